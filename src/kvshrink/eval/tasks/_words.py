"""Keys: pairs of two lists of plain words, and random identifiers."""

import random
from uuid import UUID

ADJECTIVES = """
able ancient angry bare bitter blank bold brave brief bright broad calm careful clean clever cold common cool cruel
curious damp dark dear deep dry dull eager early easy empty equal faint fair faithful false fierce final fine firm flat
fond free fresh gentle glad golden grand grave great green handsome happy harsh heavy hollow honest humble idle keen
kind large late lazy lively lonely loose loud low mild modest narrow near neat new noble odd old pale patient plain
pleasant polite poor proud quick quiet rare rich rough round rude sad sharp short silent simple slow smooth sober
strange
""".split()

NOUNS = """
anchor apple army arrow autumn barn basket bell bird blanket boat bottle bread bridge brother candle captain carpet
castle chain chair church clock cloud coat corner cousin daughter desert doctor dog door dress eagle farmer feather
field finger fire fish flag flower forest garden glass hammer harbor hat hill horse island jacket judge kettle king
kitchen ladder lake lamp letter lion market meadow mirror moon mountain needle ocean orchard paper parlor pencil piano
pillow pony prince queen river road rope sailor school shadow shepherd silver soldier spoon stable stone table teacher
tower trumpet valley village wagon wheel window winter wolf
""".split()

LIMIT = len(ADJECTIVES) * len(NOUNS)


def keys(rng: random.Random, n: int) -> list[str]:
    """n distinct keys, "brave-kettle". Up to 100 keys share no word; LIMIT is the largest n."""
    left, right = rng.sample(ADJECTIVES, len(ADJECTIVES)), rng.sample(NOUNS, len(NOUNS))
    # each round of 100 pairs the words anew, one step further along the second list
    pairs = [f"{left[j % 100]}-{right[(j + j // 100) % 100]}" for j in range(n)]
    return rng.sample(pairs, n)


def uuids(rng: random.Random, n: int) -> list[str]:
    """n random identifiers of 36 characters, as uuid4 writes them."""
    return [str(UUID(int=rng.getrandbits(128), version=4)) for _ in range(n)]
