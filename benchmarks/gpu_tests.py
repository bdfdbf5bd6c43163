# SPDX-License-Identifier: Apache-2.0
"""Runs the tests that need a GPU and stores what they said: CI has no GPU, so their evidence is committed.

python benchmarks/gpu_tests.py [more arguments for pytest]
"""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

from environment import REPOSITORY, environment
from harness import RESULTS, SCRATCH


def main() -> int:
    xml = SCRATCH / "gpu_tests.xml"
    xml.parent.mkdir(parents=True, exist_ok=True)
    command = ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={xml}", *sys.argv[1:]]
    status = subprocess.run([sys.executable, *command], cwd=REPOSITORY).returncode
    outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.parse(xml).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[outcome].append(f"{case.get('classname')}::{case.get('name')}")
    counts = {kind: len(names) for kind, names in outcomes.items()}
    stored = {"benchmark": "gpu_tests", "exit_status": status, "counts": counts, "environment": environment()}
    stored |= {kind: sorted(names) for kind, names in outcomes.items()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "gpu_tests.json").write_text(json.dumps(stored, indent=1) + "\n")
    print(counts)
    return status


if __name__ == "__main__":
    sys.exit(main())
