"""Answers of a model to a table of samples: resumable, with failures counted, split over processes if there are any."""

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from lvlm_utils.evaluate.prefix import can_share
from lvlm_utils.evaluate.pruned import MEASURED, Pruned, read
from lvlm_utils.evaluate.replies import EMPTY, ask
from lvlm_utils.evaluate.store import Store
from lvlm_utils.models import LVLM
from lvlm_utils.pruning.engine import ENGINES

CONDITIONS = ("original", "white", "black", "none")
META = ["sample", "image_id", "group", "length", "label", "target", "kind", "size"]  # copied from the samples
COLUMNS = [
    "sample", "image_id", "group", "length", "n_context_tokens", "n_visual_tokens", "condition", "method", "keep",
    "options", "label", "target", "kind", "size", "answer", "raw", "parsed", "correct", "margin", "error", "model",
    "revision", "dtype", "attention", "versions", "seconds", "n_prefill_tokens", *MEASURED, "key",
]  # fmt: skip


def answer(
    lvlm: LVLM,
    samples: pd.DataFrame,
    image: str = "original",
    prune: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    out: str | Path | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 4,
    share: bool = True,
    progress: bool = True,
) -> pd.DataFrame:
    """Ask every row of `samples` greedily; one row of results per sample, in the same order.

    `samples` needs the columns image (path or PIL image), context, question, and may have those of META. `image` is the
    picture shown: "original", a "white" or "black" one of the same size, or "none". With `share`, prompts about one
    picture reuse the keys and values of their common beginning, or, where what is pruned depends on the question, what
    comes before the first choice; the answers are those of separate prompts.
    `prune` is {"name": method, **options} of lv.prune, or a list of such; what it kept stands in the columns MEASURED.
    `out` is a parquet file: rows already there are not asked again, unless model, data or settings changed. A picture
    or prompt that fails becomes a row with `error`, counted in one warning. Rows are split over the processes of
    `accelerate launch`. `margin` is the logit of yes minus that of no (best of their spellings) at the first new token.
    A yes or no ends an answer. Raises ValueError for a wrong `image` or `prune`, and for a missing column.
    """
    if image not in CONDITIONS:
        raise ValueError(f"image={image!r} is not one of {', '.join(CONDITIONS)}.")
    if missing := {"image", "context", "question"} - set(samples.columns):
        raise ValueError(f"The samples have no column {', '.join(sorted(missing))}.")
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(f"batch_size={batch_size} and max_new_tokens={max_new_tokens} must be at least 1.")
    if lvlm.model in ENGINES:
        raise ValueError("answer() inside an lv.prune would take its answers for unpruned ones: use prune=.")
    pruned = read(lvlm, prune)
    share = share and not (pruned.asks and pruned.alike is None)
    if share and not can_share(lvlm):
        warnings.warn(f"{lvlm.name} cannot share prefixes here: slower, same answers.", stacklevel=2)
        share = False
    state = _processes(lvlm)
    rank, processes = (0, 1) if state is None else (state.process_index, state.num_processes)
    wanted = _wanted(lvlm, samples, image, pruned, max_new_tokens)
    store = Store(out, rank)
    stale = store.drop_stale(wanted)
    if stale and rank == 0:
        tqdm.write(f"{Path(out).name}: {stale} stale rows dropped, because the model or the data changed.", sys.stderr)
    # split before looking at what is done: a process that starts late may already see rows of another
    mine = [rows for _, rows in wanted.drop_duplicates("key").groupby("picture", sort=False)][rank::processes]
    left = [rows[~rows["key"].isin(store.table["key"])] for rows in mine]
    pictures = [rows for rows in left if len(rows)]
    chunk = max(4, batch_size)  # pictures between two writes to disk
    fresh: list[dict] = []
    bar = tqdm(total=len(pictures), unit="picture", disable=not progress or rank > 0 or not pictures)
    with bar, pruned.running(lvlm) as trace:
        for at in range(0, len(pictures), chunk):
            rows = ask(lvlm, pictures[at : at + chunk], image, batch_size, max_new_tokens, share, trace,
                       pruned.alike if pruned.asks else None)  # fmt: skip
            store.add(rows)
            fresh += rows
            bar.update(len(pictures[at : at + chunk]))
    if state is not None:
        from accelerate.utils import gather_object

        store.merge(gather_object(fresh))
    if rank == 0:
        store.finish()
    if state is not None:
        state.wait_for_everyone()  # nobody reads the file of the next call before it is whole
    results = _in_order(store.table, wanted).set_index(samples.index)
    if failed := int(results["error"].notna().sum()):
        first = results["error"].dropna().iloc[0]
        warnings.warn(f"{failed} of {len(results)} rows failed, see the column error. First: {first}", stacklevel=2)
    return results


def summary(results: pd.DataFrame) -> dict[str, int]:
    """Counts: rows, unparsed (answered, but not by yes or no) and errors (not answered)."""
    errors = results["error"].notna()
    unparsed = ~results["parsed"].astype(bool) & ~errors
    return {"rows": len(results), "unparsed": int(unparsed.sum()), "errors": int(errors.sum())}


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


def _wanted(lvlm: LVLM, samples: pd.DataFrame, condition: str, pruned: Pruned, max_new_tokens: int) -> pd.DataFrame:
    """One row per sample: what to ask, what identifies it, and a hash of everything that the answer depends on."""
    wanted = samples.reindex(columns=[*META, "image", "context", "question"]).reset_index(drop=True)
    settings = {
        "condition": condition, "method": pruned.name, "keep": pruned.keep, "model": lvlm.name,
        "revision": lvlm.revision, "dtype": str(lvlm.dtype).removeprefix("torch."), "attention": lvlm.attention,
    }  # fmt: skip
    options = {"options": pruned.options}
    settings |= options if pruned.methods else {}  # nothing more for plain answers: those on disk stay valid
    same = json.dumps([settings, max_new_tokens, lvlm.processor.chat_template], sort_keys=True)
    hashes: dict = {}
    keys, pictures = [], []
    for row in wanted.itertuples():
        picture = row.image
        name = id(picture) if isinstance(picture, Image.Image) else str(picture)
        if name not in hashes:
            hashes[name] = "" if condition == "none" else _picture_hash(picture)
        pictures.append(name)
        content = [same, str(row.sample), str(row.group), hashes[name], row.context, row.question]
        keys.append(hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:24])
    return wanted.assign(**settings | options, key=keys, picture=pictures)


def _picture_hash(picture: Image.Image | str | Path) -> str:
    if isinstance(picture, Image.Image):
        content = f"{picture.mode}{picture.size}".encode() + picture.tobytes()
    else:
        content = Path(str(picture)).read_bytes() if Path(str(picture)).is_file() else b"missing"
    return hashlib.sha256(content).hexdigest()


def _in_order(table: pd.DataFrame, wanted: pd.DataFrame) -> pd.DataFrame:
    """Results in the order of the samples; labels and the like come from the samples, never from an old file."""
    found = table.set_index("key").reindex(columns=list(EMPTY)).reindex(wanted["key"]).reset_index(drop=True)
    results = pd.concat([wanted, found], axis=1)
    for name in ("answer", "raw", "error"):  # None where there is none, whether just asked or read from a file
        results[name] = results[name].astype(object).where(results[name].notna(), None)
    results = results.astype({name: int for name in EMPTY if name.startswith("n_")})
    results = results.astype(dict.fromkeys(("margin", *MEASURED), float))
    results["parsed"] = results["answer"].notna()
    results["correct"] = results["parsed"] & (results["answer"] == results["label"])
    return results[COLUMNS]
