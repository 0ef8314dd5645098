"""Answers and measurements are read back only while everything that they depend on is the same.

What was answered anew took another time, to the nanosecond: that tells it from what was read back.
"""

import linecache
import os
import shutil
import subprocess
import sys
from functools import partial
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ask, build, picture, same, table, text_of
from PIL import Image
from processors import lvlm as family_lvlm
from small_methods import LastRow, Scattered, Scored, Weak
from torch import nn

import lvlm_utils as lv
from lvlm_utils import prompts
from lvlm_utils.pruning import engine


def read_back(before: pd.DataFrame, after: pd.DataFrame) -> bool:
    """Whether all rows were read back; ValueError where only some were."""
    found = (before["seconds"] == after["seconds"]).unique()
    if len(found) > 1:
        raise ValueError("Some rows were read back and some were not.")
    return bool(found[0])


@pytest.fixture
def fresh() -> "lv.models.LVLM":
    """A model of the test's own, which it may change."""
    return lv.load(*build())


# What changes the model ----------------------------------------------------------------------------------------------
def scaled(lvlm):
    with torch.no_grad():
        lvlm.model.get_output_embeddings().weight.mul_(1.3)


def scaled_by_data(lvlm):  # which does not count up the tensor's version
    lvlm.decoder.layers[1].mlp.up_proj.weight.data.mul_(1.3)


def one_element(lvlm):
    weight = lvlm.decoder.layers[-1].self_attn.v_proj.weight
    with torch.no_grad():
        weight[17, 23] += 1.0


def exchanged_rows(lvlm):  # the sum of all elements stays
    weight = lvlm.model.get_output_embeddings().weight
    with torch.no_grad():
        weight.copy_(weight.flip(0))


def trained(lvlm):
    optimizer = torch.optim.SGD(lvlm.model.parameters(), lr=1e-2)
    inputs = lv.prompt(lvlm, picture("navy"), "Quiet.", "Is it?").inputs
    lvlm.model(**inputs).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def buffer(lvlm):
    lvlm.decoder.rotary_emb.inv_freq.mul_(2)


def another_layer(lvlm):
    lvlm.model.config.vision_feature_layer = -1


def another_end(lvlm):
    lvlm.model.generation_config.eos_token_id = list(range(4, 400))


def half(lvlm):
    lvlm.model.to(torch.bfloat16)


def eager(lvlm):
    lvlm.model.set_attn_implementation("eager")


def steered(lvlm):
    lvlm.decoder.layers[1].register_forward_hook(lambda module, args, output: output * 1.1)


def replaced_forward(lvlm):
    layer = lvlm.decoder.layers[1].mlp
    layer.forward = partial(lambda forward, x: 0.5 * forward(x), layer.forward)


def dropout(lvlm):
    lvlm.decoder.layers[0].self_attn.attention_dropout = 0.5


def picture_size(lvlm):
    lvlm.processor.image_processor.size = {"shortest_edge": 40}


def picture_mean(lvlm):
    lvlm.processor.image_processor.image_mean = [0.1, 0.1, 0.1]


def template(lvlm):
    lvlm.processor.chat_template = lvlm.processor.chat_template.replace("USER", "Human")


def normalizer(lvlm):
    from tokenizers.normalizers import Lowercase

    lvlm.tokenizer.backend_tokenizer.normalizer = Lowercase()


CHANGES = [
    scaled, scaled_by_data, one_element, exchanged_rows, trained, buffer, another_layer, another_end, half, eager,
    steered, replaced_forward, dropout, picture_size, picture_mean, template, normalizer,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_is_asked_again(fresh, images, tmp_path, change):
    out, samples = tmp_path / "results.parquet", table(images[:1], (20,))
    before = ask(fresh, samples, out=out)
    assert read_back(before, ask(fresh, samples, out=out))
    change(fresh)
    after = ask(fresh, samples, out=out)
    assert not read_back(before, after)
    same(after, ask(fresh, samples))


class LowRank(nn.Module):
    """A layer with two adapters, of which one is switched on, as peft has them."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self._active_adapter = base, ["a"]
        self.adapters = nn.ModuleDict({name: nn.Linear(base.in_features, base.out_features) for name in "ab"})

    def forward(self, x):
        return self.base(x) + sum(self.adapters[name](x) for name in self._active_adapter)


@pytest.mark.parametrize("switch", [["b"], []])
def test_switched_adapters_are_asked_again(fresh, images, tmp_path, switch):
    layer = fresh.decoder.layers[1].mlp
    layer.up_proj = LowRank(layer.up_proj)
    out, samples = tmp_path / "results.parquet", table(images[:1], (20,))
    before = ask(fresh, samples, out=out)
    layer.up_proj._active_adapter = switch
    after = ask(fresh, samples, out=out)
    assert not read_back(before, after) and (after["margin"] != before["margin"]).any()


def test_the_number_of_visual_tokens_is_that_of_the_processor(images, tmp_path):
    lvlm, samples = family_lvlm("qwen2_vl"), table(images[:1], (20,))
    before = ask(lvlm, samples, out=tmp_path / "results.parquet")
    lvlm.processor.image_processor.size = {"shortest_edge": 14 * 14, "longest_edge": 14 * 28}
    after = ask(lv.load(lvlm.model, lvlm.processor), samples, out=tmp_path / "results.parquet")
    visual = lv.prompt(lvlm, images[0], "", "Is it?").groups.visual.sum()
    assert set(after["n_visual_tokens"]) == {int(visual)} != set(before["n_visual_tokens"])


def test_arithmetic_counts(fresh, images, tmp_path):
    out, samples = tmp_path / "results.parquet", table(images[:1], (20,))
    before = ask(fresh, samples, out=out)
    with torch.autocast("cpu", torch.bfloat16):
        assert not read_back(before, ask(fresh, samples, out=out))


# What changes the code -----------------------------------------------------------------------------------------------
def bottom(self, score, keep, best=engine.Tokens.best):
    return best(self, -score, keep)


def grey(image, colour):
    return Image.new("RGB", image.size, "grey")


def one_each(keep, have):
    return torch.ones_like(have)


def narrowed(tokens, keep, *others, real=engine._narrowed):
    return real(tokens, keep | tokens.last, *others)


@pytest.mark.parametrize(
    ("where", "name", "code", "prune", "again"),
    [
        (LastRow, "choose", lambda self, tokens: tokens.alive, LastRow(), True),  # a method
        (engine.Tokens, "best", bottom, LastRow(), True),  # what it calls
        ("lvlm_utils.pruning.keep", "numbers", one_each, LastRow(), True),  # and what that calls
        (engine, "_narrowed", narrowed, LastRow(), True),  # the engine
        (LastRow, "positions", "contiguous", Scattered(), False),  # another method
        (engine, "_narrowed", narrowed, None, False),  # nothing is pruned
        (prompts, "blank", grey, None, True),
        (prompts, "MARK", "\ue001", None, True),  # a constant
        ("lvlm_utils.saliency", "information_flow", None, None, False),  # nothing that answers run through
        ("lvlm_utils.stats", "wilson", None, None, False),
    ],
)  # fmt: skip
def test_changed_code_is_asked_again(tiny, images, tmp_path, monkeypatch, where, name, code, prune, again):
    out, samples = tmp_path / "results.parquet", table(images[:1], (20,))
    before = ask(tiny, samples, "white", prune=prune, out=out)
    where = import_module(where) if isinstance(where, str) else where
    monkeypatch.setattr(where, name, code)
    after = ask(tiny, samples, "white", prune=prune, out=out)
    assert read_back(before, after) != again
    same(after, ask(tiny, samples, "white", prune=prune))


OWN = """
from dataclasses import dataclass
import torch
from lvlm_utils.methods import Method

def score(tokens):
    return tokens.place.float(){sign}

@dataclass
class Own(Method):
    keep: int = 4
    uses_question = False
    def choose(self, tokens):
        return tokens.best(score(tokens), self.keep)
"""
RUN = """
import sys
sys.path[:0] = sys.argv[1:4]
import pandas as pd, lvlm_utils as lv
from conftest import build
from own import Own
found = lv.answer(lv.load(*build()), pd.read_pickle(sys.argv[4]), prune=Own(), out=sys.argv[5], progress=False)
found.to_pickle(sys.argv[5] + ".pkl")
"""


def test_another_process_reads_back_and_notices_a_changed_file(images, tmp_path):
    """Nothing in the key depends on the process; the file of a user's own method counts, and what it calls there."""
    table(images[:1], (20,)).to_pickle(tmp_path / "samples.pkl")
    here, found = os.path.dirname(__file__), []
    arguments = [str(lv.ROOT), here, str(tmp_path), str(tmp_path / "samples.pkl"), str(tmp_path / "out.parquet")]
    (tmp_path / "run.py").write_text(RUN)
    for sign, seed in (("", "1"), ("", "2"), (" * -1", "3")):
        (tmp_path / "own.py").write_text(OWN.format(sign=sign))
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, tmp_path / "run.py", *arguments], check=True, env=environment)
        found.append(pd.read_pickle(tmp_path / "out.parquet.pkl"))
    assert read_back(found[0], found[1])
    assert not read_back(found[1], found[2]) and (found[1]["margin"] != found[2]["margin"]).any()


# What changes the question -------------------------------------------------------------------------------------------
def test_a_picture_counts_by_what_it_shows(tiny, images, tmp_path):
    out, samples = tmp_path / "results.parquet", table(images[:1], (20,))
    before, stamp = ask(tiny, samples, out=out), os.stat(images[0])
    picture("navy", 12).save(images[0], compress_level=0)
    with open(images[0], "r+b") as file:
        file.truncate(max(stamp.st_size, os.path.getsize(images[0])))
    os.utime(images[0], ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as old as before
    assert not read_back(before, ask(tiny, samples, out=out))


def test_the_colours_of_a_picture_with_a_palette_count(tiny, tmp_path):
    out, image = tmp_path / "results.parquet", picture("navy").convert("P")
    samples = table([image], (20,))
    before = ask(tiny, samples, out=out)
    image.putpalette(image.getpalette()[::-1])
    after = ask(tiny, samples, out=out)
    assert not read_back(before, after)
    same(after, ask(tiny, samples))


@pytest.mark.parametrize(
    "changed",
    [{"question": "Is the sea in it?"}, {"context": "Quiet."}, {"sample": "other"}],
    ids=lambda changed: next(iter(changed)),
)
def test_what_is_asked_counts(tiny, images, tmp_path, changed):
    out, samples = tmp_path / "results.parquet", table(images[:1], (20,), ("couch",))
    before = ask(tiny, samples, out=out)
    assert not read_back(before, ask(tiny, samples.assign(**changed), out=out))


@pytest.mark.parametrize("options", [{"max_new_tokens": 6}, {"stop": ()}, {"prune": Weak()}, {"image": "black"}])
def test_options_count(tiny, images, tmp_path, options):
    out, samples = tmp_path / "results.parquet", table(images[:1], (20,))
    before = ask(tiny, samples, out=out)
    after = ask(tiny, samples, out=out, **options)
    assert not read_back(before, after) and read_back(after, ask(tiny, samples, out=out, **options))


def test_an_attribute_that_is_no_field_of_a_method_counts(tiny, images, tmp_path):
    out, samples, method = tmp_path / "results.parquet", table(images[:1], (20,)), Scattered()
    before = ask(tiny, samples, prune=method, out=out)
    method.layer = 3
    after = ask(tiny, samples, prune=method, out=out)
    assert not read_back(before, after) and (after["mean_visual"] > before["mean_visual"]).all()


# What changes nothing ------------------------------------------------------------------------------------------------
def test_the_same_elsewhere_is_read_back(images, tmp_path):
    """Another copy of the model in another folder, under another name, of the pictures and of the table."""
    model, processor = build()
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name / "final")
        processor.save_pretrained(tmp_path / name / "final")
    shutil.copy(images[0], tmp_path / "copy.png")
    samples, found = table(images[:1], (20,)), []
    for name, rows in (("a", samples), ("b", samples.assign(image=str(tmp_path / "copy.png"), label="no", group="x"))):
        found.append(ask(lv.load(tmp_path / name / "final"), rows, out=tmp_path / "results.parquet"))
    assert read_back(*found)
    assert set(found[1]["label"]) == {"no"} and set(found[1]["group"]) == {"x"}
    assert [frame["path"].unique().tolist() for frame in found] == [[str(tmp_path / n / "final")] for n in "ab"]


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl", "idefics3", "qwen2_vl", "video_llama_3"])
def test_use_changes_nothing(images, tmp_path, family):
    """Asking, observing, pruning and generating leave traces in model and tokenizer that do not count."""
    lvlm, out, samples = family_lvlm(family), tmp_path / "results.parquet", table(images[:1], (20,))
    first = ask(lvlm, samples, share=False, out=out)
    prompt = lv.prompt(lvlm, images[0], text_of(20), "Is it?")
    with lv.observe(lvlm, prompt.groups):
        lv.generate(lvlm, prompt)
    ask(lvlm, samples, share=False, prune=LastRow())
    lvlm.tokenizer(["a b", "c"], padding="max_length", max_length=90, truncation=True)
    assert read_back(first, ask(lvlm, samples, share=False, out=out))
    with lv.observe(lvlm, prompt.groups):
        assert read_back(first, ask(lvlm, samples, share=False, out=out))


# What cannot be read -------------------------------------------------------------------------------------------------
def never_read_back(lvlm, samples, out, message, **options):
    with pytest.warns(UserWarning, match=message) as warned:
        first = ask(lvlm, samples, out=out, **options)
        second = ask(lvlm, samples, out=out, **options)
    assert len(warned) == 2  # one a call
    assert not read_back(first, second) and len(pd.read_parquet(out)) == len(samples)
    same(first, second)


def test_offloaded_weights_are_never_reused(fresh, images, tmp_path):
    from accelerate import cpu_offload

    plain = ask(fresh, table(images[:1], (20,)))
    cpu_offload(fresh.decoder.layers[2], execution_device="cpu")
    never_read_back(fresh, table(images[:1], (20,)), tmp_path / "out.parquet", "offloaded.* not reused", share=False)
    same(ask(fresh, table(images[:1], (20,)), share=False), plain)


def test_a_method_without_source_is_never_reused(tiny, images, tmp_path):
    space: dict = {"__name__": "somewhere"}
    exec(OWN.format(sign=""), space)  # noqa: S102
    never_read_back(tiny, table(images[:1], (20,)), tmp_path / "out.parquet", "no source.* not reused",
                    prune=space["Own"]())  # fmt: skip


def test_an_option_that_is_no_json_is_never_reused(tiny, images, tmp_path):
    method = Scored(lambda tokens: tokens.place.float())
    out, samples = tmp_path / "out.parquet", table(images[:1], (20,))
    never_read_back(tiny, samples, out, "option score of Scored.* not reused", prune=method)
    kept = pd.read_parquet(out)
    ask(tiny, samples, prune=Scattered(), out=out)
    with pytest.warns(UserWarning, match="not reused"):
        other = ask(tiny, samples, prune=Scored(method.score, keep=3), out=out)
    assert len(pd.read_parquet(out)) == 3 * len(samples)  # nobody takes over the rows of another method
    assert set(kept["options"]).isdisjoint(other["options"]) and "0x" not in kept["options"][0]


# Measurements --------------------------------------------------------------------------------------------------------
LIMIT = 3
calls: list = []


class Calls:
    """How often something was measured; an object like this counts by its type."""

    made = 0


def margins(rows):
    Calls.made += 1
    found = [float(lv.generate(MODEL[0], lv.prompt(MODEL[0], row.image, "", row.question)) == "yes")
             for row in rows.itertuples()]  # fmt: skip
    return {"margin": np.array(found[:LIMIT])}


MODEL: list = []


@pytest.mark.parametrize("change", [scaled_by_data, another_layer, template, steered], ids=lambda one: one.__name__)
@pytest.mark.parametrize("global_", [False, True])
def test_a_measurement_of_a_changed_model_is_made_again(fresh, images, tmp_path, monkeypatch, change, global_):
    """Of the model that it is of, and of every model that it names."""
    counted = type("Counted", (), {"made": 0})
    monkeypatch.setitem(globals(), "Calls", counted())
    rows, of = table(images[:1], (0,)), lv.load(*build())
    monkeypatch.setitem(globals(), "MODEL", [fresh if global_ else lv.load(*build())])
    measure = partial(lv.measured, of if global_ else fresh, "a", margins, rows, folder=tmp_path)
    measure()
    measure()
    assert globals()["Calls"].made == 1
    change(fresh)
    measure()
    assert globals()["Calls"].made == 2


def observed(rows):
    Calls.made += 1
    prompt = lv.prompt(MODEL[0], rows["image"].iloc[0], "", "Is it?")
    with lv.observe(MODEL[0], prompt.groups) as seen:
        lv.generate(MODEL[0], prompt)
    return {"received": seen.received[0].numpy()}


@pytest.mark.parametrize(
    ("module", "name", "again"),
    [("lvlm_utils.attention.streaming", "_blocks", True), ("lvlm_utils.prompts", "render", True),
     ("lvlm_utils.saliency", "information_flow", False), ("lvlm_utils.pruning.engine", "_narrowed", False),
     ("lvlm_utils.stats", "wilson", False)],
)  # fmt: skip
def test_a_measurement_runs_through_the_code_that_it_names(tiny, images, tmp_path, monkeypatch, module, name, again):
    monkeypatch.setitem(globals(), "Calls", type("Counted", (), {"made": 0})())
    monkeypatch.setitem(globals(), "MODEL", [tiny])
    rows = table(images[:1], (0,))
    lv.measured(tiny, "a", observed, rows, folder=tmp_path)
    real = getattr(import_module(module), name)
    monkeypatch.setattr(module + "." + name, lambda *args, **kw: real(*args, **kw))
    lv.measured(tiny, "a", observed, rows, folder=tmp_path)
    assert Calls.made == 1 + again


LATER = """
def factor():
    return {}
"""


def late(n):
    import imported_later

    return {"n": np.array(n * imported_later.factor())}


def test_a_module_that_is_imported_later_counts(tiny, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for factor in (2, 3):
        (tmp_path / "imported_later.py").write_text(LATER.format(factor))
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        for _ in range(2):
            sys.modules.pop("imported_later", None)
            linecache.clearcache()
            assert lv.measured(tiny, "a", late, 5, folder=tmp_path)["n"] == 5 * factor


def test_names_that_happen_to_be_those_of_modules_do_not_count(tiny, images, tmp_path, monkeypatch):
    """What a process has loaded besides is no matter."""
    out, samples = tmp_path / "results.parquet", table(images[:1], (20,))
    before = ask(tiny, samples, out=out)
    for name in ("text", "groups", "row", "visual", "append", "inputs"):
        (tmp_path / f"{name}.py").write_text("visual = row = text = append = 3")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("text", "groups", "row", "visual", "append", "inputs"):
        monkeypatch.setitem(sys.modules, name, import_module(name))
    assert read_back(before, ask(tiny, samples, out=out))


def test_a_measurement_that_cannot_be_read_is_made_every_time(tiny, tmp_path):
    space: dict = {"np": np, "made": []}
    exec("def measure(n):\n    made.append(n)\n    return {'n': np.array(n)}", space)  # noqa: S102
    for measure, asked in ((space["measure"], 3), (lambda n: {"n": np.array(3)}, torch.Generator())):
        for _ in range(2):
            with pytest.warns(UserWarning, match="(no source|Generator).* not reused"):
                assert lv.measured(tiny, "a", measure, asked, folder=tmp_path)["n"] == 3
    assert space["made"] == [3, 3]


# Hooks and attention of the user's -----------------------------------------------------------------------------------
class Steer:
    """A hook that is an object: what it holds decides what it does."""

    def __init__(self, by):
        self.by = by

    def __call__(self, module, args, output):
        return output * self.by

    def method(self, module, args, output):
        return output * self.by


def steered(module, args, output, by):
    return output * by


@pytest.mark.parametrize("kind", ["object", "method", "partial"])
def test_hooks_with_state_are_never_reused(fresh, images, tmp_path, kind):
    steer = Steer(1.2)
    hook = {"object": steer, "method": steer.method, "partial": partial(steered, by=torch.tensor(1.2))}[kind]
    samples = table(images[:1], (20,))
    handle = fresh.decoder.layers[1].mlp.register_forward_hook(hook)
    try:
        never_read_back(fresh, samples, tmp_path / "out.parquet", "A hook of .* is more than a function")
    finally:
        handle.remove()


def test_an_attention_that_is_registered_anew_is_asked_again(fresh, images, tmp_path):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def scaled(*args, **kwargs):
        output, weights = sdpa_attention_forward(*args, **kwargs)
        return output * 1.3, weights

    AttentionInterface.register("of_mine", lambda *args, **kwargs: sdpa_attention_forward(*args, **kwargs))
    AttentionMaskInterface.register("of_mine", sdpa_mask)
    fresh.model.set_attn_implementation("of_mine")
    out, samples = tmp_path / "out.parquet", table(images[:1], (20,))
    before = ask(fresh, samples, out=out)
    assert read_back(before, ask(fresh, samples, out=out))
    AttentionInterface.register("of_mine", scaled)
    after = ask(fresh, samples, out=out)
    assert not read_back(before, after)
    same(after, ask(fresh, samples))
