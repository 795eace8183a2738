"""Real servers for tests: started on free ports of this machine, in a temp folder, and killed by their pid.

A test asks the session fixture ``serve`` for one by name, such as ``serve("s3").fresh()``; a test that kills its server
starts one of its own, ``with running(SeaweedFS, tmp_path) as server``.
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
