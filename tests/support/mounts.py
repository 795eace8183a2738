"""Real filesystems for tests. Each is mounted below the test's own folder, and always unmounted."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from support.servers.fixtures import lacks

MIB = 1 << 20
PATIENCE_S = 60.0
Mount = Callable[[Path], contextlib.AbstractContextManager[Path]]


def need(*programs: str, fuse: bool = False, loop: bool = False, part: str = "mounts") -> None:
    """Skip the test, or fail it if ``part`` is required, unless these programs can run here as root."""
    missing = [program for program in programs if shutil.which(program, path=_PATH) is None]
    if os.geteuid() != 0:
        missing.append("root")
    missing += ["/dev/fuse"] if fuse and not os.path.exists("/dev/fuse") else []
    missing += ["/dev/loop-control"] if loop and not os.path.exists("/dev/loop-control") else []
    give_up(missing, part)


def give_up(missing: list[str], part: str = "mounts") -> None:
    """Skip the test if a part is missing; fail it if ``part`` is required."""
    if missing:
        lacks(part, f"this machine lacks {', '.join(missing)}")


_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def sh(*command: object) -> str:
    """Run a program and return its output; a failure shows its messages."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, "PATH": _PATH}
    )
    assert 0 == done.returncode, f"{' '.join(map(str, command))}: {done.stderr or done.stdout}"
    return done.stdout.strip()


def _mount(*command: object) -> None:
    """Mount. If the kernel or container refuses it, the part counts as missing."""
    try:
        sh(*command)
    except AssertionError as error:
        give_up([str(error)])


def unmount(target: Path) -> None:
    """Unmount. If the mount is in use, try again for a minute, and then detach it."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            sh("umount", target)
            return
        except AssertionError:
            if time.monotonic() > deadline:
                sh("umount", "-l", target)
                raise
            time.sleep(0.02)


def wait_detached(image: object) -> None:
    """Wait until the kernel has let go of a disk image: another mount namespace may have copied the mount for a moment.

    Else the next mount of the image would show the old contents.
    """
    deadline = time.monotonic() + PATIENCE_S
    while sh("losetup", "-j", image):
        assert time.monotonic() < deadline, f"{image} is still attached"
        time.sleep(0.02)


@contextlib.contextmanager
def mounted(target: Path, *command: object) -> Iterator[Path]:
    """Run a mount command for ``target``, and unmount it afterwards."""
    target.mkdir(parents=True, exist_ok=True)
    _mount(*command)
    try:
        yield target
    finally:
        unmount(target)
        if "loop" in command:
            wait_detached(command[-2])


def image(path: Path, kind: str, size: int) -> Path:
    """Make a sparse disk image with an empty filesystem."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as stream:
        stream.truncate(size)
    options = {
        "ext4": ("-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"),
        "xfs": ("-q", "-f", "-K"),
    }[kind]
    sh(f"mkfs.{kind}", *options, path)
    return path


@contextlib.contextmanager
def tmpfs(base: Path, size: int = 64 * MIB) -> Iterator[Path]:
    """Mount a tmpfs of ``size`` bytes."""
    need("mount")
    with mounted(base / "tmpfs", "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", base / "tmpfs") as path:
        yield path


@contextlib.contextmanager
def loop(base: Path, kind: str, size: int) -> Iterator[Path]:
    """Mount a new image, which is held in memory, through a loop device."""
    need("mount", "losetup", f"mkfs.{kind}", loop=True)
    with tmpfs(base / f"{kind}-memory", 2 * size) as memory:
        disk = image(memory / "disk.img", kind, size)
        with mounted(base / kind, "mount", "-t", kind, "-o", "loop", disk, base / kind) as path:
            yield path


def ext4(base: Path, size: int = 64 * MIB) -> contextlib.AbstractContextManager[Path]:
    """Mount an ext4 of ``size`` bytes."""
    return loop(base, "ext4", size)


def xfs(base: Path, size: int = 320 * MIB) -> contextlib.AbstractContextManager[Path]:
    """Mount an XFS of ``size`` bytes, at least 300 MiB."""
    return loop(base, "xfs", size)


@contextlib.contextmanager
def read_only(folder: Path, base: Path) -> Iterator[Path]:
    """Mount a folder under another path, read-only."""
    need("mount")
    with mounted(base / "read-only", "mount", "--bind", folder, base / "read-only") as path:
        sh("mount", "-o", "remount,ro,bind", path)
        yield path


@contextlib.contextmanager
def bindfs(base: Path, *options: str) -> Iterator[Path]:
    """Mount a folder through FUSE, with ``options`` that refuse requests, such as ``--chmod-deny``."""
    need("bindfs", "mount", fuse=True)
    source = base / "source"
    source.mkdir(parents=True, exist_ok=True)
    with mounted(base / "bindfs", "bindfs", *options, source, base / "bindfs") as path:
        yield path


def no_chmod(base: Path) -> contextlib.AbstractContextManager[Path]:
    """Mount a filesystem that refuses chmod and chown."""
    return bindfs(base, "--chmod-deny", "--chown-deny")


@contextlib.contextmanager
def _by_fuse(base: Path, kind: str, driver: str, size: int) -> Iterator[Path]:
    # NTFS adds little to the others, so it is a part of its own.
    need(driver, f"mkfs.{kind}", "losetup", "mount", fuse=True, loop=True, part="ntfs" if kind == "ntfs" else "mounts")
    disk = base / f"{kind}.img"
    disk.parent.mkdir(parents=True, exist_ok=True)
    with open(disk, "wb") as stream:
        stream.truncate(size)
    device = sh("losetup", "--find", "--show", disk)
    try:
        sh(f"mkfs.{kind}", *(("-q", "-F", "-Q") if kind == "ntfs" else ()), device)
        with mounted(base / kind, driver, device, base / kind) as path:
            yield path
    finally:
        sh("losetup", "-d", device)


def exfat(base: Path, size: int = 64 * MIB) -> contextlib.AbstractContextManager[Path]:
    """Mount an exFAT: it ignores case, has no links, and stores times in whole seconds."""
    return _by_fuse(base, "exfat", "mount.exfat-fuse", size)


def ntfs(base: Path, size: int = 64 * MIB) -> contextlib.AbstractContextManager[Path]:
    """Mount an NTFS through ntfs-3g."""
    return _by_fuse(base, "ntfs", "ntfs-3g", size)


@contextlib.contextmanager
def filled(folder: Path, leave: int) -> Iterator[None]:
    """Fill the filesystem of ``folder`` except for about ``leave`` bytes, and free it again afterwards."""
    ballast = folder / "ballast"
    try:
        with open(ballast, "wb", buffering=0) as stream:
            for chunk in (MIB, 4096):
                with contextlib.suppress(OSError):
                    while stream.write(bytes(chunk)) == chunk:
                        pass
            os.fsync(stream.fileno())
            stream.truncate(max(0, stream.tell() - leave))
            os.fsync(stream.fileno())
        yield
    finally:
        ballast.unlink(missing_ok=True)
