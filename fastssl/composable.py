"""What may be composed: settings as values, and none of what Hydra and YAML could do beside.

Hydra's overrides can load YAML from any folder (`recipe=../../x`, hydra.searchpath=[file://...]), import any package
(hydra.searchpath=[pkg://...]) and name what a later `instantiate` would call; OmegaConf's resolvers read the
environment; YAML's aliases make 10^9 values of 236 bytes. None of it is needed for a table of values, so all of it is
refused: in an override, in every file of configs/ (a recipe may come from anybody), and in the tree that they make.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MAX_OVERRIDES = 1000
MAX_OVERRIDE_CHARS = 2**14  # a list of a thousand ids has 6,000
MAX_FILE_BYTES = 2**16  # the largest of ours has 5 kB
MAX_DEPTH = 32  # of brackets in brackets; ours have 4
MAX_VALUES = 10**5  # of the tree, when its references are replaced by what they refer to

_CALLS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")  # the keys of Hydra's instantiate
_KEY = re.compile(r"[~+]*([A-Za-z_]\w*)((?:\.\w+)*)", re.ASCII)
_OPTION = re.compile(r"\w[\w-]*", re.ASCII)
_REFERENCE = re.compile(r"\$\{(\w+(?:\.\w+)*)\}", re.ASCII)  # to another setting, by its full name
_OF_HYDRA = re.compile(r"(?m)^[^#\n]*\bhydra\b")
_ABOVE = re.compile(r"(?m)^[^#\n]*\.\./")
_MARKS = re.compile(r"[&*!]")
_STEERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def check_overrides(overrides: Sequence[str], folder: Path) -> None:
    """Raise ValueError, a sentence, for an override that is no setting, or names no file in `folder`'s groups."""
    if len(overrides) > MAX_OVERRIDES:
        raise ValueError(f"{len(overrides)} settings are given, more than {MAX_OVERRIDES}; put them into a recipe")
    for override in overrides:
        _check_override(override, folder)


def _check_override(override: str, folder: Path) -> None:
    shown = repr(override if len(override) <= 100 else override[:97] + "...")
    if len(override) > MAX_OVERRIDE_CHARS:
        raise ValueError(f"override {shown} has more than {MAX_OVERRIDE_CHARS} characters; put it into a recipe")
    if "${" in override or any(word in override for word in _CALLS):
        raise ValueError(
            f"override {shown} uses _target_ or ${{...}}, which fastssl does not accept; write the plain value"
        )
    if not override.isprintable():
        raise ValueError(f"override {shown} holds control characters; write it without them")
    if _depth(override) > MAX_DEPTH:
        raise ValueError(f"override {shown} has more than {MAX_DEPTH} brackets in each other; write the plain value")
    key, equals, value = override.partition("=")
    match = _KEY.fullmatch(key)
    if not equals and not override.startswith("~"):
        raise ValueError(f"override {shown} is not of the form key=value")
    if match is None:
        raise ValueError(f"override {shown} does not begin with the name of a setting; write it as key=value")
    group, rest = match.groups()
    if group in ("hydra", "defaults"):
        raise ValueError(f"override {shown} is about Hydra itself, which fastssl keeps to itself; leave it out")
    if not rest and equals and (folder / group).is_dir() and not _OPTION.fullmatch(value.strip("'\"")):
        options = ", ".join(sorted(path.stem for path in (folder / group).glob("*.yaml")))
        raise ValueError(f"override {shown} must name one file of configs/{group}; choose one of {options}")


def check_files(folder: Path) -> None:
    """Raise ValueError, naming the file, for YAML below `folder` that holds more than values and plain references."""
    for path in sorted((*folder.glob("*.yaml"), *folder.glob("*/*.yaml"))):
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        for fault in _faults(content):
            raise ValueError(f"{path} {fault}; take it out, or remove the file")


def _faults(content: bytes) -> Iterator[str]:
    if len(content) > MAX_FILE_BYTES:
        yield f"has more than {MAX_FILE_BYTES} bytes"
        return
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        yield "is not text in UTF-8"
        return
    if _STEERS.search(text):
        yield "holds control characters"
    if _depth(text) > MAX_DEPTH:
        yield f"has more than {MAX_DEPTH} brackets in each other"
        return
    if word := next((word for word in _CALLS if word in text), None):
        yield f"uses {word}, which fastssl does not accept"
    if "${" in _REFERENCE.sub("", text):
        yield "uses ${...} for something else than the name of a setting"
    if _OF_HYDRA.search(text) or _ABOVE.search(text):
        yield "sets Hydra itself, or leads out of configs/"
    if _MARKS.search(text):
        yield from _marked(text)


def _marked(text: str) -> Iterator[str]:
    """Aliases, anchors and tags; of text in quotes and comments, which may hold their marks, nothing is said."""
    import yaml

    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                yield "uses an anchor or an alias of YAML"
            elif getattr(event, "tag", None) is not None:
                yield f"uses the tag {event.tag!r} of YAML"
    except yaml.YAMLError:
        return  # Hydra says what is wrong with it, if it is asked for


def _depth(text: str) -> int:
    """How many brackets are open at most; brackets in quotes count, too."""
    depth = most = 0
    for char in re.findall(r"[\[\]{}()]", text):
        depth += 1 if char in "[{(" else -1
        most = max(most, depth)
    return most


def check_tree(tree: Any) -> None:
    """Raise ValueError for keys that call, resolvers, and references that refer to themselves or grow beyond bounds.

    tree    with its references as they are written
    """
    sizes: dict[str, int | None] = {}

    def size(node: Any, above: str) -> int:
        if isinstance(node, Mapping):
            for key in node:
                if key in _CALLS:
                    raise ValueError(f"{above}{key} is set, which fastssl does not accept; write plain values")
            return 1 + sum(size(value, f"{above}{key}.") for key, value in node.items())
        if isinstance(node, list):
            return 1 + sum(size(value, above) for value in node)
        if not isinstance(node, str) or "${" not in node:
            return 1
        if "${" in _REFERENCE.sub("", node):
            raise ValueError(f"{above[:-1]} is {node[:80]!r}, but only the name of a setting may stand in ${{...}}")
        return 1 + sum(target(name) for name in _REFERENCE.findall(node))

    def target(name: str) -> int:
        if name in sizes:
            if (known := sizes[name]) is None:
                raise ValueError(f"{name} refers to itself; write the plain value")
            return known
        sizes[name] = None
        found = tree
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        sizes[name] = result = size(found, f"{name}.")
        return result

    if size(tree, "") > MAX_VALUES:
        raise ValueError(f"the settings are more than {MAX_VALUES} values, counting what they refer to; write fewer")
