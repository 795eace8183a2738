"""The commands on files without a record, on names, and in a shell: show, diff, export, verify, rm, pin, completion."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import POLICY, Said, command, snapshot, train

from checkpointer import CheckpointManager, EverySteps, KeepAll, KeepLast, Policy


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of which step 20 is the best and step 40 the last."""
    return train(tmp_path / "run", 0.9, 0.2, 0.5, 0.7)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """What torch.save writes, in a directory without records."""
    path = tmp_path / "model.pt"
    torch.save({"model": {"w": torch.arange(6.0).reshape(2, 3)}, "step": 7}, path)
    return path


# show


def test_show_takes_any_file_or_folder(file: Path, tmp_path: Path) -> None:
    """A torch file, a safetensors file, a folder of them; nothing is asked of them but that they hold tensors."""
    save_file({"w": torch.ones(4)}, tmp_path / "w.safetensors")
    said = command("show", file)
    assert (0, "") == (said.code, said.err)
    assert "model.w  float32  2 x 3   24 B" in said.out
    assert "record  none" in said.out
    assert ["w"] == [one["name"] for one in command("show", tmp_path / "w.safetensors", "--json").data["tensors"]]
    names = [one["name"] for one in command("show", tmp_path, "--json").data["tensors"]]
    assert ["model.pt: model.w", "w.safetensors: w"] == names


def test_show_takes_the_path_that_best_and_last_print(run: Path) -> None:
    """With its record; also through an alias that is a link, and at a URL."""
    path = command("best", run).out.strip()
    assert 20 == command("show", path, "--json").data["step"]
    assert 40 == command("show", run / "last.ckpt", "--json").data["step"]
    assert 0 == command("copy", run, "memory://any/run").code
    data = command("show", "memory://any/run/epoch=1-step=20.ckpt", "--json").data
    assert (20, "memory://any/run/epoch=1-step=20.ckpt") == (data["step"], data["path"])


def test_show_of_a_directory_of_checkpoints_asks_for_a_name(run: Path) -> None:
    """And shows how."""
    for place in (run, run.parent):
        said = command("show", place)
        assert (2, "") == (said.code, said.out)
    assert f"'checkpointer ls {run}' lists the names" in command("show", run).err


def test_a_path_that_is_not_there_has_the_closest_name_in_its_error(file: Path) -> None:
    """One line without the number of the system's error."""
    for name in ("show", "verify"):
        said = command(name, file.parent / "modle.pt")
        assert (2, "") == (said.code, said.out)
        assert f"checkpointer: there is no file or folder {file.parent}/modle.pt (did you mean {file}?)\n" == said.err
    assert "there is no file or folder memory://no/where" in command("show", "memory://no/where").err


# diff and export


def test_diff_takes_two_files(file: Path, run: Path, tmp_path: Path) -> None:
    """Of any format, from any place; the exit code is that of diff."""
    torch.save({"model": {"w": torch.zeros(2, 3)}, "step": 7}, tmp_path / "b.pt")
    said = command("diff", file, tmp_path / "b.pt")
    assert (1, True) == (said.code, "1 of 1 tensor and 0 values differ" in said.out)
    assert 0 == command("diff", file, file).code
    assert 1 == command("diff", file, command("best", run).out.strip()).code
    said = command("diff", file)
    assert (2, True) == (said.code, "diff takes two files, or a directory and two checkpoints" in said.err)


def test_export_takes_a_file(file: Path, tmp_path: Path) -> None:
    """The weights of what torch.save wrote, as safetensors."""
    out = tmp_path / "w.safetensors"
    assert 0 == command("export", file, out).code
    assert [3.0, 4.0, 5.0] == load_file(out)["w"][1].tolist()
    said = command("export", file, tmp_path / "nowhere" / "w.safetensors")
    assert (2, True) == (said.code, f"there is no directory {tmp_path}/nowhere to write w.safetensors to" in said.err)


# verify


def test_verify_without_a_record_uses_the_checksums_in_a_torch_file(file: Path) -> None:
    """Each part of the zip file has a CRC32."""
    said = command("verify", file)
    assert (0, True) == (said.code, "ok    model.pt: the checksums of its parts" in said.out)
    data = bytearray(file.read_bytes())
    data[data.index(torch.arange(6.0).numpy().tobytes()) + 5] ^= 1
    file.write_bytes(data)
    said = command("verify", file)
    assert (1, True) == (said.code, "BAD   model.pt: its part model/data/0 has other bytes" in said.out)


@pytest.mark.parametrize("name", ["x.bin.sha256", "SHA256SUMS", "x.bin.md5"])
def test_verify_without_a_record_uses_a_checksum_file(tmp_path: Path, name: str) -> None:
    """As sha256sum and md5sum write it, for one file and for a folder."""
    (tmp_path / "x.bin").write_bytes(b"data")
    hasher = hashlib.md5(b"data") if "md5" in name else hashlib.sha256(b"data")
    (tmp_path / name).write_text(f"{hasher.hexdigest()}  x.bin\n")
    for place in (tmp_path / "x.bin", tmp_path):
        said = command("verify", place)
        assert (0, True) == (said.code, f"in {name}" in said.out)
    (tmp_path / "x.bin").write_bytes(b"dada")
    assert 1 == command("verify", tmp_path / "x.bin").code


def test_verify_says_if_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    """That is not "whole"."""
    (tmp_path / "notes.md").write_text("text")
    said = command("verify", tmp_path / "notes.md")
    assert (2, "") == (said.code, said.out)
    assert "notes.md can be verified: it has no record and no checksum file" in said.err


def test_verify_takes_the_path_of_a_checkpoint(run: Path) -> None:
    """Its record is beside it."""
    said = command("verify", run / "last.ckpt")
    assert (0, True) == (said.code, "1 of 1 whole, 0 bad; 1." in said.out)


# ls


def test_ls_prints_names_for_scripts_and_the_newest_with_a_limit(run: Path) -> None:
    """As ls -1 does."""
    names = ["epoch=1-step=20.ckpt", "epoch=2-step=30.ckpt", "epoch=3-step=40.ckpt"]
    assert names == command("ls", run, "-1").out.splitlines()
    assert names[:0:-1] == command("ls", run, "-1", "-n", 2).out.splitlines()
    assert names[1:2] == command("ls", run, "-1", "-n", 1, "-s", "epoch", "-w", "loss>0.4").out.splitlines()


def test_ls_refuses_a_metric_that_no_checkpoint_has(run: Path) -> None:
    """An empty column would look like a metric that was not measured."""
    said = command("ls", run, "-m", "losss")
    assert (2, "checkpointer: no checkpoint has the metric 'losss' (did you mean 'loss'?)\n") == (said.code, said.err)


# rm, pin, unpin


def test_rm_shows_first_and_removes_with_apply(run: Path) -> None:
    """The payload and the record; the others stay."""
    before = snapshot(run)
    said = command("rm", run, "30")
    assert (0, True) == (said.code, "would remove 1 checkpoint" in said.out)
    assert before == snapshot(run)
    said = command("rm", run, "30", "--apply")
    assert (0, True) == (said.code, "removed 1 checkpoint" in said.out)
    assert [20, 40] == [one["step"] for one in command("ls", run, "--json").data]
    assert not (run / "epoch=2-step=30.ckpt").exists()


def test_rm_leaves_what_is_pinned_or_named_by_an_alias(run: Path) -> None:
    """And then removes nothing at all."""
    assert 0 == command("pin", run, "30").code
    for name, why in (("30", "it is pinned; 'checkpointer unpin"), ("last", "last.ckpt points to it")):
        assert (1, True) == ((said := command("rm", run, name)).code, why in said.out)
        assert (2, True) == ((said := command("rm", run, name, "--apply")).code, why in said.err)
    assert 3 == len(command("ls", run, "-1").out.splitlines())


def test_rm_of_the_newest_says_from_where_the_run_would_go_on(tmp_path: Path) -> None:
    """So that it is not a surprise at the next start."""
    folder = train(tmp_path / "run", 0.9, 0.5, policy=Policy(EverySteps(1), [KeepAll()]))
    assert "the run would go on from epoch=0-step=10.ckpt (step 10)" in command("rm", folder, "20").err


def test_a_pinned_checkpoint_stays_until_it_is_unpinned(run: Path) -> None:
    """The pin is in its record, so a manager and prune respect it."""
    said = command("pin", run, "30")
    assert (0, "pinned  epoch=2-step=30.ckpt\n") == (said.code, said.out)
    with CheckpointManager(run, Policy(EverySteps(1), [KeepLast(1)]), state=dict) as manager:
        manager.restore()
        manager.observe({"loss": 0.1}, step=50, epoch=4)
        assert [30, 50] == [record.step for record in manager.records if record.step > 20]
    assert "pinned  epoch=2-step=30.ckpt (was so before)\n" == command("pin", run, "30").out
    command("unpin", run, "30")
    assert [False] == [one["pinned"] for one in command("ls", run, "--json", "-w", "step=30").data]


def test_what_a_process_writes_to_is_not_changed(tmp_path: Path) -> None:
    """Its manager would not see the pin, and might rely on what was removed."""
    with CheckpointManager(tmp_path / "run", POLICY, state=dict) as manager:
        manager.observe({"loss": 0.5}, step=10, epoch=0)
        for argv in (["pin"], ["unpin"], ["rm", "--apply"]):
            said = command(argv[0], tmp_path / "run", "10", *argv[1:])
            assert (2, True) == (said.code, "is writing to" in said.err or "points to it" in said.err)


# Errors


def test_errors_have_no_number_of_the_system(run: Path, tmp_path: Path) -> None:
    """Errno 2 says nothing to a reader."""
    (tmp_path / "policy.yaml").mkdir()
    for argv in (
        ["ls", run, "--policy", tmp_path / "polcy.yaml"],
        ["ls", run, "--policy", tmp_path / "policy.yaml"],
        ["simulate", tmp_path / "nope.csv", "--policy", tmp_path / "policy.yaml"],
        ["plot", run, tmp_path / "none" / "x.png"],
        ["copy", run, run],
    ):
        said = command(*argv)
        assert (2, "") == (said.code, said.out)
        assert "Errno" not in said.err
        assert "mirror" not in said.err
    assert "polcy.yaml (did you mean" in command("ls", run, "--policy", tmp_path / "polcy.yaml").err


# As a process, and in a shell


def shell(text: str, **env: str) -> Said:
    """Run a line of bash, in which $CKPT is the command."""
    env = {**os.environ, "CKPT": f"{sys.executable} -m checkpointer", **env}
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=120, env=env)
    return Said(done.returncode, done.stdout, done.stderr)


def test_a_closed_pipe_changes_no_exit_code(tmp_path: Path) -> None:
    """As in ``checkpointer ls runs | head -1``: 0 is fine, and 1 still says that something is bad."""
    folder = train(tmp_path / "run", *([0.5] * 60), policy=Policy(EverySteps(1), [KeepAll()]))
    said = shell(f"$CKPT ls {folder} --json | head -1; echo ${{PIPESTATUS[0]}}")
    assert (["[", "0"], "") == (said.out.split(), said.err)
    next(folder.glob("*.ckpt")).write_bytes(b"")
    said = shell(f"$CKPT verify {folder} --json | head -1; echo ${{PIPESTATUS[0]}}")
    assert ["[", "1"] == said.out.split()


def test_the_shell_completes_names_and_metrics(run: Path) -> None:
    """Of the directory that is on its line already."""

    def complete(*typed: str) -> list[str]:
        env = {"_CHECKPOINTER_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        env |= {"_TYPER_COMPLETE_ARGS": " ".join(["checkpointer", *typed])}
        code = "import sys; from checkpointer.cli.app import run; sys.exit(run())"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ, **env}
        )
        return [line.partition("\t")[0] for line in done.stdout.splitlines()]

    assert ["epoch=3-step=40.ckpt"] == complete("show", str(run), "epoch=3")
    assert ["last.ckpt"] == complete("diff", str(run), "20", "la")
    assert ["loss"] == complete("ls", str(run), "--metric", "lo")
    assert ["unpin"] == complete("unp")


def test_help_has_each_command_once_and_imports_none_of_them() -> None:
    """It is what a new user types first."""
    code = (
        "import sys; from checkpointer.cli.app import run; run(['--help']); "
        "print([m for m in sys.modules if m.startswith('checkpointer.cli.commands') or m in ('rich', 'yaml', 'attr')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "[]" == done.stdout.splitlines()[-1]
    from checkpointer.cli.app import COMMANDS

    for name in (name for group in COMMANDS.values() for name in group):
        assert 1 == sum(line.startswith(f"  {name} ") for line in done.stdout.splitlines()), name
        assert 0 == command(name, "--help").code


def test_version_lists_what_a_report_needs() -> None:
    """Without an import of torch."""
    data = command("version", "--json").data
    assert (torch.__version__.partition("+")[0], []) == (data["versions"]["torch"].partition("+")[0], data["problems"])
    assert "torch-checkpointer" in json.dumps(data)
