"""Real servers for tests. They run on free ports of this machine, in a temporary folder, and are killed by their pid.

A test gets a server by name from the session fixture ``serve``, such as ``serve("s3").fresh()``. A test that kills its
server starts its own, ``with running(SeaweedFS, tmp_path) as server``.
"""

from __future__ import annotations

from support.servers.azure import Azure
from support.servers.chaosproxy import ChaosProxy
from support.servers.gcs import Gcs
from support.servers.hdfs import Hdfs, WebHdfs
from support.servers.launching import running
from support.servers.rclone import Rclone
from support.servers.seaweedfs import SeaweedFS
from support.servers.server import Server
from support.servers.smb import Smb
from support.servers.sshd import Sftp, Ssh
from support.servers.webdav import WebDav

__all__ = ["KINDS", "ChaosProxy", "Rclone", "SeaweedFS", "Server", "Sftp", "Ssh", "running"]

KINDS: dict[str, type[Server]] = {
    kind.name: kind for kind in (SeaweedFS, Rclone, Sftp, Ssh, WebDav, Smb, Gcs, Azure, Hdfs, WebHdfs)
}
