"""What the tower looks at: the share of [CLS]'s attention that the top quarter of patches gets, by layer (FoPru, Fig. 1).

python data/smol-llava/attend.py [folder of pictures ...]     by default 32 drawn pictures; prints the table of the card
"""

import argparse
from pathlib import Path

import parts
import torch
import wheels
from PIL import Image
from torch import Tensor

DRAWN = wheels.HERE.parent / "emoji-world" / "vg" / "VG_100K"
TYPES = {".jpg", ".jpeg", ".png", ".webp"}


@torch.inference_mode()
def shares(pictures: list[Path], part: float = 0.25) -> Tensor:
    """(layers, pictures): how much of the attention of [CLS] to patches goes to the `part` that gets most.

    The mean over heads comes first, as where a method ranks patches.
    """
    tower = wheels.vision()
    tower.set_attn_implementation("eager")
    found = []
    for picture in pictures:
        pixels = parts.images()(Image.open(picture).convert("RGB"), return_tensors="pt")["pixel_values"]
        attention = torch.cat(tower(pixels, output_attentions=True).attentions)[:, :, 0, 1:].mean(1)
        top = attention.topk(round(part * attention.shape[1]), dim=1).values
        found.append(top.sum(1) / attention.sum(1))
    return torch.stack(found, 1)


def table(folders: list[Path], pictures: int) -> str:
    """Markdown: one row for each folder, one column for each layer; mean over its first pictures, by name."""
    lines = []
    for folder in folders:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in TYPES)[:pictures]
        found = shares(files)
        lines.append([f"{folder.name}, {len(files)} pictures", *(f"{share:.2f}" for share in found.mean(1).tolist())])
    head = [["layer", *map(str, range(1, len(lines[0])))], ["---"] * len(lines[0])]
    return "\n".join(f"| {' | '.join(line)} |" for line in head + lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[DRAWN])
    parser.add_argument("--pictures", type=int, default=32, help="at most so many of each folder")
    given = parser.parse_args()
    print(table(given.folders, given.pictures))
