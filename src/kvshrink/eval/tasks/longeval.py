"""LongEval line retrieval: one of many "line <key>: REGISTER_CONTENT is <number>" is asked for.

Source: github.com/DachengLi1/LongChat@4b5faa52, longeval/; the test that CSKV (arXiv 2409.10593) reports.
Official cases come from a file (50 in the bundled one); generated ones have the same form and any number.

Two wordings, and each is scored its own way:
  reference  the prompt of the bundled reference model. It goes on talking after the closing ">", so right means that
             the output, from its first character up to the first one that is no digit, is the number.
  longeval   the official prompt, for instruction-tuned models. Right means that the last integer of the output is
             the number (the official rule).
Near misses are wrong in both: 4244 is not 42440.

Differs from upstream: generated keys come from 100 + 100 words, no two lines of a record hold the same number, and in
the reference wording generated numbers have five digits. The reference model writes five digits whatever it read, so
the 14 official cases whose number is shorter are nearly out of its reach: uncompressed and greedy it gets 3 of them
right and 31 of the other 36 (records cut to 30 lines).
"""

from pathlib import Path

from kvshrink.errors import EvalError
from kvshrink.eval.tasks import Sample, _longeval_cases
from kvshrink.eval.tasks._common import check_count, first_integer, last_integer, leading_digits
from kvshrink.eval.tasks._longeval_cases import Case

__all__ = ["first_integer", "last_integer", "samples", "score"]

REFERENCE_HEADER = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and "
    "contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value.\n"
)
OFFICIAL_HEADER = REFERENCE_HEADER.rstrip("\n") + (
    " For each line index, memorize its corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to "
    "retrieve the corresponding <REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
)
WORDINGS = ("reference", "longeval")


def samples(
    n: int,
    seed: int,
    *,
    lines: int | None = 30,
    path: str | Path | None = None,
    official: bool = True,
    wording: str = "reference",
) -> list[Sample]:
    """The first n official cases (`seed` has no effect on them), or n generated ones if not `official`.

    lines: lines of each record. An official record is cut to a window of this many lines that holds the asked line
           at about the same depth; None keeps it whole.
    path:  an official JSONL file to read instead of the bundled 200_lines.jsonl.

    Raises EvalError for a setting that does not fit or a file that cannot be read.
    """
    check_count("longeval", n)
    if wording not in WORDINGS:
        raise EvalError(f"longeval: no wording {wording!r}. Known: {', '.join(WORDINGS)}.")
    if lines is not None and lines < 1:
        raise EvalError(f"longeval: lines={lines}. Use at least 1, or None for whole official records.")
    if official:
        cases = _longeval_cases.official(n, path)
        cases = cases if lines is None else [_longeval_cases.cut(case, lines) for case in cases]
    elif path is not None:
        raise EvalError(f"longeval: generated records read no file, got path={path}. Drop path= or use official=True.")
    else:
        smallest = _longeval_cases.SMALLEST_REFERENCE if wording == "reference" else 1
        cases = _longeval_cases.generated(n, seed, lines, smallest)
    return [_sample(i, case, wording, official) for i, case in enumerate(cases)]


def score(sample: Sample, text: str) -> float:
    if sample.meta["wording"] == "longeval":
        return float(last_integer(text) == int(sample.answers[0]))
    return float(leading_digits(text) == sample.answers[0])


def _sample(index: int, case: Case, wording: str, official: bool) -> Sample:
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
    if wording == "longeval":
        return Sample(OFFICIAL_HEADER + record + "\n", case.question, "", (number,), 100, meta)
    question = f"Tell me what is the REGISTER_CONTENT in line {key}? Answer:"
    return Sample(REFERENCE_HEADER + record, question, " <", (number,), 8, meta)
