"""The page on what lies on disk is enough to read a directory: this reader uses nothing of the library."""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from checkpointer import CheckpointManager, EverySteps, HMACKey, KeepBest, KeepLast, Policy

SECRET = b"0123456789abcdef0123456789abcdef"
NEW: dict[str, Any] = {"xxh3-128": xxhash.xxh3_128, "sha256": hashlib.sha256}


def read_records(directory: Path) -> list[dict[str, Any]]:
    """Return the committed records, in commit order."""
    files = [json.loads(path.read_text()) for path in (directory / ".checkpointer/records").rglob("*.json")]
    return sorted((f["record"] for f in files if f["status"] == "committed"), key=lambda record: record["serial"])


def digest(payload: Path, algorithm: str) -> tuple[int, str]:
    hashed, size = NEW[algorithm.removeprefix("files-")](), 0
    folder = payload.is_dir()
    files = (
        {f.relative_to(payload).as_posix(): f for f in payload.rglob("*") if f.is_file()} if folder else {"": payload}
    )
    for inside, file in sorted(files.items()):
        data = file.read_bytes()
        size += len(data)
        if folder and algorithm.startswith("files-"):
            digits = NEW[algorithm.removeprefix("files-")](data).hexdigest()
            hashed.update(f"{inside}\0{len(data)}\0{digits}\0".encode())
            continue
        if folder:
            hashed.update(f"{inside}\0{len(data)}\0".encode())
        hashed.update(data)
    return size, f"{algorithm}:{hashed.hexdigest()}"


def counts(record: dict[str, Any], line: list[list[int]]) -> bool:
    shared = len(record["line"])
    return bool(record["line"] == line[:shared] and all(record["step"] <= step for _, step in line[shared:]))


@pytest.mark.parametrize("format", ["torch", "safetensors", "dcp"])
@pytest.mark.parametrize("trust", [None, HMACKey(SECRET)], ids=["plain", "signed"])
@pytest.mark.filterwarnings("ignore:contents='weights'")
def test_a_directory_is_read_by_the_page_alone(tmp_path: Path, format: str, trust: HMACKey | None) -> None:
    """Records, digests, signatures, and which records count after a run went back to an older step."""
    contents: Any = "weights" if format == "safetensors" else "full"
    policy = Policy(EverySteps(1), [KeepBest(2, "loss", mode="min"), KeepLast(2)], contents=contents)
    state = {"w": torch.arange(5.0)}
    with CheckpointManager(tmp_path, policy, state=lambda: state, format=format, trust=trust) as manager:
        for step, loss in enumerate([0.3, float("nan"), 0.5, 0.2], start=1):
            manager.observe({"loss": loss}, step, 0, epoch_end=False)
    with CheckpointManager(tmp_path, policy, state=lambda: state, format=format, trust=trust) as manager:
        manager.restore(3, contents="any")
        manager.observe({"loss": 0.1}, 5, 0, epoch_end=False)
        live, abandoned = [r.step for r in manager.records], [r.step for r in manager.session.manifest.abandoned]

    records = read_records(tmp_path)
    line = records[-1]["line"]
    assert live == [record["step"] for record in records if counts(record, line)]
    assert abandoned == [record["step"] for record in records if not counts(record, line)]
    assert [4] == abandoned
    for record in records:
        algorithm = record["digest"].partition(":")[0]
        assert f"{'files-' if format == 'dcp' else ''}{'sha256' if trust else 'xxh3-128'}" == algorithm
        assert (record["size"], record["digest"]) == digest(tmp_path / record["name"], algorithm)
        assert "dcp" != format or (tmp_path / record["name"]).is_dir()
        for inside, (size, digits) in record.get("files", {}).items():
            data = (tmp_path / record["name"] / inside).read_bytes()
            assert (size, digits) == (len(data), NEW[algorithm.removeprefix("files-")](data).hexdigest())
        assert ("files" in record) == (format == "dcp")
        if trust is not None:
            signed = json.loads((tmp_path / ".checkpointer/records" / f"{record['name']}.json").read_text())
            signature = signed.pop("signature")
            text = json.dumps(signed, sort_keys=True, separators=(",", ":")).encode()
            assert f"hmac-sha256:{hmac.new(SECRET, text, 'sha256').hexdigest()}" == signature


def test_a_directory_written_by_the_page_alone_is_read_by_the_library(tmp_path: Path) -> None:
    """Another writer, in another language perhaps, needs a payload and a record."""
    torch.save({"w": 7}, tmp_path / "mine.ckpt")
    size, digested = digest(tmp_path / "mine.ckpt", "xxh3-128")
    record = {
        "name": "mine.ckpt", "step": 12, "epoch": 1, "epoch_end": True, "metrics": {"loss": 0.5, "norm": "inf"},
        "time": 1.5, "size": size, "digest": digested, "format": "torch", "contents": "full", "kind": "regular",
        "reason": "", "run": "theirs", "label": "", "line": [], "serial": 1, "token": "x", "pinned": False,
    }  # fmt: skip
    records = tmp_path / ".checkpointer" / "records"
    records.mkdir(parents=True)
    (records / "mine.ckpt.json").write_text(json.dumps({"schema": 1, "status": "committed", "record": record}))

    with CheckpointManager(tmp_path) as manager:
        restored = manager.restore()
        assert restored is not None
        assert ({"w": 7}, 12, {"loss": 0.5, "norm": float("inf")}) == (
            restored.state,
            restored.step,
            dict(restored.record.metrics),
        )
