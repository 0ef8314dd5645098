"""One part of benchmarks/gpu.sh: python benchmarks/gpu.py tests|observe|saliency|pruning|larger [--small] --out FILE

- tests: tests/test_cuda.py.
- observe: the shape of LLaVA-1.5-7B, a forward pass inside lv.observe beside a plain one, at 4k and 16k tokens, and
  beside eager attention at 4k.
- saliency: lv.information_flow beside a plain forward and backward pass at 4k tokens, and beside eager autograd at 1k.
- pruning: time to the first token, time of a decode step and memory against visual tokens kept, for every method,
  beside what VisPruner and FoPru print.
- larger: the same at the shapes of LLaVA-NeXT-7B and LLaVA-1.5-13B, for what the papers print of them.

Weights are random and made on the device: latency and memory depend on shapes alone. They are drawn so that attention
is not uniform. The report is written anew after every measurement, so that it holds all that was measured when time is
out; a measurement that failed is a row with its error, and the exit status says so. --small: tiny sizes on the CPU.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from attention import SOME
from attention import WAYS as OBSERVED
from common import CLIP_L, ROOT, lvlm, machine, prompt, seconds, spread, write
from papers import PAPERS
from saliency import WAYS as FLOWS

import lvlm_utils as lv
from lvlm_utils.attention import STATISTICS
from lvlm_utils.efficiency import cache_bytes, decoder_flops, measure, peak_memory
from lvlm_utils.models import LVLM
from lvlm_utils.prompts import Prompt

TEXT = 60  # tokens of a prompt besides the picture's, about as many as a question of POPE has with its template
KEEP = (192, 128, 64, 32)  # of 576 visual tokens
LLAMA_7B = {"width": 4096, "heads": 32, "layers": 32, "intermediate_size": 11008, "vocab_size": 32064}
LLAMA_13B = {"width": 5120, "heads": 40, "layers": 40, "intermediate_size": 13824, "vocab_size": 32064}
SHAPES = {
    "LLaVA-1.5-7B": {"family": "llava", "tower": CLIP_L, **LLAMA_7B},
    "LLaVA-1.5-13B": {"family": "llava", "tower": CLIP_L, **LLAMA_13B},
    "LLaVA-NeXT-7B": {"family": "llava_next", "tower": CLIP_L, **LLAMA_7B},
}
TINY = {
    "width": 64, "heads": 4, "layers": 4, "intermediate_size": 96, "vocab_size": 640,
    "tower": {**CLIP_L, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
              "image_size": 56, "patch_size": 7},
}  # fmt: skip


class Report:
    """The rows measured so far, on the disk as soon as they are there."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.start, self.failed = options, time.perf_counter(), False
        self.small, self.device = options.small, torch.device("cpu" if options.small else "cuda")
        self.dtype = "float32" if options.small else "bfloat16"
        self.repeats = 1 if options.small else 5
        self.found = {
            "part": options.part, "small": options.small, "machine": machine(self.device), "dtype": self.dtype,
            "finished": False, "seconds": 0.0, "models": {}, "rows": [],
        }  # fmt: skip
        self.write()

    def write(self) -> None:
        self.found["seconds"] = round(time.perf_counter() - self.start, 1)
        write(self.found, self.options.out)

    def model(self, name: str) -> LVLM:
        """A random model of one of SHAPES."""
        shape = SHAPES[name] | (TINY if self.small else {})
        made: list[LVLM] = []
        taken = seconds(lambda: made.append(lvlm(**shape, device=self.device, dtype=self.dtype)), self.device)
        facts = {**shape, "seconds_to_build": round(taken, 1), "weights_GB": round(gigabytes(made[0]), 2)}
        self.found["models"][name] = facts
        made[0].model.requires_grad_(False)
        return made[0]

    def row(self, measured: Callable[[], dict], **about: object) -> dict:
        """Measure, and keep what was found or why not; out of memory or refused, the others go on."""
        try:
            row = {**about, **measured()}
        except Exception as error:
            row = {**about, "error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            self.failed = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.found["rows"].append(row)
        self.write()
        return row


def patches(model: LVLM) -> int:
    """Of one tile."""
    vision = model.model.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def gigabytes(model: LVLM) -> float:
    return sum(one.nbytes for one in (*model.model.parameters(), *model.model.buffers())) / 2**30


def timed(report: Report, run: Callable[[], object], repeats: int) -> dict:
    """Seconds after a run to warm up, and the most that one run holds beyond the weights, in GB."""
    run()
    peak = peak_memory(run, report.device)[1]  # what it returns may be as large, and is let go
    return {**spread([seconds(run, report.device) for _ in range(repeats)]), "extra_GB": round(peak / 2**30, 3)}


# Parts ----------------------------------------------------------------------------------------------------------------
class Outcomes:
    """A plugin of pytest: each test's outcome, time and properties become a row."""

    def __init__(self, report: Report):
        self.report = report

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
            row["figures"] = dict(report.user_properties)
            if report.failed:
                row["error"] = str(report.longrepr).strip().splitlines()[-1]
            self.report.found["rows"].append(row)
            self.report.write()


def tests(report: Report) -> None:
    import pytest  # which the other parts do not need

    os.environ["LVLM_TEST_DEVICE"] = report.device.type
    options = (f"--rootdir={ROOT}", "-q", "-p", "no:cacheprovider", "--tb=short")
    status = pytest.main([str(ROOT / "tests" / "test_cuda.py"), *options], plugins=[Outcomes(report)])
    outcomes = [row["outcome"] for row in report.found["rows"]]
    report.failed = status != 0 or not outcomes or set(outcomes) != {"passed"}


def observe(report: Report) -> None:
    model = report.model("LLaVA-1.5-7B")
    plans = {4096: ("plain", "some", "all", "eager"), 16384: ("plain", "some", "all")}
    if report.small:
        plans = {160: plans[4096], 256: plans[16384]}
    report.found["statistics"] = {"some": SOME, "all": STATISTICS}
    for tokens, ways in plans.items():
        given = prompt(model, tokens - patches(model))
        for way in ways:
            repeats = report.repeats if tokens < 10_000 else 3
            run = partial(OBSERVED[way], model, given)
            report.row(partial(timed, report, run, repeats), tokens=tokens, way=way)
        if "eager" in ways:
            report.row(partial(apart, model, given), tokens=tokens, way="apart")
    show(report, ("tokens", "way", "seconds_median", "extra_GB", "first_layer", "largest", "error"))


def apart(model: LVLM, given: Prompt) -> dict:
    """How far attention received as lv.observe has it is from that of eager weights, by the norm of the difference: in
    the first layer, whose input is the same in both, and at most (rounding adds up from layer to layer)."""
    received, differences = OBSERVED["all"](model, given).received, []
    for layer, weights in enumerate(OBSERVED["eager"](model, given)):
        wanted = weights.float().sum(2).cpu()
        differences.append(float((received[layer].cpu() - wanted).norm() / wanted.norm()))
    return {"first_layer": differences[0], "largest": max(differences)}


def saliency(report: Report) -> None:
    model = report.model("LLaVA-1.5-7B")
    plans = {1024: ("plain", "streamed", "eager"), 4096: ("plain", "streamed")}
    if report.small:
        plans = {160: plans[1024], 256: plans[4096]}
    sums: dict[str, torch.Tensor] = {}
    for tokens, ways in plans.items():
        given = prompt(model, tokens - patches(model))
        for way in ways:

            def run(way=way, given=given) -> None:
                sums[way] = FLOWS[way](model, given)

            report.row(partial(timed, report, run, report.repeats), tokens=tokens, way=way)
        if "eager" in ways:
            report.row(lambda: {"largest": float((sums["streamed"] - sums["eager"]).norm() / sums["eager"].norm())},
                       tokens=tokens, way="apart")  # fmt: skip
    show(report, ("tokens", "way", "seconds_median", "extra_GB", "largest", "error"))


def pruning(report: Report) -> None:
    methods = sorted(name for name, method in lv.methods.METHODS.items() if method.kind != "text")
    cost(report, "LLaVA-1.5-7B", [(name, keep, {}) for keep in KEEP[: 1 if report.small else None] for name in methods])


def larger(report: Report) -> None:
    cost(report, "LLaVA-NeXT-7B", [])
    cost(report, "LLaVA-1.5-13B", [])


PARTS = {one.__name__: one for one in (tests, observe, saliency, pruning, larger)}


# What pruning costs and saves ---------------------------------------------------------------------------------------
def cost(report: Report, name: str, cases: list[tuple[str, int, dict]]) -> None:
    """The model without pruning, with every one of the `cases` (method, visual tokens kept, further options), and with
    those that the papers print of this model."""
    model, papers = report.model(name), [row for row in PAPERS if row["model"] == name]
    printed = [(row["method"], row["keep"], row["options"]) for row in papers if row["method"]]
    printed = printed[::5] if report.small else printed
    cases += [case for number, case in enumerate(printed) if case not in cases and case not in printed[:number]]
    side = model.model.config.vision_config.image_size
    tiles = 5 if SHAPES[name]["family"] == "llava_next" else 1  # the whole picture, and two by two parts of it
    given = prompt(model, TEXT, (side, side) if tiles == 1 else (2 * side, 2 * side))
    scale = patches(model) / 576  # below 1 with --small
    report.found["models"][name] |= {"visual_tokens": int(given.groups.visual.sum()), "text_tokens": TEXT}
    plain = report.row(lambda: expense(report, model, given), model=name, method=None, keep=576 * tiles)
    for method, keep, options in cases:
        before = lv.methods.METHODS[method].kind == "visual, before the LLM"
        number = max(2, round(keep * scale / (tiles if before else 1)))  # of every tile, or of the prompt

        def run(method=method, number=number, options=options) -> dict:
            with lv.prune(model, method, keep=number, **options) as trace:
                return expense(report, model, given, trace)

        row = report.row(run, model=name, method=method, keep=keep, **({"options": options} if options else {}))
        if "ttft_ms" in row and "ttft_ms" in plain:
            row["of_plain"] = round(row["ttft_ms"] / plain["ttft_ms"], 3)
        row["paper"] = [
            one for one in papers if (one["method"], one["keep"], one["options"]) == (method, keep, options)
        ]
    plain["paper"] = [row for row in papers if not row["method"]]
    report.write()
    columns = ("method", "options", "keep", "ttft_ms", "of_plain", "tpot_ms", "memory_GB", "visual_kv_MB")
    show(report, (*columns, "paper", "error"), name)


def expense(report: Report, model: LVLM, given: Prompt, trace: "lv.methods.Trace | None" = None) -> dict:
    """Milliseconds to the first token and for each further one, memory with the weights, what visual tokens cost."""
    config, weights = model.model.config, gigabytes(model)
    taken = measure(model, given, new_tokens=3 if report.small else 8, repeats=report.repeats)
    visual = given.groups.visual
    layers = config.get_text_config().num_hidden_layers
    each = [float(visual.sum())] * layers if trace is None else (trace.kept.cpu() & visual.cpu()).sum((1, 2)).tolist()
    facts = {
        "ttft_ms": 1000 * taken["ttft"].median(), "ttft_ms_min": 1000 * taken["ttft"].min(),
        "ttft_ms_max": 1000 * taken["ttft"].max(), "tpot_ms": 1000 * taken["tpot"].median(),
        "memory_GB": weights + taken["peak_memory"].max() / 2**30, "visual_tokens": sum(each) / layers,
        "visual_tokens_last_layer": each[-1], "visual_TFLOPs": decoder_flops(config, each)["prefill"] / 1e12,
        "visual_kv_MB": cache_bytes(config, each) / 2**20,
    }  # fmt: skip
    return {name: float(f"{value:.5g}") for name, value in facts.items()}


def show(report: Report, columns: tuple[str, ...], model: str | None = None) -> None:
    """The rows as a table, of one model where it is named; beside ours the papers' milliseconds and `of_plain`."""
    rows = [row for row in report.found["rows"] if row.get("model") == model]
    lines = [columns, *([cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def cell(value: object) -> str:
    if isinstance(value, list):  # of rows of a paper
        return "; ".join(f"{row['ttft_ms']} ({row['of_plain']:.2f}, {row['table']})" for row in value)
    if isinstance(value, dict):
        return ", ".join(f"{name}={one}" for name, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    report = Report(parser.parse_args())
    PARTS[report.options.part](report)
    report.found["finished"] = True
    report.write()
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
