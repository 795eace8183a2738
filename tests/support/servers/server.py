"""A server as its user sees it: its URL and the options to reach it."""

from __future__ import annotations

import abc
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import attrs


@attrs.frozen
class Server(abc.ABC):
    """One running server. ``attrs.evolve(server, port=proxy.port)`` is the same server through a proxy."""

    name: ClassVar[str]
    """Its name in tests and in ``CHECKPOINTER_REQUIRE``."""

    folder: Path
    """Folder of its files, its configuration and its log."""
    port: int
    """Its port on 127.0.0.1."""
    pids: tuple[int, ...]
    """Its process groups."""

    @classmethod
    @abc.abstractmethod
    def missing(cls) -> str | None:
        """Return what is not installed and how to install it, or None."""

    @classmethod
    @abc.abstractmethod
    def start(cls, folder: Path) -> Server:
        """Start the server; it need not be ready yet."""

    @classmethod
    def prepare_client(cls) -> None:
        """Prepare this process to open the URL, as a user of the server has to."""
        return

    def prepare(self) -> None:
        """Make the bucket or share, once the port is open; raise if the server is not ready yet."""
        return

    @property
    @abc.abstractmethod
    def url(self) -> str:
        """The URL that a user passes as the directory, without a slash at the end."""

    @property
    @abc.abstractmethod
    def storage_options(self) -> Mapping[str, Any]:
        """The ``storage_options`` that a user passes."""

    def fresh(self) -> str:
        """Return the URL of an unused folder."""
        return f"{self.url}/{uuid.uuid4().hex}"
