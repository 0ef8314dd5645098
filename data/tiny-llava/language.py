"""The language model over packed rows, and stage 2: it learns to read and to look things up before it has seen a picture.

The pictures of stage 2 are label maps sent through a learned table into the image slots (with noise): looking objects up is learned
in minutes that way; stage 3 then only has to translate real visual features into that table.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from assemble import config, world
from loop import schedule, train
from optim import Masters
from rows import ANSWER, SHAPES, SLOT, Batch, Row, Writer, collate
from torch import nn
from transformers import AttentionInterface, LlamaForCausalLM, PreTrainedTokenizerFast

_causal: dict[tuple[int, torch.dtype], torch.Tensor] = {}


def causal(length: int, dtype: torch.dtype) -> torch.Tensor:
    if (length, dtype) not in _causal:
        _causal[length, dtype] = torch.full((length, length), float("-inf"), dtype=dtype).triu(1)
    return _causal[length, dtype]


class Packed:
    """Runs the layers of an unmodified Llama over packed rows; prefix and branches take separate attention calls."""

    def __init__(self, model: nn.Module, compile_layers: bool = True):
        self.model = model
        for layer in model.layers:
            layer.self_attn.config._attn_implementation = "packed"
            if compile_layers:
                layer.compile(dynamic=False)

    def __call__(self, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        hidden, rotary = embeddings, self.model.rotary_emb(embeddings, batch.positions)
        for layer in self.model.layers:
            hidden = layer(hidden, attention_mask=batch.mask, position_embeddings=rotary)
        return self.model.norm(hidden)


def packed_attention(module, query, key, value, attention_mask=None, scaling=None, **unused):
    """The prefix is causal; a branch sees the prefix as far as the mask lets it, and itself. Training only."""
    prefix, query = attention_mask.shape[3], query * scaling
    k, v = key[:, :, :prefix], value[:, :, :prefix]
    if prefix <= 640:  # below that, two plain products beat the fused kernel on a CPU
        scores = torch.matmul(query[:, :, :prefix], k.transpose(-1, -2)) + causal(prefix, query.dtype)
        out = torch.matmul(scores.softmax(-1), v)
    else:
        out = F.scaled_dot_product_attention(query[:, :, :prefix], k, v, is_causal=True, scale=1.0)
    if query.shape[2] > prefix:
        slots = (*query.shape[:2], -1, SLOT, query.shape[3])
        own_q, own_k, own_v = (x[:, :, prefix:].reshape(slots) for x in (query, key, value))
        own = torch.matmul(own_q, own_k.transpose(-1, -2)) + causal(SLOT, query.dtype)
        far = torch.matmul(query[:, :, prefix:], k.transpose(-1, -2)) + attention_mask.to(query.dtype)
        weights = torch.cat([far, own.flatten(2, 3)], dim=-1).softmax(-1)
        near = torch.matmul(weights[..., prefix:].unflatten(2, own.shape[2:4]), own_v).flatten(2, 3)
        out = torch.cat([out, torch.matmul(weights[..., :prefix], v) + near], dim=2)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("packed", packed_attention)


def losses(hidden: torch.Tensor, head: nn.Module, batch: Batch, writer: Writer) -> tuple[torch.Tensor, dict]:
    """Weighted cross entropy where a weight is set; and the accuracy of yes against no at the answers."""
    chosen = batch.weights > 0
    logits, target, weight = head(hidden[chosen]).float(), batch.targets[chosen], batch.weights[chosen]
    each = F.cross_entropy(logits, target, reduction="none")
    answer, loss = weight == ANSWER, (each * weight).sum() / weight.sum()
    if not answer.any():
        return loss, {"loss": loss.item()}
    with torch.no_grad():
        yes = logits[answer, writer.yes] > logits[answer, writer.no]
        right = (yes == (target[answer] == writer.yes)).float().mean().item()
    return loss, {"accuracy": right, "answer_loss": each[answer].mean().item()}


WITH_PICTURE = ("picture", "caption", "picture+context", "picture+1.4k", "picture+2.8k")


def draw(mix: dict[str, float], rng: random.Random) -> str:
    return rng.choices(list(mix), list(mix.values()))[0]


def write(kind: str, writer: Writer, scenes: list[world.Scene]) -> list[Row]:
    """Rows of one kind; contexts fill the prefix."""
    prefix, branches, _ = SHAPES[kind]
    if kind == "picture":
        return [writer.dense(scene, branches) for scene in scenes]
    if kind == "bare":
        return [writer.bare(scene, branches) for scene in scenes]
    if kind == "caption":
        return [writer.caption(scene) for scene in scenes]
    if kind == "facts":
        return [writer.context(scene, False, prefix, branches, facts=DENSE) for scene in scenes]
    return [writer.context(scene, kind.startswith("picture"), prefix, branches) for scene in scenes]


def pseudo(scenes: list[world.Scene], table: nn.Embedding) -> torch.Tensor:
    """Label maps as visual tokens: 8% of the patches go blank, 3% show anything, and noise. (batch, 144, 192)."""
    labels = np.stack([world.label_map(scene) for scene in scenes]).reshape(len(scenes), -1)
    chance = np.random.rand(*labels.shape)
    labels = np.where(chance < 0.08, len(world.NAMES), labels)
    labels = np.where(chance > 0.97, np.random.randint(0, len(world.NAMES), labels.shape), labels)
    embedded = table(torch.from_numpy(labels))
    return embedded + torch.randn_like(embedded) * (0.25 * embedded.detach().float().std()).to(embedded.dtype)


DENSE = 0.75  # share of facts in "facts" rows: which objects come together is learned sooner from few words
MIX = {
    "picture": 0.36,
    "caption": 0.06,
    "picture+context": 0.12,
    "facts": 0.20,
    "text": 0.12,
    "text 1.4k": 0.07,
    "text 2.8k": 0.07,
}
TEXT_WEIGHT = {
    "caption": 0.5,
    "facts": 0.1,
    "text": 0.3,
    "text 1.4k": 0.3,
    "text 2.8k": 0.3,
}  # of next-token loss; 0.05 elsewhere


def stage(
    work: Path,
    minutes: float,
    seed: int,
    words: PreTrainedTokenizerFast,
    compile_layers: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Train and leave `work/language.weights` (language model, head and table)."""
    torch.manual_seed(seed)
    rng = random.Random(1000 + seed)
    writer, model = Writer(words, rng), LlamaForCausalLM(config(words).text_config)
    table = nn.Embedding(len(world.NAMES) + 1, 192)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 0.3)
        for i, name in enumerate(world.NAMES):
            table.weight[i] = model.model.embed_tokens.weight[writer.encode(" " + name)].mean(0)
        table.weight[-1].normal_(0, 0.3)
    both = nn.ModuleDict({"model": model, "table": table}).to(dtype)
    optimiser, body = Masters(both.named_parameters(), lr_muon=0.02, lr_adam=2e-3), Packed(model.model, compile_layers)

    def step(done: float, number: int) -> dict:
        kind = draw(MIX, rng)
        prefix, branches, count = SHAPES[kind]
        scenes = [world.sample_scene(rng) for _ in range(count)]
        batch = collate(write(kind, writer, scenes), prefix, branches, words.pad_token_id, TEXT_WEIGHT.get(kind, 0.05))
        embeddings = model.model.embed_tokens(batch.ids)
        if kind in WITH_PICTURE:
            embeddings = embeddings.masked_scatter((batch.ids == writer.image)[..., None], pseudo(scenes, table))
        loss, numbers = losses(body(embeddings, batch), model.lm_head, batch, writer)
        loss.backward()
        optimiser.step(schedule(done, number, decay=0.5))
        return {f"{kind} {name}": value for name, value in numbers.items()}

    train("language", work, minutes, [optimiser], step, rng)
    torch.save({name: p.detach() for name, p in both.state_dict().items()}, work / "language.weights")
