"""bAbI-like stories in book text: a few facts of one story, far apart, and a question that needs one or two of them.

Source: BABILong (arXiv 2406.10149) hides bAbI's facts in PG19. Here stories come from an own simulator, filler is a
held-out book, and the prompt is in own words: do not compare with its scores.

  qa1  where a person is: the last place she went to
  qa2  where a thing is: who took it, and where she went next
  qa4  which place lies north, south, east or west of another

Facts stand after full stops. The fact that decides the answer is at the sample's depth, the earlier facts anywhere
before it, the later ones behind.
"""

from pathlib import Path
from random import Random

from kvshrink.eval.tasks import Count, Sample, _book
from kvshrink.eval.tasks._common import check_known

VARIANTS: dict[str, dict] = {story: {"story": story} for story in ("qa1", "qa2", "qa4")}
PERSONS = ("Mary", "Daniel", "Sandra", "Julie")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
SIDES = {"north": "south", "south": "north", "east": "west", "west": "east"}
MOVES = ("went", "moved", "travelled", "journeyed")
FACTS = 8
INTRO = (
    "Facts about persons, things and places are hidden in the following text. Answer the question by the facts alone; "
    "if a person was in several places, the latest one counts. Answer with one word.\n\n"
)
# (facts, position of the one that decides, question, answer)
Story = tuple[list[str], int, str, str]


def samples(
    n: int,
    seed: int,
    *,
    tokens: int = 4000,
    count: Count,
    path: str | Path | None = None,
    story: str = "qa1",
) -> list[Sample]:
    """n stories, each filling `tokens` tokens with bos and answer.

    path: a text file to use instead of the bundled held-out book.
    """
    check_known("babi_books", "story", story, list(VARIANTS))

    def word(random: Random, depth: float) -> _book.Hidden:
        facts, deciding, question, answer = STORIES[story](random)
        before = sorted(random.uniform(0, depth) for _ in facts[:deciding])
        after = sorted(random.uniform(depth, 1) for _ in facts[deciding + 1 :])
        labels = [place for place in PLACES if f" {place}" not in question]
        return _book.Hidden(
            intro=INTRO,
            sentences=tuple(zip([*before, depth, *after], facts, strict=True)),
            question=f"Question: {question}\n",
            answer_prefix="Answer:",
            answer=answer,
            metric="one_label",
            max_new_tokens=16,
            meta={"labels": labels, "chance": 1 / len(labels), "facts": facts},
        )

    return _book.samples(f"babi_books/{story}", word, n, seed, _book.words(path), tokens, count, at_stop=True)


def _qa1(random: Random) -> Story:
    moves = [(random.choice(PERSONS), random.choice(PLACES)) for _ in range(FACTS)]
    person = random.choice(sorted({who for who, _ in moves}))
    deciding = max(i for i, (who, _) in enumerate(moves) if who == person)
    return [_move(random, *move) for move in moves], deciding, f"Where is {person}?", moves[deciding][1]


def _qa2(random: Random) -> Story:
    thing, other = random.sample(THINGS, 2)
    owner, second, *others = random.sample(PERSONS, len(PERSONS))
    place = random.choice(PLACES)
    strangers = [_move(random, random.choice(others), random.choice(PLACES)) for _ in range(FACTS - 4)]
    told = [f"{owner} took the {thing}.", _move(random, owner, place), f"{second} took the {other}."]
    # the owner has been somewhere before she takes the thing; strangers come anywhere in between
    facts = [_move(random, owner, random.choice(PLACES)), *told]
    slots = sorted(random.sample(range(FACTS), len(facts)))
    line = [facts[slots.index(i)] if i in slots else strangers.pop() for i in range(FACTS)]
    return line, slots[2], f"Where is the {thing}?", place


def _qa4(random: Random) -> Story:
    places = random.sample(PLACES, len(PLACES))
    sides: list[str] = []
    for _ in places[1:]:
        # never back the way it came: then no place has two others on one side
        sides.append(random.choice([side for side in SIDES if not sides or side != SIDES[sides[-1]]]))
    facts = [f"The {b} is {side} of the {a}." for a, b, side in zip(places, places[1:], sides, strict=False)]
    deciding = random.randrange(len(facts))
    before, place, side = places[deciding], places[deciding + 1], sides[deciding]
    if random.random() < 0.5:
        return facts, deciding, f"What is {side} of the {before}?", place
    return facts, deciding, f"What is {SIDES[side]} of the {place}?", before


def _move(random: Random, person: str, place: str) -> str:
    return f"{person} {random.choice(MOVES)} to the {place}."


STORIES = {"qa1": _qa1, "qa2": _qa2, "qa4": _qa4}
