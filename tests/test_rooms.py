"""Who may import whom, and what none of the packages may do: the table of the design, held to the code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"fastssl": {"fastssl", "pipelines", "shard_tools"}, "pipelines": {"pipelines", "shard_tools"}}
ROOMS["shard_tools"] = {"shard_tools"}
OURS = {"fastssl", "pipelines", "shard_tools", "tests", "bench", "configs"}
HEAVY = {"torch", "torchvision", "timm", "nvidia", "hydra", "omegaconf"}  # shard_tools runs without them


def modules(*rooms: str) -> list[Path]:
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text(), str(path))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_itself_and_those_below(room):
    assert modules(room)
    for path in modules(room):
        roots = {name.split(".")[0] for name in imports(parsed(path))}
        assert roots & OURS <= ROOMS[room], path


def test_shard_tools_runs_without_torch_or_dali():
    for path in modules("shard_tools"):
        assert not {name.split(".")[0] for name in imports(parsed(path))} & HEAVY, path


def test_pipelines_knows_only_what_lies_on_disk_of_shard_tools():
    for path in modules("pipelines"):
        from_below = {name for name in imports(parsed(path)) if name.split(".")[0] == "shard_tools"}
        on_disk = {f"shard_tools.{name}" for name in ("manifest", "stamps", "headers", "checksum", "cache", "remote")}
        assert from_below <= on_disk, path


def test_only_the_configuration_knows_hydra():
    for path in modules("fastssl", "pipelines"):
        if {name.split(".")[0] for name in imports(parsed(path))} & {"hydra", "omegaconf"}:
            assert path.relative_to(ROOT).as_posix() == "fastssl/config.py"


def test_no_module_is_a_drawer_for_everything():
    names = {path.stem for path in modules(*ROOMS)}
    assert not names & {"utils", "util", "helpers", "common", "misc", "manager", "process"}
