"""A TCP proxy that breaks connections in the ways that networks and servers do, when a test says so."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import IO, TypeAlias

import attrs

CHUNK = 64 * 1024


@attrs.frozen(eq=False)
class Pass:
    """Forward everything."""


@attrs.frozen(eq=False)
class Refuse:
    """Reset open connections, and refuse new ones."""


@attrs.frozen(eq=False)
class Reset:
    """Reset every connection at its first byte."""


@attrs.frozen(eq=False)
class Cut:
    """Reset a connection after a number of bytes since the plan was set; ``times`` times."""

    up: int | None = None
    """Bytes to the server."""
    down: int | None = None
    """Bytes from the server."""
    times: int = 1


@attrs.frozen(eq=False)
class Stall:
    """Forward and close nothing until the plan changes."""


@attrs.frozen(eq=False)
class Delay:
    """Delay each chunk by ``seconds``."""

    seconds: float


@attrs.frozen(eq=False)
class LoseReply:
    """Forward an HTTP request whose head matches, and reset the connection when the reply comes.

    The server has applied the request, and its client does not know. Heads are matched by ``re.search``.
    """

    head: bytes
    nth: int = 1
    """Number of the first matching request that is hit, from 1."""
    times: int = 1


@attrs.frozen(eq=False)
class Answer:
    """Answer HTTP requests whose head matches with an error, and do not forward them."""

    head: bytes
    status: int = 503
    code: str = "SlowDown"
    """S3's name for the error."""
    times: int = 1


@attrs.frozen(eq=False)
class CutRequest:
    """Reset the connection after ``body`` bytes of the body of an HTTP request whose head matches."""

    head: bytes
    body: int = 0
    nth: int = 1
    """Number of the first matching request that is hit, from 1."""
    times: int = 1


@attrs.frozen(eq=False)
class Halt:
    """Call ``halt`` when a request arrives, and forward the request when the call returns.

    Requests are counted over all connections. What is not HTTP counts by the chunk.
    """

    halt: Callable[[], None]
    nth: int
    """Number of the request, from 1."""


Plan: TypeAlias = Halt | Pass | Refuse | Reset | Cut | Stall | Delay | LoseReply | Answer | CutRequest


class ChaosProxy:
    """A proxy for a server on 127.0.0.1: ``with ChaosProxy(server.port) as proxy: proxy.plan = Refuse()``.

    Args:
        upstream: The server's port.
        bind: Returns a socket that is bound to a port; 0 is any port. None binds it on 127.0.0.1.

    Attributes:
        port: The proxy's port.
        arrived: The number of requests since the plan was set; what is not HTTP counts by the chunk.
        requests: First lines of all HTTP requests, including those that the proxy answers.
        hits: How often the plan was applied since it was set. A test must check it, to be sure that a fault happened.
    """

    def __init__(self, upstream: int, bind: Callable[[int], socket.socket] | None = None) -> None:
        self._upstream = upstream
        self._bind = bind or bound
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._plan: Plan = Pass()
        self._matches = 0
        self._links: set[_Link] = set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        # It is bound but never listens, to reserve the port while connections are refused.
        self._reserved = self._bind(0)
        self.port: int = self._reserved.getsockname()[1]
        self.requests: list[str] = []
        self.arrived = 0
        self.hits = 0

    def __enter__(self) -> ChaosProxy:
        self._listen()
        return self

    def __exit__(self, *error: object) -> None:
        self.plan = Refuse()
        for thread in self._threads:
            thread.join(timeout=10)
        self._reserved.close()

    @property
    def plan(self) -> Plan:
        """The plan for all connections, open ones included."""
        return self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        with self._changed:
            self._plan, self._matches, self.arrived, self.hits = plan, 0, 0, 0
            links = tuple(self._links)
            for link in links:
                link.up = link.down = 0
            self._changed.notify_all()
        if isinstance(plan, Refuse):
            self._close_listener()
            for link in links:
                link.reset()
        elif self._listener is None:
            self._listen()

    # Called by the links

    def wait_while_stalled(self, link: _Link) -> None:
        """Return once the plan changes, or the link is reset."""
        with self._changed:
            if isinstance(self._plan, Stall):
                self.hits += 1
            self._changed.wait_for(lambda: not isinstance(self._plan, Stall) or link.is_reset)

    def let_in(self) -> None:
        """Count a request, and halt it if the plan says so."""
        with self._lock:
            plan = self._plan
            self.arrived += 1
            if not isinstance(plan, Halt) or self.arrived != plan.nth:
                return
            self.hits += 1
        plan.halt()

    def strikes(self, *, head: bytes) -> Plan | None:
        """Return the plan if it applies to the request, and count it."""
        with self._lock:
            self.requests.append(head.partition(b"\r\n")[0].decode("latin-1"))
            plan = self._plan
            if not isinstance(plan, LoseReply | Answer | CutRequest) or not re.search(plan.head, head):
                return None
            self._matches += 1
            first = 1 if isinstance(plan, Answer) else plan.nth
            if not first <= self._matches < first + plan.times:
                return None
            self.hits += 1
            return plan

    def room(self, link: _Link, wanted: int, *, up: bool) -> int | None:
        """Return how many of the bytes pass before the cut, or None if they are not cut; count them."""
        with self._lock:
            plan = self._plan
            passed = link.up if up else link.down
            if up:
                link.up += wanted
            else:
                link.down += wanted
            if isinstance(plan, Reset):
                self.hits += 1
                return 0
            limit = None if not isinstance(plan, Cut) else plan.up if up else plan.down
            if limit is None or not isinstance(plan, Cut) or self.hits >= plan.times or passed + wanted < limit:
                return None
            self.hits += 1
            return max(0, limit - passed)

    def delay(self) -> None:
        """Wait for the plan's delay, or until the plan changes."""
        with self._changed:
            plan = self._plan
            if isinstance(plan, Delay):
                self.hits += 1
                self._changed.wait_for(lambda: self._plan is not plan, timeout=plan.seconds)

    def forget(self, link: _Link) -> None:
        """Remove a link that has ended."""
        with self._lock:
            self._links.discard(link)

    # Connections

    def _listen(self) -> None:
        self._listener = self._bind(self.port)
        self._listener.listen(128)
        self._run(self._accept, self._listener)

    def _close_listener(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            # close() alone does not end an accept() in the other thread.
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._upstream), timeout=10)
            except OSError:
                _reset(client)
                continue
            server.settimeout(None)
            for side in (client, server):
                # Otherwise each small packet waits for the acknowledgement of the one before.
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = _Link(self, client, server)
            with self._lock:
                self._links.add(link)
                refused = isinstance(self._plan, Refuse)
            if refused:
                link.reset()
            self._run(link.pump_up)
            self._run(link.pump_down)

    def _run(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()


class _Link:
    """A client's connection, and the matching connection to the server."""

    def __init__(self, proxy: ChaosProxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._lock = threading.Lock()
        self._pumps = 2
        self._loses_reply = False
        self.is_reset = False
        self.up = 0
        self.down = 0

    def reset(self) -> None:
        """Send both sides a RST."""
        with self._lock:
            if self.is_reset or self._pumps == 0:
                return
            self.is_reset = True
        # close() does not end a recv() in the other pump. shutdown() does, but without SO_LINGER it would send a FIN.
        for side in (self._client, self._server):
            _linger_none(side)
        with self._proxy._changed:
            self._proxy._changed.notify_all()
        for side in (self._client, self._server):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RD)

    def pump_up(self) -> None:
        """Forward the client's bytes; if it uses HTTP, request by request."""
        with self._ending(self._server), self._client.makefile("rb") as stream:
            if re.match(rb"[A-Z]{3,8} ", stream.peek(9)) is None:
                while data := stream.read1(CHUNK):
                    self._proxy.let_in()
                    self._send(data, up=True)
                return
            while head := _read_head(stream):
                plan = self._proxy.strikes(head=head)
                self._proxy.let_in()
                if isinstance(plan, Answer):
                    self._answer(plan, head, stream)
                    return
                if isinstance(plan, LoseReply):
                    self._loses_reply = True
                self._send(head, up=True)
                left = plan.body if isinstance(plan, CutRequest) else None
                for data in _read_body(head, stream):
                    if left is not None and len(data) >= left:
                        self._send(data[:left], up=True)
                        break
                    left = None if left is None else left - len(data)
                    self._send(data, up=True)
                if isinstance(plan, CutRequest):
                    self.reset()
                    return

    def pump_down(self) -> None:
        """Forward the server's bytes."""
        with self._ending(self._client):
            while data := self._server.recv(CHUNK):
                if self._loses_reply:
                    # "100 Continue" only requests the body; the server has not applied the request yet.
                    interim, data = _split_interim(data)
                    if interim:
                        self._send(interim, up=False)
                    if data:
                        self.reset()
                        return
                else:
                    self._send(data, up=False)

    def _send(self, data: bytes, *, up: bool) -> None:
        self._proxy.wait_while_stalled(self)
        self._proxy.delay()
        room = self._proxy.room(self, len(data), up=up)
        side = self._server if up else self._client
        side.sendall(data if room is None else data[:room])
        if room is not None:
            self.reset()
            msg = "cut"
            raise ConnectionAbortedError(msg)

    def _answer(self, plan: Answer, head: bytes, stream: IO[bytes]) -> None:
        if b"expect: 100-continue" not in head.lower():
            # If a part of the request stays unread, closing sends a RST, and the client does not get the answer.
            for _ in _read_body(head, stream):
                pass
        body = f'<?xml version="1.0"?><Error><Code>{plan.code}</Code><Message>by plan</Message></Error>'.encode()
        lines = [f"HTTP/1.1 {plan.status} {plan.code}", "Content-Type: application/xml", "Connection: close"]
        lines.append(f"Content-Length: {len(body)}")
        answer = "\r\n".join([*lines, "", ""]).encode()
        self._client.sendall(answer if head.startswith(b"HEAD ") else answer + body)
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_WR)

    @contextlib.contextmanager
    def _ending(self, other: socket.socket) -> Iterator[None]:
        """Pass the end of one side on to the other; the second pump to end closes both."""
        # A socket of which a test has reset the other end: that is what this is for.
        with contextlib.suppress(OSError, ValueError):
            yield
        if not self.is_reset:
            with contextlib.suppress(OSError):
                other.shutdown(socket.SHUT_WR)
        with self._lock:
            self._pumps -= 1
            is_last = self._pumps == 0
        if is_last:
            self._client.close()
            self._server.close()
            self._proxy.forget(self)


def _read_head(stream: IO[bytes]) -> bytes:
    lines = []
    while line := stream.readline():
        lines.append(line)
        if line in (b"\r\n", b"\n"):
            break
    return b"".join(lines)


def _read_body(head: bytes, stream: IO[bytes]) -> Iterator[bytes]:
    if re.search(rb"(?im)^transfer-encoding:.*chunked", head):
        yield from _read_chunks(stream)
    elif found := re.search(rb"(?im)^content-length:\s*(\d+)", head):
        yield from _read_exactly(stream, int(found[1]))


def _read_chunks(stream: IO[bytes]) -> Iterator[bytes]:
    while line := stream.readline():
        yield line
        size = int(line.split(b";")[0], 16)
        if size == 0:
            # Trailers, up to an empty line.
            yield _read_head(stream)
            return
        yield from _read_exactly(stream, size + len(b"\r\n"))


def _read_exactly(stream: IO[bytes], count: int) -> Iterator[bytes]:
    while count and (data := stream.read1(min(count, CHUNK))):  # type: ignore[attr-defined]
        count -= len(data)
        yield data


def _split_interim(data: bytes) -> tuple[bytes, bytes]:
    if not data.startswith(b"HTTP/1.1 100"):
        return b"", data
    head, end, rest = data.partition(b"\r\n\r\n")
    return head + end, rest


def bound(port: int) -> socket.socket:
    """Return a socket that is bound to a port of 127.0.0.1."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    one.bind(("127.0.0.1", port))
    return one


def _linger_none(side: socket.socket) -> None:
    with contextlib.suppress(OSError):
        side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _reset(side: socket.socket) -> None:
    _linger_none(side)
    side.close()
