"""What the frozen tower sees of drawn training pictures, and the projector that says it in the language model's own words."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import world
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

SIDE = 16  # patches along a side
GROUND = len(world.NAMES)  # the label of a patch without an object
HERDS = 0.15  # share of the pictures in which some objects come several times
BLANKS = ((255,) * 3, (255,) * 3, (0,) * 3, (0,) * 3, (128,) * 3, (200, 60, 60), (60, 160, 80), (50, 80, 180))


@dataclass
class Pictures:
    """Scenes, the tower's features of each (pictures, 256, 384) in half precision, and those of pictures of one colour."""

    scenes: list[world.Scene]
    features: Tensor
    blank: Tensor


def herd(rng: random.Random) -> world.Scene:
    """A scene in which one to three of the objects come two to four times; nothing else differs."""
    scene = world.sample_scene(rng)
    names = rng.sample(sorted(scene.names), rng.randint(4, 6))
    more = [name for name in names[: rng.randint(1, 3)] for _ in range(rng.randint(1, 3))]
    return world.Scene(scene.kind, world.place(names + more, rng, (0.7, 0.3, 0.0)))


def label_map(scene: world.Scene, least: float = 0.25) -> np.ndarray:
    """Which object each of the 256 patches shows most of, GROUND where none covers `least` of it."""
    labels, cover = np.full((SIDE, SIDE), GROUND), np.full((SIDE, SIDE), least)
    edges = np.arange(SIDE + 1) * world.SIDE / SIDE
    for thing in scene.things:
        x1, y1, x2, y2 = thing.box
        wide = np.clip(np.minimum(edges[1:], x2) - np.maximum(edges[:-1], x1), 0, None)
        tall = np.clip(np.minimum(edges[1:], y2) - np.maximum(edges[:-1], y1), 0, None)
        share = tall[:, None] * wide[None] / (world.SIDE / SIDE) ** 2
        labels, cover = np.where(share > cover, world.INDEX[thing.name], labels), np.maximum(cover, share)
    return labels.flatten()


@torch.inference_mode()
def look(tower: nn.Module, processor, pictures: list[np.ndarray]) -> Tensor:
    """Patch features of the penultimate layer, (pictures, 256, 384), in half precision."""
    pixels = processor.image_processor([Image.fromarray(p) for p in pictures], return_tensors="pt").pixel_values
    return tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].half()


def draw(tower: nn.Module, processor, file: Path, count: int, seed: int, batch: int = 8) -> Pictures:
    """`count` fresh pictures and what the tower sees of them, kept in `file`; never one of the held-out split."""
    if file.exists():
        return torch.load(file, weights_only=False)
    rng = random.Random(f"smol-llava pictures {seed}")
    scenes = [herd(rng) if rng.random() < HERDS else world.sample_scene(rng) for _ in range(count)]
    steps = tqdm(range(0, count, batch), desc="looking", unit="batch", mininterval=5)
    features = [look(tower, processor, [world.paint(s, rng) for s in scenes[i : i + batch]]) for i in steps]
    blank = look(tower, processor, [np.full((world.SIDE, world.SIDE, 3), tone, np.uint8) for tone in BLANKS])
    pictures = Pictures(scenes, torch.cat(features), blank)
    torch.save(pictures, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)
    return pictures


def name_table(embeddings: Tensor, encode) -> Tensor:
    """Mean embedding of the tokens of each name, and last that of all tokens, which stands for the ground: (86, width)."""
    return torch.stack([embeddings[encode(f" {name}")].mean(0) for name in world.NAMES] + [embeddings.mean(0)])


def regress(projector: nn.Module, pictures: Pictures, table: Tensor, steps: int, seed: int) -> float:
    """Teach the projector to send a patch to the embedding of what it shows, in place; the share of object patches it gets right.

    While it trains its output cannot leave the span of the name embeddings: what lies outside means nothing to the language
    model and only disturbs it. The last tenth of the pictures is for the check.
    """
    choose = torch.Generator().manual_seed(seed)
    held = max(1, len(pictures.scenes) // 10)
    x = pictures.features[:-held].flatten(0, 1)
    y = torch.from_numpy(np.concatenate([label_map(s) for s in pictures.scenes[:-held]]))
    shown, ground = (y < GROUND).nonzero()[:, 0], (y == GROUND).nonzero()[:, 0]
    blank, centre, scale = pictures.blank.flatten(0, 1).float(), table.mean(0), table.std()
    mean, deviation = x[::11].float().mean(0), x[::11].float().std(0)
    directions = F.normalize(table - centre, dim=1)
    basis = torch.linalg.svd(table - centre, full_matrices=False).Vh[:GROUND]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, inner = nn.Linear(x.shape[1], table.shape[1]), nn.Linear(table.shape[1], len(basis))
    optimiser = torch.optim.AdamW([*first.parameters(), *inner.parameters()], 3e-3, weight_decay=0.01)
    for step in tqdm(range(steps), desc="projector", mininterval=5):
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / steps) + 1e-5
        some = [part[torch.randint(len(part), (n,), generator=choose)] for part, n in ((shown, 1024), (ground, 448))]
        empty = blank[torch.randint(len(blank), (64,), generator=choose)]
        target = torch.cat([y[torch.cat(some)], torch.full((64,), GROUND)])
        seen = (
            inner(F.gelu(first((torch.cat([x[torch.cat(some)].float(), empty]) - mean) / deviation))) @ basis + centre
        )
        near = F.normalize(seen - centre, dim=1) @ directions.T
        loss = F.mse_loss(seen / scale, table[target] / scale) + 0.1 * F.cross_entropy(near / 0.07, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():  # the two factors of the second layer, and the standardisation of the features, fold into it
        projector.linear_1.weight.copy_(first.weight / deviation)
        projector.linear_1.bias.copy_(first.bias - first.weight @ (mean / deviation))
        projector.linear_2.weight.copy_(basis.T @ inner.weight)
        projector.linear_2.bias.copy_(basis.T @ inner.bias + centre)
        seen = projector(pictures.features[-held:].flatten(0, 1).float())
        truth = torch.from_numpy(np.concatenate([label_map(s) for s in pictures.scenes[-held:]]))
        found = (F.normalize(seen - centre, dim=1) @ directions.T).argmax(1) == truth
    return found[truth < GROUND].float().mean().item()


def pretend(table: Tensor, rng: random.Random, count: int) -> Pictures:
    """Pictures made of words: at each patch the embedding of what is there, with noise, 8% missing and 3% wrong."""
    draw = np.random.default_rng(rng.getrandbits(32))
    scenes = [herd(rng) if rng.random() < HERDS else world.sample_scene(rng) for _ in range(count)]
    labels = np.stack([label_map(scene) for scene in scenes])
    chance = draw.random(labels.shape)
    labels = np.where(chance < 0.08, GROUND, np.where(chance > 0.97, draw.integers(0, GROUND, labels.shape), labels))
    noise = torch.from_numpy(draw.standard_normal((*labels.shape, table.shape[1]), np.float32))
    return Pictures(
        scenes, (table[torch.from_numpy(labels)] + 0.25 * table.std() * noise).half(), table[None, -1:].half()
    )
