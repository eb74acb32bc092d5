"""Prints what tests of kernels record about their errors."""


def pytest_terminal_summary(terminalreporter):
    """The lines that tests recorded as ``kernel_errors``, also those of other processes (pytest-xdist)."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    lines = [value for report in reports for name, value in report.user_properties if name == "kernel_errors"]
    if lines:
        terminalreporter.section("errors of the kernels")
        for line in sorted(lines):
            terminalreporter.write_line(line)
