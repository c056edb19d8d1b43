"""A count of what the images of a split are, taken from their content and never from lists of known file names."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shard_tools.images import FORMAT_NAMES, Facts
from shard_tools.manifest import ShardError

MAX_ODDITIES = 1000  # named in the manifest; all of them are counted
_USUAL_MODES = ("RGB", "L")
_EXTENSIONS_OF = {"jpg": ("jpg", "jpeg", "jpe", "jfif"), "png": ("png",), "webp": ("webp",), "bmp": ("bmp", "dib")}


@dataclass
class Census:
    """Counts so far. `bad` holds one entry an unusable file: its name, the reason, and what was done with it.

    bands   that every image has or, of images yet to come, must have: 0 for photographs, None as long as it is open
    """

    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    exif_orientation: Counter[str] = field(default_factory=Counter)
    corrupt_exif: int = 0
    reencoded: int = 0
    num_oddities: int = 0
    oddities: list[list[str]] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)
    bands: int | None = None

    def add(self, name: str, facts: Facts, reencoded: bool) -> None:
        """Count one good image: `facts` of the source's bytes, before any resize.

        Raises ShardError if it has other bands than those before it.
        """
        self._set_bands(facts.bands, f"{printable(readable(name))} has")
        self.formats[FORMAT_NAMES[facts.extension]] += 1
        self.modes[facts.mode] += 1
        self.corrupt_exif += facts.corrupt_exif
        self.reencoded += reencoded
        if facts.orientation is not None:
            self.exif_orientation[str(facts.orientation)] += 1
        for oddity in _oddities(name, facts):
            self._add_oddity([readable(name), oddity])

    def add_bad(self, name: str, reason: str, action: str, row: int | None = None) -> None:
        """Note one bad file. `action` is quarantined or kept; a kept one has its row."""
        entry: dict[str, Any] = {"name": name, "reason": reason, "action": action}
        self.bad.append(entry if row is None else {**entry, "row": row})

    def merge(self, other: Census) -> None:
        """Add the counts of images that came after these; raises ShardError if they have other bands."""
        if other.bands is not None:
            self._set_bands(other.bands, "some images have")
        self.formats += other.formats
        self.modes += other.modes
        self.exif_orientation += other.exif_orientation
        self.corrupt_exif += other.corrupt_exif
        self.reencoded += other.reencoded
        self.bad += other.bad
        for oddity in other.oddities:
            self._add_oddity(oddity)
        self.num_oddities += other.num_oddities - len(other.oddities)

    def to_json(self) -> dict[str, Any]:
        """The counts; "bands" is there for stamps only."""
        bands = {"bands": self.bands} if self.bands else {}
        return {
            **bands,
            "formats": dict(sorted(self.formats.items())),
            "modes": dict(sorted(self.modes.items())),
            "exif_orientation": dict(sorted(self.exif_orientation.items())),
            "corrupt_exif": self.corrupt_exif,
            "reencoded": self.reencoded,
            "num_oddities": self.num_oddities,
            "oddities": self.oddities,
            "bad": self.bad,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Census:
        counters = {key: Counter(document[key]) for key in ("formats", "modes", "exif_orientation")}
        bands = document.get("bands", 0 if document["formats"] else None)
        return cls(**{**document, **counters, "bands": bands})

    def _set_bands(self, bands: int, what: str) -> None:
        if self.bands not in (None, bands):
            raise ShardError(f"{what} {_kind(bands)}, but those before {_kind(self.bands)}; pack them apart")
        self.bands = bands

    def _add_oddity(self, oddity: list[str]) -> None:
        self.num_oddities += 1
        if len(self.oddities) < MAX_ODDITIES:
            self.oddities.append(oddity)


def size_quantiles(index: np.ndarray) -> dict[str, dict[str, int]]:
    """Smallest, 5 %, median, 95 % and largest width, height (px) and stored size (bytes) of an index."""
    quantiles = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
    return {
        key: {name: int(np.sort(index[key])[int(q * (len(index) - 1))]) for name, q in quantiles.items()}
        for key in ("width", "height", "size")
    }


def table(census: dict[str, Any]) -> list[str]:
    """The lines in which `pack`, `index` and `info` print a manifest's census."""
    lines = [
        f"  formats    {_counts(census.get('formats', {}))}",
        f"  modes      {_counts(census.get('modes', {}))}",
    ]
    if not census.get("bands"):
        lines.append(f"  EXIF       {_exif(census)}")
    for key, unit in (("width", "px"), ("height", "px"), ("size", "bytes")):
        if quantiles := census.get("quantiles", {}).get(key):
            lines.append(f"  {key:10s} {', '.join(f'{name} {value}' for name, value in quantiles.items())} {unit}")
    if census.get("reencoded"):
        lines.append(f"  re-encoded {census['reencoded']}")
    if census.get("num_oddities"):
        examples = [f"{printable(name)}: {what}" for name, what in census["oddities"][:5]]
        more = ["..."] if census["num_oddities"] > 5 else []
        lines.append(f"  oddities   {census['num_oddities']} ({'; '.join(examples + more)})")
    bad = census.get("bad", [])
    lines.append(f"  bad        {len(bad)}")
    lines += [f"             {printable(e['name'])}: {e['reason']} ({e['action']})" for e in bad[:10]]
    return [*lines, "             ..."] if len(bad) > 10 else lines


def readable(name: str) -> str:
    """A file name as valid Unicode: bytes that are none are written \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def printable(name: str) -> str:
    """A file name without control characters, which could steer a terminal or break a line."""
    return name if name.isprintable() else repr(name)


def counted(number: int, noun: str) -> str:
    """`1 shard`, `2 shards`"""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _oddities(name: str, facts: Facts) -> list[str]:
    found = []
    if facts.mode not in _USUAL_MODES and not facts.bands:
        found.append(f"mode {facts.mode}")
    named = name.rpartition(".")[2].lower()
    claimed = next((extension for extension, names in _EXTENSIONS_OF.items() if named in names), facts.extension)
    if claimed != facts.extension:
        found.append(f"{FORMAT_NAMES[facts.extension]} named .{named}")
    if facts.orientation not in (None, 1):
        found.append(f"EXIF orientation {facts.orientation}")
    if facts.corrupt_exif:
        found.append("corrupt EXIF")
    return found


def _kind(bands: int | None) -> str:
    return counted(bands, "band") if bands else "none (photographs)"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def _exif(census: dict[str, Any]) -> str:
    tags = census.get("exif_orientation", {})
    corrupt = census.get("corrupt_exif", 0)
    text = ", ".join(f"orientation {tag}: {count}" for tag, count in tags.items()) or "no orientation tags"
    return f"{text}, corrupt {corrupt}" if corrupt else text
