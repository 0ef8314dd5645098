"""A picture is what a person sees of it, whatever holds it; what cannot be one picture is refused in one line."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import lvlm_utils as lv
from lvlm_utils.prompts import open_image

SIZE = (48, 32)
WHITE = (255, 255, 255)
# EXIF's number for an orientation -> what a camera held that way did to the scene before it wrote the file
TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip


def scene() -> Image.Image:
    """Three colours in three corners: every orientation differs from every other."""
    image = Image.new("RGB", SIZE, "navy")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 15, 15), fill="red")
    draw.rectangle((32, 0, 47, 15), fill="yellow")
    return image


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def same(found: Image.Image, wanted: Image.Image, tolerance: int = 0) -> None:
    assert found.size == wanted.size
    assert np.abs(pixels(found) - pixels(wanted)).max() <= tolerance


# Orientation --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("number", TURNED)
def test_the_orientation_in_the_exif_data_is_followed(number, kind, tmp_path):
    exif, path = Image.Exif(), tmp_path / f"turned.{kind}"
    exif[0x0112] = number
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(kind, {})
    scene().transpose(TURNED[number]).save(path, exif=exif, **options)
    tolerance = 40 * (kind == "jpg")  # between two colours
    same(open_image(path), scene(), tolerance)
    with Image.open(path) as held:
        same(open_image(held), scene(), tolerance)
        copy = held.convert("RGB")
        same(open_image(copy.resize(copy.size)), scene(), tolerance)  # copies keep the EXIF data
    same(open_image(open_image(path)), scene(), tolerance)  # turned once, not twice


# Grey, of sixteen bits and more -------------------------------------------------------------------------------------
RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)


@pytest.mark.parametrize("kind", ["png", "tiff", "pgm"])
def test_sixteen_bits_keep_their_greys(kind, tmp_path):
    path = tmp_path / f"grey.{kind}"
    if kind == "pgm":
        path.write_bytes(b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes())
    else:
        Image.fromarray(RAMP).save(path)
    for source in (path, Image.open(path)):
        found = pixels(open_image(source))
        assert np.array_equal(found[..., 0], np.arange(256).reshape(16, 16)) and (found == found[..., :1]).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I"])
def test_modes_of_sixteen_bits(mode):
    kind = {"I;16B": ">u2", "I": "<i4"}.get(mode, "<u2")
    image = Image.frombytes(mode, (16, 16), RAMP.astype(kind).tobytes())
    assert np.array_equal(pixels(open_image(image))[..., 1], np.arange(256).reshape(16, 16))


def test_float_pictures_are_from_0_to_1():
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    assert np.array_equal(pixels(open_image(Image.fromarray(ramp)))[..., 0], np.arange(256).reshape(16, 16))
    for wrong in (ramp * 255, ramp - 0.5, np.full((4, 4), np.nan, np.float32), np.full((4, 4), np.inf, np.float32)):
        with pytest.raises(ValueError, match="floats? .* from 0 to 1"):
            open_image(Image.fromarray(wrong.astype(np.float32)))


@pytest.mark.parametrize("number", [-1, 70_000, 200])
def test_whole_numbers_that_may_mean_two_things_are_refused(number):
    """200 of 255 or of 65,535?"""
    with pytest.raises(ValueError, match=r"PIL image \(mode I, 4 x 3\).*65535"):
        open_image(Image.new("I", (4, 3), number))


# Transparency -------------------------------------------------------------------------------------------------------
def see_through(mode: str) -> Image.Image:
    """The left half is opaque grey, the right half fully transparent with black hidden in it."""
    if mode == "PA":
        image = Image.new("PA", (8, 4))
        image.putpalette([0, 0, 0, 100, 100, 100])
        image.paste((1, 255), (0, 0, 4, 4))
        return image
    image = Image.new("LA", (8, 4), (100, 255))
    image.paste((0, 0), (4, 0, 8, 4))
    return image.convert("RGBA").convert(mode) if mode.startswith("RGB") else image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparent_pixels_show_white(mode):
    found = open_image(see_through(mode))
    assert found.getpixel((1, 1)) == (100, 100, 100) and found.getpixel((6, 1)) == WHITE


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1", "I;16"])
@pytest.mark.parametrize("written", [True, False])
def test_a_transparent_colour_shows_white(mode, written, tmp_path):
    """What PNG and GIF write beside pictures that have no alpha channel."""
    if mode == "P":
        image = Image.new("P", (8, 4), 1)
        image.putpalette([0, 0, 0, 100, 100, 100])
        image.paste(0, (4, 0, 8, 4))
    elif mode == "I;16":
        array = np.full((4, 8), 100 * 257, np.uint16)
        array[:, 4:] = 0
        image = Image.fromarray(array)
    else:
        image = Image.new(mode, (8, 4), {"1": 1, "L": 100, "RGB": (100, 100, 100)}[mode])
        image.paste(0, (4, 0, 8, 4))
    key = (0, 0, 0) if mode == "RGB" else 0
    image.info["transparency"] = key
    if written:
        image.save(tmp_path / "key.png", transparency=key)
        image = tmp_path / "key.png"
    found = open_image(image)
    assert found.getpixel((6, 1)) == WHITE
    assert found.getpixel((1, 1)) == (WHITE if mode == "1" else (100, 100, 100))


def test_half_transparent_is_half_white_and_a_palette_may_be_too(tmp_path):
    assert open_image(Image.new("RGBA", (2, 2), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)
    image = Image.new("P", (2, 2), 0)
    image.putpalette([0, 0, 0])
    image.save(tmp_path / "p.png", transparency=bytes([128]))
    assert open_image(tmp_path / "p.png").getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_as_pillow_shows_them(mode):
    image = scene().convert(mode)
    same(open_image(image), image.convert("RGB"))


# Several frames -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_of_several_frames_the_first_is_seen_or_the_one_that_a_held_picture_is_at(kind, tmp_path):
    path, frames = tmp_path / f"moving.{kind}", [Image.new("RGB", (9, 9), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "webp" else {}))
    assert open_image(path).getpixel((4, 4)) == (255, 0, 0)
    with Image.open(path) as held:
        held.seek(2)
        assert open_image(held).getpixel((4, 4)) == (0, 0, 255) and held.tell() == 2


def test_a_held_picture_is_left_as_it_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = see_through("RGBA")
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as held:
        before = held.tobytes(), held.mode, held.size, dict(held.info)
        assert open_image(held).size == (4, 8)
        assert (held.tobytes(), held.mode, held.size, dict(held.info)) == before
    plain = scene()
    assert open_image(plain) is not plain


# Arrays and tensors -------------------------------------------------------------------------------------------------
def forms() -> dict:
    array = np.asarray(scene())
    tensor = torch.tensor(array)
    return {
        "uint8 HWC": array, "uint8 CHW": array.transpose(2, 0, 1), "uint16": array.astype(np.uint16) * 257,
        "float32": (array / 255).astype(np.float32), "float16": (array / 255).astype(np.float16),
        "float64": array / 255,
        "big-endian": (array.astype(np.uint16) * 257).astype(">u2"), "not contiguous": array[::-1][::-1],
        "tensor": tensor, "tensor CHW": tensor.permute(2, 0, 1), "float tensor": tensor.permute(2, 0, 1) / 255,
        "uint16 tensor": (tensor.int() * 257).to(torch.uint16), "bfloat16": (tensor / 255).bfloat16(),
        "wants gradients": (tensor / 255).requires_grad_(),
        "opaque RGBA": np.dstack([array, np.full(SIZE[::-1], 255, np.uint8)]),
    }  # fmt: skip


@pytest.mark.parametrize("form", forms())
def test_arrays_and_tensors_are_pictures(form, tiny):
    source = forms()[form]
    same(open_image(source), scene(), form == "bfloat16")
    shown = [lv.prompt(tiny, one, "", "Is it?").inputs["pixel_values"] for one in (source, scene())]
    assert torch.allclose(*shown, atol=0.02) and (form == "bfloat16" or torch.equal(*shown))


def test_grey_arrays_and_transparent_ones():
    grey = np.arange(30, dtype=np.uint8).reshape(5, 6)
    for form in (grey, grey[..., None], grey[None], torch.tensor(grey)[None] / 255):
        assert np.array_equal(pixels(open_image(form)), np.repeat(grey[..., None], 3, 2))
    clear = np.zeros((5, 6, 4), np.float32)
    assert open_image(clear).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((3, 5, 3), np.uint8), r"array of shape \(3, 5, 3\).*channels"),
        (np.zeros((1, 5, 4), np.uint8), "channels"),
        (np.zeros((5, 6, 2), np.uint8), "channels"),
        (np.zeros((7, 5, 6), np.uint8), "channels"),
        (np.zeros((2, 5, 6, 3), np.uint8), r"array of shape \(2, 5, 6, 3\).*several of one prompt are a tuple"),
        (torch.zeros(1, 3, 5, 6), r"tensor of shape \(1, 3, 5, 6\).*several of one prompt are a tuple"),
        (np.zeros(5, np.uint8), "channels"),
        (np.zeros((5, 6, 3), np.int64), "int64.*uint8"),
        (np.zeros((5, 6), bool), "bool.*uint8"),
        (np.zeros((5, 6, 3), np.uint32), "uint32.*uint8"),
        (np.full((5, 6, 3), 128.0), "from 0 to 1"),
        (torch.randn(3, 5, 6), "from 0 to 1"),
        (torch.full((3, 5, 6), torch.nan), "from 0 to 1"),
        (np.zeros((0, 6, 3), np.uint8), "no pixels"),
        (Image.new("RGB", (0, 5)), "no pixels"),
        (np.array(["a.png"], dtype=object), "object.*uint8"),
    ],
)
def test_what_is_not_clearly_one_picture_is_refused(source, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_image(source)
    assert "\n" not in str(caught.value)


# What cannot be read ------------------------------------------------------------------------------------------------
def big(tmp_path) -> str:
    Image.effect_noise((640, 640), 90).save(tmp_path / "big.jpg")
    return str(tmp_path / "big.jpg")


def test_pictures_that_break_while_they_are_read_are_named(tmp_path, monkeypatch):
    path = big(tmp_path)
    with open(path, "rb") as whole:
        (tmp_path / "cut.jpg").write_bytes(whole.read()[:20_000])
    for source in (tmp_path / "cut.jpg", Image.open(tmp_path / "cut.jpg")):
        with pytest.raises(ValueError, match=r"cut.jpg.* is not a readable picture: .*truncated"):
            open_image(source)
    closed = Image.open(path)
    closed.close()
    with pytest.raises(ValueError, match=r"big.jpg.* is not a readable picture"):
        open_image(closed)
    made = Image.new("L", (3, 4))
    made.close()
    with pytest.raises(ValueError, match=r"PIL image \(mode L, 3 x 4\) is not a readable picture"):
        open_image(made)
    gone = Image.open(path)
    gone.fp.close()
    with pytest.raises(ValueError, match=r"big.jpg.* is not a readable picture"):
        open_image(gone)
    (tmp_path / "odd.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\x00" * 40)
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("odd.png", "empty.jpg"):
        with pytest.raises(ValueError, match=f"{name} is not a readable picture"):
            open_image(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"big.jpg is not a readable picture: .*409600 pixels"):
        open_image(path)


def test_sixteen_bits_that_mean_something_else(tmp_path):
    """A TIFF in which white is zero, and an RGB PNG whose transparent colour is finer than its pixels can be here."""
    values = np.full((4, 6), 60_000, np.uint16)
    Image.fromarray(values).save(tmp_path / "black.tif")
    Image.fromarray(values).save(tmp_path / "white.tif", tiffinfo={262: 0})
    assert np.asarray(open_image(tmp_path / "black.tif"))[0, 0].tolist() == [233] * 3
    assert np.asarray(open_image(tmp_path / "white.tif"))[0, 0].tolist() == [22] * 3
    image = Image.new("RGB", (4, 4), (234, 117, 39))
    image.info["transparency"] = (60_000, 30_000, 10_000)
    with pytest.raises(ValueError, match="transparent colour has 16 bits"):
        open_image(image)
