"""Repeats a request that fails briefly: exponential backoff with jitter, up to a total deadline."""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import attrs
import tenacity

T = TypeVar("T")

_log = logging.getLogger("checkpointer")

_TRANSIENT_ERRNOS: Final = frozenset(
    getattr(errno, name, errno.EAGAIN)
    for name in (
        "EAGAIN", "EBUSY", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "EINTR", "EIO",
        "ENETDOWN", "ENETRESET", "ENETUNREACH", "ENOTCONN", "EPIPE", "EREMOTEIO", "ESHUTDOWN", "ETIMEDOUT",
    )
)  # fmt: skip
"""Drivers turn a server's 500 and 503 into EREMOTEIO, EBUSY or EIO."""

_TRANSIENT_NAMES: Final = frozenset({
    "ClientConnectionError", "ClientPayloadError", "ServerTimeoutError",  # aiohttp
    "ConnectionError", "HTTPClientError", "IncompleteReadError", "FlexibleChecksumError",  # botocore
    "ChunkedEncodingError", "ConnectTimeout", "ReadTimeout",  # requests, which has a ConnectionError too
    "ConnectError", "NetworkError", "RemoteProtocolError", "TimeoutException",  # httpx
    "ConnectionLost", "SFTPConnectionLost", "SFTPNoConnection",  # asyncssh
    "SSHException", "EOFError", "NoValidConnectionsError",  # paramiko
    "ServiceRequestError", "ServiceResponseError", "HttpResponseError",  # azure
    "SMBConnectionClosed", "HttpError", "IncompleteRead",
})  # fmt: skip
"""By name, so that the drivers need not be installed."""

_TRANSIENT_TEXTS: Final = frozenset({"Socket is closed", "Can't create any SFTP connections!"})
"""Messages of paramiko and sshfs for a lost connection; these errors have no class or number of their own."""

_PERMANENT_NAMES: Final = frozenset({"AuthenticationException", "BadHostKeyException"})
_PERMANENT: Final = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed soon: the network failed, or the server is overloaded."""
    if isinstance(error, _PERMANENT) or not isinstance(error, Exception):
        return False
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _PERMANENT_NAMES or "certificate verify failed" in str(error).lower():
        return False
    if str(error) in _TRANSIENT_TEXTS:
        return True
    if names & _TRANSIENT_NAMES:
        return not 400 <= _status(error) < 500 or _status(error) in (408, 425, 429)
    return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS


def _status(error: BaseException) -> int:
    """Return the HTTP status of an error, or 0 if it has none."""
    statuses = (getattr(error, name, None) for name in ("status_code", "status", "code"))
    return next((status for status in statuses if isinstance(status, int)), 0)


@attrs.frozen
class Retry:
    """Calls a function until it succeeds or fails permanently, or until the deadline; then raises the last error."""

    deadline_s: float = 300.0
    """Seconds after which no further attempt begins. A running attempt is limited by the driver's own timeouts."""
    first_wait_s: float = 0.2
    """Upper bound of the first pause in seconds; it doubles each time, up to 20, and each pause is random below it."""
    hide: Callable[[str], str] = attrs.field(default=str, repr=False, eq=False)
    """Hides secrets in what is logged."""

    def __call__(self, do: Callable[[], T], what: str) -> T:
        """Return the result of ``do``; ``what`` names the request in the log."""
        return tenacity.Retrying(**self._settings(what))(do)

    async def run(self, do: Callable[[], Awaitable[T]], what: str) -> T:
        """Return the result of the awaitable that ``do`` returns."""

        # Newer tenacity awaits only a declared coroutine function, not a lambda.
        async def call() -> T:
            return await do()

        result: T = await tenacity.AsyncRetrying(**self._settings(what))(call)
        return result

    def _settings(self, what: str) -> dict[str, Any]:
        def before_sleep(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            pause = state.next_action.sleep if state.next_action else 0.0
            text = self.hide(f"{what} failed ({type(error).__name__}: {error})")
            _log.warning("%s; next attempt in %.1f s", text, pause)

        return {
            "retry": tenacity.retry_if_exception(is_transient),
            "stop": tenacity.stop_before_delay(self.deadline_s),
            "wait": tenacity.wait_random_exponential(multiplier=self.first_wait_s, max=20),
            "before_sleep": before_sleep,
            "reraise": True,
        }
