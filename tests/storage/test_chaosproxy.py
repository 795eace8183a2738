"""The proxy breaks connections as its plan says, and changes nothing else."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import socket
import threading
from collections.abc import Iterator

import pytest
from support.servers.chaosproxy import (
    Answer,
    ChaosProxy,
    Cut,
    CutRequest,
    Delay,
    LoseReply,
    Pass,
    Plan,
    Refuse,
    Reset,
    Stall,
)

BODY = b"0123456789" * 30_000


class Files(http.server.ThreadingHTTPServer):
    """Keeps the files that it receives, and counts them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FilesHandler)
        self.files: dict[str, bytes] = {}
        self.puts: list[str] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing, because connections break here on purpose."""


class FilesHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Files

    def do_PUT(self) -> None:
        if "Content-Length" in self.headers:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            is_whole = len(body) == int(self.headers["Content-Length"])
        else:
            body = b"".join(iter(self._read_chunk, b""))
            is_whole = True
        if is_whole:
            self.server.files[self.path] = body
            self.server.puts.append(self.path)
        self._reply(b"")

    def _read_chunk(self) -> bytes:
        chunk = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return chunk

    def do_GET(self) -> None:
        self._reply(self.server.files[self.path])

    def _reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture
def files() -> Iterator[Files]:
    with Files() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(files: Files) -> Iterator[ChaosProxy]:
    with ChaosProxy(files.server_address[1]) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: ChaosProxy) -> Iterator[http.client.HTTPConnection]:
    """A connection for all requests, which is opened again after it broke."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    yield connection
    connection.close()


def ask(client: http.client.HTTPConnection, method: str, path: str = "/a", body: bytes | None = None) -> bytes:
    try:
        client.request(method, path, body)
        response = client.getresponse()
        return b"%d " % response.status + response.read()
    except Exception:
        client.close()
        raise


def test_without_a_plan_everything_passes(files: Files, proxy: ChaosProxy, client: http.client.HTTPConnection) -> None:
    """Bodies arrive complete, in both directions, on one connection; requests are recorded."""
    assert b"200 " == ask(client, "PUT", body=BODY)
    assert b"200 " + BODY == ask(client, "GET")
    assert {"/a": BODY} == files.files
    assert ["PUT /a HTTP/1.1", "GET /a HTTP/1.1"] == proxy.requests
    assert 0 == proxy.hits


def test_a_request_in_chunks_passes(files: Files, proxy: ChaosProxy, client: http.client.HTTPConnection) -> None:
    """The proxy finds the next request on the connection after the last chunk."""
    client.request("PUT", "/a", iter([b"12345", b"GET / HTTP/1.1\r\n\r\n"]), encode_chunked=True)
    assert b"" == client.getresponse().read()
    assert b"200 12345GET / HTTP/1.1\r\n\r\n" == ask(client, "GET")
    assert ["PUT /a HTTP/1.1", "GET /a HTTP/1.1"] == proxy.requests


def test_what_is_not_http_passes_too() -> None:
    """The server may send the first bytes."""
    with socket.create_server(("127.0.0.1", 0)) as server, ChaosProxy(server.getsockname()[1]) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
            theirs, _ = server.accept()
            with theirs:
                theirs.sendall(b"hello")
                assert b"hello" == client.recv(100)
                client.sendall(b"\x00\xffGET ")
                assert b"\x00\xffGET " == theirs.recv(100)
        assert [] == proxy.requests


def test_refused_connections_are_refused_until_they_are_not(
    files: Files, proxy: ChaosProxy, client: http.client.HTTPConnection
) -> None:
    """Open connections break at once, and the port stays the same."""
    ask(client, "PUT", body=b"1")
    for _ in range(3):
        proxy.plan = Refuse()
        with pytest.raises((http.client.HTTPException, OSError)):
            ask(client, "GET")
        with pytest.raises(ConnectionRefusedError):
            ask(client, "GET")
        proxy.plan = Pass()
        assert b"200 1" == ask(client, "GET")


@pytest.mark.parametrize("plan", [Reset(), Cut(up=0), Cut(up=100_000), Cut(up=10)])
def test_an_upload_that_is_cut_never_arrives(
    files: Files, proxy: ChaosProxy, client: http.client.HTTPConnection, plan: Plan
) -> None:
    """The client gets a broken connection, and the server gets an incomplete request."""
    proxy.plan = plan
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        ask(client, "PUT", body=BODY)

    assert {} == files.files
    assert proxy.hits >= 1


def test_nothing_passes_beyond_the_cut() -> None:
    """The reset may discard the last bytes, but the server never gets more than planned."""
    with socket.create_server(("127.0.0.1", 0)) as server, ChaosProxy(server.getsockname()[1]) as proxy:
        proxy.plan = Cut(up=10)
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
            theirs, _ = server.accept()
            client.sendall(b"x" * 100)
            received = b""
            with theirs, contextlib.suppress(ConnectionResetError):
                while data := theirs.recv(100):
                    received += data
        assert len(received) <= 10


def test_a_download_is_cut_where_the_plan_says(
    files: Files, proxy: ChaosProxy, client: http.client.HTTPConnection
) -> None:
    """The plan is applied ``times`` times."""
    files.files["/a"] = BODY
    proxy.plan = Cut(down=150_000, times=2)
    for _ in range(2):
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            ask(client, "GET")

    assert b"200 " + BODY == ask(client, "GET")
    assert 2 == proxy.hits


@pytest.mark.parametrize(("nth", "times"), [(1, 1), (2, 1), (1, 2)])
def test_a_lost_reply_belongs_to_a_request_that_was_applied(
    files: Files, proxy: ChaosProxy, client: http.client.HTTPConnection, nth: int, times: int
) -> None:
    """The plan applies to the n-th matching request and those after it; the others are answered."""
    proxy.plan = LoseReply(rb"^PUT /record", nth=nth, times=times)
    for number in range(1, 4):
        assert b"200 " == ask(client, "PUT", "/payload", b"x")
        if nth <= number < nth + times:
            with pytest.raises((ConnectionError, http.client.HTTPException)):
                ask(client, "PUT", f"/record{number}", b"mine")
        else:
            assert b"200 " == ask(client, "PUT", f"/record{number}", b"mine")

    assert times == proxy.hits
    assert ["/record1", "/record2", "/record3"] == [path for path in files.puts if path != "/payload"]


@pytest.mark.parametrize("count", [0, 1, 100_000])
def test_a_request_is_cut_within_its_body(
    files: Files, proxy: ChaosProxy, client: http.client.HTTPConnection, count: int
) -> None:
    """Only the second matching request is cut."""
    proxy.plan = CutRequest(rb"^PUT /record", body=count, nth=2)
    assert b"200 " == ask(client, "PUT", "/payload", b"x")
    assert b"200 " == ask(client, "PUT", "/record1", BODY)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        ask(client, "PUT", "/record2", BODY)
    assert b"200 " == ask(client, "PUT", "/record3", BODY)

    assert 1 == proxy.hits
    assert "/record2" not in files.files


def test_an_answered_request_never_reaches_the_server(
    files: Files, proxy: ChaosProxy, client: http.client.HTTPConnection
) -> None:
    """The proxy reads its whole body; the next request after the last answer passes."""
    proxy.plan = Answer(rb"^PUT ", status=503, code="SlowDown", times=2)
    for _ in range(2):
        answer = ask(client, "PUT", body=BODY)
        assert answer.startswith(b"503 ")
        assert b"<Code>SlowDown</Code>" in answer
    assert {} == files.files

    assert b"200 " == ask(client, "PUT", body=BODY)
    assert 2 == proxy.hits


def test_a_stalled_connection_goes_on_with_the_next_plan(files: Files, proxy: ChaosProxy) -> None:
    """Meanwhile no byte is lost, and no connection is closed."""
    files.files["/a"] = BODY
    proxy.plan = Stall()
    impatient = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=0.2)
    with pytest.raises(TimeoutError):
        ask(impatient, "GET")
    patient = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    patient.request("GET", "/a")
    proxy.plan = Pass()
    response = patient.getresponse()
    assert BODY == response.read()
    patient.close()


def test_a_delayed_request_is_late_and_whole(
    files: Files, proxy: ChaosProxy, client: http.client.HTTPConnection
) -> None:
    """Each chunk is delayed."""
    files.files["/a"] = b"1"
    proxy.plan = Delay(0.05)

    assert b"200 1" == ask(client, "GET")
    assert proxy.hits >= 2
