"""SeaweedFS, an S3 server that conforms to the protocol, conditional PUT included."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec

from support.servers.processes import free_ports, missing, spawn
from support.servers.server import Server

KEY, SECRET, BUCKET = "test-key", "test-secret", "bucket"


def s3_options(port: int) -> dict[str, Any]:
    """Return the options of s3fs for a server that is not Amazon's."""
    return {
        "key": KEY,
        "secret": SECRET,
        "endpoint_url": f"http://127.0.0.1:{port}",
        "client_kwargs": {"region_name": "us-east-1"},
    }


class SeaweedFS(Server):
    name = "s3"

    @classmethod
    def missing(cls) -> str | None:
        return missing(["weed"], ["s3fs"])

    @classmethod
    def start(cls, folder: Path) -> SeaweedFS:
        roles = ["s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
        roles += ["filer.port", "filer.port.grpc", "admin.port", "admin.port.grpc"]
        ports = free_ports(len(roles))
        command = ["weed", f"-logdir={folder}", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [f"-{role}={port}" for role, port in zip(roles, ports, strict=True)]
        command += ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += ["-master.telemetry=false", f"-bucket={BUCKET}"]
        account = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        return cls(folder, ports[0], (spawn(command, folder / "weed.log", account),))

    def prepare(self) -> None:
        fs = fsspec.filesystem("s3", skip_instance_cache=True, **self.storage_options)
        # The port opens before the server can store a file.
        fs.pipe_file(f"{BUCKET}/ready", b"1")
        fs.rm_file(f"{BUCKET}/ready")

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}"

    @property
    def storage_options(self) -> Mapping[str, Any]:
        return s3_options(self.port)
