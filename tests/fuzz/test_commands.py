"""Command lines by chance: exit 0, or exit 2 with one line, and nothing of the user is changed."""

from tests.fuzz import commands


def test_command_lines(fuzz_cases, tmp_path):
    tally = commands.run(fuzz_cases(60), seed=0, root=tmp_path / "world")
    assert not tally.findings
    assert tally.outcomes["exit 0"] > 5
