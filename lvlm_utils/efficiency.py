"""What an answer costs: FLOPs and cache bytes from a config, and measured seconds to the first and every further token.

FLOPs are those of matrix products and convolutions, two per multiplication and addition, as torch.utils.flop_counter
counts them. Norms, activations, rotary embeddings and softmax are left out. Attention counts all pairs of tokens,
also those that the causal mask hides, because most formulas in papers do: halve that term for a kernel that skips them.
"""

import ctypes
import gc
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import pandas as pd
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedConfig, PreTrainedModel

from lvlm_utils.families import PLAIN_TOWERS, find_family, registers_of
from lvlm_utils.models import LVLM, evaluating
from lvlm_utils.prompts import Prompt, generate, greedy_options

T = TypeVar("T")


def decoder_flops(config: PreTrainedConfig, tokens: int | Iterable[float], new_tokens: int = 1) -> dict[str, int]:
    """FLOPs of the language model for one prompt: {"prefill", "decode"}; output layer included, for new tokens only.

    `config` is that of the whole model or of its language model. `tokens` is the length of the prompt, or one length
    per layer under pruning: the trace's `tokens_per_layer` (where that is a mean over prompts, attention is counted as
    if all had the mean length). The prefill gives the first new token, so that there are `new_tokens` - 1 decode steps.
    ValueError for a wrong number of layers, and for a mixture of experts.
    """
    text = config.get_text_config()
    if getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None):
        raise ValueError("The FLOPs of a mixture of experts depend on the routing: count them on a run.")
    hidden, heads = text.hidden_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or hidden // heads
    projections = 2 * hidden * head * (heads + text.num_key_value_heads)  # q and o, k and v
    per_token = 2 * (projections + 3 * hidden * text.intermediate_size)
    per_pair = 2 * 2 * heads * head  # scores, and the weighted sum of values
    out = 2 * hidden * text.vocab_size
    lengths = _lengths(text, tokens, new_tokens)
    steps = new_tokens - 1
    past = sum(steps * n + steps * (steps + 1) // 2 for n in lengths)  # step i sees n + i keys, itself among them
    prefill = round(sum(per_token * n + per_pair * n * n for n in lengths)) + out
    return {"prefill": prefill, "decode": steps * (len(lengths) * per_token + out) + round(per_pair * past)}


def tower_flops(config: PreTrainedConfig, pictures: int = 1, tokens: Iterable[float] | None = None) -> dict[str, int]:
    """FLOPs of the plain vision transformer and the projector of a model: {"tower", "projector"}.

    `pictures` counts what the tower sees as one picture: images, tiles, frames. Every tile is encoded, those of padding
    too. All layers count, because transformers runs all of them, whichever layer's features are used. `tokens` are
    those of one picture in each layer, [CLS] too, where a method makes them fewer (tome, downsample); the projector
    sees all patches in any case. ValueError where the tower is no plain transformer over pictures of one size (Qwen-VL,
    VideoLLaMA3, DeepSeek-VL's hybrid), and for a wrong number of layers.
    """
    family, text = find_family(config.model_type, []), config.get_text_config()
    vision = config.vision_config
    if family.patches is None or vision.model_type not in PLAIN_TOWERS or getattr(vision, "use_swiglu_ffn", False):
        raise ValueError(f"The tower of {config.model_type!r} has windows, free sizes or layers of its own: "
                         "count its FLOPs on a run, with torch.utils.flop_counter.FlopCounterMode.")  # fmt: skip
    image, patch = (_side(getattr(vision, name)) for name in ("image_size", "patch_size"))
    registers = registers_of(config)
    width, patches, extra = vision.hidden_size, (image // patch) ** 2, PLAIN_TOWERS[vision.model_type] + registers
    inner = getattr(vision, "intermediate_size", None) or width * vision.mlp_ratio  # DINOv2 gives the latter
    lengths = [patches + extra] * vision.num_hidden_layers if tokens is None else list(tokens)
    if len(lengths) != vision.num_hidden_layers:
        raise ValueError(f"tokens has {len(lengths)} lengths, the tower {vision.num_hidden_layers} layers: one each.")
    per_token = 2 * (4 * width**2 + 2 * width * inner)
    layers = sum(per_token * n + 4 * width * n * n for n in lengths)
    embedding = 2 * (lengths[0] - extra) * vision.num_channels * patch**2 * width
    merged = family.patches if isinstance(family.patches, int) else family.patches(config)
    used = getattr(config, "vision_feature_layers", None) or getattr(config, "vision_feature_layer", -1)
    features = width * merged * (len(used) if isinstance(used, list | tuple) else 1)
    linear = features * text.hidden_size + (family.linears - 1) * text.hidden_size**2
    projector = pictures * 2 * ((patches + registers) // merged) * linear
    return {"tower": round(pictures * (layers + embedding)), "projector": projector}


def cache_bytes(
    config: PreTrainedConfig, tokens: int | Iterable[float], new_tokens: int = 1, dtype: torch.dtype = torch.float16
) -> int:
    """Bytes of the key-value cache of one prompt after `new_tokens` tokens; the last one is never stored.

    `config` and `tokens` as in `decoder_flops`.
    """
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    entries = sum(n + new_tokens - 1 for n in _lengths(text, tokens, new_tokens))
    return round(2 * text.num_key_value_heads * head * dtype.itemsize * entries)


def measure(
    lvlm: LVLM | PreTrainedModel, prompt: Prompt | dict[str, torch.Tensor], new_tokens: int = 16, repeats: int = 5
) -> pd.DataFrame:
    """Time `generate`, one row per repeat: ttft, tpot (seconds) and peak_memory (bytes).

    A bare model takes the keywords of its `generate` in place of a prompt: random weights need no processor.
    ttft is the time to the first token: tower, projector and prefill. tpot is the mean time of a decode step, the whole
    batch in one step. Exactly `new_tokens` tokens are generated, and every token waits for the device. Two runs come
    first: one to warm up, one for peak_memory (the function of that name says of what). Inside `lv.prune` the pruned
    model is timed. ValueError for fewer than two tokens.
    """
    if new_tokens < 2 or repeats < 1:
        raise ValueError(f"new_tokens={new_tokens} must be at least 2 (one is the prefill's), repeats={repeats} 1.")

    def run() -> dict[str, float]:
        clock = _Clock(lvlm.device)
        options = {"min_new_tokens": new_tokens, "logits_processor": LogitsProcessorList([clock])}
        if isinstance(prompt, Prompt):
            generate(lvlm, prompt, new_tokens, **options)
        else:
            with evaluating(lvlm):
                lvlm.generate(**prompt, **greedy_options(lvlm, new_tokens, **options))
        start, first, *_, last = clock.stamps
        return {"ttft": first - start, "tpot": (last - first) / (new_tokens - 1)}

    run()
    _, memory = peak_memory(run, lvlm.device)
    return pd.DataFrame([run() for _ in range(repeats)]).assign(peak_memory=memory)


def peak_memory(run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """(what `run` returns, the most bytes it held at once beyond what was held before).

    On CUDA the allocator's count of tensors. On a CPU the resident memory of the process, which Linux alone tells: NaN
    elsewhere. Free memory is given back first where that is possible (glibc); what stays free is used, and not counted.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        return result, torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # sets the high-water mark back to what is resident now
    except OSError:
        return run(), float("nan")
    before = _resident("VmRSS")
    result = run()
    return result, max(_resident("VmHWM") - before, 0)


class _Clock(LogitsProcessor):
    """Notes when the logits of each new token are there; the first stamp is when generation was asked for."""

    def __init__(self, device: torch.device):
        self.device, self.stamps = device, []
        self()

    def __call__(self, input_ids: torch.LongTensor | None = None, scores: torch.FloatTensor | None = None):
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.stamps.append(time.perf_counter())
        return scores


def _lengths(text: PreTrainedConfig, tokens: int | Iterable[float], new_tokens: int) -> list[float]:
    """Prompt tokens in each layer."""
    if new_tokens < 1:
        raise ValueError(f"new_tokens={new_tokens} must be at least 1: the prefill gives one.")
    lengths = list(tokens) if isinstance(tokens, Iterable) else [int(tokens)] * text.num_hidden_layers
    if len(lengths) != text.num_hidden_layers:
        raise ValueError(f"tokens has {len(lengths)} lengths, the model {text.num_hidden_layers} layers: one each.")
    return lengths


def _side(size: int | Iterable[int]) -> int:
    """Side of a square given as a number or as (height, width)."""
    return size if isinstance(size, int) else next(iter(size))


def _resident(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))
