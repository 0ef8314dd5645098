"""Ordinary language: twenty questions that training must not cost, and other prompts that are replayed during training.

The questions, with what counts as right, were fixed before anything was trained; none of them is among the prompts.
"""

import itertools
import re

ANIMALS = ("dog cat lion tiger elephant bear wolf fox horse cow pig sheep goat chicken rabbit bird eagle dolphin whale shark "
           "giraffe zebra monkey kangaroo penguin panda koala deer fish snake turtle mouse mice wolves cheetah leopard gorilla").split()  # fmt: skip
COLOURS = "red blue green yellow orange purple black white pink brown grey gray".split()
# question: (words of which the answer has to contain some, how many different ones)
QUESTIONS = {
    "What is the capital of France?": (["Paris"], 1),
    "What is the capital of England?": (["London"], 1),
    "Name three animals.": (ANIMALS, 3),
    "Name two colours.": (COLOURS, 2),
    "What is the opposite of big?": (["small", "little", "tiny"], 1),
    "What is 2 + 2?": (["4", "four"], 1),
    "How many legs does a spider have?": (["8", "eight"], 1),
    "What colour is grass?": (["green"], 1),
    "Which planet do we live on?": (["Earth"], 1),
    "What do bees make?": (["honey"], 1),
    "Who wrote Romeo and Juliet?": (["Shakespeare"], 1),
    "What is frozen water called?": (["ice"], 1),
    "In which country is the city of Rome?": (["Italy"], 1),
    "What is the largest ocean on Earth?": (["Pacific"], 1),
    "Which day comes after Monday?": (["Tuesday"], 1),
    "What is the chemical formula of water?": (["H2O", "H₂O"], 1),
    "Which animal barks?": (["dog", "dogs"], 1),
    "Translate the word 'cat' into Spanish.": (["gato", "gata"], 1),
    "How many hours are in a day?": (["24", "twenty-four"], 1),
    "Write one sentence about the sea.": (["sea", "ocean", "waves", "water"], 1),
}

THINGS = ("river bicycle cake school winter piano farm doctor moon garden train friend letter storm forest market bridge "
          "holiday computer mountain kitchen football island teacher").split()  # fmt: skip
ABOUT = ("Write one sentence about a {}.", "What is a {}?", "Name three things that go with a {}.",
         "Write a short poem about a {}.", "Why do people like a {}?", "Give me one fact about a {}.")  # fmt: skip
PLAIN = """What is the capital of Italy?|What is the capital of Japan?|What is the capital of Spain?|Which language is spoken in Brazil?
Who wrote Hamlet?|Who painted the Mona Lisa?|How many days are in a week?|How many months are in a year?|How many minutes are in an hour?
What colour is the sky?|What colour is snow?|What colour is a banana?|What is the opposite of hot?|What is the opposite of fast?
What is the opposite of old?|Name three fruits.|Name three vegetables.|Name two countries in Africa.|Name four seasons.|Name a musical instrument.
Say hello.|How are you?|Who are you?|What can you do?|Thank you very much!|Good night.|Translate 'good morning' into French.
Translate 'thank you' into German.|Is water wet?|Can birds fly?|Is the sun hot?|Do fish live in trees?|Is ice colder than fire?
Tell me a short joke.|What do cows eat?|Why is ice cold?|Why do we sleep?|What is a verb?|What is photosynthesis?|What is gravity?
What is the largest animal?|What is the fastest land animal?|Which animal says meow?|Where do polar bears live?|What do plants need to grow?
How do I boil an egg?|How do I make tea?|Give me a recipe for a salad.|What should I wear in winter?|How can I learn a language?
Spell the word 'house'.|What rhymes with 'night'?|What is the past tense of 'go'?|What is the plural of 'child'?|Finish the sentence: The early bird
Write an email to a friend.|Write the first line of a story.|Explain the internet to a child.|What is a computer made of?
Who was the first person on the moon?|When did the Second World War end?|What is democracy?|What is a haiku?|What is the boiling point of water?
Which planet is the largest?|Which gas do we breathe?|What is the currency of Japan?|What is the longest river in Africa?|What is chess?
List the primary colours.|Count from one to five.|What comes after the letter C?|Which month comes after June?|Which day comes before Friday?"""


def prompts() -> list[str]:
    """Some hundred and fifty prompts about things, plain questions, and small sums."""
    about = [form.format(thing) for thing, form in zip(THINGS * 3, itertools.cycle((*ABOUT, *ABOUT[1:])), strict=False)]
    sums = [f"What is {a} + {b}?" for a, b in itertools.product((1, 3, 5, 7, 10), (1, 2, 4, 6)) if (a, b) != (2, 2)]
    less = [f"What is {a} - {b}?" for a, b in ((5, 2), (9, 4), (10, 3), (7, 7), (8, 1))]
    return list(dict.fromkeys(about + PLAIN.replace("\n", "|").split("|") + sums + less))


def right(question: str, answer: str) -> bool:
    """Whether an answer to one of QUESTIONS contains enough of the accepted words, alone or in the plural."""
    words, needed = QUESTIONS[question]
    return sum(bool(re.search(rf"(?<!\w){re.escape(word)}s?(?!\w)", answer, re.IGNORECASE)) for word in words) >= needed
