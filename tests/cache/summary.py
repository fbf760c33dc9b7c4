"""A pytest plugin that prints how many random sequences matched the oracle. Under xdist it counts in the controller."""


def pytest_terminal_summary(terminalreporter) -> None:
    passed = terminalreporter.getreports("passed")
    counts = [value for report in passed for name, value in report.user_properties if name == "sequences"]
    if counts:
        terminalreporter.write_line(f"{sum(counts)} random cache sequences ran, all as the oracle says")
