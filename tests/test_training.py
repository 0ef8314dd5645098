"""The training recipe: packed rows are the separate prompts, a short run works, and a killed one goes on."""

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import LlamaForCausalLM

import lvlm_utils as lv

FOLDER = lv.ROOT / "data" / "tiny-llava"
CPU = Path("/proc/cpuinfo")
FAST_BF16 = CPU.exists() and bool(re.search("avx512_bf16|amx_bf16", CPU.read_text()))  # otherwise ten times slower
sys.path.insert(0, str(FOLDER))
import assemble  # noqa: E402
import language  # noqa: E402
import rows  # noqa: E402
from assemble import world  # noqa: E402


@pytest.fixture(scope="module")
def words():
    return assemble.tokenizer()


@pytest.mark.parametrize("kind", ["text", "picture+context", "text 1.4k", "bare"])
def test_packed_rows_equal_separate_prompts(words, kind):
    """Logits of every branch equal those of prefix[:cut] + branch run alone through transformers."""
    torch.manual_seed(0)
    writer = rows.Writer(words, random.Random(0))
    alone = LlamaForCausalLM(assemble.config(words).text_config).eval()
    for p in alone.parameters():
        p.data *= 4 if p.dim() > 1 else 1  # at the default initialisation attention hardly matters
    packed = LlamaForCausalLM(assemble.config(words).text_config).eval()
    packed.load_state_dict(alone.state_dict())
    prefix, branches, _ = rows.SHAPES[kind]
    made = language.write(kind, writer, [world.sample_scene(writer.rng)])
    batch = rows.collate(made, prefix, branches, words.pad_token_id, 0.3)
    with torch.no_grad():
        hidden = language.Packed(packed.model, compile_layers=False)(packed.model.embed_tokens(batch.ids), batch)
        cuts = set()
        for i, (cut, ids, _, _) in enumerate(made[0].branches[:6]):
            expected = alone(torch.tensor([made[0].prefix[:cut] + ids])).logits[0, cut:]
            place = prefix + i * rows.SLOT
            torch.testing.assert_close(packed.lm_head(hidden[0, place : place + len(ids)]), expected, rtol=0, atol=1e-4)
            cuts.add(cut)
    assert (len(cuts) == 1) == (kind == "bare")  # all others are asked at several lengths


def test_asked_objects_are_not_in_the_context_of_a_row(words):
    writer = rows.Writer(words, random.Random(1))
    for _ in range(20):
        row = writer.context(world.sample_scene(writer.rng), False, 640, 14)
        context = words.decode(row.prefix)
        for _, ids, _, _ in row.branches:
            asked = words.decode(ids).split(" in the image")[0].split("Is the ")[1]
            assert not re.search(rf"\b{asked}\b", context)


def test_answers_are_trained_where_they_are_read(words):
    """The target at the last prompt token is the answer, and the full question is the prompt of the evaluation."""
    writer = rows.Writer(words, random.Random(2))
    row = rows.Row([1], [1])
    writer.ask(row, "teddy bear", True, 1, False)
    _, ids, targets, weights = row.branches[0]
    assert words.decode(ids) == " Is the teddy bear in the image? (Please answer with yes or no.) ASSISTANT: yes</s>"
    last = weights.index(rows.ANSWER)
    assert words.decode(ids[: last + 1]).endswith("ASSISTANT:") and words.decode(targets[last]) == " yes"


def command(work, out, minutes: float) -> list[str]:
    return [
        sys.executable,
        str(FOLDER / "train.py"),
        "--minutes",
        str(minutes),
        "--work",
        str(work),
        "--out",
        str(out),
        "--variants",
        "short",
        "--no-compile",
        *([] if FAST_BF16 else ["--float32"]),
    ]


@pytest.mark.slow
def test_two_minutes_of_training_resume_after_a_kill_and_leave_a_checkpoint(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    process = subprocess.Popen(command(work, out, 1.6), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while not (work / "language.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (work / "language.pt").exists() and not (work / "joint.weights").exists()
    used = torch.load(work / "language.pt", weights_only=False)["used"]
    done = subprocess.run(command(work, out, 1.6), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    log = pd.read_csv(work / "language.csv")
    assert used > 0 and log["step"].is_monotonic_increasing and log["seconds"].is_monotonic_increasing
    lvlm = lv.load(out / "tiny-llava")
    assert lvlm.model.config.model_type == "llava" and lvlm.window == assemble.WINDOW
    assert (out / "tiny-llava" / "training.svg").exists()
    prompt = lv.prompt(
        lvlm, world.Image.new("RGB", (192, 192)), question="Is the cat in the image? (Please answer with yes or no.)"
    )
    assert isinstance(lv.generate(lvlm, prompt, max_new_tokens=2), str)
