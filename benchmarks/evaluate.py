"""lv.answer with shared beginnings beside separate prompts in padded batches: tokens computed, seconds, equal answers.

    python benchmarks/evaluate.py --model tiny-llava --pictures 2

Both ways take turns in one process on the same samples (six questions at each of six context lengths a picture).
Prints a table and writes benchmarks/evaluate.json.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import pandas as pd
from common import machine

import lvlm_utils as lv

WAYS = {"separate": False, "shared": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llava", help="an embedded model, a folder or a hub id")
    parser.add_argument("--dataset", default="emoji-world", help="emoji-world, or a folder with svit/ and vg/")
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()

    lvlm = lv.load(options.model)
    samples = lv.datasets.load(options.dataset, lvlm, samples=6 * options.pictures)
    ask = {"batch_size": options.batch_size, "progress": False}
    lv.answer(lvlm, samples[samples["length"] == 0], **ask)  # warm up
    report = {
        "model": lvlm.name, "revision": lvlm.revision, "dtype": str(lvlm.dtype), "attention": lvlm.attention,
        "dataset": Path(options.dataset).name, "pictures": options.pictures, "prompts": len(samples),
        "batch_size": options.batch_size, "repeats": options.repeats,
        "machine": machine(lvlm.device), **_compared(lvlm, samples, options.repeats, **ask),
    }  # fmt: skip
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{report['model']}, {report['pictures']} pictures, {report['repeats']} repeats")
    _show(report)


def _compared(lvlm: "lv.models.LVLM", samples: pd.DataFrame, repeats: int, **ask: object) -> dict:
    """Both ways in turn: tokens, seconds, and by how much their answers differ."""
    seconds, results = {way: [] for way in WAYS}, {}
    for _ in range(repeats):
        for way, share in WAYS.items():
            start = time.perf_counter()
            results[way] = lv.answer(lvlm, samples, share=share, **ask)
            seconds[way].append(time.perf_counter() - start)
    ways = {way: _facts(results[way]["n_computed_tokens"].sum(), seconds[way]) for way in WAYS}
    pairs = zip(seconds["separate"], seconds["shared"], strict=True)
    margins = [results[way]["margin"] for way in WAYS]
    return {
        "ways": ways, "times_fewer_tokens": round(ways["separate"]["tokens"] / ways["shared"]["tokens"], 2),
        "times_faster": [round(slow / fast, 2) for slow, fast in pairs],
        "answers_differing": int((results["separate"]["raw"] != results["shared"]["raw"]).sum()),
        "largest_margin_difference": float((margins[0] - margins[1]).abs().max()),
    }  # fmt: skip


def _facts(tokens: int, seconds: list[float]) -> dict:
    return {
        "tokens": int(tokens), "seconds_median": round(statistics.median(seconds), 3),
        "seconds_min": round(min(seconds), 3), "seconds_max": round(max(seconds), 3),
    }  # fmt: skip


def _show(compared: dict) -> None:
    print(f"\n{compared['prompts']} prompts\n{'':12}{'tokens':>10}{'seconds':>10}  (min to max)")
    for way, facts in compared["ways"].items():
        spread = f"({facts['seconds_min']:.2f} to {facts['seconds_max']:.2f})"
        print(f"{way:12}{facts['tokens']:10,}{facts['seconds_median']:10.2f}  {spread}")
    faster = sorted(compared["times_faster"])
    print(f"{compared['times_fewer_tokens']}x fewer tokens, {faster[0]}x to {faster[-1]}x faster")
    largest = compared["largest_margin_difference"]
    print(f"{compared['answers_differing']} answers differ, margins by at most {largest:.1e}")


if __name__ == "__main__":
    main()
