"""Real servers for tests: started on free ports of this machine, in a temp folder, and killed by their pid.

A test asks the session fixture ``serve`` for one by name, such as ``serve("s3").fresh()``; a test that kills its server
starts one of its own, ``with running(SeaweedFS, tmp_path) as server``.
"""

from __future__ import annotations

from servers.azure import Azure
from servers.chaosproxy import ChaosProxy
from servers.gcs import Gcs
from servers.hdfs import Hdfs, WebHdfs
from servers.launching import running
from servers.rclone import Rclone
from servers.seaweedfs import SeaweedFS
from servers.server import Server
from servers.smb import Smb
from servers.sshd import Sftp, Ssh
from servers.webdav import WebDav

__all__ = ["KINDS", "ChaosProxy", "Rclone", "SeaweedFS", "Server", "Sftp", "Ssh", "running"]

KINDS: dict[str, type[Server]] = {
    kind.name: kind for kind in (SeaweedFS, Rclone, Sftp, Ssh, WebDav, Smb, Gcs, Azure, Hdfs, WebHdfs)
}
