"""Answers of a model to a table of samples: a table in, rows out, resumable, with every failure a row."""

import json
import os
import re
import sys
import time
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lvlm_utils import prompts
from lvlm_utils.methods import METHODS, Method, Trace, fitted, named
from lvlm_utils.models import LVLM, evaluating
from lvlm_utils.prefix import Ends, Reply, can_share, clusters, separate, shared
from lvlm_utils.pruning.engine import pruning
from lvlm_utils.results import COLUMNS, MEASURED, Store, Unreadable, digest, fingerprint, path_of, revision_of, storable
from lvlm_utils.session import session_of
from lvlm_utils.token_groups import inside

CONDITIONS = ("original", "white", "black", "none")
META = ["sample", "image_id", "group", "length", "label", "target", "kind", "size"]  # copied from the samples
COUNTS = ("n_context_tokens", "n_visual_tokens", "n_prefill_tokens", "n_computed_tokens")
NUMBERS = ("margin", "seconds", *MEASURED)
USAGE = 'give a method such as lv.methods.FastV(keep=0.5), or {"name": "fastv", "keep": 0.5}, or a list of such.'
PLAIN = dict.fromkeys(("yes", "y", "true", "1", "1.0"), "yes") | dict.fromkeys(("no", "n", "false", "0", "0.0"), "no")
YES_OR_NO = re.compile(
    r"\byes\s*(or|/)\s*no\b|^\W*(is|are|am|was|were|do|does|did|has|have|had|(can|could|will|would)(?!\s+you\b)|shall|"
    r"should|may|might|must|isn't|aren't|doesn't|don't)\b", re.IGNORECASE,
)  # fmt: skip
DASHES, APOSTROPHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "\u2018\u2019\u02bc"
SIGNS = {ord(one): "-" for one in DASHES} | {ord(one): "'" for one in APOSTROPHES}


def answer(
    lvlm: LVLM, samples: pd.DataFrame, image: str = "original",
    prune: Method | Mapping[str, Any] | Sequence[Method | Mapping[str, Any]] | None = None,
    out: str | Path | None = None, batch_size: int = 8, max_new_tokens: int | None = None,
    stop: Sequence[str] | None = None, share: bool = True, progress: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Ask every row of `samples` greedily; one row of results per sample, in the same order.

    samples: the columns image (path or picture), context and question; where there are any, also sample, image_id,
        group, length, label, target, kind, size, and `choices`, a list of short answers. `label` is one of the choices;
        yes or no (also True, 1, "TRUE") for a question that can be answered so; else any text. It may be missing.
    image: the picture shown, "original", a "white" or "black" one of the same size, or "none".
    prune: a method of lv.methods, {"name": of one, **options}, or a list of such, which act in this order.
    out: a parquet file. Answers in it are used again unless weights, code, settings, picture or question have changed
        (`results.fingerprint`); failures are asked again. Several runs may use one file.
    batch_size: prompts at once.
    max_new_tokens: by default 4 for questions to be answered with yes or no, 64 for others.
    stop: generation ends when the reply begins with one of these words; by default yes and no for questions to be
        answered so, none for others.
    share: read what prompts about one picture have in common only once; the answers are those of separate prompts.
    progress: show a bar.

    Columns of the result, besides those of the samples:

    raw, answer: the reply; and the choice (or yes, or no) with which it begins, or all of it for a free question.
    correct: whether answer and label agree; as texts without case and punctuation at the ends; missing without a label.
    margin: the logit of yes minus that of no (the best of their spellings) at the first new token.
    n_prefill_tokens, n_computed_tokens: the length of the prompt; how many of its tokens were read for this row.
    mean_tokens, mean_visual, mean_text: with pruning, the tokens that go into a layer, mean over the layers.
    final_visual, final_text, final_context: with pruning, the tokens that go into the last layer.
    keep: the `keep` of every method that has one, as given, joined by +.
    seconds: the time of the batch, divided by its rows.
    error: why the row failed; one warning counts such rows.

    Rows are split over the processes of `accelerate launch`.

    Raises ValueError for a wrong `image` or `prune`, a missing column, and a label or choices that do not fit.
    """
    if image not in CONDITIONS:
        raise ValueError(f"image={image!r} is not one of {', '.join(CONDITIONS)}.")
    if missing := {"image", "context", "question"} - set(samples.columns):
        raise ValueError(f"The samples have no column {', '.join(sorted(missing))}.")
    if batch_size < 1 or (max_new_tokens is not None and max_new_tokens < 1):
        raise ValueError(f"batch_size={batch_size} and max_new_tokens={max_new_tokens} must be at least 1.")
    if isinstance(stop, str):
        raise ValueError(f"stop={stop!r} is one text: give a list of words.")
    if (session := session_of(lvlm.model)) and session.engine:
        raise ValueError("answer() inside an lv.prune would take its answers for unpruned ones: use prune=.")
    methods = _methods(prune)
    fit = [fitted(lvlm, method) for method in methods]
    share = share and not any(method.uses_question for method in fit)
    if share and not can_share(lvlm):
        warnings.warn(f"{lvlm.name} cannot share prefixes here: slower, same answers.", stacklevel=2)
        share = False
    store, wanted = Store(out), _wanted(lvlm, samples, image, methods, max_new_tokens, stop)
    try:
        used = [[type(method), _options(method, readable=True)] for method in methods]
        answered_by = fingerprint(lvlm, _ask, pruning if methods else None, used)
        wanted["key"] = [digest([answered_by, content]) for content in wanted["content"]]
        known = store.rows[store.rows["error"].isna()]
    except Unreadable as reason:
        warnings.warn(f"{reason}: these answers are not reused.", stacklevel=2)
        wanted["key"], known = [f"unreadable {one}" for one in wanted["identity"]], store.rows.iloc[:0]
    state = _processes(lvlm)
    rank, processes = (0, 1) if state is None else (state.process_index, state.num_processes)
    if (stale := int(store.stale(wanted).sum())) and rank == 0:
        tqdm.write(f"{Path(out).name}: {stale} stale rows dropped: what they depend on has changed.", sys.stderr)
    # split before looking at what is done: a process that starts late may already see rows of another
    mine = [rows for _, rows in wanted.drop_duplicates("key").groupby("picture", sort=False)][rank::processes]
    left = [rows[~rows["key"].isin(known["key"])] for rows in mine]
    pictures, fresh = [rows for rows in left if len(rows)], []
    chunks = [pictures[at : at + max(4, batch_size)] for at in range(0, len(pictures), max(4, batch_size))]
    with ExitStack() as stack:
        stack.enter_context(evaluating(lvlm.model))
        trace = [stack.enter_context(pruning(lvlm.model, method)) for method in fit]
        hidden = not progress or rank > 0 or not pictures
        bar = stack.enter_context(tqdm(total=len(pictures), unit="picture", disable=hidden))
        for chunk in chunks:
            rows = _ask(lvlm, chunk, image, batch_size, share, trace[0] if trace else None)
            store.add(_complete(wanted[wanted["key"].isin([row["key"] for row in rows])], rows))
            fresh += rows
            bar.update(len(chunk))
    if state is not None:
        from accelerate.utils import gather_object

        fresh = gather_object(fresh)
    if rank == 0:
        store.finish(wanted)
    if state is not None:
        state.wait_for_everyone()  # nobody reads the file of the next call before it is whole
    known = known[known["key"].isin(wanted["key"])]
    results = _complete(wanted, [*known.to_dict("records"), *fresh]).set_index(samples.index)
    if failed := int(results["error"].notna().sum()):
        first = results["error"].dropna().iloc[0]
        warnings.warn(f"{failed} of {len(results)} rows failed, see the column error. First: {first}", stacklevel=2)
    return results


def summary(results: pd.DataFrame) -> dict[str, int]:
    """Counts: rows, unparsed (the reply begins with none of the choices), errors (not answered), and unlabelled
    (without a label, so that `correct` is missing)."""
    errors = results["error"].notna()
    counted = {"unparsed": ~results["parsed"].astype(bool) & ~errors, "errors": errors}
    counted["unlabelled"] = results["correct"].isna()
    return {"rows": len(results)} | {name: int(which.sum()) for name, which in counted.items()}


def _processes(lvlm: LVLM):
    """accelerate's state when this is one of several processes (`accelerate launch` sets WORLD_SIZE), else None."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes < 2:
        return None
    from accelerate import PartialState

    state = PartialState(cpu=lvlm.device.type == "cpu")
    if state.num_processes != processes:  # each would take itself for the only one and overwrite the others' files
        raise RuntimeError(f"WORLD_SIZE is {processes}, but accelerate sees {state.num_processes} process(es).")
    return state


# What is wanted ------------------------------------------------------------------------------------------------------
def _methods(prune: Any) -> list[Method]:
    several = prune if isinstance(prune, list | tuple) else [prune]
    made = [named(**one) if isinstance(one, Mapping) and "name" in one else one for one in several]
    if prune is not None and not (made and all(isinstance(one, Method) and is_dataclass(one) for one in made)):
        raise ValueError(f"prune={prune!r}: {USAGE} A method is a dataclass.")
    return [] if prune is None else made


def _options(method: Method, readable: bool = False) -> dict[str, Any]:
    """All options as JSON. One that cannot be JSON counts by its name, or, if it is to be `readable`, is Unreadable."""
    stated = {}
    for name in dict.fromkeys([*(one.name for one in fields(method)), *vars(method)]):
        value = getattr(method, name)
        try:
            stated[name] = json.loads(json.dumps(value, default=_listed, allow_nan=False))
        except (TypeError, ValueError) as error:
            if readable:
                raise Unreadable(f"The option {name} of {type(method).__name__} is no JSON") from error
            stated[name] = getattr(value, "__qualname__", type(value).__qualname__)
    return stated


def _listed(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__qualname__} is no list")


def _wanted(
    lvlm: LVLM, samples: pd.DataFrame, condition: str, methods: Sequence[Method], limit: int | None,
    stop: Sequence[str] | None,
) -> pd.DataFrame:  # fmt: skip
    """One row per sample: what is asked, how its answer is read, what it depends on, and whose it is."""
    wanted = samples.reindex(columns=[*META, "choices", "image", "context", "question"]).reset_index(drop=True)
    names, options = {one: name for name, one in METHODS.items()}, [_options(method) for method in methods]
    settings = {
        "condition": condition,
        "method": "+".join(names.get(type(method), type(method).__name__) for method in methods) or "none",
        "keep": "+".join(json.dumps(one["keep"]) for one in options if "keep" in one) or None,
        "options": json.dumps(options if len(options) > 1 else [*options, {}][0], sort_keys=True),
        "model": lvlm.name, "path": path_of(lvlm), "revision": revision_of(lvlm),
        "dtype": str(lvlm.dtype).removeprefix("torch."), "attention": lvlm.attention,
    }  # fmt: skip
    shown, found = {}, []
    for row, index in zip(wanted.itertuples(), samples.index, strict=True):
        choices, label = _read_label(row, index)
        yes_or_no = choices == ("yes", "no")
        tokens = limit or (4 if yes_or_no else 64)
        words = choices * yes_or_no if stop is None else tuple(stop)
        at = storable(row.image) if isinstance(row.image, str | Path) else id(row.image)
        shown[at] = shown[at] if at in shown else _shown(row.image, condition)
        asked = [condition, str(row.sample), _text(row.context), _text(row.question), tokens, words]
        whose = [*asked, shown[at] if condition == "none" or isinstance(at, int) else at, *settings.values()]
        found.append([choices, label, tokens, words, at, [*asked, shown[at]], digest(whose)])
    columns = ("choices", "label", "max_new_tokens", "stop", "picture", "content", "identity")
    more = {name: pd.Series([row[i] for row in found], dtype=object) for i, name in enumerate(columns)}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return wanted.assign(**settings, **more, versions=versions)


def _text(cell: Any) -> str | list[str]:
    """A text; of anything else its type and its value, because its row will say what is wrong."""
    return cell if isinstance(cell, str) else [type(cell).__name__, str(cell)]


def _shown(picture: Any, condition: str) -> str:
    """What a picture shows. For one that cannot be opened it is the error, because its rows are asked again anyway."""
    try:
        if condition == "none":
            return ""
        is_file = isinstance(picture, str | Path)
        return digest(Path(picture).read_bytes()) if is_file else fingerprint(prompts.open_image(picture))
    except Exception as error:  # the row will say so
        return type(error).__name__


def _missing(cell: Any) -> bool:
    return pd.api.types.is_scalar(cell) and (pd.isna(cell) or not str(cell).strip())


def _read_label(row: Any, index: Any) -> tuple[tuple[str, ...], Any]:
    """(choices, label) of a sample; no choices for a free question, None for a missing label."""
    label, question = None if _missing(row.label) else row.label, str(row.question)
    said = fold(label) if pd.api.types.is_scalar(label) else repr(label)
    if not _missing(row.choices):
        given = [] if pd.api.types.is_scalar(row.choices) else list(row.choices)
        by_text = {fold(choice): str(choice) for choice in given if not _missing(choice)}
        if not given or len(by_text) < len(given):
            raise ValueError(f"Row {index!r}: choices={row.choices!r} is no list of different short answers.")
        choices = tuple(by_text.values())
        if set(by_text) == {"yes", "no"}:
            by_text, choices = PLAIN, ("yes", "no")
    else:
        by_text, choices = PLAIN, ("yes", "no")
        sure = isinstance(label, bool | np.bool_) or said in choices  # Y, N, 1 and 0 may be answers of their own
        if not sure and not YES_OR_NO.search(question) and pd.api.types.is_scalar(label):
            return (), label
    if label is not None and said not in by_text:
        raise ValueError(f"Row {index!r}: label={label!r} is none of {', '.join(choices)}, with which {question!r} is "
                         "to be answered: correct it, leave it empty, or give `choices`.")  # fmt: skip
    return choices, None if label is None else by_text[said]


# What is said --------------------------------------------------------------------------------------------------------
def fold(value: str | int | float) -> str:
    """A text, or a number as people write it, for comparison: in one form of Unicode (NFKC, plain dashes and
    apostrophes), without case, with single spaces, and without punctuation at the ends (but for the minus and the point
    of a number). A text that consists of punctuation alone stays as it is."""
    whole = isinstance(value, float | np.floating) and float(value).is_integer()  # a column with gaps makes 3 a 3.0
    text = str(int(value) if whole else value)
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(SIGNS)
    text = " ".join(text.split())
    inner = [at for at, letter in enumerate(text) if unicodedata.category(letter)[0] not in "PZC"]
    if not inner:
        return text
    sign = re.search(r"-?\.?$", text[: inner[0]])[0] if text[inner[0]].isdigit() else ""
    return text[inner[0] - len(sign) : inner[-1] + 1]


def parse(raw: str, choices: Sequence[str] = ("yes", "no")) -> str | None:
    """The choice with which a reply begins, the longest of several, as whole words in any case; else None."""
    said = fold(raw)
    for choice in sorted(choices, key=len, reverse=True):
        after = said.removeprefix(fold(choice))
        goes_on = unicodedata.category(after[:1] or " ")[0] in "LMN" or re.match(r"[-'_]\w|[.,:/]\d", after)
        if said.startswith(fold(choice)) and not goes_on:
            return choice
    return None


def _complete(wanted: pd.DataFrame, found: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Results in the order of `wanted`; labels and the like come from there, never from an old file."""
    columns = ["key", "raw", "error", *COUNTS, *NUMBERS]
    found = pd.DataFrame(found, columns=columns).drop_duplicates("key", keep="last").set_index("key")
    if lost := int((~wanted["key"].isin(found.index)).sum()):
        raise RuntimeError(f"{lost} of {len(wanted)} rows were not answered: did another process end early?")
    results = pd.concat([wanted.reset_index(drop=True), found.reindex(wanted["key"]).reset_index(drop=True)], axis=1)
    for name in ("raw", "error"):  # None where there is none, whether just asked or read from a file
        results[name] = results[name].astype(object).where(results[name].notna(), None)
    results = results.astype(dict.fromkeys(COUNTS, int) | dict.fromkeys(NUMBERS, float))
    said = [raw and parse(raw, choices) if choices else raw for raw, choices in zip(results["raw"], results["choices"])]
    right = [None if label is None else bool(one) and fold(one) == fold(label)
             for one, label in zip(said, results["label"])]  # fmt: skip
    results["answer"] = pd.Series([one or None for one in said], dtype=object)
    results["parsed"] = results["answer"].notna()
    results["correct"] = pd.array(right, dtype="boolean" if None in right else bool)
    return results[COLUMNS]


# Asking --------------------------------------------------------------------------------------------------------------
@dataclass
class Asked:
    """One sample on its way to the model."""

    row: Any  # of the table of wanted answers, as itertuples gives it
    picture: Image.Image | None = None
    ids: list[int] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    ends: tuple[int, ...] = ()  # the number of tokens up to the end of the context, and up to the end of the picture


def _ask(
    lvlm: LVLM, pictures: list[pd.DataFrame], condition: str, batch_size: int, share: bool, trace: Trace | None
) -> list[dict]:
    """What was found, in any order, for samples grouped by picture. `trace` is that of the pruning that is on."""
    done, alone = [], []
    for rows in pictures:
        asked = _each([Asked(row) for row in rows.itertuples()], partial(_prepare, lvlm, condition))
        done += [one for one in asked if isinstance(one, dict)]
        ready = [one for one in asked if isinstance(one, Asked)]
        for group, cuts in _sharing(ready, trace is not None) if share else [(ready, None)]:
            found = _together(lvlm, group, cuts, batch_size, trace) if cuts and len(group) > 1 else []
            done, alone = done + found, alone + ([] if found else group)
    alone.sort(key=lambda one: len(one.ids))  # equal lengths together: little padding
    for at in range(0, len(alone), batch_size):
        done += _each(alone[at : at + batch_size], partial(_separately, lvlm, trace))
    return done


def _each(asked: list[Asked], run: Callable[[list[Asked]], list]) -> list:
    """What `run` gives of all; where that fails, of each alone. What fails alone becomes a row with `error`."""
    try:
        return run(asked)
    except Exception as error:  # whatever it is: the others are to be answered
        if len(asked) > 1:
            return [found for one in asked for found in _each([one], run)]
        return [_found(asked[0], error=f"{type(error).__name__}: {error}")]


def _prepare(lvlm: LVLM, condition: str, asked: list[Asked]) -> list[Asked | dict]:
    """Samples about one picture, tokenised in full, one by one; the picture is processed once."""
    picture = None if condition == "none" else prompts.open_image(asked[0].row.image)
    picture = picture if condition in ("original", "none") else prompts.blank(picture, condition)
    rendered = [prompts.render(lvlm, picture is not None, one.row.context, one.row.question) for one in asked]
    _, replaced = prompts.process(lvlm, [prompts.pictures_of(picture)], [None], rendered[:1])
    rendered = [one.expanded(replaced[0]) for one in rendered]
    batch = lvlm.tokenizer([one.text for one in rendered], **prompts.tokenizer_options(lvlm, rendered[0].text))
    prepared = []
    for one, text, ids, offsets in zip(asked, rendered, batch["input_ids"], batch["offset_mapping"], strict=True):
        context = inside(torch.from_numpy(np.array(offsets)), text.spans.get("context"))  # numpy reads lists faster
        places = [context.nonzero()[:, 0].tolist(), [at for at, i in enumerate(ids) if i == lvlm.image_token_id]]
        one.picture, one.ids, one.ends = picture, ids, tuple(max(some, default=-1) + 1 for some in places)
        one.counts = dict(zip(COUNTS, (*map(len, places), len(ids))))
        try:
            prompts.check_length(lvlm, len(ids))
            prepared.append(one)
        except ValueError as error:
            prepared.append(_found(one, error=str(error)))
    return prepared


def _sharing(asked: list[Asked], pruned: bool) -> Iterator[tuple[list[Asked], list[int]]]:
    """Prompts about one picture that share a beginning, with their cuts; if it is pruned, about one context too.

    A beginning that is pruned ends after the first token of the question or template that all share, so that its last
    token is one that stays anyway.
    """
    contexts = defaultdict(list)
    for one in asked:
        contexts[pruned and one.row.context].append(one)
    for members in contexts.values():
        least = max(members[0].ends) + 1 if pruned else members[0].ends[1]
        for rows, cuts in clusters([one.ids for one in members], least):
            yield [members[row] for row in rows], cuts


def _assembled(lvlm: LVLM, asked: list[Asked]) -> prompts.Prompt:
    contexts, questions = ([getattr(one.row, name) for one in asked] for name in ("context", "question"))
    return prompts.assemble(lvlm, [one.picture for one in asked], contexts, questions)


def _together(lvlm: LVLM, asked: list[Asked], cuts: list[int], batch_size: int, trace: Trace | None) -> list[dict]:
    """Replies to prompts whose shared beginning is read once; no rows where that fails."""
    ids = [one.ids for one in asked]
    try:
        return _results(lvlm, asked, lambda: shared(lvlm, _assembled(lvlm, asked[:1]), ids, cuts, _ends(lvlm, asked),
                                                    batch_size, trace))  # fmt: skip
    except Exception:  # asked alone, each will say itself what is wrong
        return []


def _separately(lvlm: LVLM, trace: Trace | None, asked: list[Asked]) -> list[dict]:
    """Replies to prompts that are one left-padded batch."""
    return _results(lvlm, asked, lambda: separate(lvlm, _assembled(lvlm, asked), _ends(lvlm, asked), trace))


def _ends(lvlm: LVLM, asked: list[Asked]) -> list[Ends]:
    ends = lvlm.model.generation_config.eos_token_id
    ends = lvlm.tokenizer.eos_token_id if ends is None else ends
    ends = set(ends) if isinstance(ends, list | tuple) else {ends}
    decoded = partial(lvlm.tokenizer.decode, skip_special_tokens=True)
    return [partial(_end, decoded, ends, one.row.max_new_tokens, one.row.stop) for one in asked]


def _end(decoded: Callable, ends: set[int], limit: int, stop: Sequence[str], ids: list[int]) -> int | None:
    """How many of the new `ids` are the reply; None if it goes on. A word has ended once a letter more would begin
    another; what ended it is not read."""
    if stop and (word := parse(decoded(ids) + "x", stop)):
        return len(ids) - (parse(decoded(ids[:-1]), stop) == word)
    return len(ids) if ids[-1] in ends or len(ids) >= limit else None


def _results(lvlm: LVLM, asked: list[Asked], ask: Callable[[], list[Reply]]) -> list[dict]:
    """Rows of the replies that `ask` gives, which is timed."""
    start, replies = time.perf_counter(), ask()
    found, tokenizer, seconds = [], lvlm.tokenizer, (time.perf_counter() - start) / len(asked)
    for one, reply in zip(asked, replies, strict=True):
        yes, no = (reply.logits[word_ids(tokenizer, len(tokenizer), word)] for word in ("yes", "no"))
        margin = float(yes.max() - no.max()) if len(yes) and len(no) else np.nan
        context, visual, tokens = one.counts.values()
        whole = dict(zip(MEASURED, (tokens, visual, tokens - visual, visual, tokens - visual, context), strict=True))
        raw = tokenizer.decode(reply.ids, skip_special_tokens=True).strip()
        found.append(_found(one, raw=raw, margin=margin, seconds=seconds, n_computed_tokens=reply.computed,
                            **(reply.kept or whole)))  # fmt: skip
    return found


def _found(one: Asked, **what: Any) -> dict[str, Any]:
    """What was found for a sample, ready for the model or not."""
    plain = {"key": one.row.key, "raw": None, "error": None, "seconds": 0.0, **dict.fromkeys(COUNTS, 0)}
    return {**plain, **one.counts, **what}


@lru_cache(maxsize=16)
def word_ids(tokenizer: PreTrainedTokenizerBase, size: int, word: str) -> list[int]:
    """Tokens that are `word`, in any case, with or without the mark of a space before it. `size` of the vocabulary."""
    return [i for token, i in tokenizer.get_vocab().items() if token.strip("\u0120\u2581 ").lower() == word]
