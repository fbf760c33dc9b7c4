"""Sentences hidden in book text: the pass key, and the needles of RULER (single, several keys, several values).

`haystack` is the hard end of the same family: needles without any book text between them.
"""

from recipes.reference_model.tasks.world import ANSWER, PROMPT, RECORD, Example, World

INTRODUCTION = "Some special magic numbers are hidden within the following text."


def sentence(name: str, value: str) -> str:
    return f"One of the special magic numbers for {name} is: {value}."


def passkey(world: World, size: int, depth: float | None = None) -> Example:
    ex = Example()
    ex.add("There is an important info hidden inside a lot of irrelevant text. Find it and memorize it.", PROMPT)
    value = world.digits(5)
    at = world.rng.random() if depth is None else depth
    ex.segments += world.scatter([f"The pass key is {value}. Remember it."], max(8, size - 75), [at])
    ex.add("What is the pass key? The pass key is ", PROMPT)
    ex.add(value, ANSWER)
    ex.add(".\n", PROMPT)
    return ex


def needles(
    world: World, size: int, keys: int | None = None, depth: float | None = None, questions: int | None = None
) -> Example:
    """`keys` needles with one 7-digit value each; with a depth, only the needle at that depth is asked for."""
    ex = Example()
    k = keys or world.rng.randint(1, max(2, size // 90))
    count = questions or max(1, min(k, size // 100))
    room = max(8, size - 20 - 22 * k - 40 * count)
    if keys is None and world.rng.random() < 0.3:
        room = world.rng.randint(0, room)
    names = world.distinct_words(k) if world.rng.random() < 0.6 else world.pairs(k)
    values = [world.digits(7) for _ in names]
    ex.add(INTRODUCTION, PROMPT)
    depths = None if depth is None else sorted([depth, *(world.rng.random() for _ in range(k - 1))])
    ex.segments += world.scatter([sentence(n, v) for n, v in zip(names, values, strict=True)], room, depths)
    for i in world.picks(k, count) if depths is None else [depths.index(depth)]:
        ex.add(f"What is the special magic number for {names[i]} mentioned in the provided text?", PROMPT)
        ex.add(f" The special magic number for {names[i]} mentioned in the provided text is: ", PROMPT)
        ex.add(values[i], ANSWER)
        ex.add(".\n", PROMPT)
    return ex


def multivalue(world: World, size: int, keys: int | None = None, values: int | None = None) -> Example:
    """Several values for one key: all of them are wanted, in the order of the text."""
    ex = Example()
    per = values or world.rng.randint(2, 4)
    k = keys or world.rng.randint(1, max(1, min(4, size // 250)))
    names = world.distinct_words(k)
    slots = [i for i in range(k) for _ in range(per)]
    world.rng.shuffle(slots)
    found: dict[int, list[str]] = {i: [] for i in range(k)}
    for i in slots:
        found[i].append(world.digits(7))
    left = {i: iter(v) for i, v in found.items()}
    room = max(8, size - 20 - 22 * len(slots) - k * (28 + 9 * per))
    ex.add(INTRODUCTION, PROMPT)
    ex.segments += world.scatter([sentence(names[i], next(left[i])) for i in slots], room)
    for i in range(k):
        ex.add(
            f"What are all the special magic numbers for {names[i]} mentioned in the provided text? They are:", PROMPT
        )
        for j, value in enumerate(found[i]):
            ex.add(", " if j else " ", PROMPT)
            ex.add(value, ANSWER)
        ex.add(".\n", PROMPT)
    return ex


def haystack(world: World, size: int, questions: int | None = None) -> Example:
    """Needles only (RULER's multi-key 2 and 3): word, pair or number keys.

    Half of the training documents word the question as the record is worded: retrieval by plain induction, from which
    the other wording is learnt.
    """
    ex = Example()
    training = questions is None
    share = world.rng.uniform(0.3, 0.6)
    per_needle, per_question = 23.5, 27
    if training:
        n = max(2, int(size * (1 - share) / per_needle))
        questions = max(1, int(size * share / per_question))
    else:
        n = max(2, int((size - questions * per_question) / per_needle))
    names = _mixed_keys(world, n)
    values = [world.digits(7) for _ in names]
    ex.add(" ".join(sentence(k, v) for k, v in zip(names, values, strict=True)) + "\n", RECORD)
    as_worded = training and world.rng.random() < 0.5
    for i in world.picks(n, questions):
        if as_worded:
            ex.add(f"One of the special magic numbers for {names[i]} is: ", PROMPT)
        else:
            ex.add(f"The special magic number for {names[i]} mentioned in the provided text is: ", PROMPT)
        ex.add(values[i], ANSWER)
        ex.add(".\n", PROMPT)
    return ex


def _mixed_keys(world: World, n: int) -> list[str]:
    kind = world.rng.random()
    if kind < 0.5:
        return world.distinct_words(n)
    return world.pairs(n) if kind < 0.8 else [world.digits(6) for _ in range(n)]
