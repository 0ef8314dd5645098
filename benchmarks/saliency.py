"""lv.information_flow beside a plain forward and backward pass and beside eager autograd: seconds, memory, equal sums.

    python benchmarks/saliency.py                        # a random LLaVA at 2k tokens; 8k without eager
    python benchmarks/saliency.py --device cuda --dtype bfloat16 --width 4096 --heads 32 --layers 32 --tokens 4096

- plain: forward and backward pass with fused attention, parameters frozen, the gradient goes down to the embeddings.
- streamed: lv.information_flow.
- eager: what one would write without it: eager attention, retain_grad on the weights, products and group sums after it.
For seconds the ways take turns in one process. For memory each runs alone in a process of its own, once at a short
length first; peak is what it holds on top of that. `extra` is the peak less that of plain; streamed can be below,
because its gradient ends at the attention of the first layer. Prints a table and writes benchmarks/saliency.json.
"""

import argparse

import torch
from common import THIN, alone, arguments, lvlm, machine, prompt, ratio, seconds, spread, write

from lvlm_utils.efficiency import peak_memory
from lvlm_utils.models import LVLM
from lvlm_utils.prompts import Prompt
from lvlm_utils.saliency import information_flow

TARGET = 40  # a token of the vocabulary
VISUAL = 576
WARM = VISUAL + 64  # tokens of the run that warms up


def main() -> None:
    parser = arguments(__doc__, __file__, repeats=5, width=512, heads=8, layers=4)
    parser.add_argument("--tokens", type=int, default=2048, help="length at which the three ways are compared")
    parser.add_argument("--long", type=int, default=8192, help="length at which eager is left out; 0: not at all")
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # "way,tokens": print the peak memory of one way and leave
    options = parser.parse_args()
    if options.alone:
        way, tokens = options.alone.split(",")
        print(_alone(options, way, int(tokens)))
        return

    lengths = {options.tokens: tuple(WAYS)}
    if options.long:
        lengths[options.long] = ("plain", "streamed")
    report = {
        "width": options.width, "heads": options.heads, "key_heads": _key_heads(options), "layers": options.layers,
        "visual_tokens": VISUAL, "dtype": options.dtype, "repeats": options.repeats,
        "machine": machine(options.device),
        "tokens": {tokens: _compare(options, tokens, ways) for tokens, ways in lengths.items()},
    }  # fmt: skip
    write(report, options.out)
    _show(report)


def _compare(options: argparse.Namespace, tokens: int, ways: tuple[str, ...]) -> dict:
    model = _build(options)
    short, whole = (prompt(model, length - VISUAL) for length in (WARM, tokens))
    taken, sums = {way: [] for way in ways}, {}

    def run(way: str) -> None:
        sums[way] = WAYS[way](model, whole)

    for way in ways:
        WAYS[way](model, short)
    for _ in range(options.repeats):
        for way in ways:
            taken[way].append(seconds(lambda way=way: run(way), model.device))
    peaks = {way: alone(__file__, options, way, tokens) for way in ways}
    facts = {
        way: {
            **spread(taken[way]), "peak_MiB": round(peaks[way] / 2**20, 1),
            "extra_MiB": round((peaks[way] - peaks["plain"]) / 2**20, 1),
        }
        for way in ways
    }  # fmt: skip
    found = {"ways": facts, "times_plain": ratio(taken["streamed"], taken["plain"])}
    if "eager" in ways:
        found["times_eager"] = ratio(taken["streamed"], taken["eager"])
        extra = peaks["eager"] - peaks["plain"]
        found["extra_of_eagers_extra"] = round((peaks["streamed"] - peaks["plain"]) / extra, 3)
        difference = (sums["streamed"] - sums["eager"]).abs().amax((2, 3)) / sums["eager"].amax((2, 3))
        found["largest_relative_difference"] = float(difference.max())
    return found


def _alone(options: argparse.Namespace, way: str, tokens: int) -> float:
    model = _build(options)
    short, whole = (prompt(model, length - VISUAL) for length in (WARM, tokens))
    WAYS[way](model, short)
    return peak_memory(lambda: WAYS[way](model, whole), model.device)[1]


def _key_heads(options: argparse.Namespace) -> int:
    return max(options.heads // 2, 1)


def _build(options: argparse.Namespace) -> LVLM:
    """Grouped queries, and no gradient of parameters."""
    made = lvlm(options.width, options.heads, options.layers, THIN, options.device, options.dtype,
                num_key_value_heads=_key_heads(options))  # fmt: skip
    made.model.requires_grad_(False)
    return made


def _loss(model: LVLM, prompt: Prompt) -> None:
    """Forward and backward pass."""

    def begin(module, args, kwargs):
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"].requires_grad_()}

    handle = model.decoder.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        logits = model.model(**prompt.inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    finally:
        handle.remove()
    (-logits.log_softmax(-1)[:, TARGET]).sum().backward()


def _streamed(model: LVLM, prompt: Prompt) -> torch.Tensor:
    return information_flow(model, prompt, TARGET).groups


def _eager(model: LVLM, prompt: Prompt) -> torch.Tensor:
    parts = prompt.groups
    masks = (parts.visual, parts.text & ~parts.context & ~parts.last, parts.context, parts.last)
    groups = torch.stack(masks, -1).float()
    weights, handles = [], []
    for layer in model.decoder.layers:

        def keep(module, args, output):
            output[1].retain_grad()
            weights.append(output[1])

        handles.append(layer.self_attn.register_forward_hook(keep))
    before = model.attention
    model.model.set_attn_implementation({"text_config": "eager"})
    try:
        _loss(model, prompt)
    finally:
        model.model.set_attn_implementation({"text_config": before})
        for handle in handles:
            handle.remove()
    sums = []
    with torch.no_grad():
        for a in weights:
            sums.append(groups.transpose(1, 2) @ (a.float() * a.grad.float()).abs().sum(1) @ groups)
    return torch.stack(sums).cpu()


WAYS = {"plain": _loss, "streamed": _streamed, "eager": _eager}


def _show(report: dict) -> None:
    print(f"{report['layers']} layers of {report['width']}, {report['heads']} heads, {report['repeats']} repeats")
    for tokens, found in report["tokens"].items():
        print(f"{tokens:>6} tokens   seconds  (min to max)         peak     extra")
        for way, facts in found["ways"].items():
            between = f"({facts['seconds_min']:.2f} to {facts['seconds_max']:.2f})"
            memory = f"{facts['peak_MiB']:8.0f}{facts['extra_MiB']:+10.0f} MiB"
            print(f"  {way:10}{facts['seconds_median']:11.2f}  {between:17}{memory}")
        line = f"  streamed takes {found['times_plain']} of plain"
        if "times_eager" in found:
            line += f", {found['times_eager']} of eager, {found['extra_of_eagers_extra']:.1%} of its extra memory; "
            line += f"sums differ by {found['largest_relative_difference']:.1e}"
        print(line)


if __name__ == "__main__":
    main()
