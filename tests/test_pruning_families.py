"""Pruning in every family: nothing dropped changes nothing, and what is dropped is gone, by a plain recomputation."""

import functools
import itertools

import pytest
import torch
from families import CASES, VIDEO_FAMILIES, build, inputs
from recomputation import Recomputation, greedy, plan_of, same

from lvlm_utils.pruning import prune

LAYERS = ((0,), (2,), (0, 1, 2))
EQUAL = (True, False)  # as many tokens dropped in every row, or not
GRID = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # positions on a grid cannot be numbered anew


@functools.lru_cache(maxsize=2)
def reference(family, video=False):
    model = build(family)
    batch = inputs(model, video=video)
    return model, batch, Recomputation(model, batch)


def drops(real, layers, equal):
    """For every layer the columns (batch, tokens) that are still there: random ones go, the last one never does."""
    pick = torch.Generator().manual_seed(len(layers) + equal)
    left, stays = real.bool().clone(), {}
    for layer in layers:
        for row, here in enumerate(left):
            candidates = here[:-1].nonzero()[:, 0]
            number = 5 if equal else 2 + 3 * row
            here[candidates[torch.randperm(len(candidates), generator=pick)[:number]]] = False
        stays[layer] = left.clone()
    return stays


@pytest.mark.parametrize("family", CASES)
def test_dropping_nothing_changes_no_bit(family):
    model, batch, plain = reference(family)
    everything = {layer: plain.real for layer in (0, 2, 3)}
    with torch.no_grad():
        before = model(**batch).logits
    with prune(model, plan_of(everything)) as trace, torch.no_grad():
        assert torch.equal(model(**batch).logits, before)
        assert same(greedy(model, batch), plain.plain)
    assert torch.equal(trace.kept, plain.real.expand(4, -1, -1))


@pytest.mark.parametrize("family", CASES)
def test_dropped_tokens_are_gone(family):
    check(*reference(family), [drops(reference(family)[2].real, *case) for case in itertools.product(LAYERS, EQUAL)])


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_dropped_tokens_of_videos_are_gone(family):
    check(*reference(family, video=True), [drops(reference(family, video=True)[2].real, (0, 1, 2), equal=False)])


def check(model, batch, plain, cases):
    """Prefill and five decode steps agree with the recomputation, which tells wrong answers from right ones."""
    tokens, grid = batch["input_ids"].shape[1], model.config.model_type in GRID
    errors, not_pruned, other_positions = [], [], []
    for stays, positions in itertools.product(cases, ("original",) if grid else ("original", "contiguous")):
        with prune(model, plan_of(stays, positions)) as trace:
            got = greedy(model, batch)
        for layer, mask in stays.items():
            assert torch.equal(trace.kept[layer], mask)
        anew, not_anew = (tuple(stays), ()) if positions == "contiguous" else ((), tuple(stays))
        for row in range(len(plain.real)):
            new = got.sequences[row, tokens:]
            wanted = plain.logits(row, new[:-1], stays, anew)
            errors.append((torch.stack([step[row] for step in got.logits]) - wanted).abs().max())
            assert torch.equal(wanted.argmax(-1), new)
        not_pruned.append((plain.logits(row, new[:-1]) - wanted).abs().max())
        if not grid:
            other_positions.append((plain.logits(row, new[:-1], stays, not_anew) - wanted).abs().max())
    assert max(errors) < 1e-4
    assert min(not_pruned + other_positions) > 0.05


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("layers", LAYERS)
def test_decode_steps_lose_the_hooks_that_they_do_not_need(layers, positions, attention):
    """Without padding, sdpa needs no mask: layers are plain again, and logits those of the recomputation."""
    model = build("llava")
    model.set_attn_implementation(attention)
    batch = inputs(model, padded=False)
    plain = Recomputation(model, batch)
    stays = drops(plain.real, layers, equal=True)
    hooks = []
    watch = plain.decoder.register_forward_pre_hook(
        lambda *_: hooks.append(sum(len(layer._forward_pre_hooks) for layer in plain.decoder.layers))
    )
    with watch, prune(model, plan_of(stays, positions)):
        got = greedy(model, batch)
        again = greedy(model, batch)
    assert same(got, again)  # the second prompt is pruned like the first
    for row in range(len(plain.real)):
        new = got.sequences[row, batch["input_ids"].shape[1] :]
        wanted = plain.logits(row, new[:-1], stays, tuple(stays) if positions == "contiguous" else ())
        assert (torch.stack([step[row] for step in got.logits]) - wanted).abs().max() < 1e-4
    needed = attention == "eager" or (positions == "contiguous" and layers != (0,))
    assert (hooks[5] > 0) == needed and hooks[5] in (0, len(plain.decoder.layers))
