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
import statistics

import torch
from common import CLIP_L, alone, arguments, lvlm, machine, prompt, seconds, spread, write

import lvlm_utils as lv
from lvlm_utils.attention import STATISTICS
from lvlm_utils.efficiency import peak_memory
from lvlm_utils.models import LVLM
from lvlm_utils.prompts import Prompt

VISUAL = 576
WARM = VISUAL + 64  # tokens of the prompt that warms up
SOME = ("groups", "last")


def main() -> None:
    parser = arguments(__doc__, __file__, repeats=5, width=1024, heads=16, layers=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096], help="lengths for all four ways")
    parser.add_argument("--long", type=int, default=16384, help="length at which eager is left out; 0: not at all")
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # "way,tokens": print the peak memory of one way and leave
    options = parser.parse_args()
    if options.alone:
        way, tokens = options.alone.split(",")
        print(_alone(options, way, int(tokens)))
        return

    report = {
        "width": options.width, "heads": options.heads, "layers": options.layers, "visual_tokens": VISUAL,
        "dtype": options.dtype, "repeats": options.repeats, "statistics": {"some": SOME, "all": STATISTICS},
        "machine": machine(options.device),
        "tokens": {tokens: _compare(options, tokens, tuple(WAYS), options.repeats) for tokens in options.tokens},
    }  # fmt: skip
    if options.long:
        report["tokens"][options.long] = _compare(options, options.long, ("plain", "some", "all"), 1)
    report["largest_difference_from_eager"] = _differences(options, min(options.tokens))
    write(report, options.out)
    _show(report)


def _compare(options: argparse.Namespace, tokens: int, ways: tuple[str, ...], repeats: int) -> dict:
    model, taken = _build(options), {way: [] for way in ways}
    short, whole = (prompt(model, length - VISUAL) for length in (WARM, tokens))
    for way in ways:
        WAYS[way](model, short)
    for _ in range(repeats):
        for way in ways:
            taken[way].append(seconds(lambda way=way: WAYS[way](model, whole), model.device))
    peaks = {way: alone(__file__, options, way, tokens) for way in ways}
    found = {
        way: {
            **spread(taken[way]),
            "times_plain": [round(a / b, 3) for a, b in zip(taken[way], taken["plain"], strict=True)],
            "peak_MiB": round(peaks[way] / 2**20, 1),
            "extra_MiB": round((peaks[way] - peaks["plain"]) / 2**20, 1),
        }
        for way in ways
    }
    size = getattr(torch, options.dtype).itemsize
    weights = options.layers * options.heads * tokens**2 * size / 2**20
    result = {"ways": found, "eager_weights_MiB_by_arithmetic": round(weights)}
    if "eager" in ways:
        extra = peaks["eager"] - peaks["plain"]
        result["extra_of_eagers_extra"] = {w: round((peaks[w] - peaks["plain"]) / extra, 4) for w in ("some", "all")}
    return result


def _alone(options: argparse.Namespace, way: str, tokens: int) -> float:
    model = _build(options)
    short, whole = (prompt(model, length - VISUAL) for length in (WARM, tokens))
    WAYS[way](model, short)
    return peak_memory(lambda: WAYS[way](model, whole), model.device)[1]


def _build(options: argparse.Namespace) -> LVLM:
    tower = {**CLIP_L, "hidden_size": options.width // 2, "intermediate_size": options.width * 2,
             "num_hidden_layers": 4, "num_attention_heads": options.heads // 2}  # fmt: skip
    return lvlm(options.width, options.heads, options.layers, tower, options.device, options.dtype)


@torch.inference_mode()
def _plain(model: LVLM, prompt: Prompt, **options: bool):
    return model.model(**prompt.inputs, logits_to_keep=1, **options)


def _observed(model: LVLM, prompt: Prompt, names: tuple[str, ...], vision: bool):
    with lv.observe(model, prompt.groups, names, vision) as seen:
        _plain(model, prompt)
    return seen


def _eager(model: LVLM, prompt: Prompt) -> tuple[torch.Tensor, ...]:
    before = model.attention
    model.model.set_attn_implementation({"text_config": "eager"})
    try:
        return _plain(model, prompt, output_attentions=True).attentions
    finally:
        model.model.set_attn_implementation({"text_config": before})


WAYS = {
    "plain": _plain,
    "some": lambda model, prompt: _observed(model, prompt, SOME, vision=False),
    "all": lambda model, prompt: _observed(model, prompt, STATISTICS, vision=True),
    "eager": _eager,
}


def _differences(options: argparse.Namespace, tokens: int) -> dict[str, float]:
    """From the eager weights, absolute; of group sums relative."""
    model = _build(options)
    given = prompt(model, tokens - VISUAL)
    seen, weights = _observed(model, given, STATISTICS, vision=False), _eager(model, given)
    groups = [getattr(given.groups, name) for name in ("system", "visual", "context", "question")]
    onehot = torch.stack(groups, -1).float()
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
            between = f"({facts['seconds_min']:.2f} to {facts['seconds_max']:.2f})"
            times = statistics.median(facts["times_plain"])
            print(f"{way:8}{facts['seconds_median']:9.2f}  {between:18}{times:12.2f}{facts['peak_MiB']:10,.0f}"
                  f"{facts['extra_MiB']:11,.0f}")  # fmt: skip
        if "extra_of_eagers_extra" in result:
            shares = ", ".join(f"{way} {share:.2%}" for way, share in result["extra_of_eagers_extra"].items())
            print(f"extra memory as a share of eager's: {shares}")
    worst = ", ".join(f"{name} {error:.1e}" for name, error in report["largest_difference_from_eager"].items())
    print(f"\nlargest difference from eager: {worst}")


if __name__ == "__main__":
    main()
