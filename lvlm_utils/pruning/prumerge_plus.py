"""PruMerge+ (Shang et al., 2024, arXiv:2403.15388): PruMerge that also keeps patches at equal steps over the picture.

Steps as in the official code (42Shawn/LLaVA-PruMerge, 097c041), in `prumerge` with plus=True: about three times as
many patches as stand out are added, at equal steps of the reading order (not of a grid, and never the last patch).
"""

from torch import Tensor
from transformers import PreTrainedModel

from lvlm_utils.models import LVLM
from lvlm_utils.pruning import prumerge
from lvlm_utils.pruning.tokens import Plan

KIND = prumerge.KIND
NEEDS_CLS = True
OFFICIAL = prumerge.OFFICIAL
DEVIATIONS = f"{prumerge.DEVIATIONS} The official PruMerge+ fails for more than one picture at a time; ours does not."


def reduce(features: Tensor, cls_query: Tensor, keys: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`prumerge.reduce` with plus=True."""
    return prumerge.reduce(features, cls_query, keys, plus=True)


def plan(lvlm_or_model: LVLM | PreTrainedModel, keep: float | int | None = None, positions: str = "contiguous") -> Plan:
    """`prumerge.plan` with plus=True; of the patches that a given `keep` allows, a quarter are the most attended."""
    return prumerge.plan(lvlm_or_model, keep, positions, plus=True)
