"""One fork server for all fault tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.lives import ForkServer


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    with ForkServer(tmp_path_factory.mktemp("lives")) as server:
        yield server
