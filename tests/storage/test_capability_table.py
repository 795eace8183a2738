"""The table of storages in the documentation has the capabilities that each storage reports."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path

import pytest
from support import mounts
from support.servers import KINDS
from support.servers.fixtures import Serve

from checkpointer.ports import Storage, SupportsCapabilities, SupportsSweep
from checkpointer.storage import open_storage
from checkpointer.storage.owner import new_owner

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "storages.md"
MOUNTS: Mapping[str, Callable[[Path], AbstractContextManager[Path]]] = {
    "tmpfs": mounts.tmpfs,
    "ext4": mounts.ext4,
    "XFS": mounts.xfs,
    "exFAT": mounts.exfat,
    "NTFS": mounts.ntfs,
    "bindfs": mounts.no_chmod,
}


def table() -> dict[str, dict[str, str]]:
    """Return the page's table of capabilities: for the name in each row's first cell, its other cells by column."""
    section = PAGE.read_text(encoding="utf-8").partition("\n## What each storage can do\n")[2].partition("\n## ")[0]
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    )
    found = {}
    for name, *cells in rows:
        [key] = re.findall(r"`([^`]+)`", name)
        found[key] = {what: how for what, how in zip(head[1:], cells, strict=True) if how != "-"}
    return found


TABLE = table()


@contextlib.contextmanager
def opened(name: str, serve: Serve, folder: Path) -> Iterator[Storage]:
    """Open a storage by its name in the table."""
    with contextlib.ExitStack() as stack:
        if name in MOUNTS:
            storage = open_storage(stack.enter_context(MOUNTS[name](folder)) / "runs", new_owner())
        elif name == "memory":
            storage = open_storage("memory://capabilities", new_owner())
        else:
            server = serve(name)
            storage = open_storage(server.fresh(), new_owner(), server.storage_options)
        yield storage
        assert isinstance(storage, SupportsSweep)
        storage.close()


@pytest.mark.parametrize("name", TABLE)
def test_the_page_has_the_capabilities_that_the_storage_reports(name: str, serve: Serve, tmp_path: Path) -> None:
    """The page has the same text as ``verbose`` prints."""
    with opened(name, serve, tmp_path) as storage:
        assert isinstance(storage, SupportsSweep)
        storage.prepare()
        assert isinstance(storage, SupportsCapabilities)
        expected = TABLE[name]
        if name == "memory" and version("fsspec") < "2024.12":
            expected = {**expected, "create": TABLE["rclone"]["create"]}
        assert expected == dict(storage.capabilities())


def test_the_page_has_every_tested_storage() -> None:
    """Each server and each filesystem of the tests has a row."""
    assert {*KINDS, *MOUNTS, "memory"} == {*TABLE}
