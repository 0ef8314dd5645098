"""PruMerge+ (Shang et al., 2024, arXiv:2403.15388): PruMerge that also keeps patches at equal steps over the picture.

Steps as in the official code (42Shawn/LLaVA-PruMerge, 097c041), in `prumerge.reduce` with plus=True: about three times
as many patches as stand out are added, at equal steps of the reading order (not of a grid, and never the last patch).
"""

from dataclasses import dataclass

from lvlm_utils.methods.prumerge import PruMerge


@dataclass
class PruMergePlus(PruMerge):
    """PruMerge that also keeps patches at equal steps over the picture (PruMerge+).

    keep, positions: as in PruMerge; of the patches that a given `keep` allows, a quarter are the most attended.
    """

    plus = True
    deviations = f"{PruMerge.deviations} The official PruMerge+ fails for several pictures at a time; ours does not."
