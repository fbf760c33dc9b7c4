"""The fuzzer of files, small: every kind of file, and some methods. `--fuzz N` tries N cases and all methods."""

from tests.fuzz.files import run
from tests.fuzz.subjects import METHODS


def test_no_mutated_file_does_harm(fuzz_cases, tmp_path):
    cases = fuzz_cases(250)
    names = ("cskv4", "saq", "zipcache") if cases <= 250 else tuple(METHODS)
    tally = run(cases, 0, tmp_path, names)
    print(tally.summary())
    assert not tally.findings
    assert sum(tally.outcomes.values()) == cases
