"""Train tiny-llava and tiny-llava-long from nothing: two CPU cores are enough.

    python data/tiny-llava/train.py [--minutes 75] [--seed 0] [--variants short long] [--out data]

Killed at any time, the same command goes on from the last checkpoint (in --work, removed by hand when done).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# glibc must not give memory back between steps: on a CPU this alone makes the vision stage several times faster
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "30000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "2",
}
# share of the minutes of one variant; the first three stages are common to both
SHARES = {"vision": 0.18, "language": 0.32, "joint": 0.36, "variant": 0.12, "settled": 0.02}
FOLDERS = {"short": "tiny-llava", "long": "tiny-llava-long"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=75, help="training time of one variant (the other adds a seventh)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", choices=FOLDERS, default=list(FOLDERS))
    parser.add_argument(
        "--out", type=Path, default=HERE.parent, help="folder that gets tiny-llava/ and tiny-llava-long/"
    )
    parser.add_argument("--work", type=Path, default=HERE / ".training", help="checkpoints and logs of the stages")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--no-compile", action="store_true", help="skip torch.compile (short trials, machines without a C++ compiler)"
    )
    parser.add_argument(
        "--float32", action="store_true", help="train in float32: faster on a CPU without bf16 instructions"
    )
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(
            sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC
        )  # glibc reads them only at the start
    import assemble
    import curve
    import joint
    import language
    import torch
    import vision

    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64  # one compilation a shape
    words, compiled = assemble.tokenizer(), not options.no_compile
    dtype = torch.float32 if options.float32 else torch.bfloat16
    minutes = {stage: share * options.minutes for stage, share in SHARES.items()}
    options.work.mkdir(parents=True, exist_ok=True)

    def once(file: str, run, *rest) -> None:
        if not (options.work / file).exists():
            run(*rest)

    once("vision/model.safetensors", vision.stage, options.work, minutes["vision"], options.seed, compiled, dtype)
    once("language.weights", language.stage, options.work, minutes["language"], options.seed, words, compiled, dtype)
    once("joint.start", joint.project, options.work, options.seed, words, dtype)

    def trained(name: str, start: str, share: str) -> None:
        rest = (options.work, minutes[share], options.seed, words, compiled, dtype)
        once(f"{name}.weights", joint.stage, name, start, *rest)

    trained("joint", "joint.start", "joint")
    for variant in options.variants:
        settled = f"{variant}, settled"
        trained(variant, "joint.weights", "variant")
        trained(settled, f"{variant}.weights", "settled")
        joint.export(options.work, settled, words, options.out / FOLDERS[variant])
        curve.save(options.work, ("vision", "language", "joint", variant, settled), options.out / FOLDERS[variant])


if __name__ == "__main__":
    main()
