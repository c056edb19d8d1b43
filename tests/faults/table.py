"""Makes the table of docs/reliability.md from the marks in the tests and the record of the last `make faults`.

python -m tests.faults.table            writes it
python -m tests.faults.table --check    exits with 1 if it is not what would be written
"""

from __future__ import annotations

import ast
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.record import REPOSITORY

RECORD = REPOSITORY / "bench/results/faults.json"
PAGE = REPOSITORY / "docs/reliability.md"
_COUNT = re.compile(r"(\d+) of (\d+)$")
BEGIN, END = "<!-- faults: written by `python -m tests.faults.table` -->", "<!-- end of faults -->"


@dataclass(frozen=True)
class Fault:
    """A marked test: what it injects and what must happen."""

    test: str
    fault: str
    outcome: str
    exit_code: int | None


def marked(folder: Path = REPOSITORY / "tests") -> list[Fault]:
    """All marked tests, read from the source: no test is imported or run."""
    return [fault for path in sorted(folder.rglob("test_*.py")) for fault in _marked_in(path)]


def rows(faults: list[Fault], record: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown, a line a fault, in the order of their words; one that did not pass, or never ran, says so."""
    head = ["| fault | what happens | seen | exit code | seconds | test |", "|---|---|---|---|---|---|"]
    return head + [_row(fault, record.get(fault.test)) for fault in sorted(faults, key=lambda f: f.fault.lower())]


def page(text: str, faults: list[Fault], record: dict[str, dict[str, Any]]) -> str:
    """The page with its table replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert END in rest, f"{PAGE.name} has no place for the table"
    ran = sorted({f"{r['machine']}, {r['date']}, commit {r['commit']}" for r in record.values()})
    where = [f"{len(faults)} faults. Recorded on {'; '.join(ran)}.", ""] if ran else []
    return "\n".join([before + BEGIN, *where, *rows(faults, record), END]) + after


def _row(fault: Fault, row: dict[str, Any] | None) -> str:
    if row is None:
        seen, seconds = "**not run**", ""
    else:
        seen = _summary(row["seen"])
        if not row["passed"]:
            seen = "**failed**"
        elif not row["full"]:
            seen = f"quick: {seen}"
        seconds = f"{row['seconds']:.1f}"
    code = "" if fault.exit_code is None else str(fault.exit_code)
    cells = [fault.fault, fault.outcome, seen, code, seconds, f"`{fault.test.removeprefix('tests/')}`"]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _summary(seen: list[str]) -> str:
    """What the cases of a test saw, of many only the sum of "3 of 3"."""
    counts = [match for match in map(_COUNT.search, seen) if match]
    if len(seen) > 4 and len(counts) == len(seen):
        return f"{sum(int(c[1]) for c in counts)} of {sum(int(c[2]) for c in counts)} in {len(seen)} cases"
    return "; ".join(dict.fromkeys(seen)) or "yes"


def _marked_in(path: Path) -> list[Fault]:
    found = []
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        for mark in function.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                fault, outcome = (ast.literal_eval(argument) for argument in mark.args)
                codes = {keyword.arg: ast.literal_eval(keyword.value) for keyword in mark.keywords}
                test = f"{path.relative_to(REPOSITORY)}::{function.name}"
                found.append(Fault(test, fault, outcome, codes.get("exit_code")))
    return found


def read_record() -> dict[str, dict[str, Any]]:
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


def main(arguments: list[str]) -> int:
    before = PAGE.read_text()
    after = page(before, marked(), read_record())
    if "--check" in arguments:
        return int(before != after)
    PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
