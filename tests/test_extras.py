"""The extra that an error names can be installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from checkpointer.errors import StorageError
from checkpointer.storage import open_storage

PYPROJECT = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
_TABLE = PYPROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
EXTRAS = set(re.findall(r"^(\w+) = \[", _TABLE, re.M))
DRIVERS = {
    "s3": ["s3fs"],
    "s3a": ["s3fs"],
    "gs": ["gcsfs"],
    "gcs": ["gcsfs"],
    "az": ["adlfs"],
    "abfs": ["adlfs"],
    "abfss": ["adlfs"],
    "sftp": ["paramiko", "sshfs"],
    "ssh": ["paramiko", "sshfs"],
    "smb": ["smbclient", "smbprotocol"],
    "webdav": ["webdav4"],
    "hdfs": ["hdfs_native", "pyarrow"],
    "webhdfs": ["requests"],
}
"""The modules that each protocol needs, any of them."""

OPEN = """
import sys
for module in sys.argv[2:]:
    sys.modules[module] = None
from checkpointer.errors import StorageError
from checkpointer.storage import open_storage
try:
    open_storage(sys.argv[1] + "://user@127.0.0.1:1/path", "")
except StorageError as error:
    print(error)
"""


@pytest.mark.parametrize("protocol", DRIVERS)
def test_a_missing_driver_names_an_extra_that_exists(protocol: str) -> None:
    """Asked in an interpreter that cannot import it."""
    command = [sys.executable, "-W", "ignore", "-c", OPEN, protocol, *DRIVERS[protocol]]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert f"no driver for {protocol}://" in said
    assert set(re.findall(r"pip install 'torch-checkpointer\[(\w+)\]'", said)) <= EXTRAS
    assert "pip install 'torch-checkpointer[" in said


def test_all_has_every_extra_of_a_user() -> None:
    """Those of this project's own work are left out."""
    listed = _TABLE.partition("\nall = [")[2].partition("\n]")[0]
    named = {name for names in re.findall(r"torch-checkpointer\[([\w,]+)\]", listed) for name in names.split(",")}

    assert EXTRAS - {"all", "demo", "docs", "test", "servers", "hosts", "pages", "ray", "peers"} == named


def test_an_unknown_protocol_names_no_extra() -> None:
    """There is none."""
    with pytest.raises(StorageError, match=r"no driver for nosuch://.*fsspec's list of filesystems"):
        open_storage("nosuch://host/path", "")
