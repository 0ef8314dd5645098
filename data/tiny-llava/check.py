"""What the card promises, measured again: held-out questions without context, 300 pictures, six questions each.

    python data/tiny-llava/check.py [MODEL ...]
"""

import sys

import pandas as pd

import lvlm_utils as lv

QUESTIONS = 1800


def main(names: list[str]) -> None:
    for name in names:
        lvlm = lv.load(name)
        samples = lv.samples.load("emoji-world", lvlm, samples=QUESTIONS, lengths=(0,))
        parts = []
        for image in ("original", "white", "black", "none"):
            answers = lv.answer(lvlm, samples, image=image)
            whole = lv.stats.accuracy(answers.assign(kind="all"), ["kind"])
            parts.append(pd.concat([whole, lv.stats.accuracy(answers, ["kind"])]).assign(picture=image))
        table = pd.concat(parts).set_index(["picture", "kind"])
        print(f"\n{name}, revision {lvlm.revision}, no context")
        print(table[["n", "accuracy", "low", "high", "yes_rate", "unparsed", "errors"]].round(3).to_string())


if __name__ == "__main__":
    main(sys.argv[1:] or ["tiny-llava", "tiny-llava-long"])
