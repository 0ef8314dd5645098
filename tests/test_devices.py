"""Models on several devices: every method, observe, information_flow and answer with a part of the model on a second.

The second device is pretended, so that it can be had anywhere: its tensors say that they are on "meta", have their
values in the memory of the CPU, and fail as on a GPU where an operation is given tensors of both. Accelerate's own
hooks move what goes into a module, as they do under device_map="auto".
"""

import functools
from contextlib import contextmanager, nullcontext

import pandas as pd
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from PIL import Image
from processors import lvlm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import lvlm_utils as lv

METHODS = sorted(lv.methods.METHODS)
OPTIONS = {"context": {"drop": 0.3, "layers": range(2)}, "spatten": {"drop": 0.5}, "ltp": {"theta": 2.0}}
SPLITS = ("two layers", "the tower", "everything")  # what is on the second device

FAR, CPU = torch.device("meta"), torch.device("cpu")
MOVES = {"aten::to", "aten::_to_copy", "aten::copy_"}
SHAPES = {"aten::expand_as", "aten::view_as", "aten::reshape_as"}
BY_INDEX = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
NUMBERS = {torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__}


# A second device ------------------------------------------------------------------------------------------------------
class Far(torch.Tensor):
    """A tensor that says it is on the second device; `near` has its values."""

    @staticmethod
    def __new__(cls, near):
        with torch.inference_mode(False):  # so that it may become a view of a weight
            far = torch.Tensor._make_wrapper_subclass(
                cls, near.shape, near.stride(), near.storage_offset(), dtype=near.dtype, device=FAR,
                requires_grad=near.requires_grad,
            )  # fmt: skip
        far.near = near
        return far

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == torch.Tensor.is_meta.__get__:
            return False  # it has values
        with torch._C.DisableTorchFunctionSubclass():
            return function(args[0].cpu()) if function in NUMBERS else function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


@functools.cache
def about(function):
    """Name of an operation, names of its arguments, and whether it changes its first one."""
    schema = function._schema
    return schema.name, [one.name for one in schema.arguments], schema.is_mutable and schema.name.endswith("_")


def run(function, args, kwargs):
    """One operation, on the values; its results are where its tensors are, or where it was told to put them."""
    name, names, in_place = about(function)
    # Of its arguments neither indices nor what only lends its shape has to be on the device of the others.
    given = args[:1] + args[2:] if name in BY_INDEX else args[:1] if name in SHAPES else (*args, *kwargs.values())
    tensors = tensors_of(given)
    far = any(isinstance(one, Far) for one in tensors)
    if far and name not in MOVES and not all(isinstance(one, Far) or one.dim() == 0 for one in tensors):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device.")
    if not far and name in BY_INDEX and any(isinstance(one, Far) for one in args[1]):
        raise RuntimeError(f"{name}: indices should be on the CPU or on the device of the indexed tensor.")
    if "device" in names and (device := kwargs.get("device", dict(zip(names, args)).get("device"))) is not None:
        far, args, kwargs = torch.device(device) == FAR, (), {**dict(zip(names, args)), **kwargs, "device": CPU}
    out = function(*map(near, args), **{key: near(value) for key, value in kwargs.items()})
    if in_place:
        return args[0]
    return tree_map(lambda one: Far(one) if isinstance(one, torch.Tensor) else one, out) if far else out


def tensors_of(given):
    many = [one if isinstance(one, list | tuple) else [one] for one in given]
    return [one for several in many for one in several if isinstance(one, torch.Tensor)]


def near(one):
    """The values of what is on the second device."""
    if isinstance(one, list | tuple):
        return [near(each) for each in one]
    return one.near if isinstance(one, Far) else one


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Move(AlignDevicesHook):
    def init_hook(self, module):  # its weights are there already
        return module


@contextmanager
def two_devices(model, split, monkeypatch):
    """A part of the model is on the second device while this is open."""
    base, decoder = model.base_model, model.get_decoder()
    towers = [child for child in base.children() if child is not decoder]
    rest = [child for child in decoder.children() if child is not decoder.layers]
    modules = [*towers, *decoder.layers, *rest, model.get_output_embeddings()]
    far = {
        "two layers": decoder.layers[1:3],  # methods choose before these, in them and after them
        "the tower": towers[:1],
        "everything": modules,
    }[split]
    for name in ("autocast", "is_autocast_enabled"):  # which does not know the second device
        known = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda kind, *a, f=known, **kw: f("cpu" if kind == "meta" else kind, *a, **kw))
    tensor = torch.tensor  # makes nothing of numbers on "meta"
    monkeypatch.setattr(torch, "tensor", lambda data, device=None, **kw: tensor(near(data), **kw).to(device or CPU))
    weights = [
        (held, name, value)
        for part in (far if split != "everything" else [model]) for module in part.modules()
        for held in (module._parameters, module._buffers) for name, value in held.items() if value is not None
    ]  # fmt: skip
    try:
        for held, name, value in weights:
            there = Far(value.detach())
            held[name] = torch.nn.Parameter(there) if isinstance(value, torch.nn.Parameter) else there
        for module in modules:
            add_hook_to_module(module, Move(FAR if module in far else CPU, skip_keys="past_key_values"))
        whole = FAR if split == "everything" else CPU
        add_hook_to_module(model, Move(whole, io_same_device=True, skip_keys="past_key_values"))
        with Operations():
            yield
    finally:
        monkeypatch.undo()
        for held, name, value in weights:
            held[name] = value
        for module in (*modules, model):
            remove_hook_from_module(module)


# The tests ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["llava", "qwen3_vl"])
def model(request):
    return lvlm(request.param)


@pytest.fixture(scope="module")
def llava():
    return lvlm("llava")


def prompt(model):
    """Two prompts of unequal pictures and text."""
    images = [Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 9), Image.new("RGB", (40, 70), "red")]
    context = ["The room is quiet and the light falls on the floor.", "Two books lie on the table."]
    return lv.prompt(model, images, context, ["Is the couch in the image?", "What do you see?"])


def everywhere(model, split, monkeypatch, run):
    """What `run` gives on one device, and on two."""
    found = []
    for where in (nullcontext(), two_devices(model.model, split, monkeypatch)):
        with where:
            found.append([one.cpu() if isinstance(one, torch.Tensor) else one for one in run(model, prompt(model))])
    return found


def test_an_operation_on_tensors_of_two_devices_fails(monkeypatch):
    here = torch.arange(4.0)
    with Operations():
        there = here.to(FAR)
        assert there.device == FAR and there.tolist() == here.tolist()
        assert (there + 1).device == FAR and (there * torch.tensor(2)).cpu().tolist() == [0, 2, 4, 6]
        assert there[torch.tensor([1, 3])].tolist() == [1, 3] and torch.zeros(2, device=FAR).device == FAR
        for wrong in ("there + here", "here[there > 1]", "here + there.sum()", "torch.cat([here, there])"):
            with pytest.raises(RuntimeError, match="device"):
                eval(wrong)


@pytest.mark.parametrize("split", SPLITS)
def test_observe(model, split, monkeypatch):
    def run(model, prompt):
        with lv.observe(model, prompt.groups) as seen, torch.no_grad():
            logits = model.model(**prompt.inputs).logits
        tower = next(iter(seen.towers.values()))
        return logits, seen.received, seen.last, seen.groups, seen.entropy, seen.variance, tower.received

    for one, two in zip(*everywhere(model, split, monkeypatch, run), strict=True):
        torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("split", SPLITS)
def test_information_flow(model, split, monkeypatch):
    def run(model, prompt):
        flow = lv.information_flow(model, prompt, target=40)
        return flow.groups, flow.loss

    for one, two in zip(*everywhere(model, split, monkeypatch, run), strict=True):
        torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", METHODS)
def test_methods_in_generate(name, llava, split, monkeypatch):
    def run(model, prompt):
        with lv.prune(model, name, **OPTIONS.get(name, {"keep": 8})) as trace:
            text = lv.generate(model, prompt, max_new_tokens=2)
        return trace.kept, text

    (kept, text), (kept_on_two, text_on_two) = everywhere(llava, split, monkeypatch, run)
    assert torch.equal(kept_on_two, kept) and text_on_two == text
    assert not kept[-1].equal(kept[0]) or not kept[0].all()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("share", [False, True])
def test_answers(llava, split, share, monkeypatch):
    rows = [(c, f"Is the {w} in it?") for c in ("", "The room is quiet.") for w in ("couch", "dog")]
    samples = pd.DataFrame([
        {"sample": str(i), "image": Image.new("RGB", (90, 70)), "context": c, "question": q}
        for i, (c, q) in enumerate(rows)
    ])  # fmt: skip

    def run(model, prompt):
        return [lv.answer(model, samples, share=share, max_new_tokens=3, progress=False)["margin"].tolist()]

    one, two = everywhere(llava, split, monkeypatch, run)
    assert two[0] == pytest.approx(one[0], abs=1e-4)
