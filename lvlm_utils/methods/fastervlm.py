"""FasterVLM (Zhang et al., 2024, arXiv:2412.01818): keep the patches that [CLS] attends to most.

Matches the official code (Theia-4869/FasterVLM, f5d5f12) index for index; the same as VisPruner with important=1.
"""

from dataclasses import dataclass

from torch import Tensor

from lvlm_utils.attention.towers import has_cls
from lvlm_utils.pruning.engine import PictureMethod, Positions
from lvlm_utils.pruning.keep import top as select  # which patches stay, by the attention of [CLS] (batch, patches)
from lvlm_utils.pruning.pictures import Pictures


@dataclass
class FasterVLM(PictureMethod):
    """Keep the patches that [CLS] attends to most (FasterVLM).

    keep: share or number of the patches of every picture, tile or frame that the tower sees.
    positions: "contiguous" as in the code.
    """

    keep: float | int = 128
    positions: Positions = "contiguous"

    seen = {"cls": -2}
    official = "Theia-4869/FasterVLM f5d5f12"
    deviations = (
        "Same indices. The official code knows towers with [CLS] only: without one we take the attention received in "
        "the last layer, as VisPruner of the same authors does for SigLIP."
    )

    def fit(self, lvlm):
        return self.filled(seen={"cls": -2} if has_cls(lvlm) else {"received": -1})

    def sees(self):
        return self.seen

    def attention(self, pictures: Pictures) -> Tensor:
        """What every patch gets, (P, V), mean over the heads."""
        [name] = self.seen
        return pictures.seen(name).mean(1)

    def pick(self, pictures):
        return select(self.attention(pictures), self.keep)
