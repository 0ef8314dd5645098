"""Attention statistics that a method may need of a layer, from the query and key that its attention function gets."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lvlm_utils.attention.equi import EquiPositions
from lvlm_utils.attention.intercept import Call
from lvlm_utils.attention.record import Views
from lvlm_utils.attention.streaming import attention_row, stream
from lvlm_utils.pruning.tokens import Prefill, Tokens

FROM = ("question", "context")  # attention received from the tokens of this group only
STATISTICS = ("last", "received", "received_mean", "equi", *FROM)


def statistics(call: Call, views: Views, wanted: Collection, prefill: Prefill, decoder) -> dict:
    """The `wanted` ones of STATISTICS, float32 (batch, heads, slots); 0 for padding.

    last, received and received_mean are those of `lv.observe`. "context" is the column sum over the queries of the
    context alone, "question" the mean over those of the question. ValueError where these groups are not known, and for
    a prompt without question.
    """
    call = _square(call, prefill)
    view, found = views.of(call), {}
    if "last" in wanted:
        row = view.last(len(call.query))
        found["last"] = attention_row(call.query, call.key, call.scale, view, row)
    if "equi" in wanted:
        equi = EquiPositions(prefill.visual, ())
        equi.read_positions(decoder.rotary_emb, (call.query.new_empty(len(call.query), 1, 1), prefill.positions), {}, prefill.angles)
        found["equi"] = attention_row(call.query, call.key, call.scale, view, view.last(len(call.query)), equi.turn(call, view))
    groups = [name for name in wanted if name in FROM or callable(name)]
    sums = ["received"] if {"received", "received_mean"} & set(wanted) else []
    if sums or groups:
        rows = _rows(call, prefill, groups) if groups else None
        found |= stream(call.query, call.key, call.scale, view, (*sums, *["received_from"] * bool(groups)), rows)
    if sums:
        found["received_mean"] = found["received"] / view.seers[:, None].clamp(min=1)
    if groups:
        found |= dict(zip(groups, found["received_from"].unbind(2), strict=True))
    if "question" in groups:
        found["question"] = found["question"] / rows[..., groups.index("question")].sum(1)[:, None, None]
    return {name: found[name] for name in wanted}


def _square(call: Call, prefill: Prefill) -> Call:
    """Behind a shared beginning only the last queries run: those before them become zeros, which nobody reads."""
    missing = call.key.shape[2] - call.query.shape[2]
    if missing == 0:
        return call
    stage = prefill.stages[-1]
    return replace(
        call, query=pad(call.query, (0, 0, missing, 0)), mask=stage.alive if stage.padded else None, causal=True
    )


def _rows(call: Call, prefill: Prefill, groups: Sequence[str]) -> Tensor:
    """Which queries belong to each group, bool (batch, slots, groups)."""
    if prefill.groups is None and (of := [name for name in groups if not callable(name)]):
        groups = of
        raise ValueError(
            f"Which tokens are {' and '.join(groups)} is not known here: ask with lv.generate, or pass "
            "groups=prompt.groups."
        )
    stage, device = prefill.stages[-1], call.query.device
    place, alive = stage.place.to(device), stage.alive.to(device)
    tokens = Tokens(len(prefill.at) - 1, call.query, place, alive, prefill)
    rows = torch.stack([(name(tokens) if callable(name) else tokens.here(getattr(prefill.groups, name))) & alive for name in groups], 2)
    if "question" in groups and not rows[..., groups.index("question")].any(1).all():
        raise ValueError("A prompt has no question token left to read attention from: take another reading.")
    return rows
