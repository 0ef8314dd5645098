"""SparseVLM (Zhang et al., ICML 2025): drop visual tokens where the words that matter look least, recycle some.

Matches the official code v1.5 (Gumpest/SparseVLMs, 734d900). Raters are the text tokens behind the picture that are
close to it, once, by the embeddings. Behind layers 2, 6 and 15 of 32 visual tokens are ranked by the raters' attention
and fixed numbers stay; of those that go, the best 30% are clustered, and the means of the clusters stay as well.
"""

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lvlm_utils.attention.intercept import Call
from lvlm_utils.attention.streaming import stream
from lvlm_utils.attention.visibility import Visibility
from lvlm_utils.families import decoder_of
from lvlm_utils.models import LVLM, bare
from lvlm_utils.pruning.budget import check_keep, kept
from lvlm_utils.pruning.measure import Measure
from lvlm_utils.pruning.ranking import at_start, depths, numbers, ranks, top
from lvlm_utils.pruning.tokens import Plan, Prefill, Tokens

KIND = "visual, inside the LLM"
NEEDS_CLS = False
OFFICIAL = "Gumpest/SparseVLMs 734d900 (v1.5)"
DEVIATIONS = (
    "Same raters, indices and merged tokens at its four budgets; budgets between them are interpolated, other depths "
    "and numbers of visual tokens scaled. Merged tokens take the slots of the rearmost dropped ones, not all "
    "behind the kept ones."
)
LAYERS, OF = (2, 6, 15), 32
VISUAL = 576  # visual tokens that the numbers below are of
BUDGETS = {  # mean over depth, as the authors count it -> left behind each of the three layers
    0: (0, 0, 0), 64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110), VISUAL: (VISUAL,) * 3
}  # fmt: skip


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


def select(attention: Tensor, raters: Tensor, keep: float | int) -> Tensor:
    """Which visual tokens stay, bool (batch, V), from attention (batch, heads, T, V) of text on them, and the raters.

    At least one token goes, as in the official code, unless there is only one.
    """
    score = (attention.float().mean(1) * raters[..., None]).sum(1)
    tokens = score.shape[1]
    return top(score, max(1, min(kept(keep, tokens), tokens - 1)))


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
    to_centre = distance.gather(1, centre[..., None].expand(-1, -1, x.shape[1]))
    to_centre = to_centre.scatter(2, centre[..., None], -1).masked_fill(~counted[..., None], torch.inf)
    member = ((to_centre.argmin(1)[:, None] == index[:most, None]) & there[:, None]).float()
    return (member @ x / (member.sum(2, keepdim=True) + 1e-6)).to(tokens.dtype)


def plan(
    lvlm_or_model: LVLM | PreTrainedModel,
    keep: float | int = 192,
    layers: tuple[int, int, int] | None = None,
    positions: str = "contiguous",
) -> Plan:
    """`keep` is the share or number of a prompt's visual tokens that the depth sees on average, as the authors count.

    Official are 64, 96, 128 and 192 of 576 tokens, with a number for each of three layers: 192 is 300, 200, 110. In
    between the numbers are interpolated, and scaled where there are not 576. `layers` are those whose attention ranks
    and behind which tokens go: 2, 6, 15 of 32, or the same shares of another depth (1, 2, 4 of 8). ValueError unless
    they are three that rise and have a layer behind them.
    """
    check_keep(keep)
    of = len(decoder_of(bare(lvlm_or_model)).layers)
    layers = depths(LAYERS, OF, of) if layers is None else tuple(layers)
    if len(layers) != len(LAYERS) or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < of - 1:
        raise ValueError(f"layers={layers} have to be three that rise, below the last of {of} layers.")
    if keep == 1.0 and isinstance(keep, float):
        return Plan({}, positions)

    def attention(call: Call, view: Visibility, prefill: Prefill, place: Tensor) -> Tensor:
        rating = prefill.statistics[0, "rating"].to(place.device)[:, 0].gather(1, place)[..., None]
        return stream(call.query, call.key, call.scale, view, ("received_from",), rating)["received_from"][:, :, 0]

    measure = Measure("raters", layers, attention)

    def begin(tokens: Tokens) -> Tensor:
        measure.begin(tokens)
        visual = tokens.visual
        behind = tokens.alive & (visual.flip(1).cumsum(1).flip(1) == 0)
        rating = raters(tokens.hidden, tokens.hidden, visual, behind)
        whole = rating.new_zeros(len(rating), tokens.prefill.tokens).scatter(1, tokens.place, rating)
        tokens.prefill.statistics[0, "rating"] = whole[:, None].float()
        return tokens.alive

    def choose(stage: int, tokens: Tokens) -> Tensor | tuple[Tensor, Tensor]:
        score, visual = tokens.attention("raters", layers[stage]).mean(1), tokens.visual
        have = visual.sum(1)
        number = torch.minimum(_budget(keep, at_start(tokens))[:, stage], have - 1).clamp(min=1)
        return recycle(tokens.hidden, ranks(score, visual), visual, number)

    later = {layer + 1: partial(choose, stage) for stage, layer in enumerate(layers)}
    return Plan({0: begin, **later}, positions, within=measure.within)


def recycle(hidden: Tensor, rank: Tensor, visual: Tensor, number: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """What goes on: the `number` (batch,) of best ranked visual tokens, and the clusters of the best others.

    hidden (batch, slots, width); rank and visual (batch, slots). Clusters take the rearmost slots of those that went.
    """
    stay = ~visual | (rank < number[:, None])
    gone = (~stay).sum(1)
    recycled = torch.minimum((gone * 0.3).long() + 1, gone)
    groups = torch.where(gone > 0, recycled // 10 + 1, 0)
    most = int(recycled.max())
    if most == 0:
        return stay
    index = torch.arange(most, device=hidden.device)
    best = torch.where(visual & ~stay, rank - number[:, None], rank.shape[1]).argsort(dim=1, stable=True)[:, :most]
    candidates = hidden.gather(1, best[..., None].expand(-1, -1, hidden.shape[2]))
    means = clusters(candidates, index < recycled[:, None], groups)
    behind = (~stay).flip(1).cumsum(1).flip(1)  # the dropped tokens from here on, this one included
    taken = ~stay & (behind <= groups[:, None])
    which = (groups[:, None] - behind).clamp(min=0, max=means.shape[1] - 1)
    merged = means.gather(1, which[..., None].expand(-1, -1, hidden.shape[2]))
    return stay | taken, torch.where(taken[..., None], merged, hidden)


def _budget(keep: float | int, have: Tensor) -> Tensor:
    """Visual tokens left behind each layer, (batch, 3), of the `have` (batch,) that came into layer 0."""
    numbers(keep, have)
    share = keep * have.new_ones(len(have)).double() if isinstance(keep, float) else keep / have.double()
    known = torch.tensor(list(BUDGETS), dtype=torch.double, device=have.device)
    left = torch.tensor(list(BUDGETS.values()), dtype=torch.double, device=have.device)
    upper = torch.searchsorted(known, share * VISUAL).clamp(1, len(known) - 1)
    part = ((share * VISUAL - known[upper - 1]) / (known[upper] - known[upper - 1]))[:, None]
    of_table = left[upper - 1] + part * (left[upper] - left[upper - 1])
    return (of_table * have[:, None] / VISUAL).round().long().clamp(min=1)
