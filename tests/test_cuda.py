"""On a GPU: bfloat16, float16 and float32 on torch's attention kernels, every method, device maps, autocast, threads.

Skipped where there is no GPU. LVLM_TEST_DEVICE=cpu runs everything on the CPU instead, on the kernels that it has.
Figures of agreement are kept as properties of the tests, so that a report shows by how much they held.
"""

import functools
import os
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

import lvlm_utils as lv

DEVICE = os.environ.get("LVLM_TEST_DEVICE", "cuda")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs a GPU that torch can use", allow_module_level=True)

from families import FAMILY_NAMES, build  # noqa: E402
from processors import processor  # noqa: E402

METHODS = sorted(lv.methods.METHODS)
OPTIONS = {"context": {"drop": 0.3, "layers": range(2)}, "spatten": {"drop": 0.5}, "ltp": {"theta": 2.0}}
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
# What rounding leaves of a result, relative to its size (by the norm of the difference).
NEAR = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.06}
MATH, EFFICIENT, FLASH = SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION
KERNELS = [(MATH, dtype) for dtype in DTYPES] + [(FLASH, dtype) for dtype in HALF]
KERNELS += [(EFFICIENT, dtype) for dtype in DTYPES if DEVICE == "cuda"]


@pytest.fixture(autouse=True, scope="module")
def float32_is_float32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # by default convolutions round float32 to 10 bits
    yield
    torch.backends.cudnn.allow_tf32 = before


@functools.cache
def opened(dtype=torch.float32, family="llava", device=DEVICE, seed=0, kv_heads=2):
    """The same weights on every device and, rounded, in every dtype."""
    model = build(family, kv_heads=kv_heads, window=2048, seed=seed).to(device, dtype)
    return lv.load((model, processor(family)))


def picture(seed, size=(90, 70)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


TEXTS = (
    ("The room is quiet and the light falls on the floor. " * 4, "Is the couch in the image? (Please answer yes.)"),
    ("Two books lie on the table. The chair is red.", "What do you see on the left side?"),
)


def prompts(model):
    """Two prompts of unequal text and pictures, as a batch and one by one."""
    pictures, (contexts, questions) = [picture(0), picture(1, (40, 90))], zip(*TEXTS)
    alone = [lv.prompt(model, *one) for one in zip(pictures, contexts, questions)]
    return lv.prompt(model, pictures, list(contexts), list(questions)), alone


def forward(model, prompt, **options):
    with torch.no_grad():
        return model.model(**prompt.inputs, **options)


def far(found, wanted):
    """How far two tensors are apart: the norm of the difference, relative to that of what is wanted."""
    found, wanted = (one.detach().double().cpu() for one in (found, wanted))
    return float((found - wanted).norm() / wanted.norm())


def pruned(model, name):
    return lv.prune(model, name, **OPTIONS.get(name, {"keep": 8}))


# Observing ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kernel, dtype", KERNELS)
def test_statistics_are_those_of_eager_attention(kernel, dtype, record_property):
    model = opened(dtype, kv_heads=4)  # not every kernel takes fewer keys than queries
    prompt = prompts(model)[1][0]  # nor a mask, so that nothing can be padded
    with sdpa_kernel(kernel):
        plain = forward(model, prompt).logits
        with lv.observe(model, prompt.groups) as seen:
            assert torch.equal(forward(model, prompt).logits, plain)
    model.model.set_attn_implementation("eager")
    try:
        eager = forward(model, prompt, output_attentions=True)
    finally:
        model.model.set_attn_implementation("sdpa")
    weights = torch.stack(eager.attentions, 0).float()
    masks = [getattr(prompt.groups, name) for name in seen.group_names]
    onehot = torch.stack(masks, -1).float()[None, :, None]
    wanted = {
        "received": weights.sum(3), "last": weights[:, :, :, -1], "entropy": torch.special.entr(weights).sum(-1),
        "groups": onehot.mT @ weights @ onehot,
    }  # fmt: skip
    errors = {name: far(getattr(seen, name), value) for name, value in wanted.items()}
    record_property("errors", errors)
    assert max(errors.values()) < NEAR[dtype]
    assert all(getattr(seen, name).dtype == torch.float32 for name in wanted)


@pytest.mark.parametrize("dtype", HALF)
def test_rows_of_a_padded_batch_are_those_of_single_prompts(dtype, record_property):
    model = opened(dtype)
    together, alone = prompts(model)
    with lv.observe(model, together.groups) as seen:
        forward(model, together)
    errors = []
    for row, prompt in enumerate(alone):
        real = together.inputs["attention_mask"][row].bool().cpu()
        with lv.observe(model, prompt.groups) as own:
            forward(model, prompt)
        errors.append(far(seen.received[:, row][..., real], own.received[:, 0]))
        errors.append(far(seen.groups[:, row], own.groups[:, 0]))
    record_property("errors", errors)
    assert max(errors) < NEAR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_information_flow_is_that_of_eager_autograd(dtype, record_property):
    model = opened(dtype)
    prompt = prompts(model)[1][1]
    flow = lv.information_flow(model, prompt, target=40)
    layers, weights = model.decoder.layers, []

    def keep(module, args, output):
        output[1].retain_grad()
        weights.append(output[1])

    hooks = [layer.self_attn.register_forward_hook(keep) for layer in layers]
    model.model.set_attn_implementation("eager")
    try:
        logits = model.model(**prompt.inputs, use_cache=False).logits[:, -1]
        (-logits.cpu().double().log_softmax(-1)[:, 40]).sum().backward()
    finally:
        model.model.set_attn_implementation("sdpa")
        model.model.zero_grad()
        for hook in hooks:
            hook.remove()
    parts = prompt.groups
    masks = (parts.visual, parts.text & ~parts.context & ~parts.last, parts.context, parts.last)
    groups = torch.stack(masks, -1).float()
    wanted = torch.stack([groups.mT @ (a.float() * a.grad.float()).abs().sum(1) @ groups for a in weights])
    record_property("error", far(flow.groups, wanted))
    assert far(flow.groups, wanted) < 2 * NEAR[dtype]


# Pruning --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropping_nothing_changes_nothing(dtype):
    model = opened(dtype)
    prompt = prompts(model)[0]
    plain, text = forward(model, prompt, logits_to_keep=1).logits, lv.generate(model, prompt, max_new_tokens=4)
    for name, options in (("fastv", {"keep": 1.0}), ("context", {"drop": 0.0, "layers": range(2)})):
        with lv.prune(model, name, **options):
            assert torch.equal(forward(model, prompt, logits_to_keep=1).logits, plain)
            assert lv.generate(model, prompt, max_new_tokens=4) == text


def ask(model, name, prompt):
    """What was kept, bool (layers, batch, tokens), the logits of the first new token, and the text."""
    logits = []
    hook = model.model.get_output_embeddings().register_forward_hook(lambda m, a, output: logits.append(output[:, -1]))
    try:
        with pruned(model, name) as trace:
            text = lv.generate(model, prompt, max_new_tokens=3)
    finally:
        hook.remove()
    return trace.kept.cpu(), logits[0].float().cpu(), text


@functools.cache
def in_float32(name):
    model = opened(device="cpu")
    return ask(model, name, prompts(model)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", METHODS)
def test_methods_in_a_batch_alone_and_in_float32(name, dtype, record_property):
    """The same tokens stay, and where they do, logits are the same; rounding may swap tokens that are nearly equal."""
    model = opened(dtype)
    together, alone = prompts(model)
    kept, logits, _ = ask(model, name, together)
    precise, precise_logits, _ = in_float32(name)
    agreement, errors = [], []
    for row, prompt in enumerate(alone):
        real = together.inputs["attention_mask"][row].bool().cpu()
        own, own_logits, _ = ask(model, name, prompt)
        assert own[:, 0, -1].all() and not own[-1].all()
        for other, other_logits in ((own[:, 0], own_logits[0]), (precise[:, row, real], precise_logits[row])):
            agreement.append(float((kept[:, row, real] == other).double().mean()))
            if kept[:, row, real].equal(other):
                errors.append(far(logits[row], other_logits))
    record_property("agreement", agreement)
    record_property("errors", errors)
    assert min(agreement) >= (0.99 if dtype == torch.float32 else 0.85)
    assert max(errors, default=0) < 2 * NEAR[dtype]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_is_observed_and_pruned(family, record_property):
    """In bfloat16, beside float32 on the CPU."""
    found = []
    for model in (opened(torch.bfloat16, family), opened(torch.float32, family, "cpu")):
        prompt = prompts(model)[0]
        with lv.observe(model, prompt.groups) as seen:
            forward(model, prompt)
        with lv.prune(model, "fastv", keep=0.5) as trace:
            text = lv.generate(model, prompt, max_new_tokens=2)
        assert len(text) == 2 and seen.towers
        found.append((seen.groups, trace.tokens_per_layer))
    record_property("error", far(found[0][0], found[1][0]))
    assert far(found[0][0], found[1][0]) < NEAR[torch.bfloat16] and found[0][1] == found[1][1]


# Answers --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", [None, "vispruner", "fastv"])
def test_shared_and_separate_answers(method, dtype, record_property):
    model = opened(dtype)
    samples = pd.DataFrame([
        {"sample": f"{n}-{c}-{word}", "image_id": str(n), "image": image, "context": TEXTS[c][0],
         "question": f"Is the {word} in it?"}
        for n, image in enumerate((picture(0), picture(1)))
        for c in range(2) for word in ("couch", "dog", "sea")
    ])  # fmt: skip
    prune = method and lv.methods.METHODS[method](keep=8)
    tables, tokens = [], [0, 0]
    for share in (False, True):

        def count(layer, args, share=share):
            tokens[share] += args[0].shape[0] * args[0].shape[1]

        hook = model.decoder.layers[0].register_forward_pre_hook(count)
        try:
            tables.append(lv.answer(model, samples, prune=prune, share=share, max_new_tokens=3, progress=False))
        finally:
            hook.remove()
    separate, shared = (torch.tensor(table["margin"].to_numpy(float)) for table in tables)
    record_property("error", far(shared, separate))
    assert far(shared, separate) < 2 * NEAR[dtype] and separate.isfinite().all()
    assert tokens[True] < tokens[False] or method == "fastv"  # whose choice depends on the question


# Where the weights are ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = opened(device="cpu")
    model.model.save_pretrained(path)
    model.processor.save_pretrained(path)
    return path


def spread_out():
    """Layers 1 and 2 wait on the CPU (where all is there, on the disk), and come to the device when they run."""
    parts = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    parts += [f"model.language_model.{name}" for name in ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.3")]
    main = 0 if DEVICE == "cuda" else "cpu"
    aside = "cpu" if DEVICE == "cuda" else "disk"
    return dict.fromkeys(parts, main) | {f"model.language_model.layers.{n}": aside for n in (1, 2)}


@pytest.mark.parametrize("device_map", ["auto", "spread out"])
def test_a_device_map_changes_nothing(folder, device_map, record_property):
    where = spread_out() if device_map == "spread out" else device_map
    model = lv.load(folder, device_map=where, dtype=torch.float32)
    assert model.device.type == DEVICE
    whole, errors = opened(), []
    for one in (model, whole):
        assert lv.generate(one, prompts(one)[0], max_new_tokens=3)
    for name in METHODS:
        found, wanted = (ask(one, name, prompts(one)[0]) for one in (model, whole))
        assert torch.equal(found[0], wanted[0]) and found[2] == wanted[2]
        errors.append(far(found[1], wanted[1]))
    with lv.observe(model, prompts(model)[0].groups) as seen, lv.observe(whole, prompts(whole)[0].groups) as own:
        forward(model, prompts(model)[0]), forward(whole, prompts(whole)[0])
    errors.append(far(seen.received, own.received))
    flows = [lv.information_flow(one, prompts(one)[0], target=40).groups for one in (model, whole)]
    record_property("errors", [*errors, far(*flows)])
    assert max(*errors, far(*flows)) < NEAR[torch.float32]


def test_autocast(record_property):
    """A float32 model whose products are rounded: what is ours stays float32, and every method works."""
    model = opened()
    together, alone = prompts(model)
    with torch.autocast(DEVICE, torch.bfloat16):
        with lv.observe(model, together.groups) as seen:
            forward(model, together)
        flow = lv.information_flow(model, alone[0], target=40)
        for name in METHODS:
            kept, _, _ = ask(model, name, together)
            agreement = float((kept == in_float32(name)[0]).double().mean())
            record_property(name, agreement)
            assert agreement >= 0.85
    for tensor in (seen.received, seen.last, seen.groups, seen.entropy, seen.variance, flow.groups):
        assert tensor.dtype == torch.float32 and tensor.isfinite().all()
    rows = together.inputs["attention_mask"].sum(1).cpu()  # every row of weights sums to 1
    assert torch.allclose(seen.groups.sum((-1, -2)), rows[None, :, None].float(), rtol=1e-5)


def test_two_models_in_two_threads():
    """Each thread observes and prunes a model of its own, and finds what it finds alone."""
    models = [opened(seed=seed) for seed in (1, 2)]
    results = {}

    def work(model):
        found = []
        for name in ("vispruner", "fastv", "context") * 3:
            prompt = prompts(model)[0]
            with lv.observe(model, prompt.groups) as seen:
                forward(model, prompt)
            found.append((seen.received, *ask(model, name, prompt)))
        return found

    def run(number):
        try:
            results[number] = work(models[number])
        except Exception as error:
            results[number] = error

    wanted = [work(model) for model in models]
    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert not isinstance(results[number], Exception), results[number]
        for found, alone in zip(results[number], wanted[number]):
            assert all(torch.equal(*pair) for pair in zip(found[:3], alone[:3])) and found[3] == alone[3]
