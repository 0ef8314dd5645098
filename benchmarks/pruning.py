"""lv.prune beside the same model without it: what idle hooks cost, how much of the ideal speed-up comes, decode steps.

    python benchmarks/pruning.py                        # a random LLaVA whose matrix products dominate
    python benchmarks/pruning.py --device cuda --dtype bfloat16 --width 4096 --layers 32 --heads 32

Prefill: 80% of the prompt is visual. The ways take turns in one process; a repeat is compared with its own "plain".
- idle: a plan that looks at every token and drops none.
- half: every second visual token is dropped before layer 2; the ideal is the ratio of FLOPs (lvlm_utils.efficiency).
- fastv: the same number, chosen by FastV, whose attention row is made too.
Decode, in a second model of 32 layers: steps of lv.prune that dropped half of the visual tokens before layer 0, beside
steps of the plain model on a prompt without these tokens: the same cache, so that the difference is the engine.
Prints a table and writes benchmarks/pruning.json.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from common import machine
from common import seconds as timed
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lvlm_utils.efficiency import decoder_flops
from lvlm_utils.pruning import Plan, prune

SIDE, VOCABULARY, IMAGE = 32, 1000, 999
VISUAL = SIDE**2  # patches of the picture
TEXT = VISUAL // 4  # so that 80% of the prompt is visual


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="hidden size of the decoder")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8, help="of the model whose prefill is timed")
    parser.add_argument("--deep", type=int, default=32, help="layers of the model whose decode steps are timed")
    parser.add_argument("--steps", type=int, default=20, help="decode steps a repeat")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()

    report = {
        "width": options.width, "heads": options.heads, "layers": {"prefill": options.layers, "decode": options.deep},
        "tokens": {"visual": VISUAL, "text": TEXT}, "dtype": options.dtype, "attention": options.attention,
        "repeats": options.repeats, "steps": options.steps,
        "machine": machine(options.device),
        "prefill": _prefill(options), "decode": _decode(options),
    }  # fmt: skip
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _show(report)


def _build(options: argparse.Namespace, layers: int) -> tuple[LlavaForConditionalGeneration, dict]:
    """A random LLaVA with a tower too small to matter, and a prompt."""
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=options.width, intermediate_size=options.width * 11 // 4,
        num_hidden_layers=layers, num_attention_heads=options.heads, max_position_embeddings=8192,
    )  # fmt: skip
    vision = CLIPVisionConfig(**tower, image_size=4 * SIDE, patch_size=4)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1,
        attn_implementation=options.attention,
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    with torch.device(options.device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()
        words = torch.randint(1, IMAGE, (TEXT,))
        ids = torch.cat([words[:9], torch.full((VISUAL,), IMAGE), words[9:]])[None]
        pixels = torch.randn(1, 3, 4 * SIDE, 4 * SIDE, dtype=dtype)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def _halve(tokens) -> torch.Tensor:
    return ~tokens.visual | (tokens.place % 2 == 0)


@torch.inference_mode()
def _prefill(options: argparse.Namespace) -> dict:
    model, batch = _build(options, options.layers)
    ways = {
        "plain": None, "idle": (Plan({2: lambda tokens: tokens.alive}), {}), "half": (Plan({2: _halve}), {}),
        "fastv": ("fastv", {"keep": 0.5, "layer": 2}),
    }  # fmt: skip
    seconds, tokens = {way: [] for way in ways}, {}
    for repeat in range(options.repeats + 1):  # the first is to warm up
        for way, plan in ways.items():
            if plan is None:
                taken = timed(lambda: model(**batch, logits_to_keep=1), model.device)
            else:
                with prune(model, plan[0], **plan[1]) as trace:
                    taken = timed(lambda: model(**batch, logits_to_keep=1), model.device)
                tokens[way] = trace.tokens_per_layer
            seconds[way] += [taken] * (repeat > 0)
    full = decoder_flops(model.config, VISUAL + TEXT)["prefill"]
    facts = {way: _facts(seconds[way], seconds["plain"]) for way in ways}
    for way in ("half", "fastv"):
        ideal = full / decoder_flops(model.config, tokens[way])["prefill"]
        speedup = statistics.median(a / b for a, b in zip(seconds["plain"], seconds[way], strict=True))
        facts[way] |= {"speedup": round(speedup, 3), "ideal": round(ideal, 3), "share": round(speedup / ideal, 3)}
    return facts


@torch.inference_mode()
def _decode(options: argparse.Namespace) -> dict:
    model, batch = _build(options, options.deep)
    ids = batch["input_ids"]
    stay = (ids != IMAGE) | (torch.arange(ids.shape[1], device=ids.device) % 2 == 0)
    short = {"inputs_embeds": model.get_input_embeddings()(ids)[:, stay[0]]}
    seconds = {"plain": [], "pruned": []}

    def steps(prompt: dict) -> float:
        out = model(**prompt, use_cache=True, logits_to_keep=1)
        taken = []
        for _ in range(options.steps):
            step = {"input_ids": out.logits[:, -1:].argmax(-1), "past_key_values": out.past_key_values}
            taken.append(timed(lambda step=step: model(**step), model.device))
        return statistics.median(taken)

    for repeat in range(options.repeats + 1):
        taken = {"plain": steps(short)}
        with prune(model, Plan({0: _halve}, "contiguous")) as trace:
            taken["pruned"] = steps(batch)
        assert trace.tokens_per_layer == [stay.sum().item()] * options.deep
        for way in seconds:
            seconds[way] += [taken[way]] * (repeat > 0)
    return {way: _facts(seconds[way], seconds["plain"]) for way in seconds}


def _facts(seconds: list[float], plain: list[float]) -> dict:
    """Median and spread of the seconds, and the median over the repeats of what is more than in the plain model."""
    more = statistics.median(a / b - 1 for a, b in zip(seconds, plain, strict=True))
    return {
        "seconds_median": round(statistics.median(seconds), 5), "seconds_min": round(min(seconds), 5),
        "seconds_max": round(max(seconds), 5), "more_than_plain": round(more, 4),
    }  # fmt: skip


def _show(report: dict) -> None:
    print(f"width {report['width']}, {VISUAL} visual and {TEXT} other tokens, {report['repeats']} repeats")
    for part, layers in report["layers"].items():
        print(f"{part} ({layers} layers)   seconds  (min to max)      against plain")
        for way, facts in report[part].items():
            spread = f"({facts['seconds_min']:.4f} to {facts['seconds_max']:.4f})"
            line = f"  {way:10}{facts['seconds_median']:12.4f}  {spread:20}{facts['more_than_plain']:+8.1%}"
            if "ideal" in facts:
                line += f"  {facts['speedup']}x of ideally {facts['ideal']}x: {facts['share']:.0%}"
            print(line)


if __name__ == "__main__":
    main()
