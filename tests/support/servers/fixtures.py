"""The session fixture that starts servers, and skips tests if a server is not installed."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeAlias

import pytest

from support.servers import KINDS
from support.servers.launching import shared
from support.servers.server import Server

Serve: TypeAlias = Callable[[str], Server]


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Return a function that returns the server of a name, started at its first use. If it is missing, see `lacks`."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # The workers' folders have one parent in common.
        folder = folder.parent
    failures: dict[str, Exception] = {}
    with contextlib.ExitStack() as stack:

        @functools.cache
        def give(name: str) -> Server:
            kind = KINDS[name]
            reason = kind.missing()
            if reason is not None:
                lacks(name, reason)
            if name in failures:
                raise failures[name]
            try:
                kind.prepare_client()
                return stack.enter_context(shared(kind, folder / "servers" / name))
            except Exception as error:
                # The next test gets this error at once.
                failures[name] = error
                raise

        yield give


def lacks(part: str, reason: str) -> NoReturn:
    """Skip the test because a part is missing; fail it if ``CHECKPOINTER_REQUIRE`` names the part.

    Example: with ``CHECKPOINTER_REQUIRE=s3,sftp`` a test run fails if one of these servers is not installed.
    """
    if part in os.environ.get("CHECKPOINTER_REQUIRE", "").replace(",", " ").split():
        pytest.fail(f"{part} is in CHECKPOINTER_REQUIRE, but {reason}", pytrace=False)
    pytest.skip(f"{part}: {reason}")
