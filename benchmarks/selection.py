"""How long visual pruning takes to choose, alone and in a whole prefill, beside what it saves.

    python benchmarks/selection.py                      # shapes of CLIP-L/14-336, decoder layers of 2048
    python benchmarks/selection.py --device cuda --dtype bfloat16 --width 4096 --layers 32 --heads 32

Alone: the pure function of each method on random tensors as the tower of LLaVA-1.5 gives them (1,024 wide, 16 heads):
576 patches of one picture at each of SHARES, and at the middle one also 2,880 patches and eight pictures. In a prefill:
a random LLaVA with six layers of that tower, 576 visual and 64 other tokens, each method at each of SHARES in turn, and
the plain model before every seven of them, in one process. What is saved is the plain prefill less the pruned one; the
choice comes out of that, so it is added again before its share is taken: share = choice / (saved + choice). ToMe and
methods inside the LLM choose in several layers; each is counted as the first, which has the most tokens. The share
falls with the depth of the model, which the choice does not know. Prints a table and writes benchmarks/selection.json.
"""

import argparse
import statistics
from collections.abc import Callable
from importlib import import_module

import torch
from common import CLIP_L, arguments, lvlm, machine, prompt, seconds, spread, write
from transformers import PreTrainedConfig

import lvlm_utils as lv
from lvlm_utils.efficiency import decoder_flops
from lvlm_utils.methods import METHODS, fitted

WIDTH, HEADS, HIDDEN = 1024, 16, 4096  # of the tower; of the tokens that come out of the projector
TEXT = 64
SHARES = (0.25, 0.0625, 0.021)  # of the visual tokens that are kept: 144, 36 and 12 of 576; notebook 10 looks them up
MIDDLE = SHARES[1]
SIZES = ((576, 1), (576, 8), (2880, 1), (2880, 8))  # patches, pictures
LIMIT = 0.05  # of what is saved, for the choice
TOWER = 6  # layers


def main() -> None:
    options = arguments(__doc__, __file__, repeats=5, width=2048, heads=16, layers=8).parse_args()
    alone = _alone(options)
    report = {
        "width": options.width, "heads": options.heads, "layers": options.layers, "dtype": options.dtype,
        "repeats": options.repeats, "shares": SHARES, "keep": MIDDLE, "machine": machine(options.device),
        "alone": alone[MIDDLE], "prefill": _prefill(options),
    }  # fmt: skip
    for share in SHARES:
        for name, facts in report["prefill"][str(share)].items():
            choice = alone[share].get(name, {}).get("576 x 1")
            if choice is not None and "saved" in facts:
                facts["choice"] = round(choice * facts["choices"], 5)
                facts["share"] = round(facts["choice"] / (facts["saved"] + facts["choice"]), 4)
    write(report, options.out)
    _show(report)


def _calls(patches: int, batch: int, share: float, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """The pure functions on tensors with the spread of real ones: a few patches stand out, neighbours are alike."""
    torch.manual_seed(0)
    keep = round(patches * share)
    at = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    features = torch.randn(batch, patches, WIDTH, **at).cumsum(1) / patches**0.5 + torch.randn(batch, 1, WIDTH, **at)
    hidden = torch.cat([features.mean(1, keepdim=True), features], 1)
    keys = hidden.view(batch, patches + 1, HEADS, -1).transpose(1, 2)
    rows = torch.randn(batch, HEADS, patches + 1, **at).mul(2).softmax(-1)
    cls = rows[..., 1:].mean(1)
    between = torch.randn(1, HEADS, patches, patches, **at).softmax(-1).expand(batch, -1, -1, -1)  # one for all: memory
    projected = torch.randn(batch, patches, HIDDEN, **at)
    text = torch.randn(batch, TEXT, HIDDEN, **at)
    rater = torch.ones(batch, TEXT, dtype=torch.bool, device=options.device)
    on_visual = torch.randn(batch, HEADS, TEXT, patches, **at).softmax(-1)
    query, heads = torch.randn(batch, 32, 128, **at), torch.randn(batch, 32, patches, 128, **at)
    use = {name: import_module(f"lvlm_utils.methods.{name}") for name in METHODS}
    most = keep - keep * 10 // 64  # of VisionZip's tokens are dominant
    return {
        "vispruner": lambda: use["vispruner"].select(features, cls, keep),
        "fastervlm": lambda: use["fastervlm"].select(cls, keep),
        "fopru": lambda: use["fopru"].select(between, keep),
        "prumerge": lambda: use["prumerge"].reduce(features, hidden[:, 0], hidden, keep=keep - 1),
        "prumerge_plus": lambda: use["prumerge"].reduce(features, hidden[:, 0], hidden, True, keep - 1),
        "visionzip": lambda: use["visionzip"].reduce(hidden, rows, keys.mean(1), most, keep - most),
        "tome": lambda: use["tome"].reduce(keys.mean(1)[:, 1:], features, patches - keep),
        "divprune": lambda: use["divprune"].select(projected, keep),
        "cdpruner": lambda: use["cdpruner"].select(projected, cls, keep),
        "fastv": lambda: use["fastv"].select(rows[..., 1:], keep),
        "sparsevlm": lambda: use["sparsevlm"].select(
            on_visual, use["sparsevlm"].raters(projected, text) | rater, keep
        ),
        "pyramiddrop": lambda: use["pyramiddrop"].select(query, heads, keep),
    }


@torch.inference_mode()
def _alone(options: argparse.Namespace) -> dict[float, dict]:
    """Seconds by share, method and size; sizes beyond the first at the middle share only."""
    found: dict[float, dict] = {share: {} for share in SHARES}
    device = torch.device(options.device)
    for share in SHARES:
        for patches, batch in SIZES if share == MIDDLE else SIZES[:1]:
            for name, call in _calls(patches, batch, share, options).items():
                first = seconds(call, device)  # to warm up; what takes seconds is timed once
                taken = [seconds(call, device) for _ in range(options.repeats if first < 2 else 1)]
                found[share].setdefault(name, {})[f"{patches} x {batch}"] = round(statistics.median(taken), 5)
    return found


@torch.inference_mode()
def _prefill(options: argparse.Namespace) -> dict:
    """The plain prefill, and by share and method the pruned one; what a method cannot do is told in place of times."""
    tower = {**CLIP_L, "num_hidden_layers": TOWER}
    model = lvlm(options.width, options.heads, options.layers, tower, options.device, options.dtype)
    batch = prompt(model, TEXT).inputs
    names = [name for name, method in METHODS.items() if method.kind != "text"]
    taken: dict[tuple, list[tuple[float, float]]] = {}
    told: dict[tuple, dict] = {}

    def run() -> object:
        return model.model(**batch, logits_to_keep=1)

    for repeat in range(options.repeats + 1):  # the first is to warm up, at one share
        for share in SHARES if repeat else SHARES[:1]:
            for at, name in enumerate(names):
                if at % 7 == 0:  # the plain model again, as a machine does not stay as fast
                    plain = seconds(run, model.device)
                try:
                    method = fitted(model, name, keep=share)
                    with lv.prune(model, name, keep=share) as trace:
                        pair = plain, seconds(run, model.device)
                except ValueError as error:
                    told[share, name] = {"cannot": str(error)}
                    continue
                taken.setdefault((share, name), []).extend([pair] * (repeat > 0))
                choices = TOWER - 1 if name == "tome" else len(method.before())
                told[share, name] = {"choices": choices, "tokens": trace.tokens_per_layer}
    plain = {one for pairs in taken.values() for one, _ in pairs}
    found = {"plain": _two(spread(plain))}
    for (share, name), facts in told.items():
        pairs, config = taken.get((share, name), []), model.model.config
        found.setdefault(str(share), {})[name] = _facts(config, facts, pairs, min(plain))
    return found


def _two(facts: dict) -> dict:
    return {name: facts[name] for name in ("seconds_median", "seconds_min")}


def _facts(config: PreTrainedConfig, told: dict, pairs: list[tuple[float, float]], plain: float) -> dict:
    """Of one method at one share, from (plain, pruned) seconds; `of_plain` from the fastest of each.

    What else a machine does can only make a run slower, so that the fastest one says most.
    """
    if "cannot" in told:
        return told
    tokens, full = told["tokens"], decoder_flops(config, 576 + TEXT)["prefill"]
    return _two(spread([pruned for _, pruned in pairs])) | {
        "saved": round(statistics.median(a - b for a, b in pairs), 5),
        "speedup": round(statistics.median(a / b for a, b in pairs), 3),
        "of_plain": round(min(pruned for _, pruned in pairs) / plain, 4),
        "decoder_flops": round(decoder_flops(config, tokens)["prefill"] / full, 4),
        "mean_tokens": round(sum(tokens) / len(tokens), 1),
        "choices": told["choices"],
    }


def _show(report: dict) -> None:
    sizes = [f"{patches} x {batch}" for patches, batch in SIZES]
    print(f"the choice alone at {MIDDLE}, milliseconds" + " " * 4 + "".join(f"{size:>12}" for size in sizes))
    for name, found in report["alone"].items():
        print(f"  {name:38}" + "".join(f"{1000 * found[size]:12.2f}" for size in sizes))
    print("plain prefill {seconds_median:.3f} s, at best {seconds_min:.3f} s".format(**report["prefill"]["plain"]))
    for share in SHARES:
        print(f"pruned to {share:<24}     seconds  of plain, at best   choice / saved")
        for name, facts in report["prefill"][str(share)].items():
            part = f"{facts['share']:10.1%}" if "share" in facts else ""
            times = "{seconds_median:10.3f}{of_plain:17.1%}  ".format(**facts) if "saved" in facts else "    cannot"
            print(f"  {name:30}{times}{part}")
        most, name = max((facts["share"], name) for name, facts in report["prefill"][str(share)].items()
                         if "share" in facts)  # fmt: skip
        print(f"  choice below {LIMIT:.0%} of what is saved: {most < LIMIT} (most: {name}, {most:.1%})")


if __name__ == "__main__":
    main()
