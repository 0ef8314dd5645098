"""One style for all figures, and `save`: svg, png and the csv with their numbers; the same data give the same bytes."""
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from lvlm_utils import ROOT

# A line is told apart by colour, marker and dash: any one of them is enough.
PALETTE = sns.color_palette("colorblind", 8)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2, 2, 2)))


def style() -> None:
    """Set the project's seaborn style; call it once, before the first figure."""
    sns.set_theme(context="notebook", style="whitegrid", palette=PALETTE, rc={
        "axes.spines.top": False, "axes.spines.right": False, "figure.figsize": (7, 4), "figure.dpi": 72,
        "figure.constrained_layout.use": True, "lines.markersize": 6, "legend.frameon": False})


def save(figure: Figure, table: pd.DataFrame, name: str, model: str = "tiny-llava", root: str | Path | None = None
         ) -> Path:
    """Write ROOT/figures/<model>/<name>.svg, .png and .csv (the numbers shown); returns the svg's path.

    model: as given to `load`; of a hub id or a path only the last part names the folder. Nothing written depends on
    date, process or machine names. Unless the index is the plain row number, it goes into the csv.
    """
    if "/" in name or not name:
        raise ValueError(f"name must be a bare file name such as '02_accuracy', found {name!r}")
    folder = Path(ROOT if root is None else root) / "figures" / Path(model).name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.svg"
    with mpl.rc_context({"svg.hashsalt": "lvlm_utils", "svg.fonttype": "path", "savefig.facecolor": "white"}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(path.with_suffix(".png"), format="png", dpi=120, metadata={"Software": None})
    plain = isinstance(table.index, pd.RangeIndex)
    table.to_csv(path.with_suffix(".csv"), index=not plain, float_format="%.6g", lineterminator="\n", encoding="utf-8")
    return path


def lines_with_intervals(table: pd.DataFrame, x: str, y: str, low: str = "low", high: str = "high",
                         hue: str | None = None, ax: plt.Axes | None = None, order: Sequence | None = None,
                         band: bool = True) -> plt.Axes:
    """One line for each value of `hue` with its interval as a band (or bars); rows need not be sorted.

    The caller writes the axis labels, with units.
    """
    ax = plt.subplots()[1] if ax is None else ax
    groups = [None] if hue is None else list(dict.fromkeys(table[hue])) if order is None else list(order)
    if len(groups) > len(MARKERS):
        raise ValueError(f"{len(groups)} lines cannot be told apart; show at most {len(MARKERS)}, or use panels")
    for i, group in enumerate(groups):
        part = (table if hue is None else table[table[hue] == group]).sort_values(x)
        if part.empty:
            raise ValueError(f"no rows with {hue} = {group!r}")
        at, middle, bottom, top = (part[column].to_numpy(dtype=float) for column in (x, y, low, high))
        look = {"color": PALETTE[i], "marker": MARKERS[i], "linestyle": DASHES[i], "label": group}
        if band:
            ax.plot(at, middle, **look)
            ax.fill_between(at, bottom, top, color=PALETTE[i], alpha=0.18, linewidth=0)
        else:
            ax.errorbar(at, middle, yerr=np.stack([middle - bottom, top - middle]), capsize=3, **look)
    if hue is not None:
        ax.legend(title=hue)
    return ax


def show(*images: Image.Image | str | Path | np.ndarray, titles: Sequence[str] = (), height: float = 2.6) -> Figure:
    """Pictures side by side, without axes, as a person sees them: upright, and white where they are transparent.

    Each is a PIL image, a path or an array (rows, columns[, 3]); a two-dimensional array of floats is drawn from its
    lowest value, black, to its highest, white.
    """
    figure, axes = plt.subplots(1, len(images), figsize=(height * len(images), height), squeeze=False)
    for ax, image, title in zip(axes[0], images, [*titles, *[""] * len(images)]):
        if isinstance(image, str | Path):
            with Image.open(image) as opened:
                image = _colours(opened)
        image = _colours(image) if isinstance(image, Image.Image) else np.asarray(image)
        full = {"uint8": 255, "bool": 1}.get(image.dtype.name)
        ax.imshow(image, cmap="gray", vmin=None if full is None else 0, vmax=full)
        ax.set_title(title, fontsize="small")
        ax.axis("off")
    return figure


def _colours(picture: Image.Image) -> np.ndarray:
    """(rows, columns, 3 or 4), bytes; sixteen bits are drawn as eight."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    return np.asarray(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))
