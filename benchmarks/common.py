"""What all benchmarks share: their arguments, a random LVLM and a prompt for it, seconds, memory, and the machine."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # builders of models and processors
sys.path.insert(0, str(ROOT))  # the package, installed or not

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from families import build  # noqa: E402
from PIL import Image  # noqa: E402
from processors import processor  # noqa: E402

import lvlm_utils as lv  # noqa: E402

# Towers of LLaVA: that of LLaVA-1.5, and one too small to matter beside the decoder.
CLIP_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
THIN = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 96,
    "patch_size": 4,
}  # fmt: skip
QUESTION = "Is the couch in the image? (Please answer with yes or no.)"


def arguments(doc: str, script: str, repeats: int, **sizes: int) -> argparse.ArgumentParser:
    """--repeats and --out (a json beside the script), and, where `sizes` of the decoder are given (width, heads,
    layers: their defaults), these, --device and --dtype. `doc` is the help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--out", type=Path, default=Path(script).with_suffix(".json"))
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="of the decoder")
    if sizes:
        parser.add_argument("--device", default="cpu")
        parser.add_argument("--dtype", default="float32")
    return parser


def lvlm(
    width: int,
    heads: int,
    layers: int,
    tower: dict,
    device: str | torch.device,
    dtype: str,
    family: str = "llava",
    **text: int,
) -> "lv.models.LVLM":
    """A random LVLM. `text`: further options of the decoder's config; its feed-forward part is 2.75 times as wide."""
    options = {"hidden_size": width, "head_dim": width // heads, "intermediate_size": width * 11 // 4, **text}
    kv_heads = options.pop("num_key_value_heads", heads)
    model = build(family, layers, heads, kv_heads, 2**17, text=options, tower=tower, device=device,
                  dtype=getattr(torch, dtype))  # fmt: skip
    return lv.load((model, processor(family, tower["image_size"], tower["patch_size"])))


def prompt(model: "lv.models.LVLM", text: int, picture: tuple[int, int] | None = None) -> "lv.prompts.Prompt":
    """A picture of noise, random words and a question, with `text` tokens besides those of the picture.

    picture: its width and height in pixels; by default those of one tile. ValueError for fewer tokens than needed.
    """
    random, side = np.random.default_rng(0), model.model.config.vision_config.image_size
    width, height = picture or (side, side)
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    pieces = sorted(piece[1:] for piece in model.tokenizer.get_vocab() if piece[:1] == "▁" and piece[1:].isalpha())
    single = [w for w in pieces if len(model.tokenizer(f"{w} {w}", add_special_tokens=False).input_ids) == 2]
    made = lv.prompt(model, image, "The", QUESTION)
    if (more := text - int(made.groups.text.sum())) < 0:
        raise ValueError(f"text={text}: the shortest prompt has {text - more} tokens of text.")
    made = lv.prompt(model, image, " ".join(["The", *random.choice(single, more)]), QUESTION)
    assert int(made.groups.text.sum()) == text
    return made


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, with the device idle before and after."""
    wait = (lambda: None) if device.type == "cpu" else (lambda: torch.accelerator.synchronize(device))
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def spread(taken: Collection[float]) -> dict[str, float]:
    facts = {"median": statistics.median(taken), "min": min(taken), "max": max(taken)}
    return {f"seconds_{name}": round(value, 5) for name, value in facts.items()}


def ratio(taken: Collection[float], other: Collection[float]) -> float:
    """Median over the repeats, each compared with its own."""
    return round(statistics.median(a / b for a, b in zip(taken, other, strict=True)), 4)


def alone(script: str, options: argparse.Namespace, way: str, tokens: int) -> float:
    """What the script prints when it is asked with --alone: a number, measured in a process of its own."""
    same = ("width", "heads", "layers", "device", "dtype")
    arguments = [f"--{name}={getattr(options, name)}" for name in same] + [f"--alone={way},{tokens}"]
    done = subprocess.run([sys.executable, script, *arguments], check=True, capture_output=True, text=True)
    return float(done.stdout)


def machine(device: str | torch.device) -> dict:
    """For the report: system, cores, threads, name of the device, versions."""
    cuda = torch.device(device).type == "cuda"
    return {
        "system": platform.system(), "processor": platform.machine(), "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(), "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


def write(report: dict, out: Path) -> None:
    """So that a report is either there in full or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    part.replace(out)
