"""OpenSSH's server with its own keys, by paramiko as ``sftp://`` and by asyncssh as ``ssh://``."""

from __future__ import annotations

import getpass
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec

from support.servers.processes import find_program, free_ports, missing, spawn
from support.servers.server import Server

_CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/client.pub
PidFile {folder}/pid
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
MaxStartups 100
MaxSessions 100
Subsystem sftp internal-sftp
"""


class Sftp(Server):
    """By ``SFTPFileSystem`` of fsspec, the driver of ``sftp://`` until sshfs is installed."""

    name = "sftp"

    @classmethod
    def missing(cls) -> str | None:
        return missing(["sshd", "ssh-keygen"], ["paramiko"])

    @classmethod
    def prepare_client(cls) -> None:
        # If sshfs is installed, it registers this protocol too, so paramiko must be registered again.
        from fsspec.implementations.sftp import SFTPFileSystem

        fsspec.register_implementation("sftp", SFTPFileSystem, clobber=True)

    @classmethod
    def start(cls, folder: Path) -> Server:
        for name in ("host", "client"):
            command = [find_program("ssh-keygen") or "", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(command, check=True)
        (folder / "files").mkdir()
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        [port] = free_ports(1)
        config = folder / "sshd_config"
        config.write_text(_CONFIG.format(port=port, folder=folder))
        return cls(folder, port, (spawn(["sshd", "-D", "-e", "-f", config], folder / "sshd.log"),))

    @property
    def url(self) -> str:
        return f"sftp://{getpass.getuser()}@127.0.0.1:{self.port}{self.folder}/files"

    @property
    def storage_options(self) -> Mapping[str, Any]:
        return {"key_filename": str(self.folder / "client"), "look_for_keys": False, "allow_agent": False}


class Ssh(Sftp):
    """By ``sshfs``, whose options have other names."""

    name = "ssh"

    @classmethod
    def missing(cls) -> str | None:
        return missing(["sshd", "ssh-keygen"], ["sshfs"])

    @classmethod
    def prepare_client(cls) -> None:
        from sshfs import SSHFileSystem

        fsspec.register_implementation("ssh", SSHFileSystem, clobber=True)

    @property
    def url(self) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}{self.folder}/files"

    @property
    def storage_options(self) -> Mapping[str, Any]:
        return {"client_keys": [str(self.folder / "client")], "known_hosts": None}
