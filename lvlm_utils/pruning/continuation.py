"""Several prompts go on behind one pruned beginning: its keys and values are repeated, however many each layer kept."""

from dataclasses import replace
from weakref import ref

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lvlm_utils.pruning.engine import ENGINES


class Continuation:
    """`rows` prompts that share the beginning which `model` has just read, alone, into `cache`, inside lv.prune.

    Call it with the next tokens of each: the shorter ones begin with padding, and everything that is no padding is
    kept. The beginning stays as it is, for other continuations. ValueError for any other cache.
    """

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, rows: int):
        self.model, self.engine = model, ENGINES.get(model)
        prefill = self.engine and self.engine.trace.latest
        if not prefill or prefill.cache is None or prefill.cache() is not cache or len(prefill.stages[0].place) != 1:
            raise ValueError("Only the latest prompt that was pruned, a single one with a cache, can be continued.")
        self.cache = DynamicCache([(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v, *_ in cache])
        rest = prefill.stages[0].alive.new_zeros(rows, 0)
        self.prefill = replace(prefill, cache=ref(self.cache), seen=prefill.tokens, rest=rest)
        self.engine.caches.add(self.cache)

    def __call__(self, ids: Tensor, real: Tensor) -> Tensor:
        """Logits (rows, vocabulary) behind the next `ids` (rows, new), of which those that are `real` count."""
        self.prefill.rest = torch.cat([self.prefill.rest, real], 1)
        self.engine.prefill = self.prefill
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]
