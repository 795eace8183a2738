"""What is known of each protocol, such as ``s3``: which extra has its driver, and what its servers do.

A new one that fsspec has a driver for needs a line here; `checkpointer.storage.opening` chooses the storage.
"""

from __future__ import annotations

from typing import Final

OBJECT_STORES: Final = frozenset({"abfs", "abfss", "az", "gcs", "gs", "memory", "oci", "oss", "s3", "s3a"})
"""A file appears whole when its upload ends, and there are neither folders nor renames."""

UNSAFE: Final = {"smb": '"*:<>?|', "webdav": "#%*?[]", "webhdfs": "#%*?[]{}", "hdfs": "#%*?[]{}"}
"""Characters that the server refuses, or that the driver does not take as a part of a name."""
EXTRAS: Final = {
    "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure",
    "sftp": "sftp", "ssh": "sftp", "smb": "smb", "webdav": "webdav", "hdfs": "hdfs", "webhdfs": "webhdfs",
}  # fmt: skip
"""The extra of this package that has the driver."""
