"""lv.observe beside a plain forward pass and beside eager output_attentions=True: seconds and memory by prompt length.

    python benchmarks/attention.py                       # a random LLaVA at 1k, 2k and 4k tokens; 16k without eager
    python benchmarks/attention.py --device cuda --dtype bfloat16 --width 4096 --heads 32 --layers 32

- plain: a forward pass with fused attention (sdpa).
- some: the same inside lv.observe, for group sums and the last row of the decoder alone.
- all: every statistic that lv.observe knows, of the decoder and of the vision tower.
- eager: eager attention that returns its weights, as one would do without it; no statistic is computed from them.
For seconds the ways take turns in one process, after a short prompt each; `times_plain` compares each turn with its own
plain one. For memory each way runs alone in a process of its own; its peak is what it holds on top of what a short
prompt left, and `extra` is the peak less that of plain. The statistics are compared with those of the eager weights at
the shortest length. Prints a table and writes benchmarks/attention.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import machine
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import lvlm_utils as lv
from lvlm_utils.attention import STATISTICS
from lvlm_utils.efficiency import peak_memory

SIDE, VOCABULARY, IMAGE = 24, 1000, 999
WARM = SIDE**2 + 64  # tokens of the prompt that warms up
SOME = ("groups", "last")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096], help="lengths for all four ways")
    parser.add_argument("--long", type=int, default=16384, help="length at which eager is left out; 0: not at all")
    parser.add_argument("--width", type=int, default=1024, help="hidden size of the decoder")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # "way,tokens": print the peak memory of one way and leave
    options = parser.parse_args()
    if options.alone:
        way, tokens = options.alone.split(",")
        print(_alone(options, way, int(tokens)))
        return

    report = {
        "width": options.width, "heads": options.heads, "layers": options.layers, "visual_tokens": SIDE**2,
        "dtype": options.dtype, "repeats": options.repeats, "statistics": {"some": SOME, "all": STATISTICS},
        "machine": machine(options.device),
        "tokens": {tokens: _compare(options, tokens, tuple(WAYS), options.repeats) for tokens in options.tokens},
    }  # fmt: skip
    if options.long:
        report["tokens"][options.long] = _compare(options, options.long, ("plain", "some", "all"), 1)
    report["largest_difference_from_eager"] = _differences(options, min(options.tokens))
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _show(report)


def _compare(options: argparse.Namespace, tokens: int, ways: tuple[str, ...], repeats: int) -> dict:
    model, seconds = _build(options), {way: [] for way in ways}
    for way in ways:
        WAYS[way](model, WARM)
    for _ in range(repeats):
        for way in ways:
            start = time.perf_counter()
            WAYS[way](model, tokens)
            if options.device != "cpu":
                torch.accelerator.synchronize(options.device)
            seconds[way].append(time.perf_counter() - start)
    peaks = {way: _peak(options, way, tokens) for way in ways}
    found = {
        way: {
            "seconds_median": round(statistics.median(taken), 3), "seconds_min": round(min(taken), 3),
            "seconds_max": round(max(taken), 3),
            "times_plain": [round(a / b, 3) for a, b in zip(taken, seconds["plain"], strict=True)],
            "peak_MiB": round(peaks[way] / 2**20, 1),
            "extra_MiB": round((peaks[way] - peaks["plain"]) / 2**20, 1),
        }
        for way, taken in seconds.items()
    }  # fmt: skip
    size = getattr(torch, options.dtype).itemsize
    weights = options.layers * options.heads * tokens**2 * size / 2**20
    result = {"ways": found, "eager_weights_MiB_by_arithmetic": round(weights)}
    if "eager" in ways:
        extra = peaks["eager"] - peaks["plain"]
        result["extra_of_eagers_extra"] = {w: round((peaks[w] - peaks["plain"]) / extra, 4) for w in ("some", "all")}
    return result


def _peak(options: argparse.Namespace, way: str, tokens: int) -> float:
    """Bytes, measured in a new process."""
    same = ("width", "heads", "layers", "device", "dtype")
    arguments = [f"--{name}={getattr(options, name)}" for name in same] + [f"--alone={way},{tokens}"]
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return float(done.stdout)


def _alone(options: argparse.Namespace, way: str, tokens: int) -> float:
    model = _build(options)
    WAYS[way](model, WARM)
    return peak_memory(lambda: WAYS[way](model, tokens), model.device)[1]


def _build(options: argparse.Namespace) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=options.width // 2, intermediate_size=options.width * 2, num_hidden_layers=4,
        num_attention_heads=options.heads // 2, image_size=14 * SIDE, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=options.width, intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.heads,
        max_position_embeddings=2**15,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    torch.manual_seed(0)
    with torch.device(options.device):
        return LlavaForConditionalGeneration(config).to(getattr(torch, options.dtype)).eval()


def _prompt(model: LlavaForConditionalGeneration, tokens: int) -> tuple[dict, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(3, IMAGE, (1, tokens))
    place = torch.arange(tokens)[None]
    visual = (place >= 5) & (place < 5 + SIDE**2)
    question = place >= tokens - 30
    groups = {
        "system": place < 5,
        "visual": visual,
        "context": ~question & (place >= 5) & ~visual,
        "question": question,
    }
    pixels = torch.randn(1, 3, 14 * SIDE, 14 * SIDE)
    given = {"input_ids": ids.where(~visual, IMAGE), "attention_mask": torch.ones_like(ids)}
    given = {name: value.to(model.device) for name, value in given.items()}
    given |= {"pixel_values": pixels.to(model.device, model.dtype), "logits_to_keep": 1}
    return given, {name: mask.to(model.device) for name, mask in groups.items()}


@torch.inference_mode()
def _plain(model: LlavaForConditionalGeneration, tokens: int) -> None:
    model(**_prompt(model, tokens)[0])


@torch.inference_mode()
def _observed(model: LlavaForConditionalGeneration, tokens: int, names: tuple[str, ...], vision: bool):
    given, groups = _prompt(model, tokens)
    with lv.observe(model, groups, names, vision) as seen:
        model(**given)
    return seen


@torch.inference_mode()
def _eager(model: LlavaForConditionalGeneration, tokens: int) -> tuple[torch.Tensor, ...]:
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    try:
        return model(**_prompt(model, tokens)[0], output_attentions=True).attentions
    finally:
        model.set_attn_implementation({"text_config": before})


WAYS = {
    "plain": _plain,
    "some": lambda model, tokens: _observed(model, tokens, SOME, vision=False),
    "all": lambda model, tokens: _observed(model, tokens, STATISTICS, vision=True),
    "eager": _eager,
}


def _differences(options: argparse.Namespace, tokens: int) -> dict[str, float]:
    """From the eager weights, absolute; of group sums relative."""
    model = _build(options)
    seen, weights = _observed(model, tokens, STATISTICS, vision=False), _eager(model, tokens)
    onehot = torch.stack([*_prompt(model, tokens)[1].values()], -1).float()
    worst = dict.fromkeys(("received", "last", "entropy", "groups"), 0.0)
    for layer, matrix in enumerate(one.float() for one in weights):
        expected = {
            "received": matrix.sum(2), "last": matrix[:, :, -1], "entropy": torch.special.entr(matrix).sum(-1),
            "groups": onehot.mT[:, None] @ matrix @ onehot[:, None],
        }  # fmt: skip
        for name, value in expected.items():
            error = (getattr(seen, name)[layer].to(value.device) - value).abs()
            error = error / value.clamp(min=1) if name == "groups" else error
            worst[name] = max(worst[name], float(error.max()))
    return worst


def _show(report: dict) -> None:
    print(f"width {report['width']}, {report['heads']} heads, {report['layers']} layers, {report['dtype']}")
    for tokens, result in report["tokens"].items():
        print(f"\n{int(tokens):,} tokens (eager weights by arithmetic: "
              f"{result['eager_weights_MiB_by_arithmetic']:,} MiB)")  # fmt: skip
        print(f"{'':8}{'seconds':>9}  {'(min to max)':18}{'times plain':>12}{'peak MiB':>10}{'extra MiB':>11}")
        for way, facts in result["ways"].items():
            spread = f"({facts['seconds_min']:.2f} to {facts['seconds_max']:.2f})"
            times = statistics.median(facts["times_plain"])
            print(f"{way:8}{facts['seconds_median']:9.2f}  {spread:18}{times:12.2f}{facts['peak_MiB']:10,.0f}"
                  f"{facts['extra_MiB']:11,.0f}")  # fmt: skip
        if "extra_of_eagers_extra" in result:
            shares = ", ".join(f"{way} {share:.2%}" for way, share in result["extra_of_eagers_extra"].items())
            print(f"extra memory as a share of eager's: {shares}")
    worst = ", ".join(f"{name} {error:.1e}" for name, error in report["largest_difference_from_eager"].items())
    print(f"\nlargest difference from eager: {worst}")


if __name__ == "__main__":
    main()
