"""lv.answer with shared prefixes beside separate prompts in padded batches: tokens prefilled, seconds, equal answers.

    python benchmarks/evaluate.py --model tiny-llava --pictures 2

Both ways take turns in one process on the same samples (six questions at each of six context lengths a picture).
Prints a table and writes benchmarks/evaluate.json.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

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
    seconds, results = {way: [] for way in WAYS}, {}
    for _ in range(options.repeats):
        for way, share in WAYS.items():
            start = time.perf_counter()
            results[way] = lv.answer(lvlm, samples, share=share, **ask)
            seconds[way].append(time.perf_counter() - start)

    report = {
        "model": lvlm.name, "revision": lvlm.revision, "dtype": str(lvlm.dtype), "attention": lvlm.attention,
        "dataset": Path(options.dataset).name, "pictures": options.pictures, "prompts": len(samples),
        "batch_size": options.batch_size, "repeats": options.repeats,
        "machine": machine(lvlm.device),
        "ways": {way: _facts(results[way]["n_prefill_tokens"].sum(), seconds[way]) for way in WAYS},
    }  # fmt: skip
    ways = report["ways"]
    report["times_fewer_tokens"] = round(ways["separate"]["tokens"] / ways["shared"]["tokens"], 2)
    report["times_faster"] = [
        round(slow / fast, 2) for slow, fast in zip(seconds["separate"], seconds["shared"], strict=True)
    ]
    report["answers_differing"] = int((results["separate"]["raw"] != results["shared"]["raw"]).sum())
    margins = [results[way]["margin"] for way in WAYS]
    report["largest_margin_difference"] = float((margins[0] - margins[1]).abs().max())
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _show(report)


def _facts(tokens: int, seconds: list[float]) -> dict:
    return {
        "tokens": int(tokens), "seconds_median": round(statistics.median(seconds), 3),
        "seconds_min": round(min(seconds), 3), "seconds_max": round(max(seconds), 3),
    }  # fmt: skip


def _show(report: dict) -> None:
    print(f"{report['model']}: {report['prompts']} prompts, {report['pictures']} pictures, {report['repeats']} repeats")
    print(f"{'':10}{'tokens':>10}{'seconds':>10}  (min to max)")
    for way, facts in report["ways"].items():
        spread = f"({facts['seconds_min']:.2f} to {facts['seconds_max']:.2f})"
        print(f"{way:10}{facts['tokens']:10,}{facts['seconds_median']:10.2f}  {spread}")
    faster = sorted(report["times_faster"])
    print(f"{report['times_fewer_tokens']}x fewer tokens, {faster[0]}x to {faster[-1]}x faster")
    print(f"{report['answers_differing']} answers differ, margins by at most {report['largest_margin_difference']:.1e}")


if __name__ == "__main__":
    main()
