"""Answers of a model to a table of samples: a table in, rows out, resumable, with every failure a row."""

import json
import os
import re
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from PIL import Image
from transformers import PreTrainedTokenizerBase
from tqdm.auto import tqdm

from lvlm_utils.methods import METHODS, Method, Trace, named, prune as pruning
from lvlm_utils.models import LVLM
from lvlm_utils.prefix import Ends, Reply, can_share, clusters, separate, shared
from lvlm_utils.prompts import Prompt, assemble, blank, check_length, open_image, pictures_of, process, render, tokenizer_options
from lvlm_utils.pruning.engine import ENGINES
from lvlm_utils.results import COLUMNS, MEASURED, Store, Unreadable, digest, key, path_of
from lvlm_utils.token_groups import inside

CONDITIONS = ("original", "white", "black", "none")
META = ["sample", "image_id", "group", "length", "label", "target", "kind", "size"]  # copied from the samples
COUNTS = ("n_context_tokens", "n_visual_tokens", "n_prefill_tokens", "n_computed_tokens")
NOTHING = {  # what a row says that could not be asked
    "raw": None, "margin": np.nan, "error": None, "seconds": 0.0, **dict.fromkeys(COUNTS, 0),
    **dict.fromkeys(MEASURED, np.nan),
}  # fmt: skip
PLAIN = {**dict.fromkeys(("yes", "y", "true", "1", "1.0"), "yes"), **dict.fromkeys(("no", "n", "false", "0", "0.0"), "no")}
YES_OR_NO = re.compile(
    r"\byes\s*(or|/)\s*no\b|^\W*(is|are|am|was|were|do|does|did|has|have|had|can|could|will|would|shall|should|may|"
    r"might|must|isn't|aren't|doesn't|don't)\b", re.IGNORECASE,
)  # fmt: skip
OPEN = re.compile(r"^\W*(what|which|who|whom|whose|where|when|why|how|describe|name|list|count)\b", re.IGNORECASE)
USAGE = 'give a method such as lv.methods.FastV(keep=0.5), or {"name": "fastv", "keep": 0.5}, or a list of such.'


def answer(
    lvlm: LVLM,
    samples: pd.DataFrame,
    image: str = "original",
    prune: Method | Mapping[str, Any] | Sequence[Method | Mapping[str, Any]] | None = None,
    out: str | Path | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    stop: Sequence[str] | None = None,
    share: bool = True,
    progress: bool = True,
) -> pd.DataFrame:
    """Ask every row of `samples` greedily; one row of results per sample, in the same order.

    samples: the columns image (path or picture), context and question, and any of META and `choices`, a list of short
        answers. `label` is a choice; yes or no (also True, 1, "TRUE") for a question that can be answered so; else any
        text. None where it is not known.
    image: the picture shown, "original", a "white" or "black" one of the same size, or "none".
    prune: a method of lv.methods, {"name": of one, **options}, or a list of such, which act in this order.
    out: a parquet file. Rows there are read back while nothing changed that they depend on (`results.key`); failures
        are asked again. Several runs may use one file.
    batch_size: prompts at once.
    max_new_tokens: by default 4 for questions to be answered with yes or no, 64 for others.
    stop: words that end a reply where they are its first; by default yes and no for such questions, none for others.
    share: read what prompts about one picture have in common only once; the answers are those of separate prompts.
    progress: show a bar.

    `answer` is the choice (or yes, or no) with which the reply `raw` begins, or all of it for a free question, where
    `correct` compares with the label as text: without case and punctuation at the ends. `correct` is missing where the
    label is. `margin` is the logit of yes minus that of no (best of their spellings) at the first new token.
    `n_prefill_tokens` is the length of the prompt, `n_computed_tokens` how many of these tokens were read for this row;
    `seconds` are its share of its batch. MEASURED says what pruning left. `keep` is that of each method that has one, as
    given. A failure is a row with `error`; one warning counts them. Rows are split over the processes of `accelerate
    launch`.

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
    if lvlm.model in ENGINES:
        raise ValueError("answer() inside an lv.prune would take its answers for unpruned ones: use prune=.")
    methods = _methods(prune)
    if methods and any(method.fit(lvlm).uses_question for method in methods):
        share = False
    if share and not can_share(lvlm):
        warnings.warn(f"{lvlm.name} cannot share prefixes here: slower, same answers.", stacklevel=2)
        share = False
    store, wanted = Store(out), _wanted(lvlm, samples, image, methods, max_new_tokens, stop)
    try:
        answered_by = key(lvlm, _ask, pruning if methods else None, [_read(method) for method in methods], aside=[METHODS])
        wanted["key"] = [digest([answered_by, content]) for content in wanted["content"]]
        known = store.rows[store.rows["error"].isna()]
    except Unreadable as reason:
        warnings.warn(f"{reason}: these answers are not reused.", stacklevel=2)
        wanted["key"], known = [f"unreadable {one}" for one in wanted["identity"]], store.rows.iloc[:0]
    state = _processes(lvlm)
    rank, processes = (0, 1) if state is None else (state.process_index, state.num_processes)
    if (stale := int(store.stale(wanted).sum())) and rank == 0:
        tqdm.write(f"{Path(out).name}: {stale} stale rows dropped, because the model or the data changed.", sys.stderr)
    # split before looking at what is done: a process that starts late may already see rows of another
    mine = [rows for _, rows in wanted.drop_duplicates("key").groupby("picture", sort=False)][rank::processes]
    left = [rows[~rows["key"].isin(known["key"])] for rows in mine]
    pictures = [rows for rows in left if len(rows)]
    chunk, fresh = max(4, batch_size), []  # pictures between two writes to disk
    with ExitStack() as stack:
        traces = [stack.enter_context(pruning(lvlm, method)) for method in methods]
        bar = stack.enter_context(tqdm(total=len(pictures), unit="picture", disable=not (progress and pictures and rank == 0)))
        for at in range(0, len(pictures), chunk):
            rows = _ask(lvlm, pictures[at : at + chunk], image, batch_size, share, traces[0] if traces else None)
            store.add(_complete(wanted[wanted["key"].isin([row["key"] for row in rows])], rows))
            fresh += rows
            bar.update(len(pictures[at : at + chunk]))
    if state is not None:
        from accelerate.utils import gather_object

        fresh = gather_object(fresh)
    if rank == 0:
        store.finish(wanted)
    if state is not None:
        state.wait_for_everyone()  # nobody reads the file of the next call before it is whole
    results = _complete(wanted, [*known[known["key"].isin(wanted["key"])].to_dict("records"), *fresh])
    results = results.set_index(samples.index)
    if failed := int(results["error"].notna().sum()):
        first = results["error"].dropna().iloc[0]
        warnings.warn(f"{failed} of {len(results)} rows failed, see the column error. First: {first}", stacklevel=2)
    return results


def summary(results: pd.DataFrame) -> dict[str, int]:
    """Counts: rows, unparsed (answered, but by none of the choices), errors (not answered), and unlabelled (without a
    label, so that `correct` is missing)."""
    errors = results["error"].notna()
    unparsed = ~results["parsed"].astype(bool) & ~errors
    counted = {"unparsed": unparsed, "errors": errors, "unlabelled": results["correct"].isna()}
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
    several = [prune] if isinstance(prune, Method | Mapping) else prune
    if several is None:
        return []
    proper = isinstance(several, list | tuple) and several and all(
        is_dataclass(one) if isinstance(one, Method) else isinstance(one, Mapping) and isinstance(one.get("name"), str)
        for one in several
    )  # fmt: skip
    if not proper:
        raise ValueError(f"prune={prune!r}: {USAGE} A method is a dataclass.")
    return [one if isinstance(one, Method) else named(**one) for one in several]


def _options(method: Method) -> tuple[dict[str, Any], list[str]]:
    """All options as JSON, and the names of those that are none."""
    stated, odd = {}, []
    for name in dict.fromkeys([*(field.name for field in fields(method)), *vars(method)]):
        value = getattr(method, name)
        try:
            stated[name] = json.loads(json.dumps(value, default=_listed, allow_nan=False))
        except (TypeError, ValueError):
            stated[name] = getattr(value, "__qualname__", type(value).__qualname__)
            odd.append(name)
    return stated, odd


def _listed(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return sorted(value) if isinstance(value, set | frozenset) else list(value)


def _read(method: Method) -> list:
    """A method for its key."""
    options, odd = _options(method)
    if odd:
        raise Unreadable(f"The option {odd[0]} of {type(method).__name__} is no JSON")
    return [type(method), options]


def _wanted(
    lvlm: LVLM, samples: pd.DataFrame, condition: str, methods: Sequence[Method], limit: int | None, stop: Sequence[str] | None
) -> pd.DataFrame:
    """One row per sample: what is asked, how its answer is read, what it depends on, and whose it is."""
    wanted = samples.reindex(columns=[*META, "choices", "image", "context", "question"]).reset_index(drop=True)
    names = {method: name for name, method in METHODS.items()}
    options = [_options(method)[0] for method in methods]
    settings = {
        "condition": condition,
        "method": "+".join(names.get(type(method), type(method).__name__) for method in methods) or "none",
        "keep": "+".join(json.dumps(one["keep"]) for one in options if "keep" in one) or None,
        "options": json.dumps(options if len(options) > 1 else [*options, {}][0], sort_keys=True),
        "model": lvlm.name, "path": path_of(lvlm), "revision": lvlm.revision,
        "dtype": str(lvlm.dtype).removeprefix("torch."), "attention": lvlm.attention,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }  # fmt: skip
    shown, found = {}, []
    for row, index in zip(wanted.itertuples(), samples.index, strict=True):
        choices, label = _read_label(row, index)
        tokens = limit or (4 if choices == ("yes", "no") else 64)
        words = (choices if choices == ("yes", "no") else ()) if stop is None else tuple(stop)
        at = str(row.image) if isinstance(row.image, str | Path) else id(row.image)
        if at not in shown:
            shown[at] = _content(row.image, condition)
        name = at if isinstance(at, str) and condition != "none" else shown[at]
        asked = [condition, str(row.sample), str(row.context), str(row.question), tokens, words]
        found.append({
            "choices": choices, "label": label, "max_new_tokens": tokens, "stop": words, "picture": at,
            "content": [*asked, shown[at]], "identity": digest([*asked, name, *settings.values()]),
        })  # fmt: skip
    return wanted.drop(columns=["choices", "label"]).assign(**settings).join(pd.DataFrame(found, dtype=object, columns=[
        "choices", "label", "max_new_tokens", "stop", "picture", "content", "identity"]))  # fmt: skip


def _content(picture: Any, condition: str) -> str:
    """What a picture shows; of one that cannot be opened only that, because its rows are asked again anyway."""
    if condition == "none":
        return ""
    try:
        is_path = isinstance(picture, str | Path)
        return digest(Path(picture).read_bytes()) if is_path else key(open_image(picture))
    except Exception as error:  # the row will say so
        return type(error).__name__


def _read_label(row: Any, index: Any) -> tuple[tuple[str, ...], Any]:
    """(choices, label) of a sample; no choices for a free question, None for a missing label."""
    def missing(cell: Any) -> bool:
        return pd.api.types.is_scalar(cell) and (pd.isna(cell) or str(cell).strip() == "")

    label, question = None if missing(row.label) else row.label, str(row.question)
    if not pd.api.types.is_scalar(label):
        raise ValueError(f"Row {index!r}: label={label!r} is no single answer.")
    if not missing(row.choices):
        choices = () if pd.api.types.is_scalar(row.choices) else tuple(row.choices)
        if not choices or len({fold(str(one)) for one in choices} - {""}) < len(choices) or any(map(missing, choices)):
            raise ValueError(f"Row {index!r}: choices={row.choices!r} is no list of different short answers.")
        by_text = {fold(str(one)): str(one) for one in choices}
        choices = tuple(by_text.values())
    else:
        answers = ("yes", "no") if OPEN.match(question) and not isinstance(label, bool | np.bool_) else PLAIN
        plain = label is not None and fold(str(label)) in answers
        if not plain and not YES_OR_NO.search(question):
            return (), label
        by_text, choices = PLAIN, ("yes", "no")
    if label is not None and fold(str(label)) not in by_text:
        raise ValueError(f"Row {index!r}: label={label!r} is none of {', '.join(choices)}, with which "
                         f"{question!r} is to be answered: correct it, leave it empty, or give `choices`.")
    return choices, None if label is None else by_text[fold(str(label))]


# What is said --------------------------------------------------------------------------------------------------------
def fold(text: str) -> str:
    """A text for comparison: NFC, without case, with single spaces, and without punctuation at the ends (but for the
    minus of a number). A text of nothing else stays."""
    text = " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).split())
    inner = [at for at, letter in enumerate(text) if unicodedata.category(letter)[0] not in "PZC"]
    if not inner:
        return text
    start = inner[0] - (text[max(inner[0] - 1, 0)] == "-" and text[inner[0]].isdigit())
    return text[start : inner[-1] + 1]


def parse(raw: str, choices: Sequence[str] = ("yes", "no")) -> str | None:
    """The choice with which a reply begins, the longest of several, as whole words in any case; else None."""
    said = fold(raw)
    for choice in sorted(choices, key=len, reverse=True):
        if said.startswith(fold(choice)):
            rest = said[len(fold(choice)) :]
            goes_on = rest and unicodedata.category(rest[0])[0] in "LMN" or re.match(r"[-'\u2019_]\w|[.,]\d", rest)
            if not goes_on:
                return choice
    return None


def _complete(wanted: pd.DataFrame, found: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Results in the order of `wanted`; labels and the like come from there, never from an old file."""
    found = pd.DataFrame(found, columns=["key", *NOTHING]).drop_duplicates("key", keep="last").set_index("key")
    if lost := int((~wanted["key"].isin(found.index)).sum()):
        raise RuntimeError(f"{lost} of {len(wanted)} rows were not answered: did another process end early?")
    results = pd.concat([wanted.reset_index(drop=True), found.reindex(wanted["key"]).reset_index(drop=True)], axis=1)
    for name in ("raw", "error"):  # None where there is none, whether just asked or read from a file
        results[name] = results[name].astype(object).where(results[name].notna(), None)
    results = results.astype({**dict.fromkeys(COUNTS, int), **dict.fromkeys(("margin", "seconds", *MEASURED), float)})
    said = [raw and (parse(raw, choices) if choices else raw) for raw, choices in zip(results["raw"], results["choices"])]
    results["answer"] = pd.Series([one or None for one in said], dtype=object)
    results["parsed"] = results["answer"].notna()
    right = [pd.NA if label is None else bool(one) and fold(one) == fold(_text(label))
             for one, label in zip(results["answer"], results["label"])]  # fmt: skip
    results["correct"] = pd.array(right, dtype="boolean" if any(one is pd.NA for one in right) else bool)
    return results[COLUMNS]


def _text(label: Any) -> str:
    """A number as people write it: a column with gaps makes 3 a 3.0."""
    return str(int(label) if isinstance(label, float | np.floating) and float(label).is_integer() else label)


# Asking --------------------------------------------------------------------------------------------------------------
@dataclass
class Asked:
    """One sample, ready for the model."""

    row: Any  # of the table of wanted answers, as itertuples gives it
    picture: Image.Image | None
    ids: list[int]
    counts: dict[str, int]


def _ask(
    lvlm: LVLM, pictures: list[pd.DataFrame], condition: str, batch_size: int, share: bool, trace: Trace | None
) -> list[dict]:
    """What was found, in any order, for samples grouped by picture. `trace` is that of the pruning that is on."""
    done, alone = [], []
    for rows in pictures:
        asked = _each(list(rows.itertuples()), partial(_prepare, lvlm, condition))
        done += [one for one in asked if isinstance(one, dict)]
        asked = [one for one in asked if isinstance(one, Asked)]
        if not share:
            alone += asked
            continue
        contexts: dict[str, list[Asked]] = {}
        for one in asked:
            contexts.setdefault("" if trace is None else one.row.context, []).append(one)
        for members in contexts.values():
            found, left = _about_one_beginning(lvlm, members, batch_size, trace)
            done, alone = done + found, alone + left
    alone.sort(key=lambda one: len(one.ids))  # equal lengths together: little padding
    for at in range(0, len(alone), batch_size):
        done += _each(alone[at : at + batch_size], partial(_separately, lvlm, trace))
    return done


def _each(rows: list, run: Callable[[list], list]) -> list:
    """What `run` gives of all; where that fails, of each alone. What fails alone becomes a row with `error`."""
    try:
        return run(rows)
    except Exception as error:  # whatever it is: the others are to be answered
        if len(rows) > 1:
            return [found for row in rows for found in _each([row], run)]
        return [_found(rows[0], error=f"{type(error).__name__}: {error}")]


def _prepare(lvlm: LVLM, condition: str, rows: list) -> list["Asked | dict"]:
    """Samples about one picture, tokenised in full, one by one; the picture is processed once."""
    picture = None
    if condition != "none":
        picture = open_image(rows[0].image)
        picture = picture if condition == "original" else blank(picture, condition)
    rendered = [render(lvlm, picture is not None, row.context, row.question) for row in rows]
    _, replaced = process(lvlm, [pictures_of(picture)], [None], rendered[:1])
    rendered = [one.expanded(replaced[0]) for one in rendered]
    batch = lvlm.tokenizer([one.text for one in rendered], **tokenizer_options(lvlm, rendered[0].text))
    asked = []
    for row, text, ids, offsets in zip(rows, rendered, batch["input_ids"], batch["offset_mapping"], strict=True):
        context = inside(torch.from_numpy(np.array(offsets)), text.spans.get("context"))  # numpy reads lists faster
        counts = int(context.sum()), ids.count(lvlm.image_token_id), len(ids)
        one = Asked(row, picture, ids, dict(zip(COUNTS, counts)))
        try:
            check_length(lvlm, len(ids))
            asked.append(one)
        except ValueError as error:
            asked.append(_found(one, error=str(error)))
    return asked


def _about_one_beginning(
    lvlm: LVLM, asked: list[Asked], batch_size: int, trace: Trace | None
) -> tuple[list[dict], list[Asked]]:
    """(what was found, what is to be asked alone) of prompts about one picture, or about one context where it is
    pruned. A beginning that is pruned ends after the first token of the question or template that all share, so that
    its last token is one that stays anyway."""
    done, alone = [], []
    least = max((at + 1 for at, token in enumerate(asked[0].ids) if token == lvlm.image_token_id), default=0)
    if trace is not None:
        groups = _assembled(lvlm, asked[:1]).groups
        least = max((groups.visual | groups.context)[0].nonzero()[:, 0].tolist(), default=-1) + 2
    for rows, cuts in clusters([one.ids for one in asked], least):
        group = [asked[row] for row in rows]
        if len(group) == 1:
            alone += group
            continue
        try:
            start, ids = time.perf_counter(), [one.ids for one in group]
            replies = shared(lvlm, _assembled(lvlm, group[:1]), ids, cuts, _ends(lvlm, group), batch_size, trace)
            done += _results(lvlm, group, replies, time.perf_counter() - start)
        except Exception:  # asked alone, each will say itself what is wrong
            alone += group
    return done, alone


def _assembled(lvlm: LVLM, asked: list[Asked]) -> Prompt:
    rows = [one.row for one in asked]
    return assemble(lvlm, [one.picture for one in asked], [row.context for row in rows], [row.question for row in rows])


def _separately(lvlm: LVLM, trace: Trace | None, asked: list[Asked]) -> list[dict]:
    """Prompts as one left-padded batch."""
    start = time.perf_counter()
    replies = separate(lvlm, _assembled(lvlm, asked), _ends(lvlm, asked), trace)
    return _results(lvlm, asked, replies, time.perf_counter() - start)


def _ends(lvlm: LVLM, asked: list[Asked]) -> list[Ends]:
    ends = lvlm.model.generation_config.eos_token_id
    ends = lvlm.tokenizer.eos_token_id if ends is None else ends
    ends = set(ends) if isinstance(ends, list | tuple) else {ends} - {None}
    return [partial(_end, lvlm.tokenizer, ends, one.row.max_new_tokens, one.row.stop) for one in asked]


def _end(tokenizer: PreTrainedTokenizerBase, ends: set[int], limit: int, stop: Sequence[str], ids: list[int]) -> int | None:
    """How many of the new `ids` are the reply; None if it goes on. A word has ended once a letter more would begin
    another; what ended it is not read."""
    if stop and (word := parse(_decoded(tokenizer, ids) + "x", stop)):
        return len(ids) - (parse(_decoded(tokenizer, ids[:-1]), stop) == word)
    return len(ids) if ids[-1] in ends or len(ids) >= limit else None


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def _results(lvlm: LVLM, asked: list[Asked], replies: list[Reply], seconds: float) -> list[dict]:
    found, tokenizer = [], lvlm.tokenizer
    for one, reply in zip(asked, replies, strict=True):
        yes, no = (reply.logits[word_ids(tokenizer, len(tokenizer), word)] for word in ("yes", "no"))
        tokens, visual, context = len(one.ids), one.counts["n_visual_tokens"], one.counts["n_context_tokens"]
        whole = dict(zip(MEASURED, (tokens, visual, tokens - visual, visual, tokens - visual, context), strict=True))
        found.append(_found(
            one, raw=_decoded(tokenizer, reply.ids).strip(), seconds=seconds / len(asked),
            margin=float(yes.max() - no.max()) if len(yes) and len(no) else np.nan,
            n_computed_tokens=reply.computed, **(reply.kept or whole),
        ))  # fmt: skip
    return found


def _found(one: Any, **what: Any) -> dict[str, Any]:
    """What was found for a sample, ready for the model or not."""
    row, counts = (one.row, one.counts) if isinstance(one, Asked) else (one, {})
    return {"key": row.key, **NOTHING, **counts, **what}


@lru_cache(maxsize=16)
def word_ids(tokenizer: PreTrainedTokenizerBase, size: int, word: str) -> list[int]:
    """Tokens that are `word`, in any case, with or without the mark of a space before it. `size` of the vocabulary."""
    return [i for token, i in tokenizer.get_vocab().items() if token.strip("\u0120\u2581 ").lower() == word]
