"""Reports how many inputs the fuzz tests have had."""

from __future__ import annotations

import pytest

from tests.fuzz.inputs import NUM_INPUTS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if NUM_INPUTS:
        terminalreporter.write_sep("=", f"fuzzed with {sum(NUM_INPUTS.values()):,} inputs")
        for name, count in sorted(NUM_INPUTS.items()):
            terminalreporter.write_line(f"{count:>9,} {name}")
