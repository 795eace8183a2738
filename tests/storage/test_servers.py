"""Servers for tests start once, are shared, and end afterwards, even if their users were killed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from support.servers.fixtures import lacks
from support.servers.launching import launch, running, shared
from support.servers.processes import free_ports, has_ended, missing, spawn
from support.servers.server import Server

USER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from support.servers.launching import shared
from test_servers import Pages
with shared(Pages, Path(sys.argv[1])) as server:
    print(server.port, *server.pids, flush=True)
    sys.stdin.read()
"""


@attrs.frozen
class Pages(Server):
    """The smallest server there is."""

    name = "pages"

    @classmethod
    def missing(cls) -> str | None:
        return None

    @classmethod
    def start(cls, folder: Path) -> Server:
        [port] = free_ports(1)
        command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(folder), str(port)]
        return cls(folder, port, (spawn(command, folder / "pages.log"),))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage_options(self) -> Mapping[str, Any]:
        return {}


class Broken(Pages):
    @classmethod
    def start(cls, folder: Path) -> Server:
        return cls(folder, 1, (spawn([sys.executable, "-c", "raise SystemExit('no disk')"], folder / "broken.log"),))


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while not has_ended(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


def test_a_server_is_shared_and_ends_with_its_last_user(tmp_path: Path) -> None:
    """The second user does not start another server, and may end before the first."""
    with shared(Pages, tmp_path) as first:
        with shared(Pages, tmp_path) as second:
            assert first == second
        assert answers(first.port)
    wait_until_gone(first.pids[0])

    with shared(Pages, tmp_path) as third:
        assert first.pids != third.pids
        assert answers(third.port)


@pytest.mark.slow
def test_a_server_ends_after_all_its_users_were_killed(tmp_path: Path) -> None:
    """It runs while one of two users is alive, and ends after the second."""
    command = [sys.executable, "-c", USER, str(tmp_path), str(Path(__file__).parent)]
    users = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        lines = [user.stdout.readline() for user in users if user.stdout is not None]
        assert lines[0] == lines[1]
        port, pid = map(int, lines[0].split())
        users[0].kill()
        users[0].wait()
        assert answers(port)
    finally:
        for user in users:
            user.kill()
            user.communicate()
    wait_until_gone(pid)


def test_a_test_may_kill_its_server(tmp_path: Path) -> None:
    """A test may also use it through another port."""
    with running(Pages, tmp_path) as server:
        assert "http://127.0.0.1:1234" == attrs.evolve(server, port=1234).url
        os.kill(server.pids[0], signal.SIGKILL)
        wait_until_gone(server.pids[0])
        assert not answers(server.port)


def test_fresh_urls_differ(tmp_path: Path) -> None:
    """They are below the server's URL."""
    server = Pages(tmp_path, 80, ())
    one, other = server.fresh(), server.fresh()

    assert one != other
    assert one.startswith("http://127.0.0.1:80/")


def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    """The test fails, because the server is installed."""
    with pytest.raises(RuntimeError, match=re.compile("the pages server ended.*no disk", re.DOTALL)):
        launch(Broken, tmp_path)


def test_what_is_not_installed_is_named() -> None:
    """The message names programs and modules, and the command that installs them."""
    reason = missing(["sh", "no-such-program"], ["json", "no_such_module"])

    assert "not installed: no-such-program, Python module no_such_module; run: make servers" == reason
    assert missing(["sh"], ["json"]) is None


@pytest.mark.parametrize(
    ("required", "outcome"), [("", "skip"), ("s3", "skip"), ("s3,smb", "fail"), ("s3 smb", "fail")]
)
def test_a_missing_part_skips_unless_it_is_required(
    monkeypatch: pytest.MonkeyPatch, required: str, outcome: str
) -> None:
    """A required server must not be skipped."""
    monkeypatch.setenv("CHECKPOINTER_REQUIRE", required)
    expected = {"skip": pytest.skip.Exception, "fail": pytest.fail.Exception}[outcome]

    with pytest.raises(expected, match=r"smb.*not there"):
        lacks("smb", "it is not there")
