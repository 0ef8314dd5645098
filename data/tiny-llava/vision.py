"""Stage 1: the eye. A CLIP vision tower learns which object each patch shows, on pictures painted as it goes."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, CLIPVisionConfig, CLIPVisionModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emoji-world"))
import world  # noqa: E402
from loop import schedule, train  # noqa: E402
from optim import Masters  # noqa: E402

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])  # of CLIP's image processor
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
BATCH = 48
NAMES, KINDS = world.NAMES, list(world.SCENES)


def plain(module, query, key, value, attention_mask=None, scaling=None, **unused):
    """Attention as two matrix products: on a CPU, faster than fused kernels for 145 tokens (training only)."""
    weights = torch.matmul(query * scaling, key.transpose(-1, -2)).softmax(-1)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


AttentionInterface.register("plain", plain)


def config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        image_size=world.SIDE,
        patch_size=world.PATCH,
        hidden_act="gelu",
        projection_dim=192,
    )


def pixels(pictures: list[np.ndarray]) -> torch.Tensor:
    """Pictures uint8 (192, 192, 3) -> normalised (batch, 3, 192, 192), as the processor does it."""
    batch = torch.from_numpy(np.stack(pictures)).float()
    return (batch * (1 / (255 * STD)) - MEAN / STD).permute(0, 3, 1, 2)


class Eye(nn.Module):
    """The tower with the heads it learns by: object of each patch (penultimate layer), objects and kind of scene ([CLS])."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(config())
        self.tower.set_attn_implementation("plain")
        self.norm = nn.LayerNorm(192)
        self.patch_head = nn.Linear(192, len(NAMES) + 1)
        self.object_head, self.kind_head = nn.Linear(192, len(NAMES)), nn.Linear(192, len(KINDS))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out = self.tower(x.to(self.tower.dtype), output_hidden_states=True)
        patches = self.patch_head(self.norm(out.hidden_states[-2][:, 1:]))
        return patches, self.object_head(out.pooler_output), self.kind_head(out.pooler_output)


def oracle(eye: nn.Module, scenes: list[world.Scene], pictures: list[np.ndarray], rng: random.Random) -> dict:
    """How well the patch head alone answers "is it there?" (best single threshold): what the language model can hope for."""
    with torch.inference_mode():
        chances = torch.cat(
            [eye(pixels(pictures[i : i + 50]))[0].float().softmax(-1).amax(1) for i in range(0, len(pictures), 50)]
        )
    score, truth, kind = [], [], []
    for chance, scene in zip(chances, scenes, strict=True):
        score += [chance[world.INDEX[t.name]].item() for t in scene.things]
        truth, kind = truth + [True] * len(scene.things), kind + ["present"] * len(scene.things)
        for way in ("random", "popular", "adversarial") * 2:
            score.append(chance[world.INDEX[world.absent(scene, rng, way)]].item())
            truth, kind = truth + [False], kind + [way]
    score, truth, kind = np.array(score), np.array(truth), np.array(kind)
    best = max(np.quantile(score, np.linspace(0.1, 0.9, 60)), key=lambda t: ((score > t) == truth).mean())
    right = (score > best) == truth
    return {"oracle": right.mean(), "adversarial": right[kind == "adversarial"].mean(), "present": right[truth].mean()}


def stage(work: Path, minutes: float, seed: int, compile_layers: bool = True, dtype: torch.dtype = torch.bfloat16) -> None:
    """Train and leave `work/vision/` (a plain CLIPVisionModel checkpoint)."""
    torch.manual_seed(seed)
    rng, fixed = random.Random(seed), random.Random(909)
    eye = Eye().to(dtype)
    optimiser = Masters(eye.named_parameters(), lr_muon=0.02, lr_adam=1.5e-3)
    fast = torch.compile(eye, dynamic=False) if compile_layers else eye
    held = [world.sample_scene(fixed) for _ in range(200)]
    held_pictures = [world.paint(scene, fixed) for scene in held]
    weight = torch.ones(len(NAMES) + 1)
    weight[-1] = 0.2  # most patches are background

    def step(done: float, number: int) -> dict:
        scenes = [world.crowd(rng) if rng.random() < 0.7 else world.sample_scene(rng) for _ in range(BATCH)]
        labels = torch.from_numpy(np.stack([world.label_map(s) for s in scenes])).flatten()
        objects = torch.zeros(BATCH, len(NAMES))
        for row, scene in zip(objects, scenes, strict=True):
            row[[world.INDEX[name] for name in scene.names]] = 1
        patch, found, kind = fast(pixels([world.paint(s, rng) for s in scenes]))
        patch_loss = F.cross_entropy(patch.float().flatten(0, 1), labels, weight=weight)
        loss = (
            patch_loss
            + 2 * F.binary_cross_entropy_with_logits(found.float(), objects)
            + 0.1 * F.cross_entropy(kind.float(), torch.tensor([KINDS.index(s.kind) for s in scenes]))
        )
        loss.backward()
        optimiser.step(schedule(done, number))
        return {"loss": loss.item(), "patch_loss": patch_loss.item()}

    train("vision", work, minutes, [optimiser], step, rng, lambda: oracle(eye, held, held_pictures, random.Random(5)))
    eye.tower.float().set_attn_implementation("sdpa")
    eye.tower.save_pretrained(work / "vision")
