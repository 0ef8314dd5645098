"""Put samples about a few pictures to a model and return result rows: shared prefixes first, the rest in batches."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
import transformers
from PIL import Image

from lvlm_utils.evaluate.begun import Begun, begin
from lvlm_utils.evaluate.continued import answer_continued, begin_alike
from lvlm_utils.evaluate.encoded import Encoded, encode
from lvlm_utils.evaluate.prefix import Reply, answer_shared, clusters, stop_ids, until, word_ids
from lvlm_utils.evaluate.pruned import MEASURED, counts
from lvlm_utils.models import LVLM
from lvlm_utils.prompts import Prompt, assemble, blank, check_length, greedy_options, open_image, render
from lvlm_utils.pruning import Trace
from lvlm_utils.pruning.engine import told

# what a row holds that could not be asked
EMPTY = {
    "answer": None, "raw": None, "margin": float("nan"), "error": None, "seconds": 0.0, "n_context_tokens": 0,
    "n_visual_tokens": 0, "n_prefill_tokens": 0, **dict.fromkeys(MEASURED, float("nan")),
    "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
}  # fmt: skip


@dataclass
class Asked:
    """One sample, ready for the model."""

    row: Any  # of the table of wanted answers, as itertuples gives it
    number: int  # among the encoded prompts about the picture
    picture: Image.Image | None
    ids: list[int]
    n_context_tokens: int
    n_visual_tokens: int


def ask(
    lvlm: LVLM, pictures: list[pd.DataFrame], condition: str, batch_size: int, max_new_tokens: int, share: bool,
    trace: Trace | None = None, alike: int | None = None,
) -> list[dict]:  # fmt: skip
    """Result rows, in any order, for samples grouped by picture. What cannot be asked becomes a row with `error`.

    `trace` is that of the pruning inside which this is called, None where nothing is pruned; `alike` the layer up to
    which prompts share a beginning, where what is pruned of it depends on the question.
    """
    done, alone = [], []
    for rows in pictures:
        asked, coded, failed = _prepare(lvlm, rows, condition)
        done += failed
        if not share or not asked:
            alone += asked
            continue
        if trace is not None:
            if alike is None:
                found, left = _about_one_context(lvlm, asked, max_new_tokens, batch_size, trace)
            else:
                found, left = _begun(lvlm, asked, coded, alike, max_new_tokens, batch_size, trace)
            done, alone = done + found, alone + left
            continue
        for members, cuts in clusters([one.ids for one in asked], _visual_end(lvlm, asked)):
            if len(members) == 1:
                alone.append(asked[members[0]])
                continue
            group = [asked[member] for member in members]
            start = time.perf_counter()
            replies = answer_shared(lvlm, [g.ids for g in group], cuts, coded.extras, max_new_tokens, batch_size)
            done += _results(lvlm, group, replies, time.perf_counter() - start)
    alone.sort(key=lambda one: len(one.ids))  # equal lengths together: little padding
    for at in range(0, len(alone), batch_size):
        done += _batch(lvlm, alone[at : at + batch_size], partial(_separate, lvlm, max_new_tokens, trace), trace)
    return done


def _about_one_context(
    lvlm: LVLM, asked: list[Asked], max_new_tokens: int, batch_size: int, trace: Trace
) -> tuple[list[dict], list[Asked]]:
    """(result rows, what cannot share) of pruned prompts about one picture."""
    done, alone, contexts = [], [], {}
    for one in asked:
        contexts.setdefault(one.row.context, []).append(one)
    for members in contexts.values():
        first = assemble(lvlm, members[0].picture, members[0].row.context, members[0].row.question)
        for rows, cut in begin_alike([one.ids for one in members], first.groups):
            group = [members[row] for row in rows]
            start = time.perf_counter()
            try:
                ids = [one.ids for one in group]
                replies = answer_continued(lvlm, first, ids, cut, trace, max_new_tokens, batch_size) if cut else None
            except ValueError:  # of the method; it will say whose it is
                replies = None
            if replies is None:
                alone += group
            else:
                done += _results(lvlm, group, replies, time.perf_counter() - start)
    return done, alone


def _begun(
    lvlm: LVLM, asked: list[Asked], coded: Encoded, alike: int, max_new_tokens: int, batch_size: int, trace: Trace
) -> tuple[list[dict], list[Asked]]:
    """(result rows, what cannot share) of prompts about one picture that run by themselves from a layer on."""
    done, left = [], {one.number: one for one in asked}
    contexts = {number: one.row.context for number, one in left.items()}
    start = time.perf_counter()
    for begun in begin(lvlm, coded, list(left), _visual_end(lvlm, asked), alike):
        reading = time.perf_counter() - start

        def replies(group: list[Asked], begun: Begun = begun) -> list[Reply]:
            with begun.batch(lvlm, [one.number for one in group]) as prompt:
                return _generate(lvlm, prompt, max_new_tokens, trace)

        for numbers in begun.batches(contexts, batch_size):
            group = [left.pop(number) for number in numbers]
            done += _batch(lvlm, group, replies, trace, reading * len(group) / len(begun.cuts))
        start = time.perf_counter()
    return done, list(left.values())


def _batch(
    lvlm: LVLM, group: list[Asked], ask: Callable[[list[Asked]], list[Reply]], trace: Trace | None, before: float = 0.0
) -> list[dict]:
    """Result rows of prompts that are asked by themselves, with the seconds spent `before`.

    A prompt that a method cannot prune becomes a row with `error`.
    """
    start = time.perf_counter()
    try:
        replies = ask(group)
    except ValueError as error:
        if trace is None:
            raise
        if len(group) > 1:  # find out whose it is
            return [row for one in group for row in _batch(lvlm, [one], ask, trace)]
        return [_row(group[0].row, error=str(error), **_counts(group[0]))]
    return _results(lvlm, group, replies, before + time.perf_counter() - start)


def parse(raw: str) -> str | None:
    """ "yes" or "no" if that is the first word, else None."""
    word = re.match(r"\W*(yes|no)\b", raw, re.IGNORECASE)
    return word[1].lower() if word else None


def _prepare(lvlm: LVLM, rows: pd.DataFrame, condition: str) -> tuple[list[Asked], Encoded | None, list[dict]]:
    """(what can be asked, its encoding, rows of what cannot) for the samples of one picture."""
    try:
        picture = None
        if condition != "none":
            picture = open_image(rows["image"].iloc[0])
            picture = picture if condition == "original" else blank(picture, condition)
    except (FileNotFoundError, ValueError) as error:
        return [], None, [_row(row, error=str(error)) for row in rows.itertuples()]
    rendered, asked, failed = [], [], []
    for row in rows.itertuples():
        try:
            rendered.append((row, render(lvlm, picture is not None, row.context, row.question)))
        except ValueError as error:
            failed.append(_row(row, error=str(error)))
    if not rendered:
        return [], None, failed
    coded = encode(lvlm, picture, [text for _, text in rendered])
    for number, ((row, _), ids, n_context) in enumerate(zip(rendered, coded.ids, coded.n_context, strict=True)):
        one = Asked(row, number, picture, ids, n_context, ids.count(lvlm.image_token_id))
        try:
            check_length(lvlm, len(ids))
            asked.append(one)
        except ValueError as error:
            failed.append(_row(row, error=str(error), **_counts(one)))
    return asked, coded, failed


def _visual_end(lvlm: LVLM, asked: list[Asked]) -> int:
    """Behind the last visual token; the same in all prompts about one picture."""
    if not asked or lvlm.image_token_id not in asked[0].ids:
        return 0
    return len(asked[0].ids) - asked[0].ids[::-1].index(lvlm.image_token_id)


def _separate(lvlm: LVLM, max_new_tokens: int, trace: Trace | None, group: list[Asked]) -> list[Reply]:
    """Greedy replies to separate prompts, as one left-padded batch."""
    rows = [one.row for one in group]
    prompt = assemble(lvlm, [one.picture for one in group], [r.context for r in rows], [r.question for r in rows])
    return _generate(lvlm, prompt, max_new_tokens, trace)


@torch.inference_mode()
def _generate(lvlm: LVLM, prompt: Prompt, max_new_tokens: int, trace: Trace | None) -> list[Reply]:
    """Greedy replies to a left-padded batch."""
    stop = stop_ids(lvlm)
    with told(lvlm.model, prompt.groups):
        output = lvlm.model.generate(
            **prompt.inputs, **greedy_options(lvlm, max_new_tokens), eos_token_id=sorted(stop), output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    new = output.sequences[:, prompt.inputs["input_ids"].shape[1] :].tolist()
    lengths = prompt.inputs["attention_mask"].sum(-1).tolist()
    logits = output.logits[0].float().cpu()
    kept = [None] * len(lengths) if trace is None else counts(trace, prompt.groups)
    return [Reply(until(ids, stop), *rest) for ids, *rest in zip(new, logits, lengths, kept, strict=True)]


def _results(lvlm: LVLM, group: list[Asked], replies: list[Reply], seconds: float) -> list[dict]:
    """Result rows; every row gets an equal share of the seconds."""
    results = []
    for one, reply in zip(group, replies, strict=True):
        raw = lvlm.tokenizer.decode(reply.ids, skip_special_tokens=True).strip()
        yes, no = (reply.logits[list(word_ids(lvlm.tokenizer, word))] for word in ("yes", "no"))
        margin = float(yes.max() - no.max()) if len(yes) and len(no) else float("nan")
        found = {"answer": parse(raw), "raw": raw, "margin": margin, "n_prefill_tokens": reply.computed}
        found |= reply.kept or _unpruned(one)
        results.append(_row(one.row, seconds=seconds / len(group), **found, **_counts(one)))
    return results


def _counts(one: Asked) -> dict[str, int]:
    return {"n_context_tokens": one.n_context_tokens, "n_visual_tokens": one.n_visual_tokens}


def _unpruned(one: Asked) -> dict[str, float]:
    """MEASURED where every token goes into every layer."""
    tokens, visual, context = float(len(one.ids)), float(one.n_visual_tokens), float(one.n_context_tokens)
    return dict(zip(MEASURED, (tokens, visual, tokens - visual, visual, tokens - visual, context), strict=True))


def _row(row, **found) -> dict:
    unasked = ("Index", "image", "context", "question", "picture")
    return {k: v for k, v in row._asdict().items() if k not in unasked} | EMPTY | found
