"""A statistic of a method's own: measured while chosen layers run, and read by `Tokens.attention` like any other."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from weakref import ref

from torch import Tensor
from transformers import PreTrainedModel

from lvlm_utils.attention.intercept import Call, intercept
from lvlm_utils.attention.record import Views
from lvlm_utils.attention.visibility import Visibility
from lvlm_utils.families import decoder_of
from lvlm_utils.pruning.tokens import Prefill, Tokens


class Measure:
    """The statistic `name` of `layers`.

    Its plan calls `begin` in the choice before layer 0, which tells the prefill, and has `within` as its hooks. `value`
    gets the call, what every query sees, the prefill and the columns (batch, slots) of the layer's slots in the whole
    prompt, and returns (batch, heads, slots).
    """

    def __init__(self, name: str, layers: Iterable[int], value: Callable[[Call, Visibility, Prefill, Tensor], Tensor]):
        self.name, self.layers, self.value = name, tuple(layers), value
        self.prefill: Callable[[], Prefill | None] = lambda: None

    def begin(self, tokens: Tokens) -> None:
        self.prefill, self.views = ref(tokens.prefill), Views()

    @contextmanager
    def within(self, model: PreTrainedModel) -> Iterator[None]:
        layers = decoder_of(model).layers
        with ExitStack() as stack:
            for number in self.layers:
                stack.enter_context(intercept(partial(self._see, number), layers[number]))
            yield

    def _see(self, layer: int, call: Call) -> None:
        prefill = self.prefill()
        if prefill is None or prefill.done:
            return
        place = prefill.stages[-1].place.to(call.query.device)
        value = self.value(call, self.views.of(call), prefill, place)
        whole = value.new_zeros(*value.shape[:2], prefill.tokens)
        prefill.statistics[layer, self.name] = whole.scatter(2, place[:, None].expand_as(value), value)
