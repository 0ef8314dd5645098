"""SparseVLM (Zhang et al., ICML 2025): drop visual tokens where the words that matter look least, recycle some.

Matches the official code v1.5 (Gumpest/SparseVLMs, 734d900). Raters are the text tokens after the picture that are
close to it, once, by the embeddings. After layers 2, 6 and 15 of 32 visual tokens are ranked by the raters' attention
and fixed numbers stay; of those that go, the best 30% are clustered, and the means of the clusters stay as well.
"""

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from lvlm_utils.pruning.engine import Chosen, Method, Positions, Tokens
from lvlm_utils.pruning.keep import depth_of, depths, everything, in_float32, numbers, top

LAYERS, OF = (2, 6, 15), 32
VISUAL = 576  # visual tokens that the numbers below are of
BUDGETS = {  # mean over depth, as the authors count it -> left after each of the three layers
    0: (0, 0, 0), 64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110), VISUAL: (VISUAL,) * 3
}  # fmt: skip


@in_float32
def raters(visual: Tensor, text: Tensor, is_visual: Tensor | None = None, is_text: Tensor | None = None) -> Tensor:
    """Which text tokens rate, bool (batch, T): those to which the picture is closer than on average.

    visual (batch, V, D) and text (batch, T, D) are embeddings; the masks (batch, V) and (batch, T) say which are there.
    If none is above the average (a single token), all rate.
    """
    visual, text = visual.float(), text.float()
    is_visual = torch.ones_like(visual[..., 0], dtype=torch.bool) if is_visual is None else is_visual
    is_text = torch.ones_like(text[..., 0], dtype=torch.bool) if is_text is None else is_text
    close = (visual @ text.transpose(1, 2)).masked_fill(~is_text[:, None], torch.finfo(torch.float32).min).softmax(-1)
    weight = is_visual.float()[:, None] / is_visual.sum(1).clamp(min=1)[:, None, None]
    close = (weight @ close)[:, 0].masked_fill(~is_text, 0)
    mean = close.sum(1, keepdim=True) / is_text.sum(1, keepdim=True).clamp(min=1)
    above = is_text & (close > mean)
    return torch.where(above.any(1, keepdim=True), above, is_text)


def rated(attention: Tensor, raters: Tensor) -> Tensor:
    """Attention that the raters give every visual token: (batch, heads, T, V) and bool (batch, T) -> (batch, V)."""
    return attention.float().mean(1).masked_fill(~raters[..., None], 0).sum(1)


def select(attention: Tensor, raters: Tensor, keep: float | int | Tensor) -> Tensor:
    """Which visual tokens stay, bool (batch, V), from attention (batch, heads, T, V) of text on them, and the raters.

    At least one token goes, as in the official code, unless there is only one. What is -inf is no visual token, so that
    prompts may have unequal numbers of them; `keep` may then be numbers (batch,).
    """
    score = rated(attention, raters)
    have = (score != -torch.inf).sum(1)
    number = keep if isinstance(keep, Tensor) else numbers(keep, have)
    return top(score, torch.minimum(number, have - 1).clamp(min=1))


@in_float32
def clusters(tokens: Tensor, there: Tensor, number: Tensor) -> Tensor:
    """Means of clusters (batch, C, D) of tokens (batch, M, D) that are `there`; `number` (batch,) of them, C at most.

    Density peaks with nearest neighbours (DPC-kNN): centres are dense and far from anything denser. The number of
    neighbours is that of the clusters; of equally dense tokens the first counts as denser.
    """
    x, most = tokens.float(), int(number.max())
    index = torch.arange(x.shape[1], device=x.device)
    both = there[:, :, None] & there[:, None]
    distance = torch.cdist(x, x).masked_fill(~both, torch.inf) / x.shape[2] ** 0.5
    counted = index[:most] < number[:, None]
    near = distance.sort(-1).values[..., :most].masked_fill(~counted[:, None], 0)
    density = (-near.square().sum(-1) / number[:, None]).exp().masked_fill(~there, -1)
    same = (density[:, None] == density[:, :, None]) & (index < index[:, None])
    denser = (density[:, None] > density[:, :, None]) | same
    furthest = distance.masked_fill(~both, 0).amax((1, 2))[:, None]
    apart = torch.minimum(distance.masked_fill(~denser, torch.inf).amin(2), furthest)
    peak = (apart * density).masked_fill(~there, -1)
    centre = peak.argsort(dim=1, descending=True, stable=True)[:, :most]
    to_centre = distance.take_along_dim(centre[..., None], 1)
    to_centre = to_centre.scatter(2, centre[..., None], -1).masked_fill(~counted[..., None], torch.inf)
    member = ((to_centre.argmin(1)[:, None] == index[:most, None]) & there[:, None]).float()
    return (member @ x / (member.sum(2, keepdim=True) + 1e-6)).to(tokens.dtype)


def recycle(hidden: Tensor, score: Tensor, stay: Tensor) -> Chosen:
    """What goes on: the tokens that `stay`, bool (batch, slots), and the clusters of the best of the others.

    hidden (batch, slots, width); score (batch, slots) of the visual tokens. Clusters take the rearmost slots of those
    that went.
    """
    gone = (~stay).sum(1)
    recycled = torch.minimum((gone * 0.3).long() + 1, gone)
    groups = torch.where(gone > 0, recycled // 10 + 1, 0)
    most = int(recycled.max())
    if most == 0:
        return stay
    index = torch.arange(most, device=hidden.device)
    best = score.masked_fill(stay, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :most]
    candidates = hidden.take_along_dim(best[..., None], 1)
    means = clusters(candidates, index < recycled[:, None], groups)
    after = (~stay).flip(1).cumsum(1).flip(1)  # the dropped tokens from here on, this one included
    taken = ~stay & (after <= groups[:, None])
    which = (groups[:, None] - after).clamp(min=0, max=means.shape[1] - 1)
    merged = means.take_along_dim(which[..., None], 1)
    return stay | taken, torch.where(taken[..., None], merged, hidden)


def budget(keep: float | int, have: Tensor) -> Tensor:
    """Visual tokens left after each layer, (batch, 3), of the `have` (batch,) that came into layer 0."""
    numbers(keep, have)  # ValueError for what is no budget
    share = keep / have.double() if isinstance(keep, Integral) else torch.full_like(have, keep, dtype=torch.double)
    known = torch.tensor(list(BUDGETS), dtype=torch.double, device=have.device)
    left = torch.tensor(list(BUDGETS.values()), dtype=torch.double, device=have.device)
    upper = torch.searchsorted(known, share * VISUAL).clamp(1, len(known) - 1)
    part = ((share * VISUAL - known[upper - 1]) / (known[upper] - known[upper - 1]))[:, None]
    of_table = left[upper - 1] + part * (left[upper] - left[upper - 1])
    return (of_table * have[:, None] / VISUAL).round().long().clamp(min=1)


@dataclass
class SparseVLM(Method):
    """Drop visual tokens in three steps, by the attention of the words that are close to the picture (SparseVLM).

    keep: share or number of a prompt's visual tokens that the depth sees on average, as the authors count. Official are
        64, 96, 128 and 192 of 576, with a number for each of three layers: 192 is 300, 200, 110. The numbers between
        are interpolated, and scaled where there are not 576.
    layers: whose attention ranks, and after which tokens go: three that rise; not given, the official 2, 6, 15 of 32,
        or the same shares of another depth (1, 2, 4 of 8).
    positions: "contiguous" as in the code.
    """

    keep: float | int = 192
    layers: tuple[int, int, int] | None = None
    positions: Positions = "contiguous"

    official = "Gumpest/SparseVLMs 734d900 (v1.5)"
    deviations = (
        "Same raters, indices and merged tokens at its four budgets; budgets between them are interpolated, other "
        "depths and numbers of visual tokens scaled. Merged tokens take the slots of the rearmost dropped ones, not "
        "all after the kept ones."
    )

    def fit(self, lvlm):
        of = depth_of(lvlm)
        layers = depths(LAYERS, OF, of) if self.layers is None else tuple(self.layers)
        if len(layers) != 3 or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < of - 1:
            raise ValueError(f"layers={layers} have to be three that rise, below the last of {of} layers.")
        return self.filled(layers=layers)

    def before(self):
        return () if everything(self.keep) else (0, *(layer + 1 for layer in self.layers))

    def needs(self):
        return dict.fromkeys(self.layers, (self.rating,))

    def rating(self, tokens: Tokens) -> Tensor:
        """The raters, bool (batch, slots), as they were found before layer 0."""
        return tokens.here(tokens.notes[self.rating])

    def choose(self, tokens):
        visual = tokens.visual
        if tokens.layer == 0:
            after = tokens.alive & (visual.flip(1).cumsum(1).flip(1) == 0)
            found = raters(tokens.hidden, tokens.hidden, visual, after)
            whole = found.new_zeros(len(found), tokens.prefill.tokens)
            tokens.notes[self.rating] = whole.scatter(1, tokens.place, found)
            return tokens.alive
        stage = self.layers.index(tokens.layer - 1)
        attention = tokens.only_visual(tokens.attention(self.rating, tokens.layer - 1))
        attention, every = attention[:, :, None], torch.ones_like(visual[:, :1])  # it is summed over the raters already
        stay = ~visual | select(attention, every, budget(self.keep, tokens.at_start)[:, stage])
        return recycle(tokens.hidden, rated(attention, every), stay)
