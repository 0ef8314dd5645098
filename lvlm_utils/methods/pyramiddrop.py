"""PyramidDrop (Xing et al., CVPR 2025): drop visual tokens in stages, by the attention the next layer would pay.

Matches the official code (Cooperx521/PyramidDrop, 6444f30): after 8, 16 and 24 of 32 layers the tokens are ranked by
the attention of the last prompt token, with query and key of the layer that comes next, and 1/2, 1/4 and 1/8 of all
visual tokens go on. Positions are numbered anew.
"""

import sys
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor, nn

from lvlm_utils.models import decoder_of
from lvlm_utils.pruning.engine import Method, Positions, Tokens
from lvlm_utils.pruning.keep import depth_of, depths, everything, in_float32, numbers, top

LAYERS, OF = (8, 16, 24), 32


@in_float32
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


def select(
    query: Tensor, keys: Tensor, keep: float | int | Tensor, visual: Tensor | None = None, alive: Tensor | None = None
) -> Tensor:
    """Which visual tokens stay, bool (batch, tokens): `query` (batch, heads, d), `keys` (batch, key heads, tokens, d).

    visual (batch, tokens): which of the keys are visual tokens, else all. The softmax is over the others too, as in the
    official code, if they are `alive`. `keep` may be numbers (batch,).
    """
    score = scores(query, keys, alive)
    return top(score if visual is None else score.masked_fill(~visual, -torch.inf), keep)


@dataclass
class PyramidDrop(Method):
    """Drop visual tokens in stages, by the attention that the last token would pay in the next layer (PyramidDrop).

    keep: share or number of a prompt's visual tokens that is left after the last stage. The stages before it keep
        evenly larger shares: keep^(1/3), keep^(2/3) and keep, which is 1/2, 1/4 and 1/8 for the official 1/8.
    layers: before which it drops, rising from 1; not given, the official 8, 16, 24 of 32, or the same shares of another
        depth (2, 4, 6 of 8).
    positions: "contiguous" as in the code.
    """

    keep: float | int = 0.125
    layers: tuple[int, ...] | None = None
    positions: Positions = "contiguous"

    official = "Cooperx521/PyramidDrop 6444f30"
    deviations = (
        "Same ranking and numbers at 32 layers; other depths drop at the same shares of depth. Grouped key heads, left "
        "padding and several pictures work, which the official code cannot do."
    )

    def fit(self, lvlm):
        layers = self.layers
        if layers is None:
            layers = sorted(set(depths(LAYERS, OF, depth_of(lvlm))) - {0})
        if not layers or layers[0] < 1 or list(layers) != sorted(set(layers)):
            raise ValueError(f"layers={layers} have to rise, from 1 or more.")
        return self.filled(layers=tuple(layers))

    def before(self):
        return () if everything(self.keep) else self.layers

    def choose(self, tokens):
        have, stage = tokens.at_start, self.layers.index(tokens.layer) + 1
        share = numbers(self.keep, have).double() / have if isinstance(self.keep, Integral) else float(self.keep)
        number = (have * share ** (stage / len(self.layers)) + 1e-6).long().clamp(min=1)  # .125^(1/3) is not quite .5
        query, keys = _projected(decoder_of(tokens.model).layers[tokens.layer], tokens)
        return ~tokens.visual | select(query, keys, number, tokens.visual, tokens.alive)


def _projected(layer: nn.Module, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Query (batch, heads, d) of the last token and keys (batch, key heads, slots, d), rotated, as in `layer`."""
    attention, hidden = layer.self_attn, _through(layer.input_layernorm, tokens.hidden)
    last = tokens.last.float().argmax(1)[:, None, None].to(hidden.device)
    final = hidden.take_along_dim(last, 1)
    plain = nn.Identity()
    query, keys = (
        getattr(attention, f"{name}_norm", plain)(
            _through(getattr(attention, f"{name}_proj"), x).unflatten(-1, (-1, attention.head_dim))
        ).transpose(1, 2)
        for name, x in (("q", final), ("k", hidden))
    )
    cos, sin = (angle.to(hidden.device).expand(len(hidden), -1, -1) for angle in tokens.rotary)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # whatever this decoder's convention is
    keys = rotate(keys, keys, cos, sin)[1]
    query = rotate(query, query, *(angle.take_along_dim(last, 1) for angle in (cos, sin)))[0][:, :, 0]
    return query.to(tokens.hidden.device), keys.to(tokens.hidden.device)


def _through(module: nn.Module, x: Tensor) -> Tensor:
    """A part of a layer that has not run yet, on its own device and in its dtype: x may still come from another one."""
    weight = next(module.parameters(), x)
    return module(x if weight.is_meta else x.to(weight.device, weight.dtype if weight.is_floating_point() else x.dtype))
