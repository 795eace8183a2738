"""The storage contract on real servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.servers.fixtures import Serve

from checkpointer.ports import Storage, SupportsSweep
from checkpointer.storage import open_storage
from checkpointer.storage.owner import new_owner
from checkpointer.storage.retry import Retry
from checkpointer.testing import StorageContract

pytestmark = pytest.mark.slow


class ServerContract(StorageContract):
    """Each storage has a new folder on the server of this name."""

    server: str

    @pytest.fixture(autouse=True)
    def _use_server(self, serve: Serve) -> Iterator[None]:
        self.running = serve(self.server)
        self.opened: list[Storage] = []
        yield
        for storage in self.opened:
            assert isinstance(storage, SupportsSweep)
            storage.close()

    def make_storage(self) -> Storage:
        options = {"retry": Retry(deadline_s=5), **self.running.storage_options}
        self.opened.append(open_storage(self.running.fresh(), new_owner(), options))
        return self.opened[-1]


class TestS3(ServerContract):
    """SeaweedFS has conditional PUT."""

    server = "s3"


class TestS3WithoutConditions(ServerContract):
    """rclone ignores conditions, and answers 500 for a key below another key."""

    server = "rclone"


class TestSftp(ServerContract):
    """sshd by paramiko."""

    server = "sftp"


class TestSsh(ServerContract):
    """sshd by sshfs."""

    server = "ssh"


class TestWebDav(ServerContract):
    """WsgiDAV by webdav4."""

    server = "webdav"


class TestSmb(ServerContract):
    """Samba by smbprotocol."""

    server = "smb"


class TestGcs(ServerContract):
    """An emulator by gcsfs."""

    server = "gcs"


class TestAzure(ServerContract):
    """Azurite by adlfs."""

    server = "azure"


class TestHdfs(ServerContract):
    """A NameNode and a DataNode by hdfs-native."""

    server = "hdfs"


class TestWebHdfs(ServerContract):
    """The same by HTTP."""

    server = "webhdfs"
