"""Which keys a query sees: one reading of the masks that transformers hands to sdpa, eager and flash attention.

Masks are read in blocks of rows and never expanded. A block knows the range of keys that it needs at all (what lies
above the causal diagonal and left padding are skipped) and from which key on it has to mask.
"""

from dataclasses import dataclass, replace

import torch

ROWS = {"cpu": 128, "cuda": 256}  # queries in a block: a GPU wants fewer and larger kernels


@dataclass(frozen=True)
class Block:
    """Queries top to bottom need the keys first to end (half-open); from `mixed` on not every query sees every key."""

    top: int
    bottom: int
    first: int
    mixed: int
    end: int


@dataclass(frozen=True)
class Part:
    """Prompts start to stop of the batch, which have the same blocks."""

    start: int
    stop: int
    blocks: list[Block]


class Visibility:
    """What every query of a self-attention over `tokens` tokens may see, in blocks of `rows` queries.

    mask: None, (batch, keys) of ones and zeros as flash attention takes it, or (batch, 1, queries, keys), bool or 0
    and very negative. `causal` is read only for the first two. A query is real if it sees itself; the others are
    padding and count nowhere. Given a mask, the constructor waits for the device. Raises NotImplementedError for any
    other kind of mask.

    seen (batch or 1, tokens): number of keys that a real query sees, 0 for padding.
    seers (batch or 1, tokens): number of real queries that see a key.
    real (batch, tokens): which queries are real, or None if all are.
    """

    def __init__(self, mask: torch.Tensor | None, batch: int, tokens: int, causal: bool, rows: int, device):
        self.tokens, self.causal = tokens, causal
        self.place = torch.arange(tokens, device=device)
        edges = [(top, min(top + rows, tokens)) for top in range(0, tokens, rows)]
        if mask is not None:
            self.mask = _readable(mask).expand(batch, *mask.shape[1:])
            self._read(edges)
            return
        self.mask = self.real = None
        self.seen = self.place[None] + 1 if causal else torch.full_like(self.place, tokens)[None]
        self.seers = self.seen.flip(-1)
        blocks = [Block(t, b, 0, t, b) if causal else Block(t, b, 0, tokens, tokens) for t, b in edges]
        self.parts = [Part(0, batch, blocks)]

    def _read(self, edges: list[tuple[int, int]]) -> None:
        """Counts, real queries and blocks of a given mask, in one pass over it."""
        real, seen, seers, found = [], [], 0, []
        for top, bottom in edges:
            visible = self.visible(top, bottom)
            real.append(visible.diagonal(top, 1, 2))
            some = visible & real[-1][..., None]
            seen.append(some.sum(2))
            seers = seers + some.sum(1)
            some, every = some.any(1), (visible | ~real[-1][..., None]).all(1)
            first = torch.where(some, self.place, self.tokens).amin(1)
            end = torch.where(some, self.place + 1, 0).amax(1)
            mixed = torch.where(~every & (self.place >= first[:, None]), self.place, end[:, None]).amin(1)
            found.append(torch.stack([first, mixed, end], 1))
        self.real, self.seen, self.seers = torch.cat(real, 1), torch.cat(seen, 1), seers
        self.parts = []
        for row, blocks in enumerate(torch.stack(found, 1).tolist()):
            same = [
                Block(*edge, first, mixed, end)
                for edge, (first, mixed, end) in zip(edges, blocks, strict=True)
                if end  # a block of nothing but padding needs no keys
            ]
            joins = self.parts and self.parts[-1].blocks == same
            start = self.parts.pop().start if joins else row
            self.parts.append(Part(start, row + 1, same))

    def parts_with(self, queries: torch.Tensor) -> list[Part]:
        """The parts with only those blocks that have one of the `queries`, bool (batch, tokens)."""
        queries = queries.cpu()
        return [
            replace(part, blocks=[b for b in part.blocks if queries[part.start : part.stop, b.top : b.bottom].any()])
            for part in self.parts
        ]

    def visible(self, top: int, bottom: int, keys: slice = slice(None), prompts: slice = slice(None)) -> torch.Tensor:
        """Bool (prompts or 1, queries top to bottom, keys)."""
        if self.mask is not None and self.mask.dim() == 4:
            return _as_bool(self.mask[prompts, 0, top:bottom, : self.tokens][..., keys])
        tile = self.place[None, None, keys] <= (self.place[top:bottom, None] if self.causal else self.tokens)
        if self.mask is not None:
            tile = tile & self.mask[prompts, None, : self.tokens][..., keys].bool()
        return tile.expand(-1, bottom - top, -1)

    def row(self, query: torch.Tensor) -> torch.Tensor:
        """Bool (batch, keys): what query number `query` (batch,) of every prompt sees."""
        if self.mask is not None and self.mask.dim() == 4:
            return _as_bool(self.mask[torch.arange(len(query), device=query.device), 0, query, : self.tokens])
        row = self.place <= (query[:, None] if self.causal else torch.full_like(query, self.tokens)[:, None])
        return row if self.mask is None else row & self.mask[:, : self.tokens].bool()

    def last(self, batch: int) -> torch.Tensor:
        """Number (batch,) of the last real query of every prompt."""
        return (self.place if self.real is None else self.place * self.real).amax(-1).expand(batch)


class Views:
    """`Visibility` of attention calls; the layers of one forward pass share their mask, so it is read once."""

    def __init__(self):
        self.known: dict[tuple, tuple] = {}

    def of(self, call) -> Visibility:
        batch, _, tokens, _ = call.query.shape
        device = call.query.device
        key = id(call.mask), batch, tokens, call.causal, device
        if key not in self.known:  # the mask is held, so that no other gets its id
            rows = ROWS.get(device.type, ROWS["cuda"])
            self.known[key] = call.mask, Visibility(call.mask, batch, tokens, call.causal, rows, device)
        return self.known[key][1]


def _as_bool(tile: torch.Tensor) -> torch.Tensor:
    return tile if tile.dtype == torch.bool else tile > torch.finfo(tile.dtype).min / 2


def _readable(mask: torch.Tensor) -> torch.Tensor:
    known = isinstance(mask, torch.Tensor) and (mask.dim() == 2 or (mask.dim() == 4 and mask.shape[1] == 1))
    if known and mask.dim() == 4 and mask.is_floating_point():
        rows = mask.flatten(0, 2).split(256)
        known = all(bool(((some == 0) | ~_as_bool(some)).all()) for some in rows)  # no bias on the scores
    if not known:
        raise NotImplementedError(
            f"An attention mask of type {type(mask).__name__} and shape {tuple(getattr(mask, 'shape', ()))} cannot be "
            "observed: choose another attention, for example model.set_attn_implementation('sdpa')."
        )
    return mask
