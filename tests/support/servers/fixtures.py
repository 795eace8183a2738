"""The session fixture that hands out servers, and what happens where one is not installed."""

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
    """Return a function that gives the server of a name, started when it is first asked for; else skip, see `lacks`."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Workers have folders of their own in one that they share.
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
                # Not tried, and waited for, again by each test.
                failures[name] = error
                raise

        yield give


def lacks(part: str, reason: str) -> NoReturn:
    """Skip the test for want of a part; fail it where the environment's ``CHECKPOINTER_REQUIRE`` names the part.

    Example: ``CHECKPOINTER_REQUIRE=s3,sftp`` makes sure that a run which is meant to use these servers does.
    """
    if part in os.environ.get("CHECKPOINTER_REQUIRE", "").replace(",", " ").split():
        pytest.fail(f"{part} is in CHECKPOINTER_REQUIRE, but {reason}", pytrace=False)
    pytest.skip(f"{part}: {reason}")
