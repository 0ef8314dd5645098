"""What runs on a model right now: the groups of the prompt that is about to be asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

if TYPE_CHECKING:
    from lvlm_utils.token_groups import TokenGroups


@contextmanager
def told(model: PreTrainedModel, groups: "TokenGroups") -> Iterator[None]:
    """Let what prunes or observes `model` know the groups of the prompt that is about to be asked."""
    from lvlm_utils.pruning import engine  # not above: methods are written in terms of prompts

    with engine.told(model, groups):
        yield
