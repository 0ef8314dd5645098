"""Attention statistics of language model and vision towers while they run, streamed: never a tokens x tokens matrix."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lvlm_utils.attention.equi import last_rows, positions_of
from lvlm_utils.attention.intercept import Call, intercept
from lvlm_utils.attention.streaming import STREAMED, stream
from lvlm_utils.attention.towers import OBSERVED, Towers
from lvlm_utils.attention.visibility import Views
from lvlm_utils.families import decoder_of
from lvlm_utils.models import LVLM, bare
from lvlm_utils.session import Session, is_prompt, joined, read_by
from lvlm_utils.token_groups import PARTITION, TokenGroups, is_visual

STATISTICS = ("received", "last", "groups", "entropy", "variance", "received_from", "equi", "hidden")
BY_GROUP = {"groups", "received_from"}
Groups = TokenGroups | Mapping[str, Tensor]


class Seen:
    """Attention statistics of the latest prompt, in the language model or in a vision tower.

    With A the attention of a layer, zero in the rows of padding, these are tensors (layers, batch, heads, ...), float32
    unless the model computes in float64:

    received (..., tokens): column sums, sum_i A_ij: the attention that token j gets from all queries i.
    received_mean (..., tokens): the same divided by the number of queries that see j; 0 if none does.
    received_from (..., G, tokens): column sums over the queries of each group in `group_names`.
    groups (..., G, G): sums of A over the queries of one group and the keys of another, [query group, key group].
    last (..., tokens): the row of the last token, whose prediction is the answer.
    equi (..., tokens): the last token's row as if the picture were one token: all visual keys share one position, and
        the text goes on right after it.
    entropy (..., tokens): of row i, -sum_j A_ij ln A_ij, in nats; 0 for padding.
    variance (..., tokens): of A_ij over the keys j that query i sees; 0 for padding.
    cls (..., tokens): only in towers with a [CLS] token: its row, over [CLS] itself (the first) and the patches.
    hidden (layers, batch, tokens, width): what goes into each layer, in the model's own dtype.

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
        self._values: dict[str, Tensor | list[Tensor]] = {}

    @property
    def vision(self) -> "Seen":
        """The vision tower that ran; ValueError if there was none, or more than one."""
        if len(self.towers) != 1:
            found = "more than one tower ran" if self.towers else "no tower was observed (with vision=True, a picture)"
            raise ValueError(f"seen.vision: {found}. seen.towers has: {', '.join(self.towers) or 'nothing'}.")
        return next(iter(self.towers.values()))

    @property
    def received_mean(self) -> Tensor | list[Tensor]:
        received, seers = self.received, self._values["seers"]
        if isinstance(received, list):
            return [r / s.clamp(min=1) for r, s in zip(received, seers, strict=True)]
        return received / seers.clamp(min=1)

    def take(self, values: dict[str, Tensor | list[Tensor]]) -> None:
        """Replace what was seen; "seers" is the number of queries that see each key, (layers, batch, 1, tokens)."""
        self._values = values

    def __getattr__(self, name: str) -> Tensor | list[Tensor]:
        if name.startswith("_"):  # a copy that is being made has none of them yet
            raise AttributeError(name)
        if name not in self._names:
            asked = ", ".join(sorted(self._names))
            raise AttributeError(f"{name!r} of the {self._where} was not observed. Asked for: {asked or 'nothing'}.")
        if name not in self._values:
            raise RuntimeError(f"The {self._where} has not run yet: call the model inside `with lv.observe(...)`.")
        return self._values[name]

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._names})

    def __repr__(self) -> str:
        shapes = [
            f"{name} {tuple(value.shape) if isinstance(value, Tensor) else f'list of {len(value)}'}"
            for name, value in self._values.items()
            if name in self._names
        ]
        lines = [f"Seen of the {self._where}: {', '.join(shapes) or 'nothing yet'}"]
        lines += [f"groups: {', '.join(self.group_names)}"] if self.group_names else []
        return "\n".join([*lines, *(f"  {tower!r}" for tower in self.towers.values())])


@contextmanager
def observe(
    lvlm: LVLM | PreTrainedModel,
    groups: Groups | None = None,
    statistics: Sequence[str] | None = None,
    vision: bool = True,
    device: str | torch.device = "cpu",
) -> Iterator[Seen]:
    """Watch the attention of any prompt that this thread runs inside the block; outputs stay the same, bit by bit.

        with lv.observe(lvlm, prompt.groups) as seen:
            lv.forward(lvlm, prompt)
        seen.received, seen.last, seen.groups, seen.entropy, seen.vision.cls ...     (described in `Seen`)

    lvlm: what lv.load returns, or a bare transformers model.
    groups: `prompt.groups` (then system, visual, context and question are meant), or name -> bool (batch, tokens).
    statistics: any of "received", "last", "groups", "entropy", "variance" (by default these five, "groups" only if
        groups are given), "received_from", "equi", "hidden". Only what is asked for is computed.
    vision: also observe the towers: "received", "entropy" and "variance" as far as asked for, and always the [CLS] row.
    device: where results go once a forward pass is through.

    Works around `model(...)` and `generate(...)`. Seen is the latest prompt: the latest forward pass with an empty
    cache. Decode steps are ignored, and so is a last token that is read alone after the rest of its prompt, because it
    looks like one. Padding is ignored everywhere. Memory is linear in the tokens, and sums are float32 in bfloat16 and
    float16 models and under autocast too. Raises ValueError for unknown names, for groups of another prompt and for a
    prompt that is read in pieces or by assisted decoding; NotImplementedError for masks that cannot be read (flex
    attention) and scores with additions (soft caps, sinks).
    """
    model = bare(lvlm)
    masks = {} if groups is None else _masks(groups)
    seen = Seen(_wanted(statistics, masks), "language model", tuple(masks))
    observer = _Observer(model, masks, seen, device)
    with joined(model, observer) as session, ExitStack() as stack:
        observer.watch(session, vision, stack)
        yield seen


def _masks(groups: Groups) -> dict[str, Tensor]:
    """name -> bool (batch, tokens)."""
    masks = {name: getattr(groups, name) for name in PARTITION} if isinstance(groups, TokenGroups) else dict(groups)
    shapes = {tuple(mask.shape) for mask in masks.values()}
    if len(shapes) != 1 or len(*shapes) != 2 or any(mask.dtype != torch.bool for mask in masks.values()):
        raise ValueError("groups is prompt.groups, or a mapping from names to bool masks of one shape (batch, tokens).")
    return masks


def _wanted(statistics: Sequence[str] | None, masks: dict[str, Tensor]) -> set[str]:
    if statistics is None:
        return set(STATISTICS[:5]) - (set() if masks else BY_GROUP)
    wanted = {"received" if name == "received_mean" else name for name in statistics}
    if isinstance(statistics, str) or wanted - set(STATISTICS):
        raise ValueError(f"statistics={statistics!r}: give a sequence of names. Known: {', '.join(STATISTICS)}.")
    if wanted & BY_GROUP and not masks:
        raise ValueError(f"{' and '.join(sorted(wanted & BY_GROUP))} need groups: observe(lvlm, prompt.groups, ...).")
    return wanted


class _Observer:
    """Turns the attention calls of a prompt into `seen`."""

    def __init__(self, model: PreTrainedModel, masks: dict[str, Tensor], seen: Seen, device: torch.device | str):
        self.model, self.seen, self.device, self.wanted = model, seen, device, seen._names
        self.decoder, self.visual = decoder_of(model), masks.get("visual")
        self.groups = torch.stack([*masks.values()], -1) if masks and BY_GROUP & self.wanted else None
        self.layer = {id(part): n for n, layer in enumerate(self.decoder.layers) for part in layer.modules()}
        self.layers: dict[int, dict[str, Tensor]] | None = None  # None outside a prompt
        self.towers: Towers | None = None

    def watch(self, session: Session, vision: bool, stack: ExitStack) -> None:
        self.session = session
        stack.callback(session.hook(self.decoder, self._start, self._finish))
        for number, layer in enumerate(self.decoder.layers):
            if number == 0 or "hidden" in self.wanted:
                stack.callback(session.hook(layer, self._before_layer))
        stack.enter_context(intercept(self._see, *self.decoder.layers))
        if vision:
            names = [name for name, statistic in OBSERVED.items() if statistic in self.wanted]
            self.towers = Towers(session, dict.fromkeys([*names, "seers", "cls"]), whole=True, after=self._tower_seen)
            stack.callback(self.towers.hooks.close)

    def new_prompt(self) -> None:
        self.seen.take({})
        self.seen.towers.clear()

    def _start(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        x = read_by(args, kwargs)
        if not is_prompt(kwargs):
            self.layers = None
            if x.shape[1] > 1:
                raise ValueError("A prompt that is read in pieces cannot be observed: give it to the model as a whole.")
            return
        self.layers, self.views = {}, Views()
        self.positions = positions_of(kwargs, x)
        self.hidden: list[Tensor] = []
        ids = self.session.ids
        if self.visual is not None:
            self.visual_now = self._for_beams(self.visual, len(x))
        else:
            self.visual_now = None if ids is None else is_visual(self.model, ids)

    def _for_beams(self, masks: Tensor, batch: int) -> Tensor:
        """Masks of every prompt, once for each of its rows in the batch."""
        beams = self.session.beams
        return masks.repeat_interleave(beams, 0) if len(masks) * beams == batch else masks

    def _before_layer(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.layers is None:
            return
        self.angles = self.angles if self.hidden else kwargs["position_embeddings"]
        self.hidden.append((args[0] if args else kwargs["hidden_states"]).detach())

    def _see(self, call: Call) -> None:
        if self.layers is None or (number := self.layer[id(call.module)]) in self.layers:
            return  # a decode step, or a backward pass that computes the attention once more
        batch, _, tokens, _ = call.query.shape
        view, groups = self.views.of(call), None
        if self.groups is not None:
            groups = self._for_beams(self.groups, batch).to(call.query.device)
            if groups.shape[:2] != (batch, tokens):
                raise ValueError(
                    f"The groups are of {tuple(groups.shape[:2])} (prompts, tokens), the attention is of "
                    f"{(batch, tokens)}: give the groups of this very prompt, and none inside lv.prune."
                )
        values = stream(call.query, call.key, call.scale, view, self.wanted & {*STREAMED}, groups)
        values["seers"] = view.seers[:, None].expand(batch, -1, -1)
        rotary = self.decoder.rotary_emb
        self.layers[number] = values | last_rows(
            call, view, self.wanted, rotary, self.positions, self.angles, self.visual_now
        )

    def _finish(self, decoder: nn.Module, args: tuple, output: object) -> None:
        layers = [self.layers[n] for n in sorted(self.layers)] if self.layers else []
        if layers:
            values = {name: together([one[name] for one in layers], 0, self.device) for name in layers[0]}
            if "hidden" in self.wanted:
                values["hidden"] = together(self.hidden, 0, self.device)
            self.seen.take(values)
            if self.towers is not None:
                self.towers.new_prompt()  # what the towers showed is in `seen`
        self.layers = self.views = None
        self.hidden, self.angles = [], None

    def _tower_seen(self, name: str) -> None:
        pictures = [picture.seen for picture in self.towers.pictures if picture.tower == name]
        names = {OBSERVED.get(one, one): one for one in pictures[0]}
        seen = Seen({*names} - {"seers"}, f"tower {name!r}")
        values = {to: [torch.stack(picture[one]) for picture in pictures] for to, one in names.items()}
        seen.take({to: together(parts, 1, self.device) for to, parts in values.items()})
        self.seen.towers[name] = seen


def together(parts: list[Tensor], axis: int, device: torch.device | str) -> Tensor | list[Tensor]:
    """One tensor on `device` with a new axis where all shapes agree, else the list."""
    if len({part.device for part in parts}) > 1:  # layers on several GPUs
        parts = [part.to(device) for part in parts]
    if len({part.shape for part in parts}) > 1:
        return [part.to(device) for part in parts]
    return torch.stack(parts, axis).to(device)
