"""Stages 3 to 6: projector, joint training on real pictures, the two variants, and their settling."""

from __future__ import annotations

import random
from pathlib import Path

import assemble
import numpy as np
import torch
import torch.nn.functional as F
from assemble import world
from language import TEXT_WEIGHT, WITH_PICTURE, Packed, draw, losses, write
from loop import schedule, train
from optim import Masters
from rows import ANSWER, SHAPES, Row, Writer, collate
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from vision import pixels

EXPOSURE = 0.03  # share of training pictures almost lost to over- or under-exposure: a blank picture is not unheard of
# kind of row: share of the steps. "short" sees pictures with at most ~480 tokens of context, long positions in text only
MIXES = {
    "joint": {
        "picture": 0.22, "caption": 0.02, "picture+context": 0.16,
        "facts": 0.34, "text": 0.12, "text 1.4k": 0.07, "text 2.8k": 0.07,
    },
    "short": {
        "picture": 0.22, "caption": 0.02, "picture+context": 0.30,
        "facts": 0.10, "text": 0.12, "text 1.4k": 0.12, "text 2.8k": 0.12,
    },
    "long": {
        "picture": 0.16, "caption": 0.02, "picture+context": 0.06, "picture+1.4k": 0.14, "picture+2.8k": 0.16,
        "facts": 0.10, "text": 0.12, "text 1.4k": 0.12, "text 2.8k": 0.12,
    },
    "short, settled": {
        "bare": 0.40, "picture": 0.14, "picture+context": 0.18,
        "facts": 0.10, "text": 0.06, "text 1.4k": 0.06, "text 2.8k": 0.06,
    },
    "long, settled": {
        "bare": 0.40, "picture": 0.10, "picture+context": 0.06, "picture+1.4k": 0.08, "picture+2.8k": 0.08,
        "facts": 0.10, "text": 0.06, "text 1.4k": 0.06, "text 2.8k": 0.06,
    },
}  # fmt: skip


def paint(scene: world.Scene, rng: random.Random) -> np.ndarray:
    picture = world.paint(scene, rng)
    if rng.random() < EXPOSURE:
        blend = rng.uniform(0.85, 1.0)
        picture = (picture * (1 - blend) + rng.choice((0, 255)) * blend).astype(np.uint8)
    return picture


def features(tower: CLIPVisionModel, pictures: list[np.ndarray]) -> torch.Tensor:
    """Patch features of the penultimate layer, (batch, 144, 192)."""
    return tower(pixels(pictures).to(tower.dtype), output_hidden_states=True).hidden_states[-2][:, 1:]


def project(
    work: Path,
    seed: int,
    words: PreTrainedTokenizerFast,
    dtype: torch.dtype = torch.bfloat16,
    pictures: int = 2000,
    steps: int = 700,
) -> None:
    """Stage 3 (seconds): regress the projector onto the table of stage 2; leaves `work/joint.start`, a whole model."""
    torch.manual_seed(seed)
    rng = random.Random(2000 + seed)
    model = LlavaForConditionalGeneration(assemble.config(words))
    saved = torch.load(work / "language.weights")
    model.model.vision_tower.load_state_dict(CLIPVisionModel.from_pretrained(work / "vision").state_dict())
    model.model.language_model.load_state_dict({k[12:]: v for k, v in saved.items() if k.startswith("model.model.")})
    model.lm_head.load_state_dict({"weight": saved["model.lm_head.weight"]})
    table, projector = saved["table.weight"].float(), model.model.multi_modal_projector
    tower = CLIPVisionModel.from_pretrained(work / "vision", attn_implementation="plain").to(dtype)
    scenes = [world.sample_scene(rng) for _ in range(pictures)]
    with torch.no_grad():
        x = torch.cat(
            [
                features(tower, [world.paint(s, rng) for s in scenes[i : i + 50]]).flatten(0, 1)
                for i in range(0, pictures, 50)
            ]
        ).float()
    y = torch.from_numpy(np.stack([world.label_map(s) for s in scenes])).flatten()
    shown, ground = (y < len(world.NAMES)).nonzero()[:, 0], (y == len(world.NAMES)).nonzero()[:, 0]
    optimiser = torch.optim.AdamW(projector.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / steps) + 1e-5
        pick = torch.cat([shown[torch.randint(len(shown), (1536,))], ground[torch.randint(len(ground), (1024,))]])
        out, target = projector(x[pick]), y[pick]
        likeness = F.normalize(out, dim=1) @ F.normalize(table, dim=1).T
        loss = F.mse_loss(out / table.std(), table[target] / table.std()) + 0.5 * F.cross_entropy(
            likeness / 0.07, target
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    right = (likeness.argmax(1) == target)[:1536].float().mean()
    print(f"projector: {right:.3f} of the object patches land nearest to their own object, loss {loss:.3f}")
    torch.save(model.to(dtype).state_dict(), work / "joint.start")


def check(model: LlavaForConditionalGeneration, body: Packed, writer: Writer, seed: int, scenes: int = 110) -> dict:
    """Held-out questions with the picture and no context, three present and three absent objects a scene."""
    rng, right = random.Random(seed), {"present": [], "random": [], "popular": [], "adversarial": []}
    prefix, branches, count = SHAPES["picture"]
    for _ in range(scenes // count):
        batch_scenes, rows, kinds = [world.sample_scene(rng) for _ in range(count)], [], []
        for scene in batch_scenes:
            row = writer.prefix(scene, True, 0, set())
            asked = [(name, "present") for name in rng.sample(sorted(scene.names), 3)]
            asked += [(world.absent(scene, rng, kind), kind) for kind in ("random", "popular", "adversarial")]
            for name, kind in asked:
                writer.ask(row, name, kind == "present", row.cuts[0], True)
                kinds.append(kind)
            rows.append(row)
        batch = collate(rows, prefix, branches, writer.words.pad_token_id, 0.0)
        with torch.inference_mode():
            hidden = run(model, body, batch, [world.paint(s, rng) for s in batch_scenes], writer)
            logits = model.lm_head(hidden[batch.weights == ANSWER]).float()
        yes = logits[:, writer.yes] > logits[:, writer.no]
        for said, kind in zip(yes.tolist(), kinds, strict=True):
            right[kind].append(said == (kind == "present"))
    found = {kind: float(np.mean(values)) for kind, values in right.items()}
    return {
        "held_out": (found["present"] + np.mean([found[k] for k in ("random", "popular", "adversarial")])) / 2,
        "held_out_present": found["present"],
        "held_out_adversarial": found["adversarial"],
    }


def run(
    model: LlavaForConditionalGeneration, body: Packed, batch, pictures: list[np.ndarray] | None, writer: Writer
) -> torch.Tensor:
    """Hidden states of a batch; the tower is differentiated only where its weights are."""
    embeddings = model.model.language_model.embed_tokens(batch.ids)
    if pictures is not None:
        tower = model.model.vision_tower
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())):
            seen = features(tower, pictures)
        embeddings = embeddings.masked_scatter(
            (batch.ids == writer.image)[..., None], model.model.multi_modal_projector(seen)
        )
    return body(embeddings, batch)


# learning rate of Muon (AdamW: a ninth of it), share of the time before the tower joins
PACE = {
    "joint": (0.007, 0.45), "short": (0.004, 0.0), "long": (0.004, 0.0),
    "short, settled": (0.0015, 0.0), "long, settled": (0.0015, 0.0),
}  # fmt: skip


def stage(
    name: str,
    start: str,
    work: Path,
    minutes: float,
    seed: int,
    words: PreTrainedTokenizerFast,
    compile_layers: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Train all parts from `work/<start>`, on the rows of MIXES[name], and leave `work/<name>.weights`."""
    (lr, frozen), mix = PACE[name], MIXES[name]
    torch.manual_seed(seed)
    rng = random.Random(sum(map(ord, name)) + seed)
    writer, model = Writer(words, rng), LlavaForConditionalGeneration(assemble.config(words)).to(dtype)
    model.load_state_dict(torch.load(work / start))
    tower, body = model.model.vision_tower, Packed(model.model.language_model, compile_layers)
    tower.set_attn_implementation("plain")
    rest = [(n, p) for n, p in model.named_parameters() if "vision_tower" not in n]
    # the last layer and its norm feed only [CLS]'s pooled output, which LLaVA does not use
    eye = [(n, p) for n, p in tower.named_parameters() if "post_layernorm" not in n and "layers.5." not in n]
    tower.requires_grad_(False)
    for _, p in eye:
        p.requires_grad_(True)
    optimisers = [Masters(rest, lr_muon=lr, lr_adam=lr / 9), Masters(eye, lr_muon=lr * 0.15, lr_adam=lr / 60)]

    def step(done: float, number: int) -> dict:
        tower.requires_grad_(False)
        for _, p in eye:
            p.requires_grad_(done >= frozen)
        kind = draw(mix, rng)
        prefix, branches, count = SHAPES[kind]
        scenes = [world.sample_scene(rng) for _ in range(count)]
        rows: list[Row] = write(kind, writer, scenes)
        batch = collate(rows, prefix, branches, words.pad_token_id, TEXT_WEIGHT.get(kind, 0.05))
        pictures = [paint(s, rng) for s in scenes] if kind in WITH_PICTURE else None
        loss, numbers = losses(run(model, body, batch, pictures, writer), model.lm_head, batch, writer)
        loss.backward()
        for optimiser in optimisers[: 2 if done >= frozen and pictures else 1]:
            optimiser.step(schedule(done, number, decay=0.8))
        return {f"{kind} {key}": value for key, value in numbers.items()}

    train(
        name,
        work,
        minutes,
        optimisers,
        step,
        rng,
        lambda: check(model, body, Writer(words, random.Random(1)), seed=4321),
    )
    torch.save(model.state_dict(), work / f"{name}.weights")


def export(work: Path, name: str, words: PreTrainedTokenizerFast, folder: Path) -> None:
    """`work/<name>.weights` as a checkpoint that plain `from_pretrained` opens."""
    model = LlavaForConditionalGeneration(assemble.config(words)).to(torch.bfloat16)
    model.load_state_dict(torch.load(work / f"{name}.weights"))
    assemble.save(model, words, folder)
