"""The fault suite's own bookkeeping: what is marked is recorded, and the page shows what the record says."""

import json
import os
import re
import subprocess
import sys

from shard_tools import exit_codes
from tests.faults.record import REPOSITORY
from tests.faults.table import BEGIN, END, PAGE, Fault, marked, page, read_record, rows

MARKED = """
import pytest

@pytest.mark.fault("a cut file", "is found", exit_code=7)
@pytest.mark.parametrize("n", [1, 2])
def test_cut(n, record_property):
    record_property("seen", "both")

@pytest.mark.fault("a lost file", "is named")
def test_lost():
    assert False

def test_other():
    pass
"""


def test_a_run_records_each_marked_test_once_and_keeps_what_was_there(tmp_path):
    (tmp_path / "test_marked.py").write_text(MARKED)
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_configure  # noqa: F401")
    record = tmp_path / "faults.json"
    record.write_text(json.dumps({"earlier": {"passed": True}}))
    environment = {**os.environ, "FASTSSL_RECORD_FAULTS": str(record), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "fault", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    found = json.loads(record.read_text())
    assert found.pop("earlier") == {"passed": True}
    assert {test: (row["passed"], row["seen"]) for test, row in found.items()} == {
        "test_marked.py::test_cut": (True, ["both", "both"]),
        "test_marked.py::test_lost": (False, []),
    }
    assert all(row["commit"] and row["machine"] for row in found.values())


def test_the_table_says_what_failed_and_what_never_ran():
    faults = [Fault("t::a", "b | c", "is found", 7), *(Fault(f"t::{n}", f, "x", None) for n, f in ("ba", "cd", "de"))]
    where = {"machine": "m", "date": "d", "commit": "c", "full": True}
    record = {
        "t::a": {"passed": True, "seconds": 1.25, "seen": ["3 of 3", "3 of 3"], **where},
        "t::b": {"passed": False, "seconds": 1.0, "seen": [], **where},
        "t::d": {"passed": True, "seconds": 0.0, "seen": ["1 of 1"], **where, "full": False},
    }
    assert rows(faults, record)[2:] == [
        "| a | x | **failed** |  | 1.0 | `t::b` |",
        "| b \\| c | is found | 3 of 3 | 7 | 1.2 | `t::a` |",
        "| d | x | **not run** |  |  | `t::c` |",
        "| e | x | quick: 1 of 1 |  | 0.0 | `t::d` |",
    ]
    text = page(f"head\n{BEGIN}\nold\n{END}\ntail", faults, record)
    assert text.startswith("head\n")
    assert text.endswith(f"{END}\ntail")
    assert "old" not in text
    assert "4 faults. Recorded on m, d, commit c." in text


def test_the_page_shows_every_marked_test_as_the_record_has_it():
    text = PAGE.read_text()
    assert page(text, marked(), read_record()) == text, "run `python -m tests.faults.table`"
    codes = [line.split("|")[1].strip() for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert sorted(map(int, codes)) == sorted(v for v in vars(exit_codes).values() if isinstance(v, int))
