"""A pytest plugin that prints how many lossless scenarios ran. Under xdist it counts in the controller."""

PREFIX = "test_lossless.py::test_lossless["


def pytest_terminal_summary(terminalreporter) -> None:
    ran = {
        report.nodeid: outcome
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if PREFIX in report.nodeid and report.when == "call"
    }
    if ran:
        failed = sum(outcome == "failed" for outcome in ran.values())
        terminalreporter.write_line(f"{len(ran)} lossless scenarios ran, {len(ran) - failed} token-identical")
