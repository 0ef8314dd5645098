"""FasterVLM (Zhang et al., 2024, arXiv:2412.01818): keep the patches that [CLS] attends to most.

Matches the official code (Theia-4869/FasterVLM, f5d5f12) index for index; the same as VisPruner with important=1.
"""

from torch import Tensor
from transformers import PreTrainedModel

from lvlm_utils.models import LVLM
from lvlm_utils.pruning.budget import check_keep, kept
from lvlm_utils.pruning.ranking import top
from lvlm_utils.pruning.tokens import Plan, Tokens
from lvlm_utils.pruning.vision import has_cls

KIND = "visual, before the LLM"
NEEDS_CLS = False
OFFICIAL = "Theia-4869/FasterVLM f5d5f12"
DEVIATIONS = (
    "Same indices. The official code knows towers with [CLS] only: without one we take the attention received in the "
    "last layer, as VisPruner of the same authors does for SigLIP."
)


def select(cls_attention: Tensor, keep: float | int) -> Tensor:
    """Which patches stay, bool (batch, patches), from the attention of [CLS], (batch, patches), mean over the heads."""
    return top(cls_attention, kept(keep, cls_attention.shape[1]))


def plan(lvlm_or_model: LVLM | PreTrainedModel, keep: float | int = 128, positions: str = "contiguous") -> Plan:
    """`keep` is a share or number for each picture, tile or frame that the tower sees."""
    check_keep(keep)
    name, layer = ("cls", -2) if has_cls(lvlm_or_model) else ("received", -1)

    def choose(tokens: Tokens) -> Tensor:
        for pictures in tokens.pictures:
            pictures.keep(select(pictures.seen(name).mean(1), keep))
        return tokens.chosen()

    return Plan({0: choose}, positions, sees={name: layer}, asks=False)
