"""Samba with its own configuration, password file and port, by smbprotocol."""

from __future__ import annotations

import getpass
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.servers.processes import find_program, free_ports, missing, spawn
from support.servers.server import Server

_CONFIG = """\
[global]
server role = standalone server
interfaces = lo
bind interfaces only = yes
smb ports = {port}
private dir = {folder}/private
lock directory = {folder}/lock
state directory = {folder}/state
cache directory = {folder}/cache
pid directory = {folder}/pid
ncalrpc dir = {folder}/ncalrpc
log file = {folder}/smbd.log
disable netbios = yes
load printers = no
printing = bsd
disable spoolss = yes
[share]
path = {folder}/files
read only = no
"""
PASSWORD = "test-password"


class Smb(Server):
    name = "smb"

    @classmethod
    def missing(cls) -> str | None:
        return missing(["smbd", "smbpasswd"], ["smbprotocol"])

    @classmethod
    def start(cls, folder: Path) -> Smb:
        for name in ("private", "lock", "state", "cache", "pid", "ncalrpc", "files"):
            (folder / name).mkdir()
        [port] = free_ports(1)
        config = folder / "smb.conf"
        config.write_text(_CONFIG.format(port=port, folder=folder))
        command = [find_program("smbpasswd") or "", "-c", str(config), "-s", "-a", getpass.getuser()]
        subprocess.run(command, input=f"{PASSWORD}\n" * 2, text=True, check=True, capture_output=True)
        command = ["smbd", "--foreground", "--no-process-group", "--configfile", str(config)]
        return cls(folder, port, (spawn(command, folder / "smbd.out.log"),))

    @property
    def url(self) -> str:
        return f"smb://{getpass.getuser()}@127.0.0.1:{self.port}/share"

    @property
    def storage_options(self) -> Mapping[str, Any]:
        return {"password": PASSWORD}
