"""A server as its user sees it: the URL and the options that reach it."""

from __future__ import annotations

import abc
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import attrs


@attrs.frozen
class Server(abc.ABC):
    """One server that runs. ``attrs.evolve(server, port=proxy.port)`` is the same one reached through a proxy."""

    name: ClassVar[str]
    """What tests and ``CHECKPOINTER_REQUIRE`` call it."""

    folder: Path
    """Where its files, its configuration and its log are."""
    port: int
    """Where it listens on 127.0.0.1."""
    pids: tuple[int, ...]
    """Its process groups."""

    @classmethod
    @abc.abstractmethod
    def missing(cls) -> str | None:
        """Return what is not installed and how to get it, or None."""

    @classmethod
    @abc.abstractmethod
    def start(cls, folder: Path) -> Server:
        """Start it; it need not be ready yet."""

    @classmethod
    def prepare_client(cls) -> None:
        """Do what a user of this server has to do in his process before he opens the URL."""
        return

    def prepare(self) -> None:
        """Make the bucket or share, once the port is open; raise while it cannot be done yet."""
        return

    @property
    @abc.abstractmethod
    def url(self) -> str:
        """What a user passes as the directory, without a slash at the end."""

    @property
    @abc.abstractmethod
    def storage_options(self) -> Mapping[str, Any]:
        """What a user passes as ``storage_options``."""

    def fresh(self) -> str:
        """Return the URL of a folder that nobody has used."""
        return f"{self.url}/{uuid.uuid4().hex}"
