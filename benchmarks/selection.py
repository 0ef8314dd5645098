"""How long visual pruning takes to choose, alone and in a whole prefill, beside what it saves.

    python benchmarks/selection.py                      # shapes of CLIP-L/14-336, decoder layers of 2048
    python benchmarks/selection.py --device cuda --dtype bfloat16 --width 4096 --layers 32 --heads 32

Alone: the pure function of each method on random tensors as the tower of LLaVA-1.5 gives them (1,024 wide, 16 heads),
576 and 2,880 patches, one picture and eight; a ninth of the tokens is kept. In a prefill: a random LLaVA with six
layers of that tower, 576 visual and 64 other tokens, each method in turn with the plain model in one process. What is
saved is the plain prefill less the pruned one; the choice comes out of that, so it is added again before its share is
taken: share = choice / (saved + choice). The share falls with the depth of the model, which the choice does not know.
Prints a table and writes benchmarks/selection.json.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from common import machine, seconds
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lvlm_utils.efficiency import decoder_flops
from lvlm_utils.pruning import METHODS, prune

WIDTH, HEADS, HIDDEN = 1024, 16, 4096  # of the tower; of the tokens that come out of the projector
TEXT, VOCABULARY, IMAGE = 64, 1000, 999
SHARE = 1 / 9  # 64 of 576
OPTIONS = {"prumerge": {}, "prumerge_plus": {}, "fastv": {"layer": 2}, "sparsevlm": {}, "pyramiddrop": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048, help="hidden size of the decoder")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    report = {
        "width": options.width, "heads": options.heads, "layers": options.layers, "dtype": options.dtype,
        "repeats": options.repeats, "keep": round(SHARE, 4), "machine": machine(options.device),
        "alone": _alone(options), "prefill": _prefill(options),
    }  # fmt: skip
    for name, facts in report["prefill"].items():
        choice = report["alone"].get(name, {}).get("576 x 1")
        if choice is not None:
            facts["choice"] = choice
            facts["share"] = round(choice / (facts["saved"] + choice), 4)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _show(report)


def _calls(patches: int, batch: int, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """The pure functions on tensors with the spread of real ones: a few patches stand out, neighbours are alike."""
    torch.manual_seed(0)
    keep = round(patches * SHARE)
    at = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    features = torch.randn(batch, patches, WIDTH, **at).cumsum(1) / patches**0.5 + torch.randn(batch, 1, WIDTH, **at)
    hidden = torch.cat([features.mean(1, keepdim=True), features], 1)
    keys = hidden.view(batch, patches + 1, HEADS, -1).transpose(1, 2)
    rows = torch.randn(batch, HEADS, patches + 1, **at).mul(2).softmax(-1)
    cls = rows[..., 1:].mean(1)
    between = torch.randn(batch, HEADS, patches, patches, **at).softmax(-1) if batch * patches < 6000 else None
    projected = torch.randn(batch, patches, HIDDEN, **at)
    text = torch.randn(batch, TEXT, HIDDEN, **at)
    rater = torch.ones(batch, TEXT, dtype=torch.bool, device=options.device)
    on_visual = torch.randn(batch, HEADS, TEXT, patches, **at).softmax(-1)
    query, heads = torch.randn(batch, 32, 128, **at), torch.randn(batch, 32, patches, 128, **at)
    use = {name: method.__dict__ for name, method in METHODS.items()}
    calls = {
        "vispruner": lambda: use["vispruner"]["select"](features, cls, keep),
        "fastervlm": lambda: use["fastervlm"]["select"](cls, keep),
        "fopru": lambda: use["fopru"]["select"](between, keep),
        "prumerge": lambda: use["prumerge"]["reduce"](features, hidden[:, 0], hidden),
        "prumerge_plus": lambda: use["prumerge"]["reduce"](features, hidden[:, 0], hidden, plus=True),
        "visionzip": lambda: use["visionzip"]["reduce"](hidden, rows, keys.mean(1), keep * 54 // 64, keep * 10 // 64),
        "tome": lambda: use["tome"]["reduce"](keys.mean(1)[:, 1:], features, patches - keep),
        "divprune": lambda: use["divprune"]["select"](projected, keep),
        "cdpruner": lambda: use["cdpruner"]["select"](projected, cls, keep),
        "fastv": lambda: use["fastv"]["select"](rows[..., 1:], keep),
        "sparsevlm": lambda: use["sparsevlm"]["select"](on_visual, use["sparsevlm"]["raters"](projected, text) | rater,
                                                        keep),
        "pyramiddrop": lambda: use["pyramiddrop"]["select"](query, heads, keep),
    }  # fmt: skip
    return {name: call for name, call in calls.items() if name != "fopru" or between is not None}


@torch.inference_mode()
def _alone(options: argparse.Namespace) -> dict:
    found: dict[str, dict] = {}
    device = torch.device(options.device)
    for patches in (576, 2880):
        for batch in (1, 8):
            for name, call in _calls(patches, batch, options).items():
                first = seconds(call, device)  # to warm up; what takes seconds is timed once
                taken = [seconds(call, device) for _ in range(options.repeats if first < 2 else 1)]
                found.setdefault(name, {})[f"{patches} x {batch}"] = round(statistics.median(taken), 5)
    return found


def _build(options: argparse.Namespace) -> tuple[LlavaForConditionalGeneration, dict]:
    """A random LLaVA with the first layers of CLIP-L/14-336, and a prompt."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=6, num_attention_heads=HEADS, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=options.width, intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers, num_attention_heads=options.heads,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    with torch.device(options.device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()
        words = torch.randint(1, IMAGE, (TEXT,))
        ids = torch.cat([words[:9], torch.full((576,), IMAGE), words[9:]])[None]
        pixels = torch.randn(1, 3, 336, 336, dtype=dtype)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@torch.inference_mode()
def _prefill(options: argparse.Namespace) -> dict:
    model, batch = _build(options)
    names = [name for name in METHODS if METHODS[name].KIND != "text"]
    taken: dict[str, list[float]] = {name: [] for name in ["plain", *names]}
    tokens = {}

    def run() -> object:
        return model(**batch, logits_to_keep=1)

    for repeat in range(options.repeats + 1):  # the first is to warm up
        taken["plain"] += [seconds(run, model.device)] * (repeat > 0)
        for name in names:
            with prune(model, name, **OPTIONS.get(name, {"keep": SHARE})) as trace:
                taken[name] += [seconds(run, model.device)] * (repeat > 0)
            tokens[name] = trace.tokens_per_layer
    full = decoder_flops(model.config, 576 + TEXT)["prefill"]
    found = {"plain": {"seconds_median": round(statistics.median(taken["plain"]), 5)}}
    for name in names:
        pairs = list(zip(taken["plain"], taken[name], strict=True))
        found[name] = {
            "seconds_median": round(statistics.median(taken[name]), 5),
            "saved": round(statistics.median(a - b for a, b in pairs), 5),
            "speedup": round(statistics.median(a / b for a, b in pairs), 3),
            "decoder_flops": round(decoder_flops(model.config, tokens[name])["prefill"] / full, 4),
            "mean_tokens": round(sum(tokens[name]) / len(tokens[name]), 1),
        }
    return found


def _show(report: dict) -> None:
    sizes = list(next(iter(report["alone"].values())))
    print("the choice alone, milliseconds" + " " * 4 + "".join(f"{size:>12}" for size in sizes))
    for name, found in report["alone"].items():
        print(f"  {name:30}" + "".join(f"{1000 * found[size]:12.2f}" if size in found else " " * 12 for size in sizes))
    print(
        f"prefill, plain {report['prefill']['plain']['seconds_median']:.3f} s     seconds   speed-up   choice / saved"
    )
    for name, facts in report["prefill"].items():
        if name != "plain":
            share = f"{facts['share']:10.1%}" if "share" in facts else ""
            print(f"  {name:28}{facts['seconds_median']:10.3f}{facts['speedup']:10.2f}x {share}")


if __name__ == "__main__":
    main()
