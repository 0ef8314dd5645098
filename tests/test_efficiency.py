"""Costs: formulas against torch's counter and the cache itself, and the clock against one that is set by hand."""

from types import SimpleNamespace

import families
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache

import lvlm_utils as lv
from lvlm_utils import efficiency
from lvlm_utils.attention.towers import tower_layers
from lvlm_utils.families import towers_of

PLAIN = ("llava", "vipllava", "llava_next", "llava_next_video", "video_llava", "llava_onevision", "deepseek_vl",
         "internvl", "idefics3", "smolvlm")  # fmt: skip


def counted(call) -> FlopCounterMode:
    """FLOPs of what `call` does under eager attention (torch does not count its fused attention on a CPU)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen3_vl", "idefics3"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_decoder_flops_are_those_torch_counts(family, kv_heads):
    model = families.build(family, layers=3, kv_heads=kv_heads)
    model.set_attn_implementation("eager")
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    ids = torch.randint(families.FIRST_TEXT, families.VOCABULARY, (1, 37))
    cache, found = DynamicCache(config=decoder.config), []
    for new in (ids, *torch.randint(families.FIRST_TEXT, families.VOCABULARY, (4, 1, 1))):
        call = lambda new=new: head(decoder(input_ids=new, past_key_values=cache).last_hidden_state[:, -1:])  # noqa: E731
        found.append(counted(call).get_total_flops())
    assert efficiency.decoder_flops(model.config, 37, new_tokens=5) == {"prefill": found[0], "decode": sum(found[1:])}
    assert efficiency.decoder_flops(decoder.config, [37] * 3)["decode"] == 0

    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert efficiency.cache_bytes(model.config, 37, new_tokens=5, dtype=torch.float32) == stored


def test_costs_of_a_pruned_prompt_are_sums_over_layers():
    config = families.build("llava", layers=4).config
    short, long = (efficiency.decoder_flops(config, n, 6) for n in (10, 40))
    mixed = efficiency.decoder_flops(config, [40, 40, 40, 10], 6)
    for part in ("prefill", "decode"):
        assert 4 * (long[part] - mixed[part]) == long[part] - short[part] > 0
    assert efficiency.decoder_flops(config, torch.tensor([40]).numpy()[0], 6) == long  # numpy's numbers too
    assert efficiency.cache_bytes(config, [10.5] * 4) == efficiency.cache_bytes(config, [10, 11, 10, 11])
    saved = efficiency.cache_bytes(config, 40) - efficiency.cache_bytes(config, iter([40, 40, 10, 10]))
    assert saved == 2 * 2 * 30 * 2 * 16 * 2  # layers, keys and values, tokens, heads, width, bytes


def test_the_published_size_of_the_cache_of_llava_7b():
    """512 KiB a token: 32 layers, keys and values, 32 heads of 128, two bytes."""
    config = AutoConfig.for_model("llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    assert efficiency.cache_bytes(config, 1000) == 1000 * 512 * 1024
    parameters = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    pairs = 32 * 4 * 4096
    wanted = 2 * parameters * 700 + pairs * 700**2 + 2 * 4096 * 32000
    assert efficiency.decoder_flops(config, 700)["prefill"] == wanted


@pytest.mark.parametrize("family", PLAIN)
def test_tower_flops_are_those_torch_counts(family):
    model = families.build(family)
    model.set_attn_implementation("eager")
    inputs = families.inputs(model, batch=2, padded=False)
    pictures = inputs["pixel_values"].flatten(0, -4).shape[0]
    found = counted(lambda: model(**inputs, logits_to_keep=1)).get_total_flops()
    decoder = efficiency.decoder_flops(model.config, inputs["input_ids"].shape[1])["prefill"]
    assert sum(efficiency.tower_flops(model.config, pictures).values()) == found - 2 * decoder


def test_tower_flops_where_a_method_lets_the_tower_see_less():
    """Downsample needs no products of its own, so torch counts the model alone; ToMe's are those of its metric."""
    model = families.build("llava")
    model.set_attn_implementation("eager")
    inputs = families.inputs(model, batch=1, padded=False)
    seen = []

    def note(_, args, kwargs) -> None:
        seen.append((*args, *kwargs.values())[0].shape[1])

    layers = tower_layers(towers_of(model)["vision"])
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    found = {}
    for method in ("downsample", "tome"):
        seen.clear()
        with lv.prune(model, method, keep=4) as trace:
            found[method] = counted(lambda: model(**inputs, logits_to_keep=1)).get_total_flops()
        found[method] -= efficiency.decoder_flops(model.config, trace.tokens_per_layer)["prefill"]
        found[method] -= sum(efficiency.tower_flops(model.config, 1, seen).values())
    for hook in hooks:
        hook.remove()
    assert seen[0] == 17 and seen[-1] < seen[0]
    assert found["downsample"] == 0 < found["tome"]
    with pytest.raises(ValueError, match="2 lengths, the tower 3 layers"):
        efficiency.tower_flops(model.config, 1, [17, 17])


@pytest.mark.parametrize("family", sorted(set(families.FAMILY_NAMES) - set(PLAIN)))
def test_a_tower_without_a_formula_says_so(family):
    with pytest.raises(ValueError, match=f"'{family}' has windows.*FlopCounterMode"):
        efficiency.tower_flops(families.build(family, layers=1).config)


def llava(**vision):
    """A tiny LLaVA with a DINOv2 tower, as it comes from other makers of parts than CLIP."""
    tower = AutoConfig.for_model("dinov2", hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28,
                                 patch_size=7, mlp_ratio=2, **vision)  # fmt: skip
    text = AutoConfig.for_model("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                num_attention_heads=4)  # fmt: skip
    config = AutoConfig.for_model("llava", vision_config=tower, text_config=text, image_token_index=5)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()


def test_a_tower_of_another_maker_is_counted_or_refused():
    model, ids = llava(), torch.full((1, 20), 9)
    ids[0, 1:17] = 5
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28)}
    found = counted(lambda: model(**inputs, logits_to_keep=1)).get_total_flops()
    wanted = sum(efficiency.tower_flops(model.config).values())
    assert wanted == found - efficiency.decoder_flops(model.config, 20)["prefill"]
    model.config.vision_config.use_swiglu_ffn = True
    pixtral = llava().config
    pixtral.vision_config = AutoConfig.for_model("pixtral")
    for config in (model.config, pixtral):
        with pytest.raises(ValueError, match="'llava' has windows.*layers of its own.*FlopCounterMode"):
            efficiency.tower_flops(config)



def test_wrong_numbers_are_refused(tiny, image):
    config = tiny.model.config
    with pytest.raises(ValueError, match="3 lengths, the model 4 layers"):
        efficiency.decoder_flops(config, [5, 5, 5])
    with pytest.raises(ValueError, match="new_tokens=0"):
        efficiency.cache_bytes(config, 5, new_tokens=0)
    with pytest.raises(ValueError, match="new_tokens=1"):
        efficiency.measure(tiny, lv.prompt(tiny, image, "", "Is it?"), new_tokens=1)
    with pytest.raises(ValueError, match="mixture of experts"):
        efficiency.decoder_flops(AutoConfig.for_model("mixtral"), 5)


def test_prefill_and_decode_are_timed_apart(tiny, image, monkeypatch):
    """On a clock that only the decoder moves: 5 seconds for a prompt, 2 for a new token, more in the first runs."""
    now, calls = [0.0], []
    monkeypatch.setattr(efficiency, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work(module, args, kwargs):
        now[0] += (5 if kwargs["inputs_embeds"].shape[1] > 1 else 2) + 10 * (len(calls) < 12)
        calls.append(torch.ones(5_000_000).numel())

    prompt = lv.prompt(tiny, [image, image], "Some words.", ["Is it?", "Is the dog in the image?"])
    handle = tiny.decoder.register_forward_pre_hook(work, with_kwargs=True)
    try:
        table = efficiency.measure(tiny, prompt, new_tokens=6, repeats=2)
    finally:
        handle.remove()
    assert len(calls) == 4 * 6  # two repeats behind two runs that are not timed, whatever the model would say
    assert table["ttft"].tolist() == [5, 5] and table["tpot"].tolist() == [2, 2]
    assert (table["peak_memory"].isna() | (table["peak_memory"] > 18e6)).all()


def test_a_bare_model_is_timed_by_its_own_generate():
    """Exactly as many tokens as asked for, whatever the model would say; inside lv.prune the pruned model."""
    model = families.build("llava").train()
    model.generation_config.num_beams, model.generation_config.prefill_chunk_size = 3, 4
    inputs = families.inputs(model, batch=2, padded=False)
    steps = []
    hook = model.get_decoder().register_forward_hook(lambda *_: steps.append(1))
    with lv.prune(model, "random", keep=4) as trace:
        table = efficiency.measure(model, inputs, new_tokens=3, repeats=2)
    hook.remove()
    assert model.training and len(steps) == 4 * 3 and len(table) == 2 and table[["ttft", "tpot"]].min(axis=None) > 0
    assert trace.mean_visual == 4


def test_peak_memory_sees_what_was_freed_again():
    cpu = torch.device("cpu")
    for _ in range(2):  # what the first one leaves free does not hide the second
        held = [torch.ones(500, 1000 + n) for n in range(20)]
        del held[::2]  # holes in the heap
        result, small = efficiency.peak_memory(lambda: 7, cpu)
        _, large = efficiency.peak_memory(lambda: [torch.ones(500, 900 + n) for n in range(40)] and None, cpu)
        assert result == 7
        if large == large:  # NaN where the system does not tell
            assert small < 10e6 < 68e6 < large < 100e6
