"""WsgiDAV on cheroot, by webdav4."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.servers.processes import free_ports, missing, spawn
from support.servers.server import Server


class WebDav(Server):
    name = "webdav"

    @classmethod
    def missing(cls) -> str | None:
        return missing(["wsgidav"], ["webdav4", "cheroot"])

    @classmethod
    def start(cls, folder: Path) -> WebDav:
        (folder / "files").mkdir()
        [port] = free_ports(1)
        command = ["wsgidav", "--host", "127.0.0.1", "--port", str(port), "--root", str(folder / "files")]
        command += ["--auth", "anonymous", "--server", "cheroot", "--no-config"]
        return cls(folder, port, (spawn(command, folder / "wsgidav.log"),))

    @property
    def url(self) -> str:
        return "webdav:/"

    @property
    def storage_options(self) -> Mapping[str, Any]:
        return {"base_url": f"http://127.0.0.1:{self.port}"}
