"""What `observe` has seen: attention statistics by layer."""

from collections.abc import Iterable

import torch


class Seen:
    """Attention statistics of the latest prompt, in the language model or in a vision tower.

    With A the attention of a layer, zero in the rows of padding, these are tensors (layers, batch, heads, ...), float32
    unless the model computes in float64:

    received (..., tokens): column sums, sum_i A_ij: the attention that token j gets from all queries i.
    received_mean (..., tokens): the same divided by the number of queries that see j; 0 if none does.
    received_from (..., G, tokens): column sums over the queries of each group in `group_names`.
    groups (..., G, G): sums of A over the queries of one group and the keys of another, [query group, key group].
    last (..., tokens): the row of the last token, whose prediction is the answer.
    equi (..., tokens): that row, if all visual keys stood at one position and everything else next to it.
    entropy (..., tokens): of row i, -sum_j A_ij ln A_ij, in nats; 0 for padding.
    variance (..., tokens): of A_ij over the keys j that query i sees; 0 for padding.
    cls (..., tokens): only in towers with a [CLS] token: its row, over [CLS] itself (the first) and the patches.

    Layers of unequal length (inside `lv.prune`) cannot be one tensor: then there is a list with (batch, heads, ...) of
    every layer. In a tower the batch are the pictures, tiles or frames that it was given one by one, or the pictures
    and videos that it was given packed (the Qwen kind), in its order; tokens are the tower's own: [CLS] first, then
    patches in the order in which the processor made them. If they differ in size, there is a list with (layers, heads,
    ...) of each.

    towers: name -> Seen of every tower that ran and whose attention can be observed. (SAM in DeepSeek-VL 7B cannot: it
    adds relative positions and does not ask transformers for its attention.)
    Raises AttributeError for a statistic that was not asked for or does not exist here, RuntimeError if nothing was
    seen yet.
    """

    def __init__(self, names: Iterable[str], where: str, group_names: tuple[str, ...] = ()):
        self.group_names = group_names
        self.towers: dict[str, Seen] = {}
        self._names, self._where = frozenset(names), where
        self._values: dict[str, torch.Tensor | list[torch.Tensor]] = {}

    @property
    def vision(self) -> "Seen":
        """The vision tower that ran; ValueError if there was none, or more than one."""
        if len(self.towers) != 1:
            found = "more than one tower ran" if self.towers else "no tower was observed (with vision=True, a picture)"
            raise ValueError(f"seen.vision: {found}. seen.towers has: {', '.join(self.towers) or 'nothing'}.")
        return next(iter(self.towers.values()))

    @property
    def received_mean(self) -> torch.Tensor | list[torch.Tensor]:
        received, seers = self.received, self._values["seers"]
        if isinstance(received, list):
            return [r / s.clamp(min=1) for r, s in zip(received, seers, strict=True)]
        return received / seers.clamp(min=1)

    def take(self, values: dict[str, torch.Tensor | list[torch.Tensor]]) -> None:
        """Replace what was seen; "seers" is the number of queries that see each key, (layers, batch, 1, tokens)."""
        self._values = values

    def __getattr__(self, name: str) -> torch.Tensor | list[torch.Tensor]:
        if name.startswith("_") or name not in self._names:
            asked = ", ".join(sorted(self.__dict__.get("_names", ())))
            raise AttributeError(f"{name!r} of the {self._where} was not observed. Asked for: {asked or 'nothing'}.")
        if name not in self._values:
            raise RuntimeError(f"The {self._where} has not run yet: call the model inside `with lv.observe(...)`.")
        return self._values[name]

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._names})


def together(parts: list[torch.Tensor], axis: int, device: torch.device | str) -> torch.Tensor | list[torch.Tensor]:
    """One tensor on `device` with a new axis where all shapes agree, else the list."""
    if len({part.device for part in parts}) > 1:  # layers on several GPUs
        parts = [part.to(device) for part in parts]
    if len({part.shape for part in parts}) > 1:
        return [part.to(device) for part in parts]
    return torch.stack(parts, axis).to(device)
