"""Attention statistics that a method may need of a layer, from the query and key that its attention function gets."""

from collections.abc import Collection

from torch import Tensor

from lvlm_utils.attention.intercept import Call
from lvlm_utils.attention.record import Views
from lvlm_utils.attention.streaming import attention_row, stream

STATISTICS = ("last", "received", "received_mean")


def statistics(call: Call, views: Views, wanted: Collection[str]) -> dict[str, Tensor]:
    """The `wanted` ones of STATISTICS, as `lv.observe` defines them, float32 (batch, heads, slots); 0 for padding."""
    view, found = views.of(call), {}
    if "last" in wanted:
        row = view.last(len(call.query))
        found["last"] = attention_row(call.query, call.key, call.scale, view, row)
    if {"received", "received_mean"} & set(wanted):
        found |= stream(call.query, call.key, call.scale, view, ("received",))
        found["received_mean"] = found["received"] / view.seers[:, None].clamp(min=1)
    return {name: found[name] for name in wanted}
