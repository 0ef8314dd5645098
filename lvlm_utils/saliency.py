"""Information flow: attention times its gradient, summed over pairs of token groups while the gradient passes by.

Zhou et al. (2024, arXiv:2410.19732), Eq. 17 to 23, after Wang et al. (2023, arXiv:2305.14160). Conventions:

- I(i, j) = sum over heads of |A_ij dL/dA_ij|: row i is the query, column j the key, and information flows from the key
  to the query. Eq. 17 transposes A, so that its pairs are (source, target). Taken literally it would pair
  A_ji with the gradient of A_ij, and in a causal model one of the two is always 0.
- Eq. 17 takes the absolute value inside the sum over heads, the code of Wang et al. outside.
- dL/dA is the gradient of the loss by the softmax output of one layer, propagated back through all later layers.
- What a token sends to itself, I(i, i), is no flow between tokens: it is part of `groups`, but of no score.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from lvlm_utils.attention.intercept import Call, intercept
from lvlm_utils.attention.streaming import pair_sums
from lvlm_utils.attention.visibility import Views
from lvlm_utils.models import LVLM, evaluating
from lvlm_utils.prompts import Prompt
from lvlm_utils.pruning.engine import Stage, stage_of
from lvlm_utils.session import check_checkpointing, plain_arithmetic, session_of, with_groups

GROUPS = ("visual", "preserved", "pruned", "target")  # v, r, c and t of Eq. 18 to 23
# source and target of each score, as numbers of GROUPS
FLOWS = {"Svr": (0, 1), "Svc": (0, 2), "Srt": (1, 3), "Sct": (2, 3), "Svt": (0, 3)}
ABSOLUTE = ("inside", "outside")
Target = str | int | tuple[int, ...]


@dataclass(frozen=True)
class Flow:
    """Sums of I (see the module) over the pairs of GROUPS in every layer and prompt.

    groups (layers, batch, G, G): sums over the queries of one group and the keys of another, [query group, key group]:
    what flows from the second to the first. diagonal (layers, batch, G): the part of groups[..., g, g] that tokens send
    to themselves. pairs (layers, batch, G, G): pairs whose key comes before the query; only there something can flow.
    tokens (batch, G): tokens of each group in the whole prompt. pruned (batch, tokens): those taken as pruned. loss
    (batch,): -ln of the target's probability.
    """

    groups: Tensor
    diagonal: Tensor
    pairs: Tensor
    tokens: Tensor
    pruned: Tensor
    loss: Tensor

    @property
    def scores(self) -> pd.DataFrame:
        """Eq. 18 to 23 with the paper's denominators; rows (sample, layer), columns Svr Svc Srt Sct Svt Sww.

        The visual part counts as one token, so that the sums are divided by these numbers of tokens (NaN where 0):

        Svr: preserved      Srt: preserved x target
        Svc: pruned         Sct: pruned x target
        Svt: target         Sww: pairs in the layer that are in no other score
        """
        _, preserved, pruned, target = self.tokens.double().unbind(1)
        of_target = {"Srt": preserved * target, "Sct": pruned * target, "Svt": target}
        return self._table({"Svr": preserved, "Svc": pruned, **of_target})

    @property
    def pair_means(self) -> pd.DataFrame:
        """The same six sums, each divided by the number of its pairs in the layer: the mean of I."""
        return self._table({name: self.pairs[:, :, end, start] for name, (start, end) in FLOWS.items()})

    def _table(self, denominators: dict[str, Tensor]) -> pd.DataFrame:
        between = (self.groups - torch.diag_embed(self.diagonal)).clamp(min=0).double()
        other = torch.ones(len(GROUPS), len(GROUPS), dtype=torch.double)
        scores = {}
        for name, (start, end) in FLOWS.items():
            scores[name] = between[:, :, end, start] / denominators[name]
            other[end, start] = 0
        scores["Sww"] = (between * other).sum((2, 3)) / (self.pairs * other).sum((2, 3))
        layers, batch = scores["Sww"].shape
        index = pd.MultiIndex.from_product([range(batch), range(layers)], names=["sample", "layer"])
        return pd.DataFrame({name: score.T.flatten().numpy() for name, score in scores.items()}, index=index)


def information_flow(
    lvlm: LVLM, prompt: Prompt, target: Target | list[Target] = "yes", pruned: Tensor | None = None,
    absolute: str = "inside",
) -> Flow:  # fmt: skip
    """Flow of information between the groups of a prompt, towards the prediction of `target`, in every layer.

    target: the answer as text, as the id of one token, or as ids of several tokens in a tuple; a list has one for each
    row of a batch. Several tokens are read one after the other, and L = -ln p is summed over them.

    pruned: bool (batch, tokens), the text that is pruned (c); visual tokens and the target are never counted in it. By
    default what `lv.prune` drops, and where nothing prunes the model all of the context. The other text is preserved
    (r). To compare with an unpruned run on the same groups, pass `pruned=flow.pruned` of the pruned run.

    absolute: where the absolute value is taken, "inside" the sum over heads (Eq. 17) or "outside" it.

    Prompts of a batch do not touch each other. No gradient reaches a parameter, and the N x N attention never exists:
    memory is that of a forward and backward pass. In a float16 or bfloat16 model the gradients are in half precision
    too. ValueError for a target that the prompt does not allow.
    """
    if absolute not in ABSOLUTE:
        raise ValueError(f"absolute={absolute!r} is not one of {', '.join(ABSOLUTE)}.")
    model, layers = lvlm.model, lvlm.decoder.layers
    inputs, ids = _question(lvlm, prompt, target)
    before, new = prompt.groups.last.shape[1] - 1, ids.shape[1]  # columns before those that predict the target
    session = session_of(model)
    if session is not None and session.engine is not None and new > 1:
        raise ValueError("Inside lv.prune the target is one token.")
    check_checkpointing(model)
    recorder = _Recorder(model, layers, absolute)
    with (
        torch.inference_mode(False), torch.enable_grad(), _frozen(model), evaluating(model),
        with_groups(model, prompt.groups),
    ):  # fmt: skip
        with intercept(recorder.see, *layers):
            logits = model(**inputs, use_cache=False, logits_to_keep=new).logits
        last = stage_of(model, len(layers) - 1)
        # Some families give all logits. In float64, because 1 - p of a sure answer has few digits in float32.
        likely = logits[:, -new:].cpu().double().log_softmax(-1)
        likely = likely.gather(-1, ids.clamp(min=0)[..., None])[..., 0]
        loss = -likely.where(ids >= 0, 0).sum(-1)
        groups, pruned = _groups(prompt, pruned, pad(ids >= 0, (before, 0)), last)
        recorder.groups = groups.to(torch.promote_types(lvlm.dtype, torch.float32))
        loss.sum().backward()
    sums = [torch.stack(parts) for parts in zip(*recorder.sums, strict=True)]
    return Flow(*sums, groups.sum(1).cpu(), pruned.cpu(), loss.detach().cpu())


class _Recorder:
    """Catches the gradient of each layer's attention output, and keeps nothing but the sums over pairs of groups."""

    def __init__(self, model: PreTrainedModel, layers: torch.nn.ModuleList, absolute: str):
        self.model, self.absolute, self.views = model, absolute, Views()
        self.number = {id(part): n for n, layer in enumerate(layers) for part in layer.modules()}
        self.groups: Tensor  # (batch, tokens, G) of the whole prompt; set between the passes
        self.sums: list[tuple[Tensor, ...]] = [()] * len(layers)

    def see(self, call: Call) -> None:
        layer = self.number[id(call.module)]
        stage = stage_of(self.model, layer)
        if not call.output.requires_grad:  # the first layer: with frozen parameters the graph begins here
            call.output.requires_grad_()
        held = [call]
        call.output.register_hook(lambda gradient: self.take(layer, held.pop(), stage, gradient))

    @torch.no_grad()
    def take(self, layer: int, call: Call, stage: Stage | None, gradient: Tensor) -> None:
        groups = self.groups.to(gradient.device)
        if stage is not None:
            place, alive = stage.place.to(groups.device), stage.alive.to(groups.device)
            groups = groups.gather(1, place[..., None].expand(-1, -1, groups.shape[2])) * alive[..., None]
        view = self.views.of(call)
        with plain_arithmetic(gradient.device):
            sums, diagonal = pair_sums(
                call.query, call.key, call.value, gradient, call.scale, view, groups, self.absolute
            )
            pairs = groups.transpose(1, 2) @ (groups.cumsum(1) - groups)
        self.sums[layer] = sums.cpu(), diagonal.cpu(), pairs.cpu()


def _groups(prompt: Prompt, pruned: Tensor | None, target: Tensor, last: Stage | None) -> tuple[Tensor, Tensor]:
    """GROUPS (batch, columns, G) with `target` (batch, columns), and which columns of the prompt are pruned.

    `last` is what is left of the prompt in the last layer of a pruned model.
    """
    text, target = prompt.groups.text, target.to(prompt.groups.text.device)
    if pruned is not None and (pruned.dtype != torch.bool or pruned.shape != text.shape):
        raise ValueError(f"pruned has to be bool {tuple(text.shape)}, not {pruned.dtype} {tuple(pruned.shape)}.")
    if pruned is None and last is not None:
        pruned = ~torch.zeros_like(text).scatter(1, last.place.to(text.device), last.alive.to(text.device))
    pruned = (prompt.groups.context if pruned is None else pruned.to(text.device)) & text & ~prompt.groups.last
    masks = [mask & ~prompt.groups.last for mask in (prompt.groups.visual, text & ~pruned, pruned)]
    return torch.stack([*(pad(mask, (0, target.shape[1] - text.shape[1])) for mask in masks), target], -1), pruned


def _question(lvlm: LVLM, prompt: Prompt, target: Target | list[Target]) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs with all but the last token of the answer after the prompt; the answer (batch, tokens), -1 where it is
    shorter than others."""
    real = prompt.inputs["attention_mask"].bool()
    batch, tokens = real.shape
    targets = target if isinstance(target, list) else [target] * batch
    texts = prompt.text if isinstance(prompt.text, list) else [prompt.text]
    if len(targets) != batch:
        raise ValueError(f"target has {len(targets)} entries, the prompt {batch} rows.")
    answers = [torch.tensor(_answer(lvlm, text, one)) for text, one in zip(texts, targets, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-1)
    inputs, more = dict(prompt.inputs), ids.shape[1] - 1
    if more:
        read = ids[:, 1:] >= 0  # the others get any token, and are padding
        inputs |= {name: pad(value, (0, more)) for name, value in inputs.items() if value.shape == real.shape}
        inputs["input_ids"][:, tokens:] = ids[:, :-1].where(read, ids[:, :1]).to(real.device)
        inputs["attention_mask"][:, tokens:] = read.to(real.device)
    return inputs, ids


def _answer(lvlm: LVLM, text: str, target: Target) -> list[int]:
    """Token ids of a target; as text it goes on from the prompt, after a space unless the prompt ends in one."""
    if isinstance(target, str):
        written = text + target.strip() if text[-1:].isspace() else f"{text} {target.strip()}"
        before, whole = (lvlm.tokenizer(one, add_special_tokens=False).input_ids for one in (text, written))
        if not target.strip() or whole[: len(before)] != before:
            raise ValueError(f"target={target!r} cannot be cut off the prompt as tokens: give its token ids.")
        return whole[len(before) :]
    ids = [target] if isinstance(target, int) else list(target)
    size = lvlm.model.get_output_embeddings().weight.shape[0]
    if not ids or not all(0 <= one < size for one in ids):
        raise ValueError(f"target={target!r} is neither text nor ids of tokens, 0 to {size - 1}.")
    return ids


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """No parameter takes part in the gradient; those that did will again."""
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter in free:
            parameter.requires_grad_(True)
