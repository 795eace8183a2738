"""rclone's S3 server. Like many others it ignores conditional PUT, and stores objects in real folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.servers.processes import free_ports, missing, spawn
from support.servers.seaweedfs import BUCKET, KEY, SECRET, s3_options
from support.servers.server import Server


class Rclone(Server):
    name = "rclone"

    @classmethod
    def missing(cls) -> str | None:
        return missing(["rclone"], ["s3fs"])

    @classmethod
    def start(cls, folder: Path) -> Rclone:
        (folder / "files" / BUCKET).mkdir(parents=True)
        [port] = free_ports(1)
        command = ["rclone", "serve", "s3", "--config", "/dev/null", "--addr", f"127.0.0.1:{port}"]
        command += ["--auth-key", f"{KEY},{SECRET}", str(folder / "files")]
        return cls(folder, port, (spawn(command, folder / "rclone.log"),))

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}"

    @property
    def storage_options(self) -> Mapping[str, Any]:
        # With each part, rclone sends a checksum of the whole file.
        return {**s3_options(self.port), "config_kwargs": {"response_checksum_validation": "when_required"}}
