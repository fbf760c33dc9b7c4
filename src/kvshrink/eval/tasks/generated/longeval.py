"""LongEval line retrieval: one of many "line <key>: REGISTER_CONTENT is <number>" is asked for.

Source: github.com/DachengLi1/LongChat@4b5faa52, longeval/; the test that CSKV (arXiv 2409.10593) reports.
Official cases come from a file (50 in the bundled one); generated ones have the same form and any number.

Two wordings, and each is scored its own way:
  reference  the prompt of the bundled reference model. It goes on talking after the closing ">", so right means that
             the output, from its first character up to the first one that is no digit, is the number.
  official   the official prompt, for instruction-tuned models. Right means that the last integer of the output is
             the number (the official rule).
Near misses are wrong in both: 4244 is not 42440. A model that talks on after the number is wrong by the official rule;
the metric `first_integer` would call it right.

Differs from upstream: generated noun keys come from 100 + 100 words, no two lines of a record hold the same number, and
in the reference wording generated numbers have five digits. The reference model writes five digits whatever it read, so
the 14 official cases whose number is shorter are nearly out of its reach: uncompressed and greedy it gets 3 of them
right and 31 of the other 36 (records cut to 30 lines).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from kvshrink.errors import EvalError
from kvshrink.eval.tasks import Count, Sample, _longeval_cases
from kvshrink.eval.tasks._common import WORDINGS, check_count, check_known, fill, fits
from kvshrink.eval.tasks._longeval_cases import STYLES, Case

REFERENCE_HEADER = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and "
    "contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value.\n"
)
OFFICIAL_HEADER = REFERENCE_HEADER.rstrip("\n") + (
    " For each line index, memorize its corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to "
    "retrieve the corresponding <REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
)
VARIANTS: dict[str, dict] = {
    "official": {"official": True, "lines": 30},
    "generated": {"official": False, "lines": 30},
    "filled": {"official": False, "lines": None},
}


def samples(
    n: int,
    seed: int,
    *,
    tokens: int = 4000,
    count: Count | None = None,
    lines: int | None = 30,
    path: str | Path | None = None,
    official: bool = True,
    style: str = "noun",
    wording: str = "reference",
) -> list[Sample]:
    """The first n official cases (`seed` has no effect on them), or n generated ones if not `official`.

    lines:  lines of each record. An official record is cut to a window of this many lines that holds the asked line
            at about the same depth. None: as many as fit into `tokens`, and an official record no longer than it is.
    count:  without it nothing is fitted into `tokens`, and with lines=None official records stay whole.
    path:   an official JSONL file to read instead of the bundled 200_lines.jsonl.
    style:  of the generated keys: noun (adjective-noun), numeric (1, 2, ...), abc (six letters of A to F), uuid.

    Raises EvalError for a setting that does not fit or a file that cannot be read.
    """
    check_count("longeval", n)
    check_known("longeval", "wording", wording, WORDINGS)
    check_known("longeval", "style", style, list(STYLES))
    if lines is not None and lines < 1:
        raise EvalError(f"longeval: lines={lines}. Use at least 1, or None for as many as fit.")
    smallest = _longeval_cases.SMALLEST_REFERENCE if wording == "reference" else 1
    if official:
        cases = _longeval_cases.official(n, path)
        sources = [(len(case.lines), partial(_longeval_cases.cut, case)) for case in cases]
    elif path is not None:
        raise EvalError(f"longeval: generated records read no file, got path={path}. Drop path= or use official=True.")
    else:
        most = min(tokens, _longeval_cases.limit(style, smallest))
        sources = [(most, partial(_longeval_cases.generated, seed, i, style, smallest)) for i in range(n)]
    return [
        _sized(partial(_sample, i, make, wording, official), most, lines, official, tokens, count)
        for i, (most, make) in enumerate(sources)
    ]


def _sized(
    make: Callable[[int], Sample], most: int, lines: int | None, official: bool, tokens: int, count: Count | None
) -> Sample:
    if lines is not None:
        made = make(lines)
        if count is not None and not fits([made], tokens, count):
            raise EvalError(f"longeval: {lines} lines do not fit into tokens={tokens}. Lower lines or raise tokens.")
        return made
    if official and (count is None or fits([make(most)], tokens, count)):
        return make(most)
    if count is None:
        raise EvalError("longeval: lines=None for generated records needs count=. Give it, or a number of lines.")
    return fill("longeval", lambda k: [make(k)], 1, most, "lines", tokens, count)[0]


def _sample(index: int, make: Callable[[int], Case], wording: str, official: bool, lines: int) -> Sample:
    case = make(lines)
    key, number = case.lines[case.asked]
    record = "".join(f"line {k}: REGISTER_CONTENT is <{v}>\n" for k, v in case.lines)
    meta = {
        "index": index,
        "depth": case.asked / max(1, len(case.lines) - 1),
        "key": key,
        "lines": len(case.lines),
        "wording": wording,
        "source": "official" if official else "generated",
    }
    if wording == "official":
        return Sample(OFFICIAL_HEADER + record + "\n", case.question, "", (number,), "last_integer", 100, meta)
    question = f"Tell me what is the REGISTER_CONTENT in line {key}? Answer:"
    return Sample(REFERENCE_HEADER + record, question, " <", (number,), "leading_digits", 8, meta)
