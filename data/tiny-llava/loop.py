"""The training loop of every stage: a budget in minutes, a progress bar, a log, checkpoints that survive a kill."""

from __future__ import annotations

import csv
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from optim import Masters
from tqdm.auto import tqdm

SAVE_EVERY = 120.0  # seconds between checkpoints, at most


def schedule(done: float, step: int, warmup: int = 40, decay: float = 0.6) -> float:
    """Learning-rate factor: linear warm-up over steps, flat, then linear to 2% over the last `decay` share of the time."""
    return min(1.0, (step + 1) / warmup) * (min(1.0, (1 - done) / decay) * 0.98 + 0.02)


def train(
    stage: str,
    work: Path,
    minutes: float,
    optimisers: list[Masters],
    step: Callable[[float, int], dict],
    rng: random.Random,
    report: Callable[[], dict] | None = None,
) -> None:
    """Call `step(share of the budget used, number of the step)` until the budget is spent; resumes from `work/<stage>.pt`.

    `step` runs forward, backward and the optimisers and returns numbers to log; `report` is a slower check, every tenth of the run.
    """
    saved, log = work / f"{stage}.pt", work / f"{stage}.csv"
    used, number = 0.0, 0
    if saved.exists():
        state = torch.load(saved, weights_only=False)
        used, number = state["used"], state["number"]
        for optimiser, masters in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(masters)
        rng.setstate(state["random"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        _forget_after(log, number)
    budget, mark, since_save, checks = minutes * 60, time.monotonic(), used, int(used / (minutes * 6))
    window: list[dict] = []
    with tqdm(total=round(budget), initial=round(min(used, budget)), desc=stage, unit="s", mininterval=5) as bar:
        while used < budget:
            window.append(step(used / budget, number))
            number += 1
            now = time.monotonic()
            used, mark = used + now - mark, now
            bar.update(round(used) - bar.n)
            if number % 20 == 0 or used >= budget:
                row = {"step": number, "seconds": round(used, 1)} | _mean(window)
                if report and (used >= budget or used / (minutes * 6) >= checks + 1):
                    row |= report()
                    checks = int(used / (minutes * 6))
                    tqdm.write(f"{stage}: {row}")
                _append(log, row)
                bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if isinstance(v, float) and k != "seconds"})
                window = []
            if used - since_save > min(SAVE_EVERY, budget / 5) or used >= budget:
                state = {
                    "used": used,
                    "number": number,
                    "optimisers": [o.state_dict() for o in optimisers],
                    "random": rng.getstate(),
                    "numpy": np.random.get_state(),
                    "torch": torch.get_rng_state(),
                }
                torch.save(state, saved.with_suffix(".tmp"))
                os.replace(saved.with_suffix(".tmp"), saved)
                since_save, mark = used, time.monotonic()


def _forget_after(log: Path, step: int) -> None:
    """Drop the log of steps that were lost with the kill: they are about to be done again."""
    if not log.exists():  # killed before the first row
        return
    with log.open(newline="", encoding="utf-8-sig") as file:
        header, *rows = csv.reader(file)
    with log.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header] + [row for row in rows if int(row[0]) <= step])


def _mean(window: list[dict]) -> dict:
    keys = sorted({key for row in window for key in row})
    return {key: round(float(np.mean([row[key] for row in window if key in row])), 4) for key in keys}


def _append(log: Path, row: dict) -> None:
    """One CSV row as `step, seconds, name, value` lines: stages log different numbers."""
    fresh = not log.exists()
    with log.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(["step", "seconds", "name", "value"])
        writer.writerows([row["step"], row["seconds"], k, v] for k, v in row.items() if k not in ("step", "seconds"))
