"""Two writers replace one small file at once, on a server whose renames do not replace."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from support.faulty import FaultyFileSystem

from checkpointer.storage import open_storage
from checkpointer.storage.owner import new_owner
from checkpointer.storage.remote import FsspecStorage
from checkpointer.storage.retry import Retry


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    FaultyFileSystem.refuses = True
    yield f"faulty://{tmp_path}"
    FaultyFileSystem.refuses = False
    FaultyFileSystem.hooks.clear()


def prepared(url: str) -> FsspecStorage:
    storage = open_storage(url, new_owner(), {"retry": Retry(deadline_s=10, first_wait_s=0.001)})
    assert isinstance(storage, FsspecStorage)
    storage.prepare()
    return storage


@attrs.define
class Writers:
    """Two threads that replace the file ``a``. Each makes a request only when a test lets it."""

    url: str
    seen: list[bytes | None] = attrs.field(factory=list)
    errors: list[Exception] = attrs.field(factory=list)
    _turns: dict[str, threading.Semaphore] = attrs.field(factory=dict)
    _stopped: threading.Semaphore = attrs.field(factory=lambda: threading.Semaphore(0))
    _threads: dict[str, threading.Thread] = attrs.field(factory=dict)

    def start(self, *names: str) -> None:
        """Stop each writer before its first request."""
        storages = {name: prepared(self.url) for name in names}
        FaultyFileSystem.hooks["before"] = self._before
        for name, storage in storages.items():
            self._turns[name] = threading.Semaphore(0)
            self._threads[name] = threading.Thread(target=self._write, args=(storage, name), name=name, daemon=True)
            self._threads[name].start()
            self._stopped.acquire()

    def _write(self, storage: FsspecStorage, name: str) -> None:
        try:
            storage.write("a", name.encode())
        except Exception as error:
            self.errors.append(error)
        self._turns.pop(name)
        self._stopped.release()

    def _before(self, method: str, path: str) -> None:
        turn = self._turns.get(threading.current_thread().name)
        if turn is not None:
            self._stopped.release()
            turn.acquire()

    def run(self, name: str, num_requests: int = 1000) -> None:
        """Let a writer make at most so many requests, and read the file after each."""
        for _ in range(num_requests):
            if name not in self._turns:
                return
            self._turns[name].release()
            self._stopped.acquire()
            self.seen.append(self.read())

    def read(self) -> bytes | None:
        """Return what a reader finds."""
        with contextlib.suppress(FileNotFoundError), FsspecStorage(self.url).open("a") as stream:
            return stream.read()
        return None

    def finish(self) -> None:
        """Let every writer end."""
        for name, thread in self._threads.items():
            self.run(name)
            thread.join()


@pytest.mark.parametrize("existing", [None, b"old"], ids=["new", "existing"])
@pytest.mark.parametrize("stop", range(12))
def test_two_writers_of_one_file_lose_no_content(url: str, existing: bytes | None, stop: int) -> None:
    """The second writes everything while the first is stopped. A reader finds a content after each request."""
    if existing is not None:
        prepared(url).write("a", existing)
    writers = Writers(url)
    writers.start("one", "two")
    writers.run("one", stop)
    writers.run("two")
    num_before = len(writers.seen)
    writers.finish()

    assert [] == writers.errors
    assert {b"one", b"two"} >= {*writers.seen[num_before - 1 :], writers.read()}
    assert existing is None or None not in writers.seen
    assert ["a"] == list(FsspecStorage(url).list())


@pytest.mark.parametrize("stop", range(4, 12))
@pytest.mark.parametrize("other_stop", range(1, 12))
def test_two_writers_that_take_turns_lose_no_file(url: str, stop: int, other_stop: int) -> None:
    """Each is stopped once, between any two requests. The file of one of them has the name in the end."""
    prepared(url).write("a", b"old")
    writers = Writers(url)
    writers.start("one", "two")
    writers.run("one", stop)
    writers.run("two", other_stop)
    writers.finish()

    assert [] == writers.errors
    assert writers.read() in (b"one", b"two")
    assert ["a"] == list(FsspecStorage(url).list())
