"""Hadoop's NameNode and DataNode, by its native protocol and by WebHDFS. The jars come from pyspark 2.4.8."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec

from support.servers.processes import find_program, free_ports, kill, missing, spawn
from support.servers.server import Server

DEBIAN_JARS = ("jersey1-core", "jersey1-server", "jersey1-servlet", "jsr311-api", "commons-daemon")
OPENED = (
    "java.base/java.lang",
    "java.base/java.nio",
    "java.base/java.util",
    "java.base/sun.nio.ch",
    "java.security.jgss/sun.security.krb5",
)
_LOG = """\
log4j.rootLogger=INFO,c
log4j.appender.c=org.apache.log4j.ConsoleAppender
log4j.appender.c.layout=org.apache.log4j.PatternLayout
log4j.appender.c.layout.ConversionPattern=%d %p %c{1}: %m%n
"""


class Hdfs(Server):
    """By ``hdfs-native``."""

    name = "hdfs"

    @classmethod
    def missing(cls) -> str | None:
        jars = os.environ.get("CHECKPOINTER_HADOOP", "")
        if not jars:
            return (
                "CHECKPOINTER_HADOOP is not set to a folder of jars; run: CHECKPOINTER_WITH_HDFS=1 .ci/install-servers"
            )
        if not list(Path(jars).glob("hadoop-hdfs-*.jar")):
            return f"CHECKPOINTER_HADOOP is {jars}, and no hadoop-hdfs-*.jar is in there"
        absent = [name for name in DEBIAN_JARS if not _debian_jar(name).exists()]
        return f"not installed: {absent}; run: make servers" if absent else missing(["java"], ["hdfs_native"])

    @classmethod
    def prepare_client(cls) -> None:
        from hdfs_native.fsspec import HdfsFileSystem

        # fsspec's own driver of this name needs a libhdfs.so, which only a complete Hadoop has.
        fsspec.register_implementation("hdfs", HdfsFileSystem, clobber=True)

    @classmethod
    def start(cls, folder: Path) -> Server:
        rpc, http = ports = free_ports(2)
        java = _java(_configure(folder, rpc, http), os.environ["CHECKPOINTER_HADOOP"])
        namenode = "org.apache.hadoop.hdfs.server.namenode.NameNode"
        subprocess.run([*java, namenode, "-format", "-nonInteractive"], check=True, capture_output=True)
        pids = [spawn([*java, namenode], folder / "namenode.log")]
        try:
            datanode = "org.apache.hadoop.hdfs.server.datanode.DataNode"
            pids.append(spawn([*java, datanode], folder / "datanode.log"))
        except BaseException:
            kill(pids)
            raise
        return cls(folder, ports[cls._port_index()], tuple(pids))

    @classmethod
    def _port_index(cls) -> int:
        return 0

    def prepare(self) -> None:
        fs = fsspec.filesystem(self.url.partition("://")[0], skip_instance_cache=True, **self._address())
        # This fails until the DataNode has registered.
        fs.pipe_file("/ready", b"1")
        fs.rm_file("/ready")

    def _address(self) -> Mapping[str, Any]:
        return {"host": "127.0.0.1", "port": self.port}

    @property
    def url(self) -> str:
        return f"hdfs://127.0.0.1:{self.port}"

    @property
    def storage_options(self) -> Mapping[str, Any]:
        return {}


class WebHdfs(Hdfs):
    """By fsspec's own driver, over HTTP."""

    name = "webhdfs"

    @classmethod
    def prepare_client(cls) -> None:
        """Nothing: it comes with fsspec."""

    @classmethod
    def _port_index(cls) -> int:
        return 1

    @property
    def url(self) -> str:
        return f"webhdfs://127.0.0.1:{self.port}"


def _configure(folder: Path, rpc: int, http: int) -> Path:
    data, data_http, data_ipc = free_ports(3)
    core = {"fs.defaultFS": f"hdfs://127.0.0.1:{rpc}", "hadoop.tmp.dir": folder / "data"}
    hdfs = {
        "dfs.replication": 1,
        "dfs.namenode.http-address": f"127.0.0.1:{http}",
        "dfs.namenode.rpc-address": f"127.0.0.1:{rpc}",
        "dfs.datanode.address": f"127.0.0.1:{data}",
        "dfs.datanode.http.address": f"127.0.0.1:{data_http}",
        "dfs.datanode.ipc.address": f"127.0.0.1:{data_ipc}",
        "dfs.datanode.hostname": "127.0.0.1",
        "dfs.permissions.enabled": "false",
        "dfs.webhdfs.enabled": "true",
        "dfs.namenode.safemode.threshold-pct": 0,
        "dfs.safemode.extension": 0,
        "dfs.datanode.du.reserved": 0,
        "dfs.namenode.datanode.registration.ip-hostname-check": "false",
    }
    # The web server needs these folders, even if they are empty.
    for name in ("webapps/hdfs", "webapps/datanode"):
        (folder / name).mkdir(parents=True)
    for name, settings in (("core-site.xml", core), ("hdfs-site.xml", hdfs)):
        lines = [f"<property><name>{key}</name><value>{value}</value></property>" for key, value in settings.items()]
        (folder / name).write_text(f"<configuration>{''.join(lines)}</configuration>")
    (folder / "log4j.properties").write_text(_LOG)
    return folder


def _java(conf: Path, jars: str) -> list[str]:
    # Debian's jars come first, because WebHDFS does not work with Spark's newer jersey.
    path = os.pathsep.join([str(conf), *(str(_debian_jar(name)) for name in DEBIAN_JARS), f"{Path(jars).resolve()}/*"])
    opened = [part for package in OPENED for part in ("--add-opens", f"{package}=ALL-UNNAMED")]
    opened += ["--add-exports", "java.security.jgss/sun.security.krb5=ALL-UNNAMED"]
    options = ["-Xmx384m", "-XX:+UseSerialGC", "-Djava.net.preferIPv4Stack=true"]
    return [find_program("java") or "java", *options, *opened, "-cp", path]


def _debian_jar(name: str) -> Path:
    return Path("/usr/share/java", f"{name}.jar")
