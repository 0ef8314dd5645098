"""Growing one nested context from text units: every cut within 3% of its length in tokens, between sentences."""
from collections.abc import Callable, Sequence

from .readers import Unit

TOLERANCE = 0.03


def token_counter(tokenizer) -> Callable[[list[str]], list[int]]:
    """A function that counts the tokens of each text, special tokens left out."""
    return lambda texts: [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def grow(units: Sequence[Unit], lengths: Sequence[int], count: Callable[[list[str]], list[int]]
         ) -> dict[int, Unit] | None:
    """length -> the sentences of its context (joined by one space); the longer begins with the shorter.

    `count` gives the tokens of each of several texts (in one call: tokenizers are slow one text at a time).
    Units are taken in order. Near a length a unit may be cut between two sentences (it goes on right after the cut),
    or a later one is taken first where only that lands within 3% (unit order is otherwise kept). No context ends with
    a question that its unit answers. None when the units do not suffice.
    """
    queue = [_chunks(unit) for unit in units if unit]
    # tokens that a chunk adds after a full stop; the total is made exact at each cut
    every = list(dict.fromkeys(chunk for unit in queue for chunk in unit))
    stop, *counted = count([".", *(". " + " ".join(chunk) for chunk in every)])
    sizes = {chunk: tokens - stop for chunk, tokens in zip(every, counted)}

    def size(chunk: Unit) -> int:
        return sizes[chunk]

    context: list[str] = []
    total, contexts = 0, {}
    for length in sorted(lengths):
        low, high = length * (1 - TOLERANCE), length * (1 + TOLERANCE)
        counted = -1  # chunks in the context when `total` was last a true count
        while length:
            taken = _nearer(queue, size, length - total) if total >= low else _next(
                queue, size, low - total, length - total, high - total)
            context += [sentence for chunk in taken or () for sentence in chunk]
            total += sum(map(size, taken or ()))
            if total >= low and (counted < 0 or not taken):
                total, before = count([" ".join(context)])[0], total
                if not taken and (total == before or counted == len(context)):
                    break
                counted = len(context)
            elif not taken:
                break
        if not low <= total <= high:  # too little text, or a tokenizer in which sizes do not add up
            return None
        contexts[length] = tuple(context)
    return contexts


def _chunks(unit: Unit) -> list[Unit]:
    """The unit's sentences, a question joined to the sentence after it: where it may be cut."""
    chunks, open_ = [], []
    for sentence in unit:
        open_.append(sentence)
        if not sentence.endswith("?"):
            chunks.append(tuple(open_))
            open_ = []
    return chunks + [tuple(open_)] if open_ else chunks


def _nearer(queue: list[list[Unit]], size: Callable[[Unit], int], aim: float) -> list[Unit]:
    """The first chunks of the next unit, if they bring the total nearer to the length than it is; else none."""
    if not queue:
        return []
    miss = [abs(aim - sum(map(size, queue[0][:k]))) for k in range(len(queue[0]) + 1)]
    best = miss.index(min(miss))
    taken, queue[0] = queue[0][:best], queue[0][best:]
    if not queue[0]:
        queue.pop(0)
    return taken


def _next(queue: list[list[Unit]], size: Callable[[Unit], int], low: float, aim: float, high: float
          ) -> list[Unit] | None:
    """Take the next chunks off the queue towards a cut that is `aim` (low ... high) tokens away; None: no way."""
    if not queue:
        return None
    if sum(map(size, queue[0])) <= aim:  # the usual case: the whole next unit fits
        return queue.pop(0)
    for place, unit in enumerate(queue):  # a cut inside the next unit, else inside the first later one that lands
        sums = [sum(map(size, unit[:k])) for k in range(1, len(unit) + 1)]
        landing = [k for k, tokens in enumerate(sums, 1) if low <= tokens <= high]
        if landing:
            k = min(landing, key=lambda k: (abs(sums[k - 1] - aim), k))
            rest = queue.pop(place)
            if rest[k:]:
                queue.insert(0, rest[k:])
            return rest[:k]
    for place, unit in enumerate(queue):  # nothing lands in one step: take a later unit that fits and look again
        if sum(map(size, unit)) < low:
            return queue.pop(place)
    if size(queue[0][0]) < low:  # or begin the next unit
        return [queue[0].pop(0)]
    return None
