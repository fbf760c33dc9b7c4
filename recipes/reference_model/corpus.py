"""Books and word lists, and which of them training never sees.

Answers must come from the context, not from memory, so measuring uses words and books that were held out. The split of
the words is by hash: it does not depend on the order of the books. Held-out books are a folder of their own, or books
known by name, or, when neither is there, the last book.
"""

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from recipes.reference_model.checkpoint import write_atomically
from recipes.reference_model.recipe import Recipe, RecipeError
from recipes.reference_model.tasks.world import World

HELD_OUT = ("austen_pride_and_prejudice_1813", "stevenson_treasure_1883")
FEWEST_WORDS, FEWEST_HELD_OUT = 500, 50  # word pairs are keys: 50 words give enough of them for 16k tokens
FEWEST_CHARACTERS = 20_000


@dataclass(frozen=True)
class Corpus:
    """Texts by book, and words by use. `chars_per_token` is measured once the tokenizer exists."""

    train: dict[str, str]
    held_out: dict[str, str]
    words: list[str]
    held_out_words: list[str]
    chars_per_token: float = 3.6

    def training_world(self, rng: random.Random) -> World:
        return World(self.words, list(self.train.values()), rng, self.chars_per_token)

    def held_out_world(self, rng: random.Random) -> World:
        return World(self.held_out_words, list(self.held_out.values()), rng, self.chars_per_token)

    def save(self, path: Path) -> None:
        write_atomically(path, lambda part: part.write_text(json.dumps(asdict(self))))

    @classmethod
    def load(cls, path: Path) -> "Corpus":
        return cls(**json.loads(path.read_text()))


def read_corpus(recipe: Recipe) -> Corpus:
    books = load_books(Path(recipe.books))
    if recipe.held_out_books:
        held = load_books(Path(recipe.held_out_books))
        books |= held
    else:
        held = {k: books[k] for k in HELD_OUT if k in books} or dict([max(books.items())])
    train = {k: v for k, v in sorted(books.items()) if k not in held}
    if not train:
        raise RecipeError(f"{recipe.books}: no book is left for training when {', '.join(held)} is held out.")
    words, held_words = word_list(books)
    if len(words) < FEWEST_WORDS or len(held_words) < FEWEST_HELD_OUT:
        raise RecipeError(
            f"{recipe.books}: {len(words)} different words of 3-10 letters and {len(held_words)} held out; "
            f"{FEWEST_WORDS} and {FEWEST_HELD_OUT} are needed. Add books."
        )
    return Corpus(train, dict(sorted(held.items())), words, held_words)


def load_books(folder: Path) -> dict[str, str]:
    """Every *.txt file, hard wraps undone (files whose lines are mostly short are taken as wrapped)."""
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder of books (plain text, one *.txt file per book).")
    books = {}
    for path in sorted(folder.glob("*.txt")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        sizes = sorted(len(line) for line in text.split("\n") if line.strip())
        if sizes and sizes[len(sizes) // 2] < 90:
            text = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
        books[path.stem] = re.sub(r"\n{2,}", "\n", text)
    if not books:
        raise RecipeError(f"{folder}: no *.txt file in it.")
    short = [k for k, v in books.items() if len(v) < FEWEST_CHARACTERS]
    if short:
        raise RecipeError(f"{folder / short[0]}.txt: fewer than {FEWEST_CHARACTERS:,} characters; not a book.")
    return books


def word_list(books: dict[str, str]) -> tuple[list[str], list[str]]:
    """Common lower-case words, split by hash into training words and one tenth held out as keys for measuring."""
    counts: Counter[str] = Counter()
    for _, text in sorted(books.items()):
        counts.update(re.findall(r"\b[a-z]{3,10}\b", text))
    words = sorted(w for w, _ in counts.most_common(6000))
    held = [w for w in words if hashlib.sha256(w.encode()).digest()[0] % 10 == 0]
    return sorted(set(words) - set(held)), held
