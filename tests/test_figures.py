"""Figures in the documentation come from results files, and are what these files say."""

from __future__ import annotations

import pytest

from bench import figures
from fastssl.bench.record import Figure, Record

HEAD = "<!-- figures: bench/results/r.json moco/{row}/{column} -->"


@pytest.fixture
def tree(tmp_path):
    """A repository with one results file and a README that shows it."""
    measured = {
        "moco/native/images_per_s": Figure("images/s", (412.0, 398.4, 1420.6)),
        "moco/native/cpu_ms_per_image": Figure("ms/image", (2.5, 2.5, 2.5)),
        "moco/plain_pillow/images_per_s": Figure("images/s", (61.24,)),
        "moco/plain_pillow/ratio": Figure("x", (0.149,)),
        "other/wait": Figure("share waiting", (0.25,)),
    }
    machine = {"cpu": "Z80", "cores": 2, "memory_gib": 0.1}
    Record("loaders", "make it", measured, {}, {"torch": "2.9", "a/peer": "1"}, machine, "abc", "2026-01-02").save(
        tmp_path / "bench" / "results" / "r.json"
    )
    write(tmp_path, HEAD)
    return tmp_path


def write(root, head, body=""):
    (root / "README.md").write_text(f"before\n\n{head}\n{body}<!-- end figures -->\n\nafter\n")


def table(root):
    return [line for line in (root / "README.md").read_text().splitlines() if line.startswith("|")]


def test_the_documentation_says_what_the_results_files_say(capsys):
    assert figures.main(["--check"]) == 0, capsys.readouterr().err


def test_a_block_is_written_once_and_then_fresh(tree):
    assert figures.main(["--check"], tree) == 1
    assert figures.main([], tree) == 0
    assert figures.main(["--check"], tree) == 0
    text = (tree / "README.md").read_text()
    assert figures.main([], tree) == 0
    assert (tree / "README.md").read_text() == text
    assert text.startswith("before\n\n<!-- figures:")
    assert text.endswith("<!-- end figures -->\n\nafter\n")


def test_rows_and_columns_are_those_of_the_pattern_with_spread_and_unit(tree):
    figures.main([], tree)
    assert table(tree) == [
        "|  | images per s, images/s | cpu ms per image, ms/image | ratio, x |",
        "|---|---:|---:|---:|",
        "| native | 412 (398–1,421) | 2.50 | – |",
        "| plain pillow | 61.2 | – | 0.149 |",
    ]


def test_rows_and_columns_can_be_chosen_and_named(tree):
    chosen = '<!-- figures: bench/results/r.json moco/{row}/{column} rows=native columns="images_per_s=images/s" -->'
    write(tree, chosen)
    figures.main([], tree)
    assert table(tree) == ["|  | images/s |", "|---|---:|", "| native | 412 (398–1,421) |"]


def test_a_pattern_without_columns_gives_one(tree):
    write(tree, "<!-- figures: bench/results/r.json {row}/wait -->")
    figures.main([], tree)
    assert table(tree) == ["|  | share waiting |", "|---|---:|", "| other | 25% |"]


def test_the_caption_says_the_conditions(tree):
    figures.main([], tree)
    assert (
        "loaders. Median of 1 to 3 round(s), least and greatest in brackets; Z80, 2 cores, 0.1 GiB, no GPU; 2026-01-02,"
        " commit abc, torch 2.9. `make it` → `bench/results/r.json`." in (tree / "README.md").read_text()
    )


@pytest.mark.parametrize("where", ["412 (398", "61.2 |", "commit abc"])
def test_a_figure_changed_by_hand_is_stale(tree, where, capsys):
    figures.main([], tree)
    path = tree / "README.md"
    path.write_text(path.read_text().replace(where, where.replace("2", "3").replace("abc", "abd")))
    assert figures.main(["--check"], tree) == 1
    assert "stale in README.md" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        ("<!-- figures: bench/results/none.json a/{row} -->", "none.json cannot be read"),
        ("<!-- figures: bench/results/r.json a/{row} -->", "has no figure like a/{row}"),
        ("<!-- figures: bench/results/r.json moco/native -->", "has no {row}"),
        ("<!-- figures: bench/results/r.json moco/{row}/ratio rows=nativ -->", "has no nativ in"),
        ("<!-- figures: bench/results/r.json moco/{row}/ratio row=x -->", "neither rows=... nor columns=..."),
        ("no comment", "lacks its partner"),
    ],
)
def test_a_block_that_cannot_be_made_is_said(tree, head, sentence, capsys):
    write(tree, head)
    assert figures.main(["--check"], tree) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: README.md: ")
    assert sentence in error


def test_an_example_that_is_indented_is_no_block(tree):
    text = f"    {HEAD}\n    <!-- end figures -->\n"
    assert figures.rewritten(text, tree) == text
