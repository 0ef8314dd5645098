"""lv.information_flow beside a plain forward and backward pass and beside eager autograd: seconds, memory, equal sums.

    python benchmarks/saliency.py                        # a random LLaVA at 2k tokens; 8k without eager
    python benchmarks/saliency.py --device cuda --dtype bfloat16 --width 4096 --heads 32 --layers 32 --tokens 4096

- plain: forward and backward pass with fused attention, parameters frozen, the gradient goes down to the embeddings.
- streamed: lv.information_flow.
- eager: what one would write without it: eager attention, retain_grad on the weights, products and group sums behind.
For seconds the ways take turns in one process. For memory each runs alone in a process of its own, once at a short
length first; peak is what it holds on top of that. `extra` is the peak less that of plain; streamed can be below,
because its gradient ends at the attention of the first layer. Prints a table and writes benchmarks/saliency.json.
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
from transformers import BatchFeature, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lvlm_utils.efficiency import peak_memory
from lvlm_utils.models import LVLM
from lvlm_utils.prompts import Prompt
from lvlm_utils.saliency import information_flow
from lvlm_utils.token_groups import TokenGroups

SIDE, VOCABULARY, IMAGE, TARGET = 24, 1000, 999, 7
WARM = SIDE**2 + 64  # tokens of the run that warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="length at which the three ways are compared")
    parser.add_argument("--long", type=int, default=8192, help="length at which eager is left out; 0: not at all")
    parser.add_argument("--width", type=int, default=512, help="hidden size of the decoder")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
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

    lengths = {options.tokens: tuple(WAYS)}
    if options.long:
        lengths[options.long] = ("plain", "streamed")
    report = {
        "width": options.width, "heads": options.heads, "key_heads": _key_heads(options), "layers": options.layers,
        "visual_tokens": SIDE**2, "dtype": options.dtype, "repeats": options.repeats,
        "machine": machine(options.device),
        "tokens": {tokens: _compare(options, tokens, ways) for tokens, ways in lengths.items()},
    }  # fmt: skip
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _show(report)


def _compare(options: argparse.Namespace, tokens: int, ways: tuple[str, ...]) -> dict:
    lvlm, (prompt, short) = _build(options), (_prompt(options, length) for length in (tokens, WARM))
    seconds, sums = {way: [] for way in ways}, {}
    for way in ways:
        WAYS[way](lvlm, short)
    for _ in range(options.repeats):
        for way in ways:
            start = time.perf_counter()
            sums[way] = WAYS[way](lvlm, prompt)
            if lvlm.device.type != "cpu":
                torch.accelerator.synchronize(lvlm.device)
            seconds[way].append(time.perf_counter() - start)
    peaks = {way: _peak(options, way, tokens) for way in ways}
    facts = {
        way: {
            "seconds_median": round(statistics.median(taken), 3), "seconds_min": round(min(taken), 3),
            "seconds_max": round(max(taken), 3), "peak_MiB": round(peaks[way] / 2**20, 1),
            "extra_MiB": round((peaks[way] - peaks["plain"]) / 2**20, 1),
        }
        for way, taken in seconds.items()
    }  # fmt: skip
    found = {"ways": facts, "times_plain": _ratio(seconds, "streamed", "plain")}
    if "eager" in ways:
        found["times_eager"] = _ratio(seconds, "streamed", "eager")
        extra = peaks["eager"] - peaks["plain"]
        found["extra_of_eagers_extra"] = round((peaks["streamed"] - peaks["plain"]) / extra, 3)
        difference = (sums["streamed"] - sums["eager"]).abs().amax((2, 3)) / sums["eager"].amax((2, 3))
        found["largest_relative_difference"] = float(difference.max())
    return found


def _ratio(seconds: dict[str, list[float]], way: str, other: str) -> float:
    """Median over the repeats, each compared with its own."""
    return round(statistics.median(a / b for a, b in zip(seconds[way], seconds[other], strict=True)), 3)


def _peak(options: argparse.Namespace, way: str, tokens: int) -> float:
    """Bytes, measured in a new process."""
    same = ("width", "heads", "layers", "device", "dtype")
    arguments = [f"--{name}={getattr(options, name)}" for name in same] + [f"--alone={way},{tokens}"]
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return float(done.stdout)


def _alone(options: argparse.Namespace, way: str, tokens: int) -> float:
    lvlm = _build(options)
    WAYS[way](lvlm, _prompt(options, WARM))
    prompt = _prompt(options, tokens)
    return peak_memory(lambda: WAYS[way](lvlm, prompt), lvlm.device)[1]


def _key_heads(options: argparse.Namespace) -> int:
    return max(options.heads // 2, 1)


def _build(options: argparse.Namespace) -> LVLM:
    """A random LLaVA with a tower too small to matter, grouped queries, and no processor."""
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=options.width, intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=_key_heads(options),
        max_position_embeddings=2**17,
    )  # fmt: skip
    vision = CLIPVisionConfig(**tower, image_size=4 * SIDE, patch_size=4)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
    torch.manual_seed(0)
    with torch.device(options.device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=getattr(torch, options.dtype)).eval()
        for parameter in model.get_decoder().layers.parameters():  # so that attention is not flat
            parameter.data.mul_(3 if parameter.dim() == 2 else 1)
    return LVLM(model.requires_grad_(False), None, "random", "", 2**17, IMAGE)


def _prompt(options: argparse.Namespace, tokens: int) -> Prompt:
    """Some words, a picture, a context and a question of 16 tokens, made by hand."""
    with torch.device(options.device):
        torch.manual_seed(0)
        ids = torch.randint(1, IMAGE, (1, tokens))
        place = torch.arange(tokens)[None]
        visual, question = (place >= 9) & (place < 9 + SIDE**2), place >= tokens - 16
        ids[visual] = IMAGE
        pixels = torch.randn(1, 3, 4 * SIDE, 4 * SIDE, dtype=getattr(torch, options.dtype))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        last, none = place == tokens - 1, torch.full_like(ids, -1)
        context = ~visual & ~question & (place >= 9)
        groups = TokenGroups(place < 9, visual, context, question, ~visual, last, last, none, none, none, none)
    return Prompt(BatchFeature(inputs), "", groups)


def _loss(lvlm: LVLM, prompt: Prompt) -> None:
    """Forward and backward pass."""

    def begin(module, args, kwargs):
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"].requires_grad_()}

    handle = lvlm.decoder.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        logits = lvlm.model(**prompt.inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    finally:
        handle.remove()
    (-logits.log_softmax(-1)[:, TARGET]).sum().backward()


def _streamed(lvlm: LVLM, prompt: Prompt) -> torch.Tensor:
    return information_flow(lvlm, prompt, TARGET).groups


def _eager(lvlm: LVLM, prompt: Prompt) -> torch.Tensor:
    parts = prompt.groups
    masks = (parts.visual, parts.text & ~parts.context & ~parts.last, parts.context, parts.last)
    groups = torch.stack(masks, -1).float()
    weights, handles = [], []
    for layer in lvlm.decoder.layers:

        def keep(module, args, output):
            output[1].retain_grad()
            weights.append(output[1])

        handles.append(layer.self_attn.register_forward_hook(keep))
    before = lvlm.attention
    lvlm.model.set_attn_implementation({"text_config": "eager"})
    try:
        _loss(lvlm, prompt)
    finally:
        lvlm.model.set_attn_implementation({"text_config": before})
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
            spread = f"({facts['seconds_min']:.2f} to {facts['seconds_max']:.2f})"
            memory = f"{facts['peak_MiB']:8.0f}{facts['extra_MiB']:+10.0f} MiB"
            print(f"  {way:10}{facts['seconds_median']:11.2f}  {spread:17}{memory}")
        line = f"  streamed takes {found['times_plain']} of plain"
        if "times_eager" in found:
            line += f", {found['times_eager']} of eager, {found['extra_of_eagers_extra']:.1%} of its extra memory; "
            line += f"sums differ by {found['largest_relative_difference']:.1e}"
        print(line)


if __name__ == "__main__":
    main()
