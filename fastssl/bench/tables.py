"""Results as tables for a terminal of 80 columns. All numbers come from a Record, so a file shows as the run did."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastssl.bench.compare import FASTER, SLOWER, Comparison
from fastssl.bench.record import Figure, Record
from fastssl.bench.stages import Stage, stages
from shard_tools.printing import sentence

_STYLE = {FASTER: "green", SLOWER: "bold red"}
_MAX_DIFFERENCES = 8  # lines above a comparison


def show(record: Record, console: Console) -> None:
    """Every table that the figures of `record` fill, and its sentence."""
    rounds = max(len(figure.rounds) for figure in record.figures.values())
    console.print(f"{record.what}; median of {rounds} round(s), least and greatest in brackets", highlight=False)
    for table in (_rates(record), _stages(record), _pack(record), _candidates(record)):
        if table.row_count:
            console.print(table)
    if record.note:
        console.print(record.note, highlight=False)


def show_comparison(
    comparisons: Sequence[Comparison], differing: Sequence[str], against: str, console: Console
) -> None:
    """Medians, ratio, spread and verdict, below what else differs between the two."""
    console.print(f"\nagainst {sentence(against)}", highlight=False, markup=False)
    for line in differing[:_MAX_DIFFERENCES]:
        console.print(f"  {sentence(line)}", highlight=False, markup=False)
    if len(differing) > _MAX_DIFFERENCES:
        console.print(f"  and {len(differing) - _MAX_DIFFERENCES} more settings", highlight=False)
    table = _table("", "old", "new", "ratio", "spread", "verdict")
    for one in comparisons:
        old, new = (_number(figure.median, figure.unit) for figure in (one.old, one.new))
        style = _STYLE.get(one.verdict, "")
        table.add_row(
            escape(sentence(one.name)), old, new, f"{one.ratio:.2f}", f"±{one.spread:.0%}", one.verdict, style=style
        )
    console.print(table)


def spread(figure: Figure) -> str:
    """`412 (398-420)`: median, least and greatest; one number where there is one round or no spread to show."""
    texts = [_number(value, figure.unit) for value in (figure.median, *figure.range)]
    return texts[0] if len(set(texts)) == 1 else f"{texts[0]} ({texts[1]}-{texts[2]})"


def _number(value: float, unit: str) -> str:
    if unit.startswith("share"):
        return f"{value:.0%}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 or unit != "s" else 3
    return f"{value:.{digits}f}"


def _rates(record: Record) -> Table:
    table = _table("", "images/s", "views/s", "step s", "p95 s", "CPU ms/image", "waiting")
    for part in ("loader", "step", "train"):
        own = _of(record, part)
        if "images_per_s" in own:
            rest = ("views_per_s", "step_s_median", "step_s_p95", "cpu_ms_per_image", "data_wait")
            medians = [_number(own[name].median, own[name].unit) for name in rest]
            if part == "loader":
                medians[-1] = ""  # it does nothing but wait
            table.add_row(part, spread(own["images_per_s"]), *medians)
    return table


def _stages(record: Record) -> Table:
    """What each stage adds, those that did not show in every round as a bound; what the step pays, below the sum."""
    ladder = stages(record.figures)
    table = _table("stage", "CPU ms/image", "share", "wall ms/image")
    if not ladder:
        return table
    *own, write_out = ladder
    loader = _of(record, f"rungs/{own[-1].name}")
    total_ms = loader["cpu_ms_per_image"]
    for stage in own:
        _add_stage(table, stage, f"{stage.cpu_ms.median / total_ms.median:.0%}")
    table.add_section()
    table.add_row("loader", spread(total_ms), "100%", spread(loader["wall_ms_per_image"]))
    _add_stage(table, write_out, "")
    return table


def _add_stage(table: Table, stage: Stage, share: str) -> None:
    if stage.resolved:
        table.add_row(stage.name, spread(stage.cpu_ms), share, _number(max(0.0, stage.wall_ms.median), "ms"))
    else:
        table.add_row(stage.name, f"{stage.text}, the spread", "", "", style="dim")


def _pack(record: Record) -> Table:
    table = _table("workers", "pack images/s", "MB/s", "decode images/s", "of decode", "per worker")
    for workers in _names(record, "pack/"):
        own, decode = _of(record, f"pack/{workers}"), _of(record, f"decode/{workers}")
        if "mb_per_s" in own:
            shares = (_number(own[name].median, "share") for name in ("share_of_decode", "efficiency"))
            rate, decoded = spread(own["images_per_s"]), spread(decode["images_per_s"])
            table.add_row(workers.split("_")[0], rate, _number(own["mb_per_s"].median, "MB/s"), decoded, *shares)
    return table


def _candidates(record: Record) -> Table:
    table = _table("backend", "threads", "prefetch", "images/s")
    for name, figure in record.figures.items():
        if name.startswith("tune/"):
            _, backend, threads, prefetch, _ = name.split("/")
            table.add_row(backend, threads.removeprefix("threads_"), prefetch.removeprefix("prefetch_"), spread(figure))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if i == 0 or column == "verdict" else "right"
        table.add_column(column, justify=justify, no_wrap=i > 0, overflow="fold")
    return table


def _of(record: Record, prefix: str) -> dict[str, Figure]:
    """The figures right under `prefix`, by their last name."""
    return {name.rpartition("/")[2]: f for name, f in record.figures.items() if name.rpartition("/")[0] == prefix}


def _names(record: Record, prefix: str) -> Iterable[str]:
    """What follows `prefix`, up to the next slash, in the order of the figures."""
    return dict.fromkeys(name[len(prefix) :].split("/")[0] for name in record.figures if name.startswith(prefix))
