"""Hides passwords, keys and tokens in text: those in URLs, and those that a driver repeats in its errors."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote, quote_plus, unquote, unquote_plus

HIDDEN: Final = "***"
MIN_LENGTH: Final = 4
"""A secret with fewer characters is hidden in URLs only: elsewhere in a text it may be a part of anything."""
_MAX_DEPTH: Final = 8
# A key may have a slash in it, as those of S3 often do: it is not a port, and an @ follows.
_USER: Final = re.compile(r"(?<=://)(?:[^/\s]*|[^/\s:@\[]+:(?!\d+(?:/|$))[^\s@'\"<>]*)@")
_QUERY: Final = re.compile(r"(?<=[?&])([^?&=\s'\"<>]+)=[^&\s'\"<>]*")
_BARE_QUERY: Final = re.compile(r"(://[^\s?'\"<>]*\?)[^\s?&='\"<>]+(?=$|[\s'\"<>])")
_URL: Final = re.compile(r"://(?:([^/]*|[^/:@\[]+:(?!\d+(?:/|$))[^@]*)@)?[^?]*(?:\?(.*))?", re.DOTALL)
_SECRET_NAMES: Final = re.compile(
    r"pass|pwd|secret|token|key|cred|auth|sas|sign|cookie|connection_?string", re.IGNORECASE
)
_NO_SECRETS: Final = frozenset({"anon", "anonymous", "cloud", "browser", "cache", "google_default", "s3v4"})
"""Values of such options that say where a secret comes from."""
_PLACE_NAMES: Final = re.compile(r"file|path|folder|_dir", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """Return a text in which the users, passwords and values of queries of all URLs are hidden.

    Example:
        >>> without_secrets("cannot open sftp://me:hunter2@host/run?token=abc&part=7")
        'cannot open sftp://host/run?token=***&part=***'
    """
    text = _QUERY.sub(rf"\1={HIDDEN}", _USER.sub("", text))
    return _BARE_QUERY.sub(rf"\1{HIDDEN}", text)


def shown_place(place: str) -> str:
    """Return a path or URL as it may be shown and saved. A path stays as it is, whatever characters it has."""
    return without_secrets(place) if "://" in place else place


class Secrets:
    """The secrets of one URL and its options.

    Example:
        >>> secrets = Secrets("s3://bucket/run", {"key": "AKIA1234", "secret": "hunter2", "endpoint_url": "http://host"})
        >>> secrets.hide("http://host refuses the key AKIA1234")
        'http://host refuses the key ***'
        >>> secrets
        <Secrets, hidden>
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        found = {*_of_url(url), *_of_options(options, _MAX_DEPTH)}
        known = {form for secret in found for form in _forms(secret) if len(form) >= MIN_LENGTH}
        # The longest first, because one may be a part of another one.
        self._known: Final = sorted(known, key=len, reverse=True)

    def __repr__(self) -> str:
        return "<Secrets, hidden>"

    def hide(self, text: str) -> str:
        """Return a text without these secrets, and without those of any URL in it."""
        text = without_secrets(text)
        for secret in self._known:
            text = text.replace(secret, HIDDEN)
        return text

    def clean(self, error: BaseException) -> bool:
        """Hide the secrets in an error, and in each error that a traceback shows with it.

        An error whose text cannot be changed is removed from the traceback. If that is the first one, return False.
        """
        seen: set[int] = set()
        errors = [error]
        while errors:
            one = errors.pop()
            seen.add(id(one))
            self._clean_one(one)
            for name in ("__cause__", "__context__"):
                other = getattr(one, name)
                if other is None or id(other) in seen:
                    continue
                self._clean_one(other)
                if self._shows(other):
                    suppresses = one.__suppress_context__
                    setattr(one, name, None)
                    one.__suppress_context__ = suppresses
                else:
                    errors.append(other)
        return not self._shows(error)

    def _clean_one(self, error: BaseException) -> None:
        with contextlib.suppress(Exception):
            error.args = tuple(self.hide(arg) if isinstance(arg, str) else arg for arg in error.args)
        for name in ("strerror", "filename", "filename2", "message", "msg", "reason"):
            value = getattr(error, name, None)
            if isinstance(value, str):
                with contextlib.suppress(Exception):
                    setattr(error, name, self.hide(value))
        notes = getattr(error, "__notes__", None)
        if isinstance(notes, list):
            notes[:] = [self.hide(note) if isinstance(note, str) else note for note in notes]

    def _shows(self, error: BaseException) -> bool:
        try:
            texts = (str(error), repr(error))
        except Exception:  # A traceback says that such an error is unprintable.
            return False
        return any(self.hide(text) != text for text in texts)

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Hide the secrets in each error that the block raises."""
        try:
            yield
        except Exception as error:
            if self.clean(error):
                raise
            standin = _standin(error, self.hide(str(error)))
        else:
            return
        raise standin from None


def _standin(error: Exception, text: str) -> Exception:
    """Return an error with another text, of the closest class that a text suffices for."""
    if isinstance(error, OSError) and isinstance(error.errno, int):
        return OSError(error.errno, text)
    return OSError(f"{type(error).__name__}: {text}")


def _of_url(url: str) -> Iterator[str]:
    for user, query in _URL.findall(url):
        password = user.partition(":")[2]
        yield from (password, user if password else "")
        for pair in re.split("[&;]", query):
            name, equals, value = pair.partition("=")
            yield value if equals else name


def _of_options(value: object, depth: int, *, is_secret: bool = False) -> Iterator[str]:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str):
        if is_secret and value not in _NO_SECRETS:
            yield value
        yield from _of_url(value)
        for part in value.split(";"):  # A connection string of Azure.
            name, equals, inner = part.partition("=")
            if equals and _names_secret(name):
                yield inner
    elif depth and isinstance(value, Mapping):
        for name, item in value.items():
            yield from _of_options(item, depth - 1, is_secret=_names_secret(str(name)))
    elif depth and isinstance(value, (list, tuple)):
        for item in value:
            yield from _of_options(item, depth - 1, is_secret=is_secret)


def _names_secret(name: str) -> bool:
    return bool(_SECRET_NAMES.search(name)) and not _PLACE_NAMES.search(name)


def _forms(secret: str) -> Iterator[str]:
    """Yield the spellings of a secret: as it is, and as URLs and messages write it."""
    for plain in (secret, unquote(secret), unquote_plus(secret)):
        yield from (plain, quote(plain), quote(plain, safe=""), quote_plus(plain), repr(plain)[1:-1])
