"""Attention of the last prompt token, layer by layer."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lvlm_utils.models import LVLM
from lvlm_utils.prompts import Prompt


@contextmanager
def attention_implementation(lvlm: LVLM, name: str) -> Iterator[None]:
    """Switch the language model to attention `name` ("eager", "sdpa", ...); the old one comes back, also on errors."""
    before = lvlm.attention
    lvlm.model.set_attn_implementation({"text_config": name})
    try:
        yield
    finally:
        lvlm.model.set_attn_implementation({"text_config": before})


@torch.inference_mode()
def last_attention(lvlm: LVLM, prompt: Prompt) -> torch.Tensor:
    """Attention of the last prompt token on every token, float32 (layers, batch, heads, tokens); rows sum to 1.

    All tokens but the last run with the model's own attention; only the last query runs eagerly and returns its
    weights, so memory is linear in the prompt's length. Left padding gets exactly 0.
    """
    inputs = dict(prompt.inputs)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    prefix = lvlm.model(
        input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], use_cache=True,
        logits_to_keep=1, **inputs,
    )  # fmt: skip
    with attention_implementation(lvlm, "eager"):
        last = lvlm.model(
            input_ids=ids[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], use_cache=True,
            past_key_values=prefix.past_key_values, output_attentions=True,
        )  # fmt: skip
    return torch.stack([weights[:, :, 0] for weights in last.attentions]).float()
