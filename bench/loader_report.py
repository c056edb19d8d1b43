"""Tables and the figure of what `bench/loader.py` measured, made from its record alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.peers.fidelity import PARAMETERS
from fastssl.bench.record import Figure, Record

if TYPE_CHECKING:
    from bench.loader import Program

COLOURS = {True: "#1f6f8b", False: "#c9a66b"}  # ours, a peer


def tables(kept: Record, programs: Mapping[str, Program], views: Mapping[str, str]) -> str:
    """Markdown: one table of speed for each set of views, one of fidelity, and what each program does differently."""
    shown = [_speed(kept, programs, name, title) for name, title in views.items()]
    return "\n\n".join(part for part in (*shown, _fidelity(kept, programs), _differences(kept, programs)) if part)


def draw(kept: Record, programs: Mapping[str, Program], views: Mapping[str, str], path: Path) -> None:
    """Images per second as bars, a panel for each set of views; a line from the slowest round to the fastest."""
    from matplotlib.figure import Figure as Canvas

    panels = [name for name in views if _measured(kept, programs, name)]
    if not panels:
        return
    heights = [len(_measured(kept, programs, name)) for name in panels]
    canvas = Canvas(figsize=(9, 1.2 + 0.34 * sum(heights) + 0.9 * len(panels)), layout="constrained")
    axes = canvas.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, name in zip(axes, panels):
        bars = sorted(_measured(kept, programs, name), key=lambda n: _figure(kept, name, n, "images_per_s").median)
        speeds = [_figure(kept, name, n, "images_per_s") for n in bars]
        medians = [speed.median for speed in speeds]
        spread = [
            [m - min(s.rounds) for m, s in zip(medians, speeds)],
            [max(s.rounds) - m for m, s in zip(medians, speeds)],
        ]
        colours = ["#999999" if n == "pure_decode" else COLOURS[programs[n].ours] for n in bars]
        axis.barh(
            range(len(bars)), medians, xerr=spread, color=colours, error_kw={"elinewidth": 1.2, "ecolor": "#333333"}
        )
        axis.set_yticks(range(len(bars)), [programs[n].label for n in bars], fontsize=9)
        axis.set_xlim(0, 1.22 * max(max(speed.rounds) for speed in speeds))
        for place, (bar, speed) in enumerate(zip(bars, speeds)):
            ratio = kept.figures.get(f"{name}/{bar}/ratio")
            text = f"{speed.median:.0f}" + (f"  ({ratio.median:.1f}×)" if ratio else "")
            axis.annotate(text, (max(speed.rounds), place), (5, 0), textcoords="offset points", va="center", fontsize=8)
        rounds = max(len(speed.rounds) for speed in speeds)
        axis.set_title(f"{views[name]} ({rounds} round{'s' * (rounds > 1)})", fontsize=10, loc="left")
        axis.margins(y=0.01)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(
        "images/s (× torchvision on Pillow in the same rounds); lines: slowest to fastest round", fontsize=9
    )
    canvas.suptitle(_conditions(kept), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=120)


def _speed(kept: Record, programs: Mapping[str, Program], views: str, title: str) -> str:
    names = sorted(_measured(kept, programs, views), key=lambda n: _figure(kept, views, n, "images_per_s").median)
    if not names:
        return ""
    lines = [
        f"### {title}",
        "",
        _conditions(kept) + "; medians, in brackets slowest and fastest round.",
        "",
        "| program | images/s | CPU ms/image | cores busy | × torchvision | of decode (originals) | first batch |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        ratio, share = (kept.figures.get(f"{views}/{name}/{key}") for key in ("ratio", "share_of_decode"))
        cells = [
            programs[name].label,
            _spread(_figure(kept, views, name, "images_per_s"), ".0f"),
            f"{_figure(kept, views, name, 'cpu_ms_per_image').median:.2f}",
            f"{_cores_busy(kept, views, name):.2f}",
            _spread(ratio, ".2f") if ratio else "",
            f"{share.median:.0%}" if share else "",
            f"{_figure(kept, views, name, 'start_s').median:.1f} s",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _fidelity(kept: Record, programs: Mapping[str, Program]) -> str:
    rows = []
    for name, program in programs.items():
        errors = [kept.figures.get(f"fidelity/{name}/{operation}") for operation in PARAMETERS]
        if any(errors):
            cells = [f"{error.median:.2f}" if error else "" for error in errors]
            rows.append("| " + " | ".join([program.label, *cells]) + " |")
    if not rows:
        return ""
    head = "| program | " + " | ".join(operation.replace("_", " ") for operation in PARAMETERS) + " |"
    about = "Mean absolute difference from Pillow at the same parameters, grey levels (0-255), decoder included."
    return "\n".join(["### Fidelity", "", about, "", head, "|---" * (len(PARAMETERS) + 1) + "|", *rows])


def _differences(kept: Record, programs: Mapping[str, Program]) -> str:
    told = kept.settings.get("peers", {})
    rows = [f"| {programs[n].label} | {told[n]['output']} | {told[n]['differs']} |" for n in programs if n in told]
    head = ["### What each does differently", "", "| program | a batch is | differs |", "|---|---|---|"]
    return "\n".join([*head, *rows]) if rows else ""


def _conditions(kept: Record) -> str:
    s, m = kept.settings, kept.machine
    return (
        f"{s['images']} photographs of {s['data']} (median {s['median_size_px']}, {s['kilobytes_per_image']} kB), "
        f"{s['workers']} threads or workers, batch {s['batch']}, {s['seconds']:g} s a round\n"
        f"{m['cpu']}, {m['cores']} cores, {kept.date}, commit {kept.commit}"
    )


def _measured(kept: Record, programs: Mapping[str, Program], views: str) -> list[str]:
    return [name for name in programs if f"{views}/{name}/images_per_s" in kept.figures]


def _figure(kept: Record, views: str, name: str, key: str) -> Figure:
    return kept.figures[f"{views}/{name}/{key}"]


def _cores_busy(kept: Record, views: str, name: str) -> float:
    """Fewer than there are workers: the program waits for something, or the machine was not idle."""
    speed, cpu_ms = (_figure(kept, views, name, key).rounds for key in ("images_per_s", "cpu_ms_per_image"))
    return median(s * ms / 1000 for s, ms in zip(speed, cpu_ms))


def _spread(figure: Figure, form: str) -> str:
    return f"{figure.median:{form}} ({min(figure.rounds):{form}}–{max(figure.rounds):{form}})"
