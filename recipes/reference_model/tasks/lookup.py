"""Key-value records: a JSON object with questions, and bare associations in many wordings.

`assoc` is what made retrieval appear: the same records again and again in random orders give a dense signal for
matching a key and copying what follows it.
"""

import json

from recipes.reference_model.tasks.world import ANSWER, PROMPT, RECORD, Example, World

# before the key, between key and value, after the value
WORDINGS = (
    ("", " ", "\n"),
    ("", ": ", "\n"),
    ("", " = ", "\n"),
    ("", " is", "\n"),
    ("", " -> ", "\n"),
    (' "', '": "', '",'),
    ("- ", ": <", ">\n"),
    ("item ", " has code ", "\n"),
    ("The number of ", " is ", ".\n"),
    ("line ", ": <", ">\n"),
    ("", " was called", ".\n"),
    ("", ",", ";\n"),
    ("line ", ": REGISTER_CONTENT is <", ">\n"),
    ("One of the special magic numbers for ", " is: ", ".\n"),
    ("VAR ", " = ", "\n"),
)


def jsonkv(world: World, size: int, questions: int | None = None) -> Example:
    """A JSON object of random keys and values, then keys are looked up."""
    ex = Example()
    by_id, by_digits = world.rng.random() < 0.3, world.rng.random() < 0.6
    per_record = (7 if by_id else 3.2) + (6 if by_digits else 2) + 6
    per_question = per_record + 4
    share = world.rng.uniform(0.35, 0.7)
    if questions is None:
        n = max(2, int(size * share / per_record))
        questions = max(1, int(size * (1 - share) / per_question))
    else:
        n = max(2, int((size - questions * per_question) / per_record))
    if by_id:
        keys = list(dict.fromkeys("".join(world.rng.choice("0123456789abcdef") for _ in range(6)) for _ in range(n)))
    else:
        keys = world.distinct_words(n) if world.rng.random() < 0.5 else world.pairs(n)
    values = [world.digits(5) if by_digits else world.word() for _ in keys]
    ex.add("JSON data:\n", PROMPT)
    ex.add(json.dumps(dict(zip(keys, values, strict=True))) + "\n", RECORD)
    for i in world.picks(len(keys), questions):
        ex.add(f'Key: "{keys[i]}" Value: "', PROMPT)
        ex.add(values[i], ANSWER)
        ex.add('"\n', PROMPT)
    return ex


def assoc(world: World, size: int, most: int = 10**6) -> Example:
    """At most `most` records, then the same records in random orders until the size is reached."""
    ex, rng = Example(), world.rng
    wording = rng.choice(WORDINGS)
    asked = wording if rng.random() < 0.6 else rng.choice(WORDINGS)
    by_word = rng.random() < 0.5
    digits = rng.choice((1, 2, 3, 5, 7))
    pairs = rng.random() < 0.4
    cost = (4.4 if pairs else 2.0) + (1.5 if by_word else digits + 0.5) + 5
    n = rng.randint(2, max(3, min(most, int(size / cost / 1.6))))
    keys = world.pairs(n) if pairs else world.distinct_words(n)
    values = [world.word() if by_word else world.digits(digits) for _ in range(n)]
    records = "".join("".join(_parts(wording, k, v, by_word)) + wording[2] for k, v in zip(keys, values, strict=True))
    # a wording that opens with punctuation must not run into the closing one of the other wording
    ex.add(records if asked == wording or records.endswith("\n") else records + "\n", RECORD)
    spent = cost * n
    while spent < size:
        for i in rng.sample(range(n), n):
            head, tail = _parts(asked, keys[i], values[i], by_word)
            ex.add(head, RECORD)
            ex.add(tail, ANSWER)
            ex.add(asked[2], PROMPT)
            spent += cost
            if spent >= size:
                break
    return ex


def _parts(wording: tuple[str, str, str], key: str, value: str, by_word: bool) -> tuple[str, str]:
    """The record up to its value, and the value with the space that belongs to its first token.

    A space before a word is part of the word's token; before a digit it is a token of its own.
    """
    before, between, _ = wording
    if by_word:
        between = between.rstrip(" ")
        value = value if between.endswith(('"', "<")) else f" {value}"
    return f"{before}{key}{between}", value
