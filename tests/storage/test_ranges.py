"""A file is read in parallel into buffers of the caller, although connections are cut."""

from __future__ import annotations

import random
from collections.abc import Iterator

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.servers import ChaosProxy, Server
from support.servers.chaosproxy import Answer, Cut, Halt, Plan
from support.servers.fixtures import Serve

from checkpointer.ports import SupportsPieces
from checkpointer.storage import open_storage
from checkpointer.storage.ranges import parts_of
from checkpointer.storage.retry import Retry
from checkpointer.storage.s3 import S3Storage

MIB = 1 << 20
PATIENT = Retry(deadline_s=60.0, first_wait_s=0.01)
DATA = random.Random(1).randbytes(40 * MIB)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40))), st.integers(1, 16))
def test_parts_cover_the_pieces_and_only_them(shape: list[tuple[int, int]], size: int) -> None:
    """A part has at most ``size`` adjacent bytes. When it is filled, the pieces that it counts are filled."""
    pieces, offset = [], 0
    for gap, length in shape:
        pieces.append((offset + gap, bytearray(length)))
        offset += gap + length
    file = random.Random(0).randbytes(offset)
    for part in parts_of([(start, memoryview(buffer)) for start, buffer in pieces], size):
        assert part.end - part.position <= size
        part.write(file[part.position : part.end])
        for start, buffer in pieces[: part.num_filled]:
            assert file[start : start + len(buffer)] == buffer

    assert [file[start : start + len(buffer)] for start, buffer in pieces] == [buffer for _, buffer in pieces]


def test_more_bytes_than_requested_are_an_error() -> None:
    """They would be those of the next part."""
    [part] = parts_of([(0, memoryview(bytearray(3)))])
    with pytest.raises(OSError, match="more than the bytes up to 3"):
        part.write(b"1234")


@attrs.frozen
class Remote:
    """A file on a server, and a storage that reaches it through a proxy."""

    proxy: ChaosProxy
    direct: S3Storage
    storage: S3Storage

    def read(self, plan: Plan, data: bytes = DATA) -> tuple[bytes, list[int]]:
        """Return what is read in pieces of 1 MiB while the proxy has a plan, and the numbers that were yielded."""
        self.proxy.plan = plan
        found = bytearray(len(data))
        pieces = [(start, memoryview(found)[start : start + MIB]) for start in range(0, len(data), MIB)]
        numbers = []
        for number in self.storage.read_pieces("x", pieces):
            numbers.append(number)
            assert data[: number * MIB] == found[: number * MIB]
        return bytes(found), numbers

    def put(self, data: bytes) -> None:
        upload = self.direct.upload("x")
        upload.write(data)
        upload.finish()
        upload.publish(replace=True)


@pytest.fixture(params=["s3", "rclone"])
def remote(serve: Serve, request: pytest.FixtureRequest) -> Iterator[Remote]:
    server = serve(request.param)
    with ChaosProxy(server.port) as proxy:
        url = server.fresh()
        behind = attrs.evolve(server, port=proxy.port)
        remote = Remote(proxy, _open(server, url), _open(behind, url))
        remote.put(DATA)
        yield remote


def _open(server: Server, url: str) -> S3Storage:
    # Without the options that turn off a check of the driver.
    options = {name: value for name, value in server.storage_options.items() if name != "config_kwargs"}
    storage = open_storage(url, "", {**options, "retry": PATIENT})
    assert isinstance(storage, S3Storage)
    assert isinstance(storage, SupportsPieces)
    return storage


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "times"),
    [
        pytest.param(Cut(down=5 * MIB, times=6), 6, id="cut within bodies"),
        pytest.param(Cut(down=10, times=2), 2, id="cut before bodies"),
        pytest.param(Answer(rb"^GET ", times=5), 5, id="SlowDown"),
        pytest.param(Halt(lambda: None, nth=1), 1, id="nothing"),
    ],
)
def test_parts_arrive_although_connections_are_cut(remote: Remote, plan: Plan, times: int) -> None:
    """Each piece is complete when it is counted. A cut part goes on with its next byte."""
    found, numbers = remote.read(plan)

    assert times == remote.proxy.hits
    assert DATA == found
    assert [16, 32, 40] == numbers


@pytest.mark.slow
@pytest.mark.parametrize("other", [DATA[::-1], DATA[:-1], DATA + b"x", DATA[: 9 * MIB]], ids=len)
def test_a_file_that_is_replaced_meanwhile_is_an_error(remote: Remote, other: bytes) -> None:
    """The bytes of two files are never mixed. The second request is the first for bytes."""
    with pytest.raises(OSError, match=r"replaced while|InvalidRange|not satisfiable"):
        remote.read(Halt(lambda: remote.put(other), nth=2))

    assert 1 == remote.proxy.hits


@pytest.mark.slow
def test_a_file_that_is_replaced_after_a_cut_is_an_error(remote: Remote) -> None:
    """The rest of a part is not read from another file."""
    remote.proxy.plan = Cut(down=5 * MIB)
    found = bytearray(len(DATA))
    reading = remote.storage.read_pieces("x", [(0, memoryview(found))])
    remote.proxy.plan = Halt(lambda: remote.put(DATA[::-1]), nth=3)
    with pytest.raises(OSError, match="replaced while"):
        list(reading)


@pytest.mark.slow
def test_a_missing_file_and_one_that_is_too_short_are_errors(remote: Remote) -> None:
    """Nothing is requested beyond the end."""
    buffer = memoryview(bytearray(2))
    with pytest.raises(FileNotFoundError):
        list(remote.storage.read_pieces("missing", [(0, buffer)]))
    with pytest.raises(OSError, match=f"ends at byte {len(DATA)}, and the bytes up to {len(DATA) + 1}"):
        list(remote.storage.read_pieces("x", [(len(DATA) - 1, buffer)]))
    assert [] == list(remote.storage.read_pieces("x", []))
    assert [2] == list(remote.storage.read_pieces("x", [(3, buffer), (7, buffer[:0])]))
    assert DATA[3:5] == bytes(buffer)


@pytest.mark.slow
def test_a_reader_that_stops_early_ends_its_requests(remote: Remote) -> None:
    """Afterwards nothing is written into the buffers, and the connection can be used again."""
    found = bytearray(len(DATA))
    reading = remote.storage.read_pieces("x", [(s, memoryview(found)[s : s + MIB]) for s in range(0, len(DATA), MIB)])
    assert next(reading) == 16
    reading.close()  # type: ignore[attr-defined]
    before = bytes(found)
    assert DATA == remote.read(Halt(lambda: None, nth=1))[0]
    assert before == found
