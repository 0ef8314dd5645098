"""Which versions are installed and which are needed: what benchmarks/gpu.sh asks first, of the standard library alone.

Prints a table. Ends with 0 if all is there, 3 if a package is missing or too old, 4 if with --gpu torch sees no GPU.
"""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

NEEDED = (
    "torch", "transformers", "accelerate", "safetensors", "pillow", "numpy", "pandas", "pyarrow", "tqdm", "pytest"
)  # fmt: skip


def main() -> int:
    file = Path(__file__).resolve().parents[1] / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    stated = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    least = dict(re.match(r"([\w-]+)>=([\d.]+)", one).groups() for one in stated if ">=" in one)
    wrong = []
    for name in NEEDED:
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "missing"
        enough = found != "missing" and numbers(found) >= numbers(least[name])
        wrong += [] if enough else [name]
        print(f"  {name:14}{found:16}needed: {least[name]} or newer{'' if enough else '   <- this will not do'}")
    if "--gpu" in sys.argv and find_spec("torch"):
        import torch

        gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        print(f"  {'GPU':14}{', '.join(gpus) or 'none that torch sees'}")
        if not gpus:
            return 4
    return 3 if wrong else 0


def numbers(text: str) -> list[int]:
    """1.26.0+cu130 -> [1, 26, 0]"""
    return [int(part) for part in re.match(r"[\d.]+", text)[0].strip(".").split(".")]


if __name__ == "__main__":
    sys.exit(main())
