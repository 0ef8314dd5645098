"""The loss curve of a variant: `training.csv` and `training.svg` beside its weights."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import pandas as pd  # noqa: E402
import seaborn as sns  # noqa: E402


def save(work: Path, stages: tuple[str, ...], folder: Path) -> None:
    """Join the logs of the stages (stage, step, seconds, name, value) and draw the accuracies over time."""
    logs = [
        pd.read_csv(work / f"{stage}.csv").assign(stage=stage) for stage in stages if (work / f"{stage}.csv").exists()
    ]
    table = pd.concat(logs, ignore_index=True)[["stage", "step", "seconds", "name", "value"]]
    table.to_csv(folder / "training.csv", index=False, lineterminator="\n")
    shown = table[table["name"].str.contains("accuracy|held_out|oracle")].assign(minutes=table["seconds"] / 60)
    plt.rcParams["svg.hashsalt"] = "tiny-llava"
    grid = sns.relplot(
        shown,
        x="minutes",
        y="value",
        hue="name",
        style="name",
        col="stage",
        col_order=[s for s in stages if s in set(table["stage"])],
        kind="line",
        height=3.2,
        palette="colorblind",
        facet_kws={"sharex": False},
    )
    grid.set_axis_labels("minutes of training", "accuracy").set_titles("{col_name}")
    grid.savefig(folder / "training.svg", metadata={"Date": None})
    plt.close(grid.figure)
