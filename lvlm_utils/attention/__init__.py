"""Attention statistics while a model runs: `lv.observe`, and what it is made of."""

from lvlm_utils.attention.observe import STATISTICS, Seen, observe

__all__ = ["STATISTICS", "Seen", "observe"]
