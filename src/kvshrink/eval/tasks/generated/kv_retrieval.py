"""Key-value retrieval: a JSON object of random identifiers, and the value of one key is asked for.

Source: Lost in the Middle (arXiv 2307.03172); official wording: InfiniteBench@88b3daa6, kv_retrieval.
Two wordings, and each is scored its own way:
  reference  what the bundled reference model was trained on; the output up to the closing quotation mark is the value
  official   InfiniteBench's prompt; the value is a word of the output
Two kinds of pairs:
  uuid   36-character identifiers, as in both sources
  short  word-pair keys and five-digit values, the only kind here that a model of a few million parameters can copy
"""

import json

from kvshrink.eval.tasks import Count, Sample, _book, _words
from kvshrink.eval.tasks._common import WORDINGS, check_count, check_known, depth, fill, places, rng

VARIANTS: dict[str, dict] = {"uuid": {"pairs": "uuid"}, "short": {"pairs": "short"}}
PAIRS = ("uuid", "short")
OFFICIAL_INTRO = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
OFFICIAL_QUESTION = 'Key: "{key}"\nThe value associated with the specified key is: '


def samples(
    n: int, seed: int, *, tokens: int = 4000, count: Count, pairs: str = "uuid", wording: str = "reference"
) -> list[Sample]:
    """n objects of as many pairs as fit into `tokens`; the asked positions are evenly spread."""
    check_count("kv_retrieval", n)
    check_known("kv_retrieval", "pairs", pairs, PAIRS)
    check_known("kv_retrieval", "wording", wording, WORDINGS)
    return [_sample(seed, i, pairs, wording, tokens, count) for i in range(n)]


def _sample(seed: int, index: int, pairs: str, wording: str, tokens: int, count: Count) -> Sample:
    def make(size: int) -> list[Sample]:
        random = rng("kv_retrieval", seed, index)
        if pairs == "uuid":
            keys, values = _words.uuids(random, size), _words.uuids(random, size)
        else:
            keys, values = _words.keys(random, size), [_book.digits(random, 5) for _ in range(size)]
        at = places(size, [depth(index)])[0]
        meta = {"index": index, "depth": at / max(1, size - 1), "key": keys[at], "pairs": size}
        body = "JSON data:\n" + json.dumps(dict(zip(keys, values, strict=True))) + "\n"
        if wording == "official":
            question = OFFICIAL_QUESTION.format(key=keys[at])
            return [Sample(f"{OFFICIAL_INTRO}{body}\n", question, "", (values[at],), "word_in_text", 50, meta)]
        question = f'Key: "{keys[at]}"'
        return [Sample(body, question, ' Value: "', (values[at],), "quoted", 40, meta)]

    most = tokens if pairs == "uuid" else min(tokens, _words.LIMIT)
    return fill("kv_retrieval", make, 2, most, "pairs", tokens, count)[0]
