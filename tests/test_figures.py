"""The same data give the same bytes, in this process and in another; the helpers draw what the table holds."""
import hashlib
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

from lvlm_utils import figures  # noqa: E402

TABLE = pd.DataFrame({"length": [0, 500, 0, 500], "accuracy": [0.9, 1 / 3, 0.5, 0.55], "low": [0.85, 0.3, 0.4, 0.5],
                      "high": [0.95, 0.4, 0.6, 0.6], "picture": ["original"] * 2 + ["white"] * 2})


def write(root, model="tiny-llava") -> Path:
    figures.style()
    figure, ax = plt.subplots()
    figures.lines_with_intervals(TABLE, "length", "accuracy", hue="picture", ax=ax)
    ax.set(xlabel="context (tokens)", ylabel="accuracy")
    path = figures.save(figure, TABLE, "02_accuracy", model, root)
    plt.close(figure)
    return path


def digests(path: Path) -> list[str]:
    return [hashlib.sha256(path.with_suffix(suffix).read_bytes()).hexdigest() for suffix in (".svg", ".png", ".csv")]


def test_same_bytes_twice_and_in_another_process(tmp_path):
    first = write(tmp_path / "a")
    assert first == tmp_path / "a" / "figures" / "tiny-llava" / "02_accuracy.svg"
    assert digests(first) == digests(write(tmp_path / "b"))
    code = ("import sys; sys.path[:0] = ['tests', '.']; import test_figures as t;"
            f"print(*t.digests(t.write({str(tmp_path / 'c')!r})))")
    out = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True,
                         check=True)
    assert out.stdout.split() == digests(first)


def test_no_dates_nor_software_in_the_files(tmp_path):
    path = write(tmp_path)
    assert "<dc:date>" not in path.read_text() and "Matplotlib v" not in path.read_text()
    with Image.open(path.with_suffix(".png")) as image:
        assert not {"Software", "Creation Time", "date:create"} & set(image.info)


def test_csv_has_six_digits_unix_lines_and_a_named_index(tmp_path):
    path = write(tmp_path)
    lines = path.with_suffix(".csv").read_bytes().decode().split("\n")
    assert lines[0] == "length,accuracy,low,high,picture" and lines[2] == "500,0.333333,0.3,0.4,original"
    figure = plt.figure()
    path = figures.save(figure, TABLE.set_index("length"), "indexed", root=tmp_path)
    plt.close(figure)
    assert path.with_suffix(".csv").read_text().startswith("length,accuracy,")


def test_a_hub_id_or_a_path_names_one_folder(tmp_path):
    assert write(tmp_path, "llava-hf/llava-1.5-7b-hf").parent == tmp_path / "figures" / "llava-1.5-7b-hf"
    figure = plt.figure()
    with pytest.raises(ValueError, match="bare file name"):
        figures.save(figure, TABLE, "../x", root=tmp_path)
    plt.close(figure)


@pytest.mark.parametrize("band", [True, False])
def test_lines_with_intervals_draws_each_group(band):
    figure, ax = plt.subplots()
    figures.lines_with_intervals(TABLE.iloc[::-1], "length", "accuracy", hue="picture", ax=ax, band=band,
                                 order=["original", "white"])
    lines = [line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_linestyle() != "None"]
    assert [list(line.get_ydata()) for line in lines] == [[0.9, 1 / 3], [0.5, 0.55]]
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["original", "white"]
    with pytest.raises(ValueError, match="no rows with picture = 'black'"):
        figures.lines_with_intervals(TABLE, "length", "accuracy", hue="picture", ax=ax, order=["black"])
    plt.close(figure)


def test_too_many_lines_are_refused():
    table = pd.concat([TABLE.assign(picture=str(i)) for i in range(9)])
    with pytest.raises(ValueError, match="9 lines cannot be told apart"):
        figures.lines_with_intervals(table, "length", "accuracy", hue="picture")
    plt.close("all")


def test_show_takes_pictures_paths_and_arrays(tmp_path):
    Image.new("RGB", (8, 4), "red").save(tmp_path / "red.png")
    figure = figures.show(Image.new("L", (4, 4)), tmp_path / "red.png", np.zeros((3, 5, 3)), titles=["a", "b"])
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", ""]
    assert figure.axes[1].images[0].get_array().shape == (4, 8, 3)
    plt.close(figure)


def drawn(image) -> list[int]:
    """Red, green and blue in the middle of what `show` draws."""
    figure = figures.show(image)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())
    plt.close(figure)
    return pixels[pixels.shape[0] // 2, pixels.shape[1] // 2, :3].tolist()


@pytest.mark.parametrize("image", [
    Image.new("L", (4, 4), 255), Image.new("1", (4, 4), 1), Image.new("RGBA", (4, 4), (255, 0, 0, 0)),
    Image.new("L", (4, 4), 255).convert("P"), Image.fromarray(np.full((4, 4), 65535, np.uint16)),
    np.full((4, 4), 255, np.uint8), np.ones((4, 4), bool),
], ids=["grey", "bits", "transparent", "palette", "16 bits", "array of bytes", "mask"])  # fmt: skip
@pytest.mark.parametrize("opened", [True, False])
def test_white_is_shown_white(image, opened, tmp_path):
    figures.style()
    if not opened and isinstance(image, Image.Image):
        image.save(tmp_path / "white.png")
        image = tmp_path / "white.png"
    assert drawn(image) == [255] * 3


def test_a_grey_is_shown_as_that_grey():
    assert drawn(Image.new("L", (4, 4), 51)) == drawn(Image.fromarray(np.full((4, 4), 51 * 257, np.uint16))) == [51] * 3


def test_a_photograph_is_shown_upright(tmp_path):
    photograph = Image.new("RGB", (8, 4))
    exif = photograph.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    photograph.save(tmp_path / "photograph.jpg", exif=exif)
    figure = figures.show(tmp_path / "photograph.jpg")
    assert figure.axes[0].images[0].get_array().shape == (8, 4, 3)
    plt.close(figure)
