"""Methods for text (context, spatten, ltp, random): what they choose, how much, alone as in a batch, and refusals."""

import functools

import numpy as np
import processors
import pytest
import torch
from families import IMAGE, build
from PIL import Image

import lvlm_utils as lv
from lvlm_utils.methods import LTP, Context, Method, Random, SpAtten, context, fitted, ltp, prune, random, spatten
from lvlm_utils.pruning.engine import Tokens
from lvlm_utils.session import with_groups

SENTENCES = (
    "The room is quiet.", "Two books lie on the table!", "There is a red chair beside the plant.", "What do you see?",
    "The light falls on the floor; a plant.",
)  # fmt: skip
QUESTIONS = ("Is the couch in the image? (Please answer with yes or no.)", "What do you see on the left side?")
LENGTHS = (3, 14, 1, 8, 11, 5, 2, 9)  # sentences of context, unequal
READINGS = ("received", "received_mean", "last", "question", "context")


def words(sentences: int, start: int) -> str:
    return " ".join(SENTENCES[(start + k * (start + 1)) % len(SENTENCES)] for k in range(sentences))


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (28, 28), ("navy", "red", "green", "grey")[number % 4])


@functools.cache
def lvlm(family: str = "llava") -> lv.models.LVLM:
    return processors.lvlm(family)


def ask(family: str, rows=None, question: int | None = None) -> "lv.prompts.Prompt":
    """One prompt a row (or for all), each with a context, a picture and (unless given) a question of its own."""
    rows = range(len(LENGTHS)) if rows is None else rows
    questions = [QUESTIONS[row % 2 if question is None else question] for row in rows]
    return lv.prompt(lvlm(family), [picture(r) for r in rows], [words(LENGTHS[r], r) for r in rows], questions)


def kept(family: str, prompt, method: Method) -> torch.Tensor:
    with prune(lvlm(family), method) as trace:
        lv.generate(lvlm(family), prompt, max_new_tokens=2)
    return trace.kept


METHODS = {
    **{reading: Context(0.3, [0, 2], reading) for reading in READINGS},
    "mean": Context(0.4, [1], pooling="mean"),
    "random ranks": Context(0.5, [0, 1], pooling="random"),
    "sentence": Context(0.5, [0, 1], "question", unit="sentence"),
    "unprotected": Context(0.5, [1], protect=()),
    "linear": Context(0.6, 1.0, schedule="linear"),
    "auto": Context("auto", [1], law=(1.0, 2.0, 0.2)),
    "spatten": SpAtten(first=1),
    "ltp": LTP(1.0),
    "random text": Random(drop=0.5, layer=1),
    "random picture": Random(keep=0.5),
}


def context_counts(prompt, kept: torch.Tensor) -> list[list[int]]:
    """Context tokens that go into every layer, a list for each prompt."""
    return (kept & prompt.groups.context).sum(-1).T.tolist()


# The same choice alone and in a batch -------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
def test_a_prompt_has_the_same_choice_alone_and_in_any_batch(family):
    rows = list(range(len(LENGTHS)))
    batch, turned = ask(family), ask(family, rows[::-1])
    real = batch.inputs["attention_mask"].bool()
    alone = {row: ask(family, [row]) for row in (1, 2, 7)}
    for name, method in METHODS.items():
        together, backwards = kept(family, batch, method), kept(family, turned, method)
        assert torch.equal(together[:, rows[::-1]], backwards), name
        for row, one in alone.items():
            assert torch.equal(kept(family, one, method)[:, 0], together[:, row, real[row]]), name
        dropped = real & ~together[-1]
        assert dropped.any(1).sum() >= 6, name
        assert not (dropped & batch.groups.last).any()
        if name != "unprotected":
            assert not (dropped & (batch.groups.system | batch.groups.question)).any(), name
        assert ((dropped & batch.groups.visual).any(1) == (name == "random picture")).all(), name


def test_beams_keep_what_greedy_keeps():
    batch = ask("llava", [0, 1])
    for name in ("question", "sentence", "random ranks", "auto"):
        with prune(lvlm(), METHODS[name]) as trace:
            lv.generate(lvlm(), batch, max_new_tokens=2, num_beams=2)
        assert torch.equal(trace.kept[:, ::2], kept("llava", batch, METHODS[name])), name


# Which tokens -------------------------------------------------------------------------------------------------------
def eager_attention(prompt) -> torch.Tensor:
    """(layers, batch, heads, queries, keys), rows of padding 0."""
    model = lvlm().model
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = torch.stack(model(**prompt.inputs, output_attentions=True).attentions)
    model.set_attn_implementation("sdpa")
    return found.double() * prompt.inputs["attention_mask"].bool()[:, None, :, None]


@pytest.mark.parametrize("reading", ["question", "context"])
@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_readings_of_a_group_are_what_eager_attention_says(reading, pooling):
    prompt = ask("llava", [0, 1, 3])
    groups, attention = prompt.groups, eager_attention(ask("llava", [0, 1, 3]))[1]
    found = kept("llava", prompt, Context(0.4, [1], reading, pooling))
    others = kept("llava", prompt, Context(0.4, [1], "received", pooling))
    for row in range(3):
        columns = attention[row][:, getattr(groups, reading)[row]].sum(1)
        score = columns.amax(0) if pooling == "max" else columns.mean(0)
        mine = groups.context[row].nonzero()[:, 0]
        lowest = mine[score[mine].argsort()[: int(len(mine) * 0.4)]]
        wanted = prompt.inputs["attention_mask"][row].bool()
        wanted[lowest] = False
        assert torch.equal(found[2, row], wanted)
    assert not torch.equal(found, others)


def test_only_the_reading_of_the_context_is_the_same_for_every_question():
    for unit in ("token", "sentence"):
        same = {}
        for reading in ("context", "question", "received", "last"):
            method = Context(0.4, 1.0, reading, unit=unit)
            assert method.uses_question == (reading != "context")
            choices = []
            for question in (0, 1):
                prompt = ask("llava", question=question)
                found, mine = kept("llava", prompt, method), prompt.groups.context
                choices.append([found[:, row, mine[row]] for row in range(len(LENGTHS))])
            same[reading] = all(map(torch.equal, *choices))
        assert same == {"context": True, "question": False, "received": False, "last": False}
    assert Context(0.4, [1], "context", protect=("system",)).uses_question
    assert Context(0.4, [1], "context", "random").uses_question


def test_spatten_adds_up_layers_and_ltp_compares_with_uniform_attention():
    prompt = ask("llava", [0, 1, 3])
    mask, mine = prompt.inputs["attention_mask"].bool(), prompt.groups.context
    received = eager_attention(prompt).sum(3).mean(2)  # (layers, batch, tokens)
    cascade = kept("llava", prompt, SpAtten(0.5, first=2))
    threshold = kept("llava", prompt, LTP(thresholds=[0, 0.8, 0]))
    fixed = kept("llava", prompt, LTP(1.2))
    for row in range(3):
        here = mine[row].nonzero()[:, 0]
        gone = int(len(here) * 0.5 * (1 / 2))
        lowest = here[received[:2, row, here].sum(0).argsort()[:gone]]
        wanted = mask[row].clone()
        wanted[lowest] = False
        assert torch.equal(cascade[2, row], wanted)
        assert (cascade[3, row] & mine[row]).sum() == len(here) - int(len(here) * 0.5)
        uniform = received[:, row] / mask[row].sum() * mask[row].sum()  # mean over queries, in units of 1 / n
        assert torch.equal(threshold[2, row], mask[row] & ~(mine[row] & (uniform[1] < 0.8)))
        assert torch.equal(fixed[1, row], mask[row] & ~(mine[row] & (uniform[0] < 1.2 / 4)))
    assert not torch.equal(cascade[2], threshold[2])


def test_whole_sentences_go_and_the_number_is_near():
    batch = ask("llava")
    ids, mine = batch.inputs["input_ids"], batch.groups.context
    by_token = kept("llava", batch, Context(0.4, [1]))[2]
    found = kept("llava", batch, Context(0.4, [1], unit="sentence"))[2]
    parts = [part for sentence in SENTENCES for part in [sentence]]
    for row in range(len(LENGTHS)):
        here = mine[row].nonzero()[:, 0]
        runs = lvlm().tokenizer.batch_decode([ids[row, here][found[row, here]]])[0]
        left = runs.strip()
        for part in sorted(parts, key=len, reverse=True):
            left = left.replace(part, "")
        assert not left.strip(), runs  # nothing but whole sentences is left
        longest = max(len(lvlm().tokenizer(part)["input_ids"]) for part in parts)
        assert abs(int(found[row, here].sum()) - int(by_token[row, here].sum())) <= longest / 2
    assert not torch.equal(found, by_token)


def test_the_choices_are_functions_on_tensors():
    scores = torch.tensor([[0.5, 0.1, 0.9, 0.2, 0.3], [0.5, 0.1, 0.9, 0.2, 0.2]])
    may = torch.tensor([[True, True, True, True, False], [True] * 5])
    assert context.select is spatten.select
    assert context.select(scores, may, 0.5).tolist() == [
        [True, False, True, False, True],
        [True, False, True, False, True],
    ]
    shares, numbers = torch.tensor([0.25, 0.6]), torch.tensor([0, 5])
    assert (~context.select(scores, may, shares)).sum(1).tolist() == [1, 3]
    assert (~context.select(scores, may, numbers)).sum(1).tolist() == [0, 5]
    # means .3, .55 and .3, .567: tokens 0 and 1 go first
    sentence = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 1]])
    one, two = [False, False, True, True, True], [True] * 5
    select = functools.partial(context.select_sentences, scores, may, sentence=sentence)
    assert select(torch.tensor([2, 1])).tolist() == [one, two]  # 1 is as near to 0 as to 2: the fewer
    assert select(torch.tensor([1, 2])).tolist() == [two, one]
    assert select(0.6).tolist() == [one, one] and select(0.9).tolist()[1] == [False] * 5
    received = torch.rand(3, 2, 4, 5)
    assert torch.allclose(spatten.score(received), received.sum(0).mean(1))
    assert torch.allclose(spatten.score(received[0]), received[0].mean(1))
    assert torch.allclose(ltp.score(received[0]), received[0].mean(1) / 5)
    assert torch.allclose(
        ltp.score(received[0], torch.tensor([[4], [2]])), received[0].mean(1) / torch.tensor([[4], [2]])
    )
    assert ltp.select(scores, may, 0.2).tolist() == [[True, False, True, True, True], [True, False, True, True, True]]
    assert random.select(scores, 2).tolist() == [[True, False, True, False, False]] * 2


# How much -----------------------------------------------------------------------------------------------------------
def test_every_schedule_keeps_what_its_formula_says():
    prompt, layers = ask("llava"), [0, 1, 2]
    starts = prompt.groups.context.sum(1).tolist()
    assert len(set(starts)) > 5

    def left(**options):
        return context_counts(prompt, kept("llava", prompt, Context(0.3, layers, **options)))

    def compounding(n):
        two = n - int(n * 0.3)
        three = two - int(two * 0.3)
        return [n, two, three, three - int(three * 0.3)]

    assert left() == [compounding(n) for n in starts]
    assert left(schedule="once") == [[n, *[n - int(n * 0.3)] * 3] for n in starts]
    assert left(schedule="linear") == [[n, *(n - int(n * (0.3 * (k / 3))) for k in (1, 2, 3))] for n in starts]
    assert left(pooling="random") == left()
    for one in left(unit="sentence"):
        assert one == sorted(one, reverse=True)
    law = (-1.0, 3.0, 0.1)
    found = kept("llava", prompt, Context("auto", [0], law=law))
    shares = [min(max(-((n / 1000) ** 2) + 3 * n / 1000 + 0.1, 0), 0.95) for n in starts]
    assert [one[1] for one in context_counts(prompt, found)] == [n - int(n * s) for n, s in zip(starts, shares)]
    for law, most in (((0, 0, 9), 0.95), ((0, 0, -9), 0)):
        found = kept("llava", prompt, Context("auto", [0], law=law))
        assert [one[1] for one in context_counts(prompt, found)] == [n - int(n * most) for n in starts]


def test_layers_are_numbers_a_share_of_the_depth_or_a_third():
    deep = build("llava", layers=8)

    def acts(layers, schedule="per_layer"):
        return [layer - 1 for layer in fitted(deep, Context(layers=layers, schedule=schedule)).before()]

    assert acts([5, 1]) == acts({1, 5}) == acts(np.array([1, 5])) == [1, 5] and acts([5, 1], "once") == [1]
    assert acts(10 / 32) == [0, 1, 2] and acts(0.01) == [0] and acts(1.0) == list(range(7))
    assert acts("shallow") == [0, 1] and acts("middle") == [2, 3, 4] and acts("deep") == [5, 6]
    assert acts("shallow", "once") == [0] and acts([]) == []
    assert fitted(deep, SpAtten()).before() == (3, 4, 5, 6, 7) and fitted(deep, SpAtten(first=1)).before()[0] == 2
    for method in (Context(layers=1.0), SpAtten(), LTP()):
        with prune(deep, method):
            pass


def test_protection_is_an_option():
    prompt = ask("llava")
    groups = prompt.groups
    for protect in ((), ("system",), ("question",), ("context",), ("system", "context", "question")):
        for method, thorough in (
            (Context(0.5, [0], protect=protect), False),
            (Context(0.9, [0], protect=protect), True),
            (SpAtten(0.9, protect=protect), True),
            (LTP(thresholds=[9.0, 0, 0], protect=protect), True),
            (Random(drop=0.5, protect=protect), True),
        ):
            gone = prompt.inputs["attention_mask"].bool() & ~kept("llava", prompt, method)[-1]
            for name in ("system", "context", "question"):
                lost = (gone & getattr(groups, name)).any()
                assert not (lost and name in protect), (protect, name)
                assert lost or name in protect or not thorough, (protect, name)


def test_a_bare_call_has_to_know_the_groups():
    prompt = ask("llava", [0, 1])
    for name in ("question", "sentence", "auto", "received", "spatten", "ltp", "random text"):
        with prune(lvlm(), METHODS[name]), pytest.raises(ValueError, match="lv.generate"):
            lvlm().model(**prompt.inputs)
        with prune(lvlm(), METHODS[name]) as trace, torch.no_grad(), with_groups(lvlm().model, prompt.groups):
            lvlm().model(**prompt.inputs)
        assert torch.equal(trace.kept, kept("llava", prompt, METHODS[name])), name
    with prune(lvlm(), METHODS["unprotected"]), pytest.raises(ValueError, match="question"):
        lvlm().model(**prompt.inputs)  # nothing is protected, but the question is read
    with prune(lvlm(), Context(0.5, [1], "last", protect=())) as trace, torch.no_grad():
        lvlm().model(**prompt.inputs)
    assert not trace.kept[-1].all()


def test_random_choices_are_fresh_for_every_prompt_and_seed():
    batch = ask("llava", [0] * 6, question=0)
    visual = batch.inputs["input_ids"] == IMAGE
    assert len({tuple(row.tolist()) for row in kept("llava", batch, Random(keep=4))[0]}) == 1
    fresh = ask("llava")
    found = {}
    for seed in (0, 1, -1, 2**40):
        rows = kept("llava", fresh, Random(keep=4, seed=seed))[0]
        mine = fresh.inputs["input_ids"] == IMAGE
        assert ((rows & mine).sum(1) == 4).all()
        for row in range(len(LENGTHS)):
            found[seed, row] = tuple(rows[row, mine[row]].tolist())
    assert len(set(found.values())) >= 0.9 * len(found)
    share = torch.tensor(list(found.values())).double().mean(0)  # each of 16 places is taken a quarter of the time
    assert visual.sum(1).tolist() == [16] * 6 and (share - 0.25).abs().max() < 0.3
    tokens = kept("llava", fresh, Random(drop=0.5, seed=1))
    assert not torch.equal(tokens, kept("llava", fresh, Random(drop=0.5, seed=2)))
    starts = fresh.groups.context.sum(1).tolist()
    assert [one[0] for one in context_counts(fresh, tokens)] == [n - int(n * 0.5) for n in starts]


def test_noise_is_uniform_and_without_memory():
    real = torch.ones(1, 4000, dtype=torch.bool)
    ids = torch.full((1, 4000), 7)  # the same token again and again
    prefill = type("Prefill", (), {"stages": [type("Stage", (), {"place": torch.arange(4000)[None], "alive": real})()]})
    prefill.ids, prefill.tokens = ids, 4000
    drawn = Tokens(0, None, torch.arange(4000)[None], real, prefill).noise(3)[0]
    assert 0 <= drawn.min() and drawn.max() < 1 and len(drawn.unique()) > 3990
    counts = drawn.histc(20, 0, 1)
    assert (counts - 200).abs().max() < 5 * 200**0.5
    assert torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1].abs() < 0.06


def test_calibrated_thresholds_drop_what_they_should_of_all_prompts_together():
    prompts = [ask("llava", [row]) for row in range(len(LENGTHS))]
    starts = [int(prompt.groups.context.sum()) for prompt in prompts]
    for drop in (0.2, 0.6):
        thresholds = ltp.calibrate(lvlm(), prompts, drop)
        left = [context_counts(prompt, kept("llava", prompt, LTP(thresholds=thresholds)))[0] for prompt in prompts]
        for layer in range(4):
            assert abs(sum(starts) - int(sum(starts) * (drop * (layer / 3))) - sum(one[layer] for one in left)) <= 1
        shares = [1 - one[-1] / n for one, n in zip(left, starts, strict=True)]
        assert max(shares) - min(shares) > 0.1  # not the same share of each: that is the method
    assert ltp.calibrate(lvlm(), [ask("llava")], 0.6) == pytest.approx(thresholds, rel=1e-4)
    with pytest.raises(ValueError, match="No text to calibrate on"):
        ltp.calibrate(lvlm(), [lv.prompt(lvlm(), picture(0), "", QUESTIONS[0])])


def test_prompts_without_context_lose_nothing_and_those_without_question_are_refused():
    bare = lv.prompt(lvlm(), picture(0), "", QUESTIONS[0])
    for name, method in METHODS.items():
        if name not in ("unprotected", "random picture"):
            assert kept("llava", bare, method).all(), name
    mute = lv.prompt(lvlm(), [picture(0)] * 2, [words(3, 0)] * 2, [QUESTIONS[0], ""])
    assert kept("llava", mute, METHODS["context"]).any()
    with pytest.raises(ValueError, match="no question token"):
        kept("llava", mute, METHODS["question"])


@pytest.mark.parametrize(
    "method, options, says",
    [
        (Context, {"reading": "given"}, "reading='given' is not one of received, received_mean, last, question, con"),
        (Context, {"pooling": "sum"}, "pooling='sum' is not one of max, mean, random"),
        (Context, {"schedule": "twice"}, "schedule='twice'"),
        (Context, {"unit": "word"}, "unit='word'"),
        (Context, {"layers": "top"}, "layers='top' is not one of shallow, middle, deep"),
        (Context, {"layers": 1.5}, "layers=1.5 is no share"),
        (Context, {"layers": 2}, r"layers=2: give numbers, as \[2\]"),
        (Context, {"layers": [3]}, "Layer 3 is out of range: of the model's 4 layers, 0 to 2"),
        (Context, {"layers": [-1]}, "Layer -1 is out of range"),
        (Context, {"layers": iter([1])}, r"a share of the depth, or a third"),
        (Context, {"layers": [1.5]}, "Layer 1.5 is out of range"),
        (Context, {"protect": "system"}, "protect='s' is not one of"),
        (Context, {"drop": 1.0}, "drop=1.0 is no share"),
        (Context, {"drop": "half"}, "drop='half' is no share"),
        (Context, {"drop": "auto"}, "needs law="),
        (Context, {"drop": "auto", "law": (1, 2)}, "three numbers"),
        (Context, {"law": (0, 0, 0.3)}, "give both, or neither"),
        (Context, {"protect": ("visual",)}, "protect='visual' is not one of system, context, question"),
        (SpAtten, {"drop": -0.1}, "drop=-0.1"),
        (SpAtten, {"first": 4}, "first=4: of 4 layers, 1 to 3"),
        (SpAtten, {"first": 0}, "first=0"),
        (SpAtten, {"protect": ("image",)}, "protect='image' is not one of"),
        (LTP, {"thresholds": [1.0]}, "1 thresholds for 4 layers: give 3"),
        (LTP, {"theta": -1.0}, "from 0 on"),
        (LTP, {"protect": ("image",)}, "protect='image' is not one of"),
        (Random, {}, "exactly one"),
        (Random, {"keep": 4, "drop": 0.5}, "exactly one"),
        (Random, {"keep": 0}, "keep=0"),
        (Random, {"drop": 2}, "drop=2"),
    ],
)
def test_options_that_do_not_fit(method, options, says):
    layers = {"layers": [0]} if method is Context else {}
    with pytest.raises(ValueError, match=says) as error, prune(lvlm(), method(**{**layers, **options})):
        pass
    assert "\n" not in str(error.value)


def test_what_needs_more_than_the_bare_model_says_so():
    with pytest.raises(ValueError, match="give what lv.load returns"):
        fitted(lvlm().model, Context(layers=[0], unit="sentence"))
    with prune(lvlm(), Random(keep=17)), pytest.raises(ValueError, match="keep=17 is more than the 16"):
        lv.generate(lvlm(), ask("llava", [0]))
    with pytest.raises(ValueError, match="Layer 4 is out"), prune(lvlm(), Random(keep=2, layer=4)):
        pass
