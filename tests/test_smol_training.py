"""The training recipe of smol-llava: packed rows are separate prompts, soft targets naive Bayes, a short run works."""

import random
import re
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaModel

import lvlm_utils as lv

FOLDER = lv.ROOT / "data" / "smol-llava"
sys.path[:0] = [str(FOLDER), str(lv.ROOT / "data" / "emoji-world")]
import lessons  # noqa: E402
import ordinary  # noqa: E402
import packed  # noqa: E402
import seen  # noqa: E402
import world  # noqa: E402

REPLAY = [("What is a dog?", [330, 2767, 314, 253, 4360, 30, 2])]


@pytest.fixture(scope="module")
def lvlm():
    """The assembled model with its template and tokenizer, which decide what a row is."""
    try:
        return lv.load("smol-llava")
    except OSError as reason:
        pytest.skip(f"the parts of smol-llava are not at hand: {reason}")


@pytest.fixture(scope="module")
def pictures():
    """Six scenes; what a tower would have seen of them is random."""
    rng, noise = random.Random(5), torch.Generator().manual_seed(5)
    scenes = [seen.herd(rng) if i % 2 else world.sample_scene(rng) for i in range(6)]
    return seen.Pictures(scenes, torch.randn(6, 256, 384, generator=noise), torch.randn(2, 256, 384, generator=noise))


@pytest.mark.parametrize("kind", list(lessons.MIXES["long"]))
def test_packed_rows_equal_separate_prompts(lvlm, pictures, kind):
    """Logits at every trained place equal those of the beginning up to the cut and the branch, run alone."""
    writer = lessons.Writer(lvlm.processor, random.Random(1), REPLAY)
    inner = lvlm.model.model
    small = LlamaConfig(**inner.language_model.config.to_dict() | {"num_hidden_layers": 3})
    torch.manual_seed(0)
    llama = LlamaModel(small).eval()
    head, projector = llama.embed_tokens.weight, inner.multi_modal_projector
    row = lessons.write(kind, writer, pictures)
    with torch.no_grad():
        llama.config._attn_implementation = "grouped"
        found = packed.logits(llama, head, projector, row, writer.image)
        llama.config._attn_implementation = "sdpa"
        at = 0
        for cut, ids, marks in row.branches:
            x = llama.embed_tokens(torch.tensor(row.ids[:cut] + ids))
            x[: len(row.ids[:cut])][torch.tensor(row.ids[:cut]) == writer.image] = projector(row.features)
            start = row.positions[cut - 1] + 1
            positions = torch.tensor([row.positions[:cut] + list(range(start, start + len(ids)))])
            hidden = llama(inputs_embeds=x[None], position_ids=positions).last_hidden_state[0, cut:]
            expected = hidden[[mark.place for mark in marks]] @ head.T
            torch.testing.assert_close(found[at : at + len(marks)], expected, rtol=0, atol=1e-4)
            at += len(marks)
    assert at == len(found)


def test_rows_are_the_prompts_that_are_asked_later(lvlm, pictures):
    """With all patches, beginning and branch are the tokens that `lv.prompt` makes of picture, context and question."""
    writer = lessons.Writer(lvlm.processor, random.Random(2), REPLAY)
    scene = pictures.scenes[0]
    row = writer.with_context([(pictures.features[0], scene)], scene, 200, 256, 30, lessons.FACTS[0])
    picture = world.Image.fromarray(world.paint(scene, random.Random(0)))
    for cut, ids, marks in row.branches:
        question = lvlm.tokenizer.decode(ids[: marks[-2].place + 1] if marks[-1].kind == "end" else [])
        question = question.removesuffix(writer.tail).removeprefix(" ")
        if not question:  # a replayed prompt
            continue
        context = lvlm.tokenizer.decode(row.ids[row.cuts[0] : cut])
        asked = lv.prompt(lvlm, picture, context, question).inputs.input_ids[0].tolist()
        assert row.ids[:cut] + ids[: marks[-2].place + 1] == asked
        name = re.search("Is the (.*) in the", question).group(1)
        assert name not in context and marks[-2].token == (writer.yes if name in scene.names else writer.no)


def test_the_twenty_questions_are_not_trained():
    assert len(ordinary.QUESTIONS) == 20 and not set(ordinary.prompts()) & set(ordinary.QUESTIONS)
    assert ordinary.right("Name three animals.", "1. Dogs 2. a cat 3. Lions")
    assert not ordinary.right("Name three animals.", "dog, dog and dog")
    assert not ordinary.right("What is 2 + 2?", "It is 42.")


def test_label_map_follows_the_boxes():
    thing = world.Thing("cow", (24, 48, 60, 96), False)
    labels = seen.label_map(world.Scene("farm", (thing,))).reshape(16, 16)
    expected = np.full((16, 16), seen.GROUND)
    expected[4:8, 2:5] = world.INDEX["cow"]
    assert (labels == expected).all()


def test_soft_targets_are_naive_bayes():
    """A cow in the text makes a horse likely and a couch unlikely; nothing known leaves how often each is right."""
    prior = lessons.Prior()
    facts = prior.told("The cow stands near the sheep, and people feed the animals.")
    assert facts == {"cow", "sheep", "scene: farm"}
    assert prior.chance("horse", facts) > 0.7 > 0.3 > prior.chance("couch", facts)
    asked = {a: prior.evidence[a]["cow"]["asked"] for a in ("yes", "no")}
    assert prior.chance("cow", set()) == pytest.approx(asked["yes"] / sum(asked.values()))


def test_a_training_of_two_minutes_goes_on_after_a_kill_and_leaves_what_the_model_opens(lvlm, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    lvlm.model.save_pretrained(work / "base")
    lvlm.processor.save_pretrained(work / "base")
    command = [sys.executable, str(FOLDER / "train.py"), "--variant", "short", "--minutes", "0.5", "--pictures", "16",
               "--prompts", "2", "--work", str(work), "--out", str(out)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(work.glob("joint*.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
    process.kill()
    process.wait()
    assert list(work.glob("joint*.pt"))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    log = pd.read_csv(next(work.glob("joint*.csv")))
    assert log["step"].is_monotonic_increasing and log["value"].notna().all()
    adapted = PeftModel.from_pretrained(lvlm.model.model.language_model, out)
    moved = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(moved) == 120 and all(p.abs().max() > 0 for p in moved)
    projector = load_file(out / "projector.safetensors")
    assert projector.keys() == lvlm.model.model.multi_modal_projector.state_dict().keys()
