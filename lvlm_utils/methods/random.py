"""Random pruning, the control for every method: visual tokens or text, drawn without looking at what they say.

The choice is fresh for every prompt and always the same for one prompt: the draw is a hash of the ids of all its tokens
and of `seed` (`Tokens.noise`). Batch, order, padding and device do not change it, nor does the picture.
"""

from collections.abc import Collection
from dataclasses import dataclass

from lvlm_utils.families import family_of
from lvlm_utils.models import bare
from lvlm_utils.pruning.engine import Group, Method, Positions
from lvlm_utils.pruning.keep import all_but_lowest, everything
from lvlm_utils.pruning.keep import top as select


@dataclass
class Random(Method):
    """Drop visual tokens or text drawn at random: the control for every method.

    keep: share or number of the visual tokens of every picture, tile or frame that the tower sees; or
    drop: share of the text that may go. Exactly one of the two.
    layer: before which they go.
    seed: of the draw.
    protect: groups of text that stay in any case.
    positions: not given, "contiguous" for visual tokens before layer 0, as in the methods that this is the control of,
        where the model can number them anew, else "original".
    """

    keep: float | int | None = None
    drop: float | None = None
    layer: int = 0
    seed: int = 0
    protect: Collection[Group] = ("system", "question")
    positions: Positions | None = None

    kind = "visual, before the LLM"
    deviations = "A control, so nothing to match; with drop= it takes text instead of visual tokens."

    def fit(self, lvlm):
        if (self.keep is None) == (self.drop is None):
            raise ValueError("Give exactly one: keep= for visual tokens, or drop= for text.")
        if self.positions is not None:
            return self
        anew = self.keep is not None and self.layer == 0 and not family_of(bare(lvlm)).grid_positions
        return self.filled(positions="contiguous" if anew else "original")

    def before(self):
        return () if everything(self.keep) or self.drop == 0 else (self.layer,)

    def choose(self, tokens):
        drawn = tokens.noise(self.seed)
        if self.keep is None:
            return all_but_lowest(drawn, tokens.droppable(self.protect), self.drop)
        return tokens.by_picture(lambda p: select(drawn[p.rows[:, None], p.slots], self.keep))
