"""Methods that select visual tokens: against official numbers, against plain recomputation, in batches, in models."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from families import build, inputs
from recomputation import greedy
from torch.nn.functional import normalize

from lvlm_utils.families import decoder_of
from lvlm_utils.methods import (
    CDPruner,
    DivPrune,
    FasterVLM,
    FastV,
    FoPru,
    Method,
    PyramidDrop,
    SparseVLM,
    VisPruner,
    cdpruner,
    divprune,
    fastervlm,
    fastv,
    fopru,
    prune,
    pyramiddrop,
    sparsevlm,
    vispruner,
)

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}


def indices(kept):
    return kept[0].nonzero()[:, 0]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_official_numbers():
    z = golden("vispruner")
    features = z["features"]  # the same in three files
    attention = z["attention"].mean(1)
    assert torch.equal(indices(vispruner.select(features, attention, 64)), z["keep"])
    assert not torch.equal(indices(vispruner.select(features, attention, 64, 0.25)), z["keep"])
    assert torch.equal(indices(fastervlm.select(attention, 128)), z["fastervlm"])
    assert torch.equal(indices(vispruner.select(features, attention, 128, 1.0)), z["fastervlm"])
    z = golden("divprune")
    assert torch.equal(divprune.picks(features, 56)[0], z["order"])
    assert torch.equal(indices(divprune.select(features, 0.098)), z["order"].sort().values)
    z = golden("cdpruner")
    relevance = -(normalize(z["image"], dim=-1) @ normalize(z["text"], dim=-1).T).mean(-1)
    assert torch.equal(indices(cdpruner.select(features, relevance, 64)), z["keep"])
    assert torch.equal(indices(cdpruner.select(features, 3 * relevance + 1, 64)), z["keep"])
    assert not torch.equal(indices(cdpruner.select(features, -relevance, 64)), z["keep"])
    z = golden("sparsevlm")
    every = torch.ones(1, z["attention"].shape[2], dtype=torch.bool)
    assert torch.equal(indices(sparsevlm.select(z["attention"], every, 300)), z["keep"])
    z = golden("fastv")
    assert torch.equal(indices(fastv.select(z["attention"], 0.5)), z["keep"])


def vispruner_by_hand(features, attention, number, important):
    """Algorithm 1 with lists."""
    order = attention.argsort(descending=True, stable=True).tolist()
    most = int(number * important)
    chosen, rest, diverse = order[:most], order[most:], number - most
    unit = normalize(features, dim=-1)
    while diverse and len(rest) > diverse:
        even, odd = rest[::2], rest[1::2]
        cosine = (unit[even] @ unit[odd].T).amax(1)
        ranked = [even[i] for i in cosine.argsort(descending=True, stable=True)]
        rest = ranked[min(8, len(rest) - diverse, len(even)) :] + odd
    return sorted(chosen + (rest if diverse else []))


@pytest.mark.parametrize("near", [2, 64])
def test_vispruner_at_every_budget(near, monkeypatch):
    monkeypatch.setattr(vispruner, "NEAR", near)  # the short cut must not show
    features, attention = random(1, 37, 8), random(1, 37, seed=1)
    for important in (0.0, 0.3, 0.5, 1.0):
        for number in range(1, 38):
            got = indices(vispruner.select(features, attention, number, important)).tolist()
            assert got == vispruner_by_hand(features[0], attention[0], number, important)
    assert vispruner.select(features, attention, 0.25).sum() == 9
    with pytest.raises(ValueError, match="important=1.5"):
        vispruner.select(features, attention, 4, 1.5)


SELECTS = {
    "vispruner": (lambda f, a, k: vispruner.select(f, a.mean((1, 2)), k)),
    "fastervlm": (lambda f, a, k: fastervlm.select(a.mean((1, 2)), k)),
    "divprune": (lambda f, a, k: divprune.select(f, k)),
    "cdpruner": (lambda f, a, k: cdpruner.select(f, a.mean((1, 2)), k)),
    "fastv": (lambda f, a, k: fastv.select(a[:, :, 0], k)),
    "fopru": (lambda f, a, k: fopru.select(a, k)),
    "fopru rows": (lambda f, a, k: fopru.select(a, k, "row", (6, 8))),
    "sparsevlm": (lambda f, a, k: sparsevlm.select(a[:, :, :9], a[:, 0, :9, 0] > 0.01, k)),
    "pyramiddrop": (lambda f, a, k: pyramiddrop.select(a[:, :, 0, :16], f[:, None].expand(-1, 2, -1, -1), k)),
}  # fmt: skip


@pytest.mark.parametrize("name", SELECTS)
def test_batches_are_single_samples(name):
    features, attention = random(3, 48, 16), random(3, 4, 48, 48, seed=1).softmax(-1)
    for keep in (1, 7, 24, 47, 0.5):
        together = SELECTS[name](features, attention, keep)
        alone = [SELECTS[name](features[i : i + 1], attention[i : i + 1], keep) for i in range(3)]
        assert torch.equal(together, torch.cat(alone)) and together.dtype == torch.bool
        number = 24 if keep == 0.5 else keep
        assert (together.sum(1) == (max(8, number // 8 * 8) if name == "fopru rows" else number)).all()


def test_fopru_takes_the_direction_of_larger_variance():
    attention = random(2, 3, 16, 16).exp()
    attention[0, :, :, :4] *= 5  # the first picture has patches that receive, the second some that give
    attention[1, :, 8:12] *= 5
    assert indices(fopru.select(attention[:1], 4)).tolist() == [0, 1, 2, 3]
    assert indices(fopru.select(attention[1:], 4)).tolist() == [8, 9, 10, 11]
    assert indices(fopru.select(attention[1:], 0.25, "row")).tolist() == [8, 9, 10, 11]
    given, received = attention.mean((1, 3)), attention.mean((1, 2))
    assert torch.equal(fopru.significance(given, received), torch.stack([received[0], given[1]]))
    assert torch.equal(fopru.significance(given, received, "low"), torch.stack([given[0], received[1]]))
    with pytest.raises(ValueError, match="no grid"):
        fopru.select(attention, 4, "row", (3, 5))


def test_cdpruner_is_the_greedy_determinant():
    features, relevance = random(1, 12, 16), torch.rand(1, 12, generator=torch.Generator().manual_seed(2))
    scaled = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    vectors = (normalize(features, dim=-1) * scaled[..., None])[0].double()
    chosen = []
    for _ in range(5):
        left = [i for i in range(12) if i not in chosen]
        dets = [torch.linalg.det(vectors[[*chosen, i]] @ vectors[[*chosen, i]].T) for i in left]
        chosen.append(left[int(torch.stack(dets).argmax())])
    assert cdpruner.picks(features, relevance, 5)[0].tolist() == chosen
    copies = features[:, :1].expand(-1, 12, -1)  # nothing is left to add, yet no token is taken twice
    assert cdpruner.select(copies, torch.ones(1, 12), 9).sum() == 9


def test_sparsevlm_raters_and_clusters():
    visual, text = random(2, 20, 8), random(2, 6, 8, seed=1)
    close = (visual @ text.transpose(1, 2)).softmax(-1).mean(1)
    wanted = close > close.mean(1, keepdim=True)
    assert torch.equal(sparsevlm.raters(visual, text), wanted)
    both = torch.cat([visual, text], 1)
    is_visual = torch.arange(26) < 20
    got = sparsevlm.raters(both, both, is_visual.expand(2, -1), ~is_visual.expand(2, -1))
    assert torch.equal(got[:, 20:], wanted) and not got[:, :20].any()
    assert sparsevlm.raters(visual, text[:, :1]).all()
    heaps = torch.cat([torch.zeros(1, 4, 8), torch.full((1, 3, 8), 9.0)], 1) + random(1, 7, 8) * 0.01
    padded = torch.cat([heaps, random(1, 3, 8) * 100], 1)
    means = sparsevlm.clusters(padded, torch.arange(10)[None] < 7, torch.tensor([2]))[0]
    wanted = torch.stack([heaps[0, :4].mean(0), heaps[0, 4:].mean(0)])
    assert (means.sort(0).values - wanted.sort(0).values).abs().max() < 1e-4


def test_pyramiddrop_groups_key_heads():
    query, keys = random(2, 4, 8), random(2, 2, 12, 8, seed=1)
    repeated = keys.repeat_interleave(2, 1)
    wanted = (query[:, :, None] @ repeated.transpose(2, 3) / 8**0.5).softmax(-1)[:, :, 0].mean(1)
    assert (pyramiddrop.scores(query, keys) - wanted).abs().max() < 1e-6
    assert torch.equal(pyramiddrop.select(query, keys, 5), pyramiddrop.select(query, repeated, 5))


@pytest.mark.parametrize("name", SELECTS)
def test_choices_are_those_of_float32_under_autocast(name):
    features, attention = random(2, 48, 16), random(2, 4, 48, 48, seed=1).softmax(-1)
    text, some, number = random(2, 9, 16, seed=2), features[..., 0] > 0, torch.tensor([3, 2])

    def found():
        parts = sparsevlm.raters(features, text), sparsevlm.clusters(features, some, number)
        return SELECTS[name](features, attention, 17), *(parts if name == "sparsevlm" else ())

    wanted = found()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, found(), wanted))


IN_A_MODEL = {
    "vispruner": VisPruner(keep=5), "fastervlm": FasterVLM(keep=5), "divprune": DivPrune(keep=0.3),
    "cdpruner": CDPruner(keep=5), "fopru": FoPru(keep=0.3), "row": FoPru(keep=0.5, strategy="row"),
    "order": FoPru(keep=0.3, reorder=False), "pool": FoPru(significance="pool"), "fastv": FastV(keep=0.3),
    "equi": FastV(keep=0.3, attention="equi"), "sparsevlm": SparseVLM(keep=0.3), "pyramiddrop": PyramidDrop(keep=0.2),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_A_MODEL)
def test_in_a_model_rows_of_a_batch_do_not_touch_each_other(name):
    model = build("llava")
    batch = inputs(model)
    with prune(model, IN_A_MODEL[name]) as trace:
        together, kept = greedy(model, batch, steps=3), trace.kept
        for row, real in enumerate(batch["attention_mask"].bool()):
            one = {k: v[row : row + 1] for k, v in batch.items()}
            one |= {k: one[k][:, real] for k in ("input_ids", "attention_mask")}
            alone = greedy(model, one, steps=3)
            assert torch.equal(trace.kept[:, 0], kept[:, row, real])
            assert max((a[0] - b[row]).abs().max() for a, b in zip(alone.logits, together.logits)) < 1e-4
    assert kept[-1].sum() < batch["attention_mask"].sum()


def one_row(name, row, args):
    """The arguments of `select` for one prompt alone, with nothing but its own visual tokens; and which these are."""
    if name == "fastv":
        attention, keep = args
        mine = attention[row, 0] > -torch.inf
        return (attention[row : row + 1, :, mine], keep), mine
    if name == "sparsevlm":
        attention, raters, number = args
        mine = attention[row, 0, 0] > -torch.inf
        return (attention[row : row + 1, :, :, mine], raters[row : row + 1], int(number[row])), mine
    query, keys, number, visual, alive = args
    there = alive[row]
    only = (query[row : row + 1], keys[row : row + 1, :, there], int(number[row]), visual[row : row + 1, there])
    return only, there


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
@pytest.mark.parametrize(
    "name, method",
    [
        ("fastv", FastV(0.3)), ("fastv", FastV(3, layer=1, attention="equi")),
        ("sparsevlm", SparseVLM(0.3, positions="original")), ("pyramiddrop", PyramidDrop(0.3, positions="original")),
    ],
)  # fmt: skip
def test_inside_the_model_select_chooses_for_unequal_numbers_of_visual_tokens(family, name, method, monkeypatch):
    model, calls, module = build(family), [], {"fastv": fastv, "sparsevlm": sparsevlm, "pyramiddrop": pyramiddrop}[name]
    real = module.select
    monkeypatch.setattr(module, "select", lambda *args: calls.append((args, real(*args))) or calls[-1][1])
    with prune(model, method) as trace, torch.no_grad():
        model(**inputs(model))
    assert len(set(trace.visual.sum(1).tolist())) > 1 and calls
    for args, stay in calls:
        for row in range(3):
            alone, mine = one_row(name, row, args)
            assert torch.equal(real(*alone)[0], stay[row, mine]) and not stay[row, ~mine].any()
            assert 0 < stay[row].sum() < mine.sum()
    first = next(number for number, kept in enumerate(trace.kept) if not kept.equal(trace.kept[0]))
    layer, (_, stay) = method.layer or first, calls[0]
    visual = trace.visual
    if name == "sparsevlm":  # and the means of what was recycled
        assert (trace.kept[layer] & visual & stay).sum() == stay.sum()
    else:
        assert torch.equal(trace.kept[layer] & visual, stay)


@pytest.mark.parametrize("strategy", ["rank", "row"])
def test_fopru_in_a_model_is_the_function_on_its_towers_attention(strategy):
    model = build("llava")
    batch = inputs(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model.model.vision_tower(batch["pixel_values"], output_attentions=True).attentions[-2]
    model.set_attn_implementation("sdpa")
    with prune(model, FoPru(0.5, strategy)) as trace, torch.no_grad():
        model(**batch)
    wanted = fopru.select(attention[:, :, 1:, 1:], 0.5, strategy)
    assert torch.equal(trace.kept[0][trace.visual].view(3, 16), wanted) and wanted.sum() == 24


@dataclass
class Noted(Method):
    """Drops nothing, and keeps what is noted of the prompt."""

    found: list
    layer: int = 3

    def choose(self, tokens):
        self.found.append([note.clone() for note in tokens.notes.values()])
        return tokens.alive


def test_a_method_that_is_used_twice_remembers_each_use():
    """Raters are noted for each method: those of the second are found among what the first has left."""
    model = build("llava")
    batch, first, second = inputs(model), SparseVLM(0.5, layers=(0, 1, 2)), SparseVLM(0.3, layers=(0, 1, 2))
    notes = []
    with prune(model, VisPruner(keep=9)), prune(model, second), prune(model, Noted(notes)), torch.no_grad():
        model(**batch)
    with prune(model, first), prune(model, VisPruner(keep=9)), prune(model, Noted(notes)), prune(model, second):
        with torch.no_grad():
            model(**batch)
    assert [len(one) for one in notes] == [1, 2] and torch.equal(notes[1][1], notes[0][0])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl"])
def test_pyramiddrop_ranks_by_the_next_layers_attention(family):
    model = build(family)
    batch = inputs(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(**batch, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    with prune(model, PyramidDrop(3, layers=(2,), positions="original")) as trace, torch.no_grad():
        model(**batch)
    score = attention[2][:, :, -1].mean(1).masked_fill(~trace.visual, -1)
    wanted = torch.zeros_like(trace.visual).scatter(1, score.topk(3).indices, True)
    assert torch.equal(trace.kept[2] & trace.visual, wanted)
    before = attention[1][:, :, -1].mean(1).masked_fill(~trace.visual, -1)
    assert not torch.equal(wanted, torch.zeros_like(wanted).scatter(1, before.topk(3).indices, True))


def test_pyramiddrop_reads_the_next_layer_where_and_as_it_is():
    """A layer on another device, or offloaded, gets its input only when it is called; dtypes stand in for devices."""
    model = build("llava")
    batch, method = inputs(model), PyramidDrop(3, layers=(2,))
    with prune(model, method) as trace, torch.no_grad():
        model(**batch)
        plain = trace.kept.clone()
    layer = model.get_decoder().layers[2].bfloat16()
    forward = layer.forward

    def moved(hidden, position_embeddings, **kwargs):
        angles = tuple(part.bfloat16() for part in position_embeddings)
        return forward(hidden.bfloat16(), position_embeddings=angles, **kwargs).float()

    layer.forward = moved
    with prune(model, method) as trace, torch.no_grad():
        model(**batch)
    assert (trace.kept[2] & trace.visual).sum(1).tolist() == [3, 3, 3]
    assert (trace.kept[2] & plain[2] & trace.visual).sum() >= 6  # rounding may change one
    offloaded = cpu_offload(build("llava"), execution_device=torch.device("cpu"))
    assert offloaded.get_decoder().layers[2].self_attn.q_proj.weight.is_meta
    with prune(offloaded, method) as trace, torch.no_grad():
        offloaded(**batch)
    assert torch.equal(trace.kept, plain)


def test_sparsevlm_ranks_by_its_raters():
    model = build("llava")
    batch = inputs(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(**batch, output_attentions=True).attentions
        calls, decoder = [], decoder_of(model)
        hook = decoder.register_forward_pre_hook(partial(_keep, calls), with_kwargs=True)
        with prune(model, SparseVLM(0.3, layers=(0, 1, 2))) as trace:
            model(**batch)
        hook.remove()
    visual, real = trace.visual, batch["attention_mask"].bool()
    for row, hidden in enumerate(calls[0]):
        image = visual[row].nonzero()[:, 0]
        text = torch.arange(len(hidden)) > image[-1]
        rates = sparsevlm.raters(hidden[None, visual[row]], hidden[None, text])
        rows = attention[0][row : row + 1, :, text][..., visual[row]]
        had = int(visual[row].sum())
        number = int(sparsevlm.budget(0.3, torch.tensor([had]))[0, 0])
        stay = indices(sparsevlm.select(rows, rates, number))
        left = trace.kept[1, row, visual[row]]
        assert left[stay].all() and real[row, text].all()
        recycled = int(0.3 * (had - number)) + 1
        assert left.sum() == number + recycled // 10 + 1


def _keep(calls, module, args, kwargs):
    calls.append(kwargs["inputs_embeds"])


@pytest.mark.parametrize("share, wanted", [(192, [300, 200, 110]), (128, [303, 110, 36]), (64, [66, 30, 17])])
def test_sparsevlm_has_the_official_numbers(share, wanted):
    assert sparsevlm.budget(share, torch.tensor([576]))[0].tolist() == wanted
    assert sparsevlm.budget(share * 5, torch.tensor([2880]))[0].tolist() == [5 * n for n in wanted]


def test_refusals():
    model = build("llava")
    for method, says in (
        (FoPru(strategy="column"), "strategy='column' is not one of rank, row"),
        (FoPru(significance="max"), "significance='max' is not one of auto, low, given, received, sum, pool"),
        (FastV(attention="first"), "attention='first' is not one of last, equi"),
        (FastV(layer=0), "at least 1"),
        (CDPruner(relevance="answer"), "relevance='answer' is not one of question"),
        (CDPruner(relevance=lambda pictures: torch.ones(1, 2)), r"relevance is \(1, 2\), the pictures are"),
        (SparseVLM(layers=(1, 2)), "three that rise"),
        (PyramidDrop(layers=(2, 1)), "have to rise"),
        (VisPruner(keep=0), "keep=0"),
        (VisPruner(important=2), "important=2"),
        (DivPrune(positions="anew"), "positions='anew' is not one of original, contiguous"),
    ):
        with pytest.raises(ValueError, match=says), prune(model, method), torch.no_grad():
            model(**inputs(model))
