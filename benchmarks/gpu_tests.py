# SPDX-License-Identifier: Apache-2.0
"""Runs the tests that need a GPU and stores what they said: CI has no GPU, so their evidence is committed.

    python benchmarks/gpu_tests.py [more arguments for pytest]

Failures are printed as they come, and the file is written as the run goes on: of one that is cut off it says what was
seen until then, and `exit_status` null.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import pytest
from environment import REPOSITORY, environment
from harness import RESULTS

SECONDS = 5  # between two versions of the file


class Outcomes:
    """A pytest plugin: outcome -> tests, of this process or, under xdist, of all workers."""

    def __init__(self) -> None:
        self.tests: dict[str, str] = {}
        self._environment = environment()
        self._written = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Set-up and tear-down tell nothing but failures and skips, and a failure stays one.
        if (report.when == "call" or not report.passed) and self.tests.get(report.nodeid) != "failed":
            self.tests[report.nodeid] = report.outcome
        self._tell(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self.tests[report.nodeid] = report.outcome
            self._tell(report)

    def _tell(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            print(f"\nFAILED {report.nodeid}\n{str(report.longrepr)[-2000:]}", flush=True)
        if time.monotonic() - self._written > SECONDS:
            self.write(None)

    def write(self, exit_status: int | None) -> dict[str, int]:
        kinds: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
        for test, outcome in self.tests.items():
            kinds[outcome].append(test)
        counts = {kind: len(tests) for kind, tests in kinds.items()}
        stored: dict[str, Any] = {"benchmark": "gpu_tests", "exit_status": exit_status, "counts": counts}
        stored |= {"environment": self._environment, **{kind: sorted(tests) for kind, tests in kinds.items()}}
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "gpu_tests.json").write_text(json.dumps(stored, indent=1) + "\n")
        self._written = time.monotonic()
        return counts


def main() -> int:
    os.chdir(REPOSITORY)
    outcomes = Outcomes()
    status = int(pytest.main(["-m", "gpu", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[outcomes]))
    print(outcomes.write(status))
    return status


if __name__ == "__main__":
    sys.exit(main())
