"""What the card promises, measured: held-out questions, blank pictures beside naive Bayes, lengths, ordinary questions.

    python data/smol-llava/evaluate.py MODEL [--questions 600] [--long 120] [--out FOLDER]

MODEL is "smol-llava", "smol-llava-long" or what else `lv.load` opens, or "untouched": SmolLM2 before training, which answers
the ordinary questions only. Writes ordinary.csv and accuracy.csv, the latter after each condition; what has been answered is
kept in answers.parquet, so that the same command goes on where it was stopped.
"""

import argparse
import itertools
import random
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pandas as pd
import torch

import lvlm_utils as lv
from lvlm_utils.models import LVLM

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "emoji-world")]
import ordinary  # noqa: E402
import parts  # noqa: E402
import seen  # noqa: E402
import text  # noqa: E402
import world  # noqa: E402
from lessons import LEVEL, NUMBER, PLACE, Prior  # noqa: E402

BLANK, LENGTHS = ("none", "white", "black"), (500, 1000, 2500)
COLUMNS = ["picture", "length", "kind", "n", "clusters", "accuracy", "low", "high", "yes_rate", "unparsed", "usual"]
CHOICES = {PLACE: ["left", "middle", "right"], LEVEL: ["top", "middle", "bottom"], NUMBER: list("01234")}


def bayes(samples: pd.DataFrame) -> pd.DataFrame:
    """The samples as answered by the naive-Bayes reader, who knows only what the context mentions."""
    prior = Prior()
    told = {context: prior.told(context) for context in samples["context"].unique()}
    chances = [prior.chance(name, told[context]) for name, context in zip(samples["target"], samples["context"])]
    answers = ["yes" if chance > 0.5 else "no" for chance in chances]
    return samples.assign(answer=answers, correct=[a == b for a, b in zip(answers, samples["label"])])


def accuracies(lvlm: LVLM, questions: int, long: int, out: Path) -> Iterator[pd.DataFrame]:
    """Tables by kind of question, without context and then at three lengths: with the picture, by naive Bayes, without."""
    short = lv.samples.load("emoji-world", lvlm, samples=questions, lengths=(0,))
    nested = lv.samples.load("emoji-world", lvlm, samples=long, lengths=LENGTHS)
    for samples, image in itertools.product((short, nested), ("naive Bayes", "original", *BLANK)):
        for _, part in samples.groupby("length"):
            answers = (
                bayes(part) if image == "naive Bayes" else lv.answer(lvlm, part, image, out=out / "answers.parquet")
            )
            every = pd.concat([answers.assign(kind="all"), answers])
            yield lv.stats.accuracy(every, ["kind", "length"]).assign(picture=image)


def other_questions(lvlm: LVLM, pictures: int, seed: int = 777) -> pd.DataFrame:
    """Where an object is, across and down, and how often it comes, about fresh pictures; always the commonest answer beside."""
    rng, rows = random.Random(seed), []
    for i in range(pictures):
        scene = seen.herd(rng)
        image, names = world.paint(scene, rng), [thing.name for thing in scene.things]
        single = [thing for thing in scene.things if names.count(thing.name) == 1]
        asked = [(f"Where is the {t.name} in the image?", ask, text.where(t)[axis].replace("centre", "middle"))
                 for t in single[:2] for axis, ask in enumerate((PLACE, LEVEL))]  # fmt: skip
        counted = rng.sample(sorted(set(names)), 2) + [world.absent(scene, rng, "adversarial")]
        asked += [(f"How many {world.OBJECTS[n][1]} are in the image?", NUMBER, str(names.count(n))) for n in counted]
        rows += [{"sample": f"{i} {question}{ask}", "image_id": str(i), "image": image, "context": "", "label": label,
                  "question": question + ask, "choices": CHOICES[ask], "kind": ask.strip()}
                 for question, ask, label in asked]  # fmt: skip
    samples = pd.DataFrame(rows)
    answers = lv.answer(lvlm, samples, max_new_tokens=2)
    table = lv.stats.accuracy(answers.assign(kind=samples["kind"]), ["kind"])
    usual = samples.groupby("kind")["label"].agg(lambda labels: labels.value_counts(normalize=True).iloc[0])
    return table.assign(picture="original", length=0, usual=table["kind"].map(usual))


def ordinary_answers(lvlm: LVLM) -> pd.DataFrame:
    """The twenty questions, each without a picture."""
    questions = list(ordinary.QUESTIONS)
    said = lv.generate(lvlm, lv.prompt(lvlm, None, "", questions), max_new_tokens=40)
    right = [ordinary.right(question, answer) for question, answer in zip(questions, said, strict=True)]
    return pd.DataFrame({"question": questions, "answer": said, "right": right})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--questions", type=int, default=600, help="without context")
    parser.add_argument("--long", type=int, default=120, help="at each length")
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args()
    torch.set_num_threads(1)
    lvlm = lv.load(parts.build() if options.model == "untouched" else options.model)
    options.out.mkdir(parents=True, exist_ok=True)
    said = ordinary_answers(lvlm)
    said.to_csv(options.out / "ordinary.csv", index=False, lineterminator="\n")
    print(said.to_string(), f"\n{said['right'].sum()} of {len(said)} ordinary questions right", flush=True)
    if options.model == "untouched":
        return
    found = []
    tables = accuracies(lvlm, options.questions, options.long, options.out)
    for table in itertools.chain(tables, map(partial(other_questions, lvlm), [options.questions // 6])):
        found.append(table.reindex(columns=COLUMNS))
        print(found[-1].round(3).to_string(header=len(found) == 1), flush=True)
        whole = pd.concat(found, ignore_index=True)
        whole.to_csv(options.out / "accuracy.csv", index=False, float_format="%.4g", lineterminator="\n")


if __name__ == "__main__":
    main()
