"""Write the tables of the documentation from results files, so that no figure comes from a keyboard.

    python -m bench.figures            rewrite every block from its file
    python -m bench.figures --check    exit 1, naming the blocks that are not what their files say

A block is a pair of comments in a Markdown file, each on a line of its own; what stands between them is written here:

    <!-- figures: bench/results/NAME.json moco_v2/{row}/{column} columns=images_per_s,cpu_ms_per_image -->
    <!-- end figures -->

The pattern is the name of a figure with {row}, and {column} if there are several. `rows=` and `columns=` choose and
order them, and may give headings: columns="images_per_s=images/s,ratio=against Pillow". The results file is one that
`fastssl.bench.record` wrote; the line below the table says under which conditions.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastssl.bench.record import Figure, Record

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("README.md", "docs/*.md", "bench/*.md", "bench/peers/*.md")
_BLOCK = re.compile(
    r"^<!-- figures: (?P<head>[^\n]+) -->\n(?P<body>.*?)^<!-- end figures -->$", re.MULTILINE | re.DOTALL
)
_MARKER = re.compile(r"^<!-- (figures:.*|end figures) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Head:
    """The first comment of a block. rows and columns: name in the pattern -> heading; empty takes all there are."""

    file: str
    pattern: str
    rows: Mapping[str, str]
    columns: Mapping[str, str]


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a block is stale")
    check = parser.parse_args(argv).check
    stale, failed = [], False
    for path in documents(root):
        text = path.read_text()
        try:
            fresh = rewritten(text, root)
        except ValueError as error:
            print(f"error: {path.relative_to(root)}: {error}", file=sys.stderr)
            failed = True
            continue
        if fresh == text:
            continue
        stale.append(str(path.relative_to(root)))
        if not check:
            path.write_text(fresh)
    if failed:
        return 2
    if stale and check:
        print(f"figures are stale in {', '.join(stale)}; run python -m bench.figures", file=sys.stderr)
        return 1
    print(f"rewritten: {', '.join(stale)}" if stale else "all figures are as their files say")
    return 0


def documents(root: Path) -> list[Path]:
    return [path for place in PLACES for path in sorted(root.glob(place))]


def rewritten(text: str, root: Path) -> str:
    """`text` with the body of every block made anew. Raises ValueError for a block or a file that cannot be read."""
    if len(_MARKER.findall(text)) != 2 * len(_BLOCK.findall(text)):
        raise ValueError("a figures comment lacks its partner; write <!-- figures: ... --> and <!-- end figures -->")

    def block(match: re.Match[str]) -> str:
        head = parse(match["head"])
        record = Record.load(root / head.file)
        body = f"{table(head, record)}\n\n{caption(head, record)}"
        return f"<!-- figures: {match['head']} -->\n\n{body}\n\n<!-- end figures -->"

    return _BLOCK.sub(block, text)


def parse(head: str) -> Head:
    """Raises ValueError for words that it does not know."""
    file, pattern, *options = shlex.split(head)
    named: dict[str, dict[str, str]] = {"rows": {}, "columns": {}}
    for option in options:
        key, _, choice = option.partition("=")
        if key not in named:
            raise ValueError(f"{option!r} in a figures comment is neither rows=... nor columns=...")
        for item in choice.split(","):
            name, _, heading = item.partition("=")
            named[key][name] = heading
    if "{row}" not in pattern:
        raise ValueError(f"the pattern {pattern!r} of a figures comment has no {{row}}; write one, as in pack/{{row}}")
    return Head(file, pattern, named["rows"], named["columns"])


def table(head: Head, record: Record) -> str:
    """Markdown. Raises ValueError where no figure has such a name, or a chosen row or column has none."""
    name = re.escape(head.pattern).replace(r"\{row\}", "(?P<row>[^/]+)").replace(r"\{column\}", "(?P<column>[^/]+)")
    found: dict[tuple[str, str], Figure] = {}
    for figure_name, figure in record.figures.items():
        if match := re.fullmatch(name, figure_name):
            place = match.groupdict()
            found[place["row"], place.get("column", "")] = figure
    if not found:
        raise ValueError(f"{head.file} has no figure like {head.pattern}; it has {', '.join(record.figures)}")
    rows = head.rows or dict.fromkeys((row for row, _ in found), "")
    columns = head.columns or dict.fromkeys((column for _, column in found), "")
    for chosen, known in ((rows, {row for row, _ in found}), (columns, {column for _, column in found})):
        if unknown := set(chosen) - known:
            raise ValueError(f"{head.file} has no {', '.join(sorted(unknown))} in {head.pattern}")
    units = {column: {f.unit for (_, c), f in found.items() if c == column} for column in columns}
    lines = [_line(["", *(_heading(column, heading, units[column]) for column, heading in columns.items())])]
    lines.append("|---|" + "---:|" * len(columns))
    for row, heading in rows.items():
        cells = (_cell(found.get((row, column)), len(units[column]) > 1) for column in columns)
        lines.append(_line([heading or _words(row), *cells]))
    return "\n".join(lines)


def caption(head: Head, record: Record) -> str:
    """One line: what, how often, on what, with which versions, and the command and file."""
    machine = record.machine
    rounds = sorted({len(figure.rounds) for figure in record.figures.values()})
    counted = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    hardware = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items() if "/" not in name)
    return (
        f"{record.what}. Median of {counted} round(s), least and greatest in brackets; {hardware},"
        f" {machine.get('gpu') or 'no GPU'}; {record.date}, commit {record.commit}, {versions}. `{record.command}`"
        f" → `{head.file}`."
    )


def _heading(column: str, heading: str, units: Iterable[str]) -> str:
    if heading:
        return heading
    (unit, *others) = sorted(units)
    return _words(column) if others else f"{_words(column)}, {unit}".lstrip(", ")


def _cell(figure: Figure | None, with_unit: bool) -> str:
    if figure is None:
        return "–"
    median, least, greatest = (number(value, figure.unit) for value in (figure.median, *figure.range))
    text = median if least == greatest else f"{median} ({least}–{greatest})"
    return f"{text} {figure.unit}" if with_unit else text


def number(value: float, unit: str) -> str:
    """Three digits that count, whole numbers from 100 on; shares in per cent."""
    if unit.startswith("share"):
        return f"{value:.0%}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
