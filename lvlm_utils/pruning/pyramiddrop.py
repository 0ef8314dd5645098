"""PyramidDrop (Xing et al., CVPR 2025): drop visual tokens in stages, by the attention the next layer would pay.

Matches the official code (Cooperx521/PyramidDrop, 6444f30): behind 8, 16 and 24 of 32 layers the tokens are ranked by
the attention of the last prompt token, with query and key of the layer that comes next, and 1/2, 1/4 and 1/8 of all
visual tokens go on. Positions are numbered anew.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lvlm_utils.families import decoder_of
from lvlm_utils.models import LVLM, bare
from lvlm_utils.pruning.budget import check_keep, kept
from lvlm_utils.pruning.ranking import at_start, depths, numbers, ranks, top
from lvlm_utils.pruning.tokens import Plan, Tokens

KIND = "visual, inside the LLM"
NEEDS_CLS = False
OFFICIAL = "Cooperx521/PyramidDrop 6444f30"
DEVIATIONS = (
    "Same ranking and numbers at 32 layers; other depths drop at the same shares of depth. Grouped key heads, left "
    "padding and several pictures work, which the official code cannot do."
)
LAYERS, OF = (8, 16, 24), 32


def scores(query: Tensor, keys: Tensor, alive: Tensor | None = None) -> Tensor:
    """Attention (batch, tokens) of one query (batch, heads, d) on keys (batch, key heads, tokens, d), mean over heads.

    Softmax in float32 over all keys that are `alive`, bool (batch, tokens).
    """
    batch, heads, width = query.shape
    grouped = query.float().view(batch, keys.shape[1], -1, width)
    logits = grouped @ keys.float().transpose(2, 3) * width**-0.5
    if alive is not None:
        logits = logits.masked_fill(~alive[:, None, None], -torch.inf)
    return logits.softmax(-1).flatten(1, 2).mean(1)


def select(query: Tensor, keys: Tensor, keep: float | int) -> Tensor:
    """Which visual tokens stay, bool (batch, visual): `query` (batch, heads, d), `keys` (batch, key heads, visual, d).

    Inside a model the softmax is over the text's keys as well, as in the official code: see `scores`.
    """
    return top(scores(query, keys), kept(keep, keys.shape[2]))


def plan(
    lvlm_or_model: LVLM | PreTrainedModel,
    keep: float | int = 0.125,
    layers: tuple[int, ...] | None = None,
    positions: str = "contiguous",
) -> Plan:
    """`keep` is the share or number of a prompt's visual tokens that is left behind the last stage.

    The stages before it keep evenly larger shares: keep^(1/3), keep^(2/3) and keep, which is 1/2, 1/4 and 1/8 for the
    official 1/8. `layers` are the ones before which it drops, by default 8, 16 and 24 of 32, or the same shares of
    another depth (2, 4, 6 of 8). ValueError for layers that do not rise from 1.
    """
    check_keep(keep)
    decoder = decoder_of(bare(lvlm_or_model))
    if layers is None:
        layers = tuple(sorted(set(depths(LAYERS, OF, len(decoder.layers))) - {0}))
    if not layers or layers[0] < 1 or list(layers) != sorted(set(layers)):
        raise ValueError(f"layers={layers} have to rise, from 1 or more.")
    if keep == 1.0 and isinstance(keep, float):
        return Plan({}, positions)
    angles: dict[str, Any] = {}

    def choose(stage: int, tokens: Tokens) -> Tensor:
        have, visual = at_start(tokens), tokens.visual
        share = numbers(keep, have).double() / have if isinstance(keep, int) else keep
        number = (have * share ** (stage / len(layers)) + 1e-6).long().clamp(min=1)  # 0.125^(1/3) is not quite 0.5
        rotary = tokens.prefill.stages[-1].rotary or angles["rotary"]
        query, keys = _projected(decoder.layers[tokens.layer], tokens, rotary)
        return ~visual | (ranks(scores(query, keys, tokens.alive), visual) < number[:, None])

    @contextmanager
    def within(model: PreTrainedModel) -> Iterator[None]:
        def read(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
            angles["rotary"] = output

        hook = decoder_of(model).rotary_emb.register_forward_hook(read)
        try:
            yield
        finally:
            hook.remove()
            angles.clear()

    return Plan({at: partial(choose, n + 1) for n, at in enumerate(layers)}, positions, within=within)


def _projected(layer: nn.Module, tokens: Tokens, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Query (batch, heads, d) of the last token and keys (batch, key heads, slots, d), rotated, as in `layer`."""
    attention, hidden = layer.self_attn, layer.input_layernorm(tokens.hidden)
    last = tokens.last.float().argmax(1)[:, None, None]
    final = hidden.gather(1, last.expand(-1, 1, hidden.shape[2]))
    plain = nn.Identity()
    query, keys = (
        getattr(attention, f"{name}_norm", plain)(
            getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, attention.head_dim))
        ).transpose(1, 2)
        for name, x in (("q", final), ("k", hidden))
    )
    cos, sin = (angle.to(hidden.device).expand(len(hidden), -1, -1) for angle in rotary)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # whatever this decoder's convention is
    keys = rotate(keys, keys, cos, sin)[1]
    at_last = (angle.gather(1, last.expand(-1, 1, angle.shape[2])) for angle in (cos, sin))
    return rotate(query, query, *at_last)[0][:, :, 0], keys
