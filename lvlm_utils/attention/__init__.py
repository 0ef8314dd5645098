"""Attention statistics of language model and vision towers while they run, streamed: never a tokens x tokens matrix."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel

from lvlm_utils.attention.equi import EquiPositions
from lvlm_utils.attention.intercept import intercept
from lvlm_utils.attention.record import DecoderRecorder, TowerRecorder
from lvlm_utils.attention.seen import Seen
from lvlm_utils.models import LVLM, bare, decoder_of, towers_of, visual_ids
from lvlm_utils.prompts import TokenGroups

STATISTICS = ("received", "last", "groups", "entropy", "variance", "received_from", "equi")
PARTITION = ("system", "visual", "context", "question")  # of TokenGroups: every real token is in exactly one
Groups = TokenGroups | Mapping[str, torch.Tensor]


@contextmanager
def observe(
    lvlm: LVLM | PreTrainedModel,
    groups: Groups | None = None,
    statistics: Sequence[str] | None = None,
    vision: bool = True,
    device: str | torch.device = "cpu",
) -> Iterator[Seen]:
    """Watch the attention of any prompt that runs inside the context; outputs stay the same, bit by bit.

        with lv.observe(lvlm, prompt.groups) as seen:
            lvlm.model(**prompt.inputs)
        seen.received, seen.last, seen.groups, seen.entropy, seen.vision.cls ...     (described in `Seen`)

    groups: `prompt.groups` (then system, visual, context and question are meant), or name -> bool (batch, tokens).
    statistics: which of STATISTICS; only these are computed. None: the first five, "groups" only if there are some.
    vision: also observe the towers: "received", "entropy" and "variance" as far as asked for, and always the [CLS] row.
    device: where results go once a forward pass is through.

    Works around `model(...)` and `generate(...)`. Seen is the latest prompt, that is the latest forward pass with an
    empty cache: not the decode steps, nor a prompt whose beginning is cached. Padding counts nowhere. Memory is linear
    in the tokens, and sums are float32 in bfloat16 and float16 models too. Raises ValueError for unknown names and for
    groups of another prompt, NotImplementedError for masks that cannot be read (flex attention) and scores with
    additions (soft caps, sinks).
    """
    model = bare(lvlm)
    masks = {} if groups is None else _masks(groups)
    wanted = _wanted(statistics, masks)
    stacked = torch.stack([*masks.values()], -1) if {"groups", "received_from"} & wanted else None
    seen = Seen(wanted, "language model", tuple(masks))
    equi = EquiPositions(masks.get("visual"), visual_ids(model)) if "equi" in wanted else None
    decoder, towers = decoder_of(model), towers_of(model) if vision else {}
    main = DecoderRecorder(decoder, wanted, stacked, equi, seen, device)
    with ExitStack() as stack:
        if equi:
            stack.enter_context(model.register_forward_pre_hook(equi.read_ids, with_kwargs=True))
            stack.enter_context(decoder.rotary_emb.register_forward_hook(equi.read_positions, with_kwargs=True))
        parts = [(decoder, main)]
        for name, tower in towers.items():
            parts.append((tower, TowerRecorder(tower, wanted, name, seen.towers, device)))
            main.towers.append(parts[-1][1])
        for module, recorder in parts:
            stack.enter_context(module.register_forward_pre_hook(recorder.start, with_kwargs=True))
            stack.enter_context(module.register_forward_hook(recorder.finish))
            stack.enter_context(intercept(recorder.see, module))
        yield seen


def _masks(groups: Groups) -> dict[str, torch.Tensor]:
    """name -> bool (batch, tokens)."""
    masks = {name: getattr(groups, name) for name in PARTITION} if isinstance(groups, TokenGroups) else dict(groups)
    shapes = {tuple(mask.shape) for mask in masks.values()}
    if len(shapes) != 1 or len(*shapes) != 2 or any(mask.dtype != torch.bool for mask in masks.values()):
        raise ValueError("groups is prompt.groups, or a mapping from names to bool masks of one shape (batch, tokens).")
    return masks


def _wanted(statistics: Sequence[str] | None, masks: dict[str, torch.Tensor]) -> set[str]:
    by_group = {"groups", "received_from"}
    if statistics is None:
        return set(STATISTICS[:5]) - (set() if masks else by_group)
    wanted = {"received" if name == "received_mean" else name for name in statistics}
    if isinstance(statistics, str) or wanted - set(STATISTICS):
        raise ValueError(f"statistics={statistics!r}: give a sequence of names. Known: {', '.join(STATISTICS)}.")
    if wanted & by_group and not masks:
        raise ValueError(f"{' and '.join(sorted(wanted & by_group))} need groups: observe(lvlm, prompt.groups, ...).")
    return wanted
