"""Documents without a question: a passage copied, and plain book text."""

from recipes.reference_model.tasks.world import PROMPT, RECORD, TEXT, Example, World


def copy(world: World, size: int) -> Example:
    """A passage (book text or random words), perhaps some more text, and the passage again."""
    ex = Example()
    gap = world.rng.random() < 0.4
    n = int(size * (world.rng.uniform(0.15, 0.36) if gap else 0.4))
    from_book = world.rng.random() < 0.5
    body = world.passage(int(n * world.chars_per_token)) if from_book else _random_words(world, n)
    ex.add("Text:", PROMPT)
    ex.add(f" {body}\n", TEXT if from_book else RECORD)
    if gap:
        ex.add(world.passage(int((size - 2 * n - 12) * world.chars_per_token)) + "\n", TEXT)
    cut = body.split(" ")
    start = 0 if world.rng.random() < 0.5 else world.rng.randrange(max(1, len(cut) // 2))
    lead, rest = cut[start : start + 3], cut[start + 3 :]
    # the newline is one token with a punctuation mark before it, so it must not be a segment of its own
    prompt = "Repeat the text. " + " ".join(lead)
    ex.add(prompt if rest else prompt + "\n", PROMPT)
    if rest:
        ex.add(" " + " ".join(rest) + "\n", 1.0 if from_book else 2.0)
    return ex


def book(world: World, size: int) -> Example:
    ex = Example()
    text = world.rng.choice(world.books)
    chars = int(size * world.chars_per_token * 1.15) + 50
    at = world.rng.randrange(max(1, len(text) - chars))
    cut = text[at : at + chars]
    ex.add(cut[cut.find(" ") + 1 :], TEXT)
    return ex


def _random_words(world: World, tokens: int) -> str:
    count = max(4, int(tokens / 1.9))
    return " ".join(world.word() if world.rng.random() < 0.85 else world.digits(3) for _ in range(count))
