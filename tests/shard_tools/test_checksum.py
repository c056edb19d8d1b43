"""The crc32 that indexes hold is zlib's, whichever library takes it."""

from __future__ import annotations

import importlib
import sys
import zlib

import numpy as np
import pytest

from shard_tools import checksum


@pytest.mark.parametrize("size", [0, 1, 7, 8, 63, 64, 65, 255, 4096, 110_001])
def test_it_is_zlibs(size: int) -> None:
    content = np.random.default_rng(size).bytes(size + 3)
    for offset in range(4):  # vector code has its own road for what is not aligned
        view = memoryview(content)[offset : offset + size]
        assert checksum.crc32(view) == zlib.crc32(view)


def test_it_is_isals_where_installed_and_else_zlibs(monkeypatch: pytest.MonkeyPatch) -> None:
    isal_zlib = pytest.importorskip("isal.isal_zlib")
    assert checksum.crc32 is isal_zlib.crc32
    monkeypatch.setitem(sys.modules, "isal", None)
    monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    try:
        assert importlib.reload(checksum).crc32 is zlib.crc32
    finally:
        monkeypatch.undo()
        importlib.reload(checksum)
