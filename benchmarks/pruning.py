"""lv.prune beside the same model without it: what idle hooks cost, how much of the ideal speed-up comes, decode steps.

    python benchmarks/pruning.py                        # a random LLaVA whose matrix products dominate
    python benchmarks/pruning.py --device cuda --dtype bfloat16 --width 4096 --layers 32 --heads 32

Prefill: 80% of the prompt is visual. The ways take turns in one process; a repeat is compared with its own "plain".
- idle: a method that looks at every token and drops none.
- half: every second visual token is dropped before layer 2; the ideal is the ratio of FLOPs (lvlm_utils.efficiency).
- fastv: the same number, chosen by FastV, whose attention row is made too.
Decode, in a second model of 32 layers: steps of lv.prune that dropped half of the visual tokens before layer 0, beside
steps of the plain model on a prompt without these tokens: the same cache, so that the difference is the engine.
Prints a table and writes benchmarks/pruning.json.
"""

import argparse
import statistics
from dataclasses import dataclass

import torch
from common import THIN, arguments, lvlm, machine, prompt, ratio, seconds, spread, write

import lvlm_utils as lv
from lvlm_utils.efficiency import decoder_flops
from lvlm_utils.methods import Method
from lvlm_utils.models import LVLM

SIDE = 32
VISUAL = SIDE**2  # patches of the picture
TEXT = VISUAL // 4  # so that 80% of the prompt is visual
TOWER = {**THIN, "image_size": THIN["patch_size"] * SIDE}


def main() -> None:
    parser = arguments(__doc__, __file__, repeats=7, width=1024, heads=16, layers=8)
    parser.add_argument("--deep", type=int, default=32, help="layers of the model whose decode steps are timed")
    parser.add_argument("--steps", type=int, default=20, help="decode steps a repeat")
    parser.add_argument("--attention", default="sdpa")
    options = parser.parse_args()

    report = {
        "width": options.width, "heads": options.heads, "layers": {"prefill": options.layers, "decode": options.deep},
        "tokens": {"visual": VISUAL, "text": TEXT}, "dtype": options.dtype, "attention": options.attention,
        "repeats": options.repeats, "steps": options.steps,
        "machine": machine(options.device),
        "prefill": _prefill(options), "decode": _decode(options),
    }  # fmt: skip
    write(report, options.out)
    _show(report)


def _build(options: argparse.Namespace, layers: int) -> tuple[LVLM, dict]:
    """A model with a tower too small to matter, and the inputs of a prompt."""
    model = lvlm(options.width, options.heads, layers, TOWER, options.device, options.dtype)
    model.model.set_attn_implementation(options.attention)
    return model, dict(prompt(model, TEXT).inputs)


@dataclass
class Idle(Method):
    """Look at every token, and drop none."""

    layer: int = 2

    def choose(self, tokens):
        return tokens.alive


@dataclass
class Halve(Method):
    """Drop every second visual token."""

    layer: int = 2
    positions: str = "original"

    def choose(self, tokens):
        return ~tokens.visual | (tokens.place % 2 == 0)


@torch.inference_mode()
def _prefill(options: argparse.Namespace) -> dict:
    model, batch = _build(options, options.layers)
    ways = {"plain": None, "idle": (Idle(),), "half": (Halve(),), "fastv": ("fastv",)}
    given = {"fastv": {"keep": 0.5, "layer": 2}}
    taken, tokens = {way: [] for way in ways}, {}

    def run() -> object:
        return model.model(**batch, logits_to_keep=1)

    for repeat in range(options.repeats + 1):  # the first is to warm up
        for way, method in ways.items():
            if method is None:
                one = seconds(run, model.device)
            else:
                with lv.prune(model, *method, **given.get(way, {})) as trace:
                    one = seconds(run, model.device)
                tokens[way] = trace.tokens_per_layer
            taken[way] += [one] * (repeat > 0)
    full = decoder_flops(model.model.config, VISUAL + TEXT)["prefill"]
    facts = {way: _facts(taken[way], taken["plain"]) for way in ways}
    for way in ("half", "fastv"):
        ideal = full / decoder_flops(model.model.config, tokens[way])["prefill"]
        speedup = ratio(taken["plain"], taken[way])
        facts[way] |= {"speedup": speedup, "ideal": round(ideal, 3), "share": round(speedup / ideal, 3)}
    return facts


@torch.inference_mode()
def _decode(options: argparse.Namespace) -> dict:
    lvlm, batch = _build(options, options.deep)
    model, ids = lvlm.model, batch["input_ids"]
    stay = (ids != lvlm.image_token_id) | (torch.arange(ids.shape[1], device=ids.device) % 2 == 0)
    short = {"inputs_embeds": model.get_input_embeddings()(ids)[:, stay[0]]}
    taken = {"plain": [], "pruned": []}

    def steps(prompt: dict) -> float:
        out = model(**prompt, use_cache=True, logits_to_keep=1)
        each = []
        for _ in range(options.steps):
            step = {"input_ids": out.logits[:, -1:].argmax(-1), "past_key_values": out.past_key_values}
            each.append(seconds(lambda step=step: model(**step), model.device))
        return statistics.median(each)

    for repeat in range(options.repeats + 1):
        one = {"plain": steps(short)}
        with lv.prune(lvlm, Halve(layer=0, positions="contiguous")) as trace:
            one["pruned"] = steps(batch)
        assert trace.tokens_per_layer == [stay.sum().item()] * options.deep
        for way in taken:
            taken[way] += [one[way]] * (repeat > 0)
    return {way: _facts(taken[way], taken["plain"]) for way in taken}


def _facts(taken: list[float], plain: list[float]) -> dict:
    """The spread of the seconds, and the median over the repeats of what is more than in the plain model."""
    return {**spread(taken), "more_than_plain": round(ratio(taken, plain) - 1, 4)}


def _show(report: dict) -> None:
    print(f"width {report['width']}, {VISUAL} visual and {TEXT} other tokens, {report['repeats']} repeats")
    for part, layers in report["layers"].items():
        print(f"{part} ({layers} layers)   seconds  (min to max)      against plain")
        for way, facts in report[part].items():
            between = f"({facts['seconds_min']:.4f} to {facts['seconds_max']:.4f})"
            line = f"  {way:10}{facts['seconds_median']:12.4f}  {between:20}{facts['more_than_plain']:+8.1%}"
            if "ideal" in facts:
                line += f"  {facts['speedup']}x of ideally {facts['ideal']}x: {facts['share']:.0%}"
            print(line)


if __name__ == "__main__":
    main()
