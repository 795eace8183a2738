"""The crash law on a real S3 server: stop at every n-th storage operation; nothing acknowledged is lost."""

from __future__ import annotations

import pytest
from support.s3_tools import LargeFormat, objects, unfinished
from support.sampling import DAYS, FIRST
from support.servers.fixtures import Serve
from support.servers.server import Server
from test_crash_law import LARGEST, POLICIES, When, check_survivor, run_until_crash

from checkpointer import EverySteps, KeepLast, Policy
from checkpointer.ports import Format, Storage
from checkpointer.storage import open_storage
from checkpointer.storage.owner import new_owner
from checkpointer.testing import CrashingStorage, die

pytestmark = pytest.mark.slow

STRIDE = 13
"""Each policy begins at an operation of its own, so that together they hit every kind."""


def crash_and_recover(
    server: Server,
    policy: Policy,
    largest: int,
    *,
    at: int,
    when: When,
    format: Format | None = None,
    losses: tuple[float, ...] = (0.9, 0.4, 0.6, 0.7, 0.3),
) -> int:
    """Die at an operation, check the law, and return how many operations were done."""
    url, owner, clue = server.fresh(), new_owner(), f"died {when} operation {at}"

    def reopen(owner: str) -> Storage:
        return open_storage(url, owner, server.storage_options)

    inner = reopen(owner)
    inner.write("foreign.txt", b"mine")
    storage = CrashingStorage(inner, at=at, when=when)
    acknowledged = run_until_crash(storage, policy, format=format, losses=losses)
    die(owner)
    check_survivor(reopen(new_owner()), policy, acknowledged, largest, clue, format=format)
    assert [] == unfinished(server, url), clue
    assert not [path for path in objects(server, url) if "staging" in path], clue
    return storage.operations


@pytest.mark.parametrize("when", ["before", "halfway", "after"])
@pytest.mark.parametrize("name", POLICIES)
def test_dying_at_any_operation_on_s3_loses_nothing(serve: Serve, name: str, when: When) -> None:
    """No unfinished upload and no staged object stays either."""
    server = serve("s3")
    at = 1 + [*POLICIES].index(name) + ["before", "halfway", "after"].index(when) * 3 + FIRST % DAYS * STRIDE
    while crash_and_recover(server, POLICIES[name], LARGEST[name], at=at, when=when) == at:
        at += STRIDE * DAYS


@pytest.mark.parametrize("when", ["before", "halfway", "after"])
@pytest.mark.parametrize("at", [36, 37, 44], ids=["write", "finish", "publish"])
def test_dying_within_a_multipart_upload_loses_nothing(serve: Serve, at: int, when: When) -> None:
    """Uncompleted parts of the second save are gone after the next start."""
    policy = Policy(EverySteps(1), [KeepLast(1)], last=None)
    crash_and_recover(serve("s3"), policy, 1, at=at, when=when, format=LargeFormat(), losses=(0.9, 0.4))
