"""Questions about one picture for methods whose choice depends on the question.

What comes before any choice, the tower and the first layers, is computed once for all that the prompts have in common.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lvlm_utils.evaluate.encoded import Encoded, padded
from lvlm_utils.evaluate.prefix import clusters
from lvlm_utils.models import LVLM
from lvlm_utils.prompts import Prompt
from lvlm_utils.pruning.beginning import Beginning
from lvlm_utils.token_groups import inside


@dataclass
class Begun:
    """Prompts of `coded`, numbers -> how many of their first tokens are those of `beginning`."""

    coded: Encoded
    beginning: Beginning
    cuts: dict[int, int]

    @contextmanager
    def batch(self, lvlm: LVLM, numbers: Sequence[int]) -> Iterator[Prompt]:
        """A left-padded batch of some of them, to be given to the model inside."""
        prompt = padded(lvlm, self.coded, numbers)
        with self.beginning.under(prompt.inputs["attention_mask"], [self.cuts[number] for number in numbers]):
            yield prompt

    def batches(self, contexts: Sequence[str], size: int) -> Iterator[list[int]]:
        """Numbers, at most `size` at once, of prompts with one context (by number): they are about equally long."""
        alike = defaultdict(list)
        for number in self.cuts:
            alike[contexts[number]].append(number)
        for numbers in alike.values():
            numbers.sort(key=lambda number: len(self.coded.ids[number]))
            yield from (numbers[at : at + size] for at in range(0, len(numbers), size))


@torch.inference_mode()
def begin(lvlm: LVLM, coded: Encoded, numbers: Sequence[int], visual_end: int, layer: int) -> Iterator[Begun]:
    """Read what prompts about one picture have in common, up to `layer`; prompts that share nothing are left out.

    A beginning holds the picture, whose tokens end at `visual_end`, and nothing of any question: the attention of its
    tokens may count.
    """
    for members, cuts in clusters([coded.ids[number] for number in numbers], visual_end):
        rows = [numbers[member] for member in members]
        ends = {row: min(cut, _question(coded, row)) for row, cut in zip(rows, cuts, strict=True)}
        ends = {row: cut for row, cut in ends.items() if cut >= max(visual_end, 1)}
        if len(ends) > 1:
            shared = coded.ids[rows[0]][: max(ends.values())]
            yield Begun(coded, Beginning(lvlm.model, shared, coded.extras, layer), ends)


def _question(coded: Encoded, number: int) -> int:
    """Where the question begins; the last token where there is none."""
    tokens = inside(coded.offsets[number], coded.rendered[number].spans.get("question")).nonzero()
    return int(tokens[0]) if len(tokens) else len(coded.ids[number]) - 1
