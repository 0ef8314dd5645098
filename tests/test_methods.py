"""Every method in every family, inside generate(): it drops what it should, in a batch as alone, or says why not."""

import functools
import json
import re
import subprocess
import sys
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from families import CASES, FAMILY_NAMES
from PIL import Image
from processors import lvlm

import lvlm_utils as lv
from lvlm_utils import ROOT, methods
from lvlm_utils.methods import METHODS, fitted, named

OPTIONS = {
    "context": {"drop": 0.3, "layers": range(2)}, "spatten": {"drop": 0.5}, "ltp": {"theta": 2.0},
    "random": {"keep": 0.5}, "fastv": {"keep": 0.5}, "sparsevlm": {"keep": 0.4}, "pyramiddrop": {}, "prumerge": {},
    "prumerge_plus": {}, "tome": {"keep": 0.5}, "downsample": {"keep": 0.25},
}  # fmt: skip
WORKS = {"+": "yes", "o": "with original positions"}
REFUSED = {  # what the table says, what the error says
    "c": ("no: needs [CLS]", r"needs a \[CLS\] token"),
    "m": ("no: a token is several patches", "a visual token of several"),
    "l": ("no: features of several layers", "layer of features, and there are several"),
}
# One sign for each of FAMILY_NAMES, in its order; what no longer fits has to be changed here and in the README.
SUPPORT = {
    "context": "+++++++++++++++",
    "spatten": "+++++++++++++++",
    "ltp": "+++++++++++++++",
    "vispruner": "++++++++ooo++++",
    "fastervlm": "++++++++ooo++++",
    "fopru": "++++++++ooo++++",
    "prumerge": "+++++ccmccccccc",
    "prumerge_plus": "+++++ccmccccccc",
    "visionzip": "+l+++ccmccccccc",
    "tome": "++++++mmmmm+mmm",
    "divprune": "++++++++ooo++++",
    "cdpruner": "++++++++ooo++++",
    "fastv": "+++++++++++++++",
    "sparsevlm": "++++++++ooo++++",
    "pyramiddrop": "++++++++ooo++++",
    "random": "+++++++++++++++",
    "downsample": "++++++mmmmm+mmm",
}
opened = functools.cache(lvlm)


def table() -> str:
    """SUPPORT as the README shows it: families that take the same methods stand together, and so do methods."""
    columns = {}
    for family, signs in zip(FAMILY_NAMES, zip(*SUPPORT.values(), strict=True), strict=True):
        columns.setdefault(signs, []).append(family)
    rows = {}
    for name, signs in zip(SUPPORT, zip(*columns, strict=True), strict=True):
        rows.setdefault(signs, []).append(name)
    words = {**WORKS, **{sign: says for sign, (says, _) in REFUSED.items()}}
    lines = [["method", *(", ".join(families) for families in columns.values())], ["---"] * (len(columns) + 1)]
    lines += [[", ".join(names), *(words[sign] for sign in signs)] for signs, names in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def options(name, family):
    chosen = OPTIONS.get(name, {"keep": 0.5})
    return {**chosen, "positions": "original"} if sign(name, family) == "o" else chosen


def sign(name, family):
    if family not in FAMILY_NAMES:  # LLaVA with a DINOv2 tower takes every method
        return "+"
    return SUPPORT[name][FAMILY_NAMES.index(family)]


def prompts(family):
    """Two prompts of unequal pictures and text, together and one by one."""
    images = [picture(60, 44, 0), picture(40, 90, 1)]
    context = ["The room is quiet and the light falls on the floor.", "Two books lie on the table. The chair is red."]
    question = ["Is the couch in the image? (Please answer with yes or no.)", "What do you see on the left side?"]
    model = opened(family)
    alone = [lv.prompt(model, *one) for one in zip(images, context, question, strict=True)]
    return lv.prompt(model, images, context, question), alone


def run(family, name, prompt, options):
    with lv.prune(opened(family), name, **options) as trace, torch.no_grad():
        text = lv.generate(opened(family), prompt, max_new_tokens=3)
    real = prompt.inputs["attention_mask"].bool()
    kept = trace.kept
    return text, [kept[:, row, here].clone() for row, here in enumerate(real)], prompt.groups


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_every_family_works_or_says_why_not(name, family):
    together, alone = prompts(family)
    if sign(name, family) in REFUSED:
        says = REFUSED[sign(name, family)][1]
        for given in (options(name, family), {**options(name, family), "positions": "original"}):
            with pytest.raises(ValueError, match=says) as refused:
                run(family, name, together, given)
            assert "\n" not in str(refused.value)
            others = [other for other in METHODS if re.search(rf"\b{other}\b", str(refused.value))]
            assert others and all(sign(other, family) in WORKS for other in others)  # what can be taken instead
        return
    if sign(name, family) == "o":
        with pytest.raises(ValueError, match=r"cannot be numbered anew: use positions=\"original\""):
            run(family, name, together, {**options(name, family), "positions": "contiguous"})
        assert METHODS[name]().positions == "contiguous"
    given = options(name, family)
    text, kept, groups = run(family, name, together, given)
    for row, one in enumerate(alone):
        own_text, (own,), own_groups = run(family, name, one, given)
        assert torch.equal(own, kept[row]) and own_text == text[row]  # the same in a batch as alone
        visual, spared = own_groups.visual[0], own_groups.question[0] | own_groups.system[0]
        assert own[:, -1].all() and own[:, spared].all()
        dropped = own_groups.context[0] if METHODS[name].kind == "text" else visual
        assert own[:, ~dropped].all()
        left, whole = int(own[-1][dropped].sum()), int(dropped.sum())
        assert (name != "ltp") <= left < whole + (name == "prumerge_plus")  # both adapt: all may go, or all stay


def test_the_matrix_is_of_all_methods_and_families_and_in_the_readme():
    assert SUPPORT.keys() == METHODS.keys()
    assert {len(signs) for signs in SUPPORT.values()} == {len(FAMILY_NAMES)}
    assert set("".join(SUPPORT.values())) == WORKS.keys() | REFUSED.keys()
    assert table() in (ROOT / "README.md").read_text(encoding="utf-8")


# What a method says of itself ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name):
    method = METHODS[name]
    assert method.kind in ("text", "visual, before the LLM", "visual, inside the LLM")
    assert all(isinstance(text, str) and text for text in (method.official, method.deviations))
    assert method.needs_cls == ("c" in SUPPORT[name])
    for field in fields(method):
        assert re.search(rf"^    (\w+, )*{field.name}\b.*[:;]", method.__doc__, re.MULTILINE), field.name
    assert "positions" in {field.name for field in fields(method)}


@pytest.mark.parametrize("name", METHODS)
def test_options_come_back_from_json(name):
    own = OPTIONS.get(name, {"keep": 0.5})
    method = named(name, **{key: list(value) if isinstance(value, range) else value for key, value in own.items()})
    read = named(name, **json.loads(json.dumps(asdict(method))))
    assert fitted(opened("llava"), read).before() == fitted(opened("llava"), method).before() != ()
    assert asdict(fitted(opened("llava"), method)).keys() == asdict(method).keys()
    before = asdict(method)
    with lv.prune(opened("llava"), method), torch.no_grad():
        lv.generate(opened("llava"), prompts("llava")[0], max_new_tokens=1)
    assert asdict(method) == before and vars(method).keys() == before.keys()  # a copy runs


@pytest.mark.parametrize("name", METHODS)
def test_a_wrong_option_is_answered_by_the_right_ones(name):
    known = [field.name for field in fields(METHODS[name])]
    with pytest.raises(ValueError, match=f"{name} has no option colour. There are: {', '.join(known)}."):
        lv.prune(opened("llava"), name, colour=1).__enter__()
    with pytest.raises(ValueError, match="positions='anew' is not one of original, contiguous."):
        lv.prune(opened("llava"), named(name, **{**OPTIONS.get(name, {}), "positions": "anew"})).__enter__()


@pytest.mark.parametrize("name, option", [
    (name, option) for name in METHODS for option in ("keep", "drop")
    if option in {field.name for field in fields(METHODS[name])} and name != "random"
])  # fmt: skip
@pytest.mark.parametrize("wrong", [True, 0, -0.5, 1.5, float("nan"), "much", [0.5], np.True_, np.float32(2)])
def test_keep_and_drop_are_checked_for_every_method(name, option, wrong):
    if option == "drop" and isinstance(wrong, int) and wrong == 0 and not isinstance(wrong, bool):
        return  # nothing is dropped
    given = {**{key: value for key, value in OPTIONS.get(name, {}).items()}, option: wrong}
    with pytest.raises(ValueError, match=f"^{option}=.* is (neither a share|no share)") as error:
        lv.prune(opened("llava"), name, **given).__enter__()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given, says", [
    (("fastvv", {}), "'fastvv' is no pruning method. There are: cdpruner, context"),
    ((methods.FastV(), {"keep": 0.3}), "own options: keep cannot be given"),
    ((methods.FastV, {}), "is no method: give a name, or a Method with its options"),
    ((None, {}), "None is no method"),
])  # fmt: skip
def test_what_is_no_method(given, says):
    name, options = given
    with pytest.raises(ValueError, match=says):
        lv.prune(opened("llava"), name, **options).__enter__()


def test_numbers_of_numpy_are_numbers():
    prompt = prompts("llava")[0]
    for plain, other in ((5, np.int64(5)), (5, np.uint8(5)), (0.5, np.float32(0.5)), (0.5, np.float64(0.5))):
        for name in ("fastv", "sparsevlm", "pyramiddrop", "vispruner", "divprune", "prumerge", "tome", "downsample",
                     "visionzip", "random", "fopru", "cdpruner"):  # fmt: skip
            found, wanted = (run("llava", name, prompt, {"keep": keep}) for keep in (other, plain))
            assert all(map(torch.equal, found[1], wanted[1])) and found[0] == wanted[0], (name, other)
    for drop in (np.float32(0.5), np.float64(0.5)):
        for name in ("context", "spatten", "random"):
            found, wanted = (run("llava", name, prompt, {"drop": drop}) for drop in (drop, 0.5))
            assert all(map(torch.equal, found[1], wanted[1])), (name, drop)


# What is tested is what runs -----------------------------------------------------------------------------------------
PURE = {
    "context": "context.score context.select", "spatten": "spatten.score spatten.select",
    "ltp": "ltp.score ltp.select", "vispruner": "vispruner.select", "fastervlm": "fastervlm.select",
    "fopru": "fopru.significance fopru.choice", "prumerge": "prumerge.reduce", "prumerge_plus": "prumerge.reduce",
    "visionzip": "visionzip.reduce", "tome": "tome.reduce", "divprune": "divprune.select",
    "cdpruner": "cdpruner.select", "fastv": "fastv.select", "sparsevlm": "sparsevlm.raters sparsevlm.select",
    "pyramiddrop": "pyramiddrop.select", "random": "random.select", "downsample": "downsample.cells",
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_the_functions_that_are_tested_are_those_that_run(name, monkeypatch):
    called = []
    for path in PURE[name].split():
        module, function = path.split(".")
        module = getattr(methods, module)
        real = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a, real=real, path=path: called.append(path) or real(*a))
    run("llava", name, prompts("llava")[0], options(name, "llava"))
    assert set(called) == set(PURE[name].split())


def test_pruning_stays_a_name_for_the_methods():
    code = (
        "import sys, lvlm_utils.pruning as p; assert 'lvlm_utils.methods' not in sys.modules;"
        "from lvlm_utils.pruning import keep; assert keep.__name__ == 'lvlm_utils.pruning.keep';"
        "from lvlm_utils.pruning import prune, METHODS, fastv; import lvlm_utils.methods as m;"
        "assert prune is m.prune and METHODS is m.METHODS and fastv is m.fastv;"
        "assert not hasattr(p, 'fastvv') and p.random.__name__ == 'lvlm_utils.methods.random'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].kind != "text"])
def test_every_visual_method_prunes_the_frames_of_a_video(name):
    """Video-LLaVA: frames have a [CLS] token of their own, which methods before the language model leave out."""
    model = opened("video_llava")
    prompt = lv.prompt(model, question="Is the couch in the image?", video=tuple(picture(40, 40, i) for i in range(3)))
    with lv.prune(model, name, **options(name, "video_llava")) as trace:
        lv.generate(model, prompt, max_new_tokens=2)
    visual, patches = (prompt.groups.visual[0], prompt.groups.visual[0] & (prompt.groups.row[0] >= 0))
    left = int(trace.kept[-1, 0, visual].sum())
    assert int(visual.sum()) == 51 and int(patches.sum()) == 48
    assert 0 < left <= 48 and (left < 48 or name == "prumerge_plus")


if __name__ == "__main__":
    print(table())
