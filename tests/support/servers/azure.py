"""Azurite, Microsoft's emulator of its storage, by adlfs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec

from support.servers.processes import free_ports, missing, spawn
from support.servers.server import Server

PROGRAM = Path(__file__).resolve().parents[3] / ".servers/node_modules/.bin/azurite-blob"
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Not a secret: every Azurite has this account by default."""
CONTAINER = "container"


class Azure(Server):
    name = "azure"

    @classmethod
    def missing(cls) -> str | None:
        if not PROGRAM.exists():
            return "azurite is not in .servers; run: make servers (it needs npm)"
        return missing(["node"], ["adlfs"])

    @classmethod
    def start(cls, folder: Path) -> Azure:
        [port] = free_ports(1)
        command = ["node", str(PROGRAM.resolve()), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
        command += ["--location", str(folder), "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
        return cls(folder, port, (spawn(command, folder / "azurite.log"),))

    def prepare(self) -> None:
        fs = fsspec.filesystem("az", skip_instance_cache=True, **self.storage_options)
        if not fs.exists(CONTAINER):
            fs.mkdir(CONTAINER)

    @property
    def url(self) -> str:
        return f"az://{CONTAINER}"

    @property
    def storage_options(self) -> Mapping[str, Any]:
        endpoint = f"http://127.0.0.1:{self.port}/{ACCOUNT}"
        secret = f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint};"
        return {"connection_string": f"DefaultEndpointsProtocol=http;{secret}"}
