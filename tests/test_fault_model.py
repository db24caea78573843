"""docs/faults.md says only what a test proves."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "faults.md"


def test_every_line_names_tests_that_exist() -> None:
    rows = [
        line
        for line in DOCUMENT.read_text().partition("## Measured")[0].splitlines()
        if line.startswith("| ")
    ][1:]
    assert len(rows) > 12
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row.rsplit("|", 2)[1])
        assert named, row
        for file, test in named:
            assert f"def {test}(" in (TESTS / file).read_text(), f"{file}::{test}"
