"""The commands that look: ls, show, best, last, verify. They change nothing, load nothing and run nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from support.commands import POLICY, command, snapshot, train
from support.factories import record

from checkpointer import CheckpointerWarning, CheckpointManager, EverySteps, HMACKey, KeepAll, KeepLast, Policy
from checkpointer.commit.index import record_path
from checkpointer.errors import NotFoundError, NoValidCheckpointError
from checkpointer.ports import Stat
from checkpointer.records.record import Entry
from checkpointer.storage import LocalStorage, open_storage
from checkpointer.storage.digests import digest_of
from checkpointer.testing import MemoryStorage
from checkpointer.tools.catalog import look_at


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of which step 20 is the best and step 40 the last."""
    return train(tmp_path / "run", 0.9, 0.2, 0.5, 0.7)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


# ls


def test_ls_shows_each_checkpoint_with_its_aliases_and_what_keeps_it(run: Path, tmp_path: Path) -> None:
    """One look answers what is there, how good it is, and why it is still there."""
    POLICY.to_yaml(tmp_path / "policy.yaml")
    said = command("ls", run, "--policy", tmp_path / "policy.yaml")
    assert 0 == said.code
    lines = [line.split() for line in said.out.splitlines()]
    assert ["step", "epoch", "loss", "acc", "size", "age", "name"] == lines[1]
    assert ["20", "1", "0.2", "0.8"] == lines[2][:4]
    shown = [line.strip() for line in said.out.splitlines()]
    assert "#1 of the best 2 by loss (min)" == shown[shown.index("<- best.ckpt") + 1]
    assert "the newest; newest (last points here)" == shown[shown.index("<- last.ckpt") + 1]


def test_ls_json_holds_the_whole_record_and_where_it_is(run: Path) -> None:
    """A script needs no second command."""
    data = command("ls", run, "--json").data
    assert [20, 30, 40] == [item["step"] for item in data]
    assert [["best.ckpt"], [], ["last.ckpt"]] == [item["aliases"] for item in data]
    assert all(Path(item["path"]).is_file() and item["digest"] and item["why"] for item in data)


def test_ls_sorts_and_filters(run: Path) -> None:
    """By any field and metric."""
    by_loss = command("ls", run, "--sort", "loss", "--json").data
    assert [0.2, 0.5, 0.7] == [item["metrics"]["loss"] for item in by_loss]
    newest = command("ls", run, "-r", "-s", "step", "-n", 1, "--json").data
    assert [40] == [item["step"] for item in newest]
    few = command("ls", run, "-w", "loss<0.6", "-w", "step>20", "--json").data
    assert [30] == [item["step"] for item in few]


def test_ls_says_which_checkpoints_are_abandoned(tmp_path: Path) -> None:
    """They look like any other, and will not be restored."""
    policy = Policy(EverySteps(1), [KeepAll()])
    folder = train(tmp_path / "run", 0.9, 0.5, policy=policy)
    with CheckpointManager(folder, policy, state=dict) as manager:
        manager.restore(10)
        manager.observe({"loss": 0.7}, step=15, epoch=0)
    data = command("ls", folder, "--json").data
    assert [15] == [item["step"] for item in data if "abandoned" not in item["why"] and item["step"] > 10]
    assert [20] == [item["step"] for item in data if "abandoned" in item["why"]]


def test_a_typo_in_a_field_or_condition_names_the_nearest(run: Path) -> None:
    """Nothing is left out in silence."""
    said = command("ls", run, "--sort", "los")
    assert (2, "checkpointer: no checkpoint has 'los' (did you mean 'loss'?)\n") == (said.code, said.err)
    assert "did you mean 'loss'?" in command("ls", run, "-w", "losss<1").err
    assert "is not a condition; write one such as" in command("ls", run, "-w", "best").err
    assert "'x' is not a number" in command("ls", run, "-w", "loss<x").err


def test_what_records_say_cannot_drive_the_terminal(tmp_path: Path) -> None:
    """A planted record may hold escape sequences; they are not passed on."""
    plant(tmp_path / "run", "a.ckpt", b"data", reason="\x1b]0;owned\x07\x1b[2J", metrics={"a\u202eb": 1.0})
    said = command("ls", tmp_path / "run")
    assert not {"\x1b", "\x07", "\u202e"} & set(said.out)


def test_json_shows_such_characters_as_escapes(tmp_path: Path) -> None:
    """Control, format and separator characters, of the basic plane and beyond it; the data is the same."""
    odd = "a\u202eb\x7f\x9b\u2028\u200bc\U000e0041\u00e9"
    plant(tmp_path / "run", "a.ckpt", b"data", reason=odd, metrics={odd: 1.0})
    for name in ("ls", "verify", "last"):
        said = command(name, tmp_path / "run", "--json")
        shown = {char for char in said.out if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
        assert {"\n"} == shown, name
    data = command("ls", tmp_path / "run", "--json").data[0]
    assert (odd, [odd]) == (data["reason"], [*data["metrics"]])


# best and last


def test_last_and_best_print_a_path_and_nothing_else(run: Path) -> None:
    """So that a script can write torch.load($(checkpointer last runs/a))."""
    assert f"{run}/epoch=3-step=40.ckpt\n" == command("last", run).out
    assert f"{run}/epoch=1-step=20.ckpt\n" == command("best", run).out
    assert f"{run}/epoch=1-step=20.ckpt\n" == command("best", run, "--by", "acc", "--mode", "max").out
    assert f"{run}/epoch=3-step=40.ckpt\n" == command("best", run, "--by", "acc", "--mode", "min").out


def test_best_without_an_alias_asks_by_which_metric(tmp_path: Path) -> None:
    """It does not guess, and lists what there is."""
    folder = train(tmp_path / "run", 0.5, policy=Policy(EverySteps(1), [KeepLast(1)]))
    said = command("best", folder)
    assert (2, "") == (said.code, said.out)
    assert "takes --by METRIC --mode min or max (metrics: loss, acc)" in said.err
    assert "did you mean 'loss'" in command("best", folder, "--by", "los", "--mode", "min").err
    assert "belong together" in command("best", folder, "--by", "loss").err


# show


def test_show_lists_tensors_and_values(run: Path) -> None:
    """Shape, dtype and bytes, of whatever torch.save wrote."""
    data = command("show", run, "last", "--json").data
    assert [
        {"name": "model.w", "dtype": "float32", "shape": [2, 3], "bytes": 24},
        {"name": "model.b", "dtype": "float32", "shape": [3], "bytes": 12},
    ] == data["tensors"]
    assert ({"lr": 0.1}, []) == (data["others"], data["calls"])
    text = command("show", run, 20).out
    assert "model.w  float32  2 x 3   24 B" in text
    assert "2 tensors, 9 elements, 36 B" in text


def test_show_takes_a_name_with_or_without_extension_a_step_or_an_alias(run: Path) -> None:
    """As a person would call it."""
    for which in ("epoch=1-step=20.ckpt", "epoch=1-step=20", "20", "best", "best.ckpt"):
        assert 20 == command("show", run, which, "--json").data["step"]
    said = command("show", run, "epoch=1-step=21.ckpt")
    assert (2, "") == (said.code, said.out)
    assert "did you mean 'epoch=1-step=20.ckpt'?" in said.err
    (run / "best.ckpt").unlink()
    assert 20 == command("show", run, "best", "--json").data["step"]


# Nothing runs


def plant(folder: Path, name: str, data: bytes, **kw: Any) -> None:
    """Put a payload with a record that agrees with it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    found = digest_of(LocalStorage(folder, ""), name, "xxh3-128")
    assert found is not None
    target = folder / record_path(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    made = record(name, **({"size": found[0], "digest": found[1]} | kw))
    target.write_bytes(Entry(record=made).to_json())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_that_would_run_code_is_listed_verified_and_shown_and_nothing_runs(
    tmp_path: Path, zipped: bool
) -> None:
    """A pickle runs what it names when it is unpickled; here it is only read."""
    path, marker = tmp_path / "bomb", tmp_path / "pwned"
    torch.save({"w": torch.ones(2), "bomb": Bomb(marker)}, path, _use_new_zipfile_serialization=zipped)
    plant(tmp_path / "run", "evil.ckpt", path.read_bytes())

    assert 0 == command("ls", tmp_path / "run").code
    assert 0 == command("verify", tmp_path / "run", "--deep").code
    data = command("show", tmp_path / "run", "evil", "--json").data

    assert [f"{os.mkdir.__module__}.mkdir"] == data["calls"]
    assert ["w"] == [tensor["name"] for tensor in data["tensors"]]
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # It would have.


def test_no_command_that_looks_changes_anything(run: Path) -> None:
    """Not a lock, not an index, not an access by another name."""
    before = snapshot(run)
    for argv in (["ls"], ["last"], ["best"], ["verify", "--deep"]):
        command(argv[0], run, *argv[1:])
    command("show", run, "last")
    assert before == snapshot(run)


# verify


def test_verify_finds_a_flipped_byte_a_cut_file_and_one_that_is_gone(run: Path) -> None:
    """Each by its name, with what is wrong, and an exit code for scripts."""
    assert 0 == command("verify", run).code
    flipped, cut, gone = sorted(run.glob("epoch=*.ckpt"))
    data = bytearray(flipped.read_bytes())
    data[-200] ^= 1
    flipped.write_bytes(data)
    os.truncate(cut, cut.stat().st_size - 1)
    gone.unlink()
    said = command("verify", run)
    assert 1 == said.code
    assert f"BAD   {flipped.name}: has other bytes than were written" in said.out
    assert f"BAD   {cut.name}: has {cut.stat().st_size} bytes, and its record says" in said.out
    assert f"BAD   {gone.name}: is gone, though its record is there" in said.out
    assert "0 of 3 whole, 3 bad" in said.out
    quick = command("verify", run, "--quick", "--json").data
    assert [True, False, False] == [item["ok"] for item in quick]


def test_a_payload_that_is_a_link_now_is_not_what_was_written(run: Path) -> None:
    """As for a restore: the owner of a link there decides what is loaded, and when."""
    path = run / "epoch=1-step=20.ckpt"
    path.rename(run.parent / "elsewhere")
    path.symlink_to(run.parent / "elsewhere")
    said = command("verify", run)
    assert (1, True) == (said.code, "BAD   epoch=1-step=20.ckpt" in said.out)


def test_deep_finds_what_the_digest_cannot(tmp_path: Path) -> None:
    """A payload that was already wrong when its digest was taken: a tensor's bytes are missing."""
    path = tmp_path / "whole"
    torch.save({"w": torch.arange(100.0)}, path)
    data = path.read_bytes()
    plant(tmp_path / "run", "bad.ckpt", data.replace(torch.arange(100.0).numpy().tobytes(), b"\0" * 400))
    assert 0 == command("verify", tmp_path / "run").code
    said = command("verify", tmp_path / "run", "--deep")
    assert 1 == said.code
    assert "whole/data/0 has other bytes than its checksum says" in said.out


# Bad input


def bad_inputs(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Return a directory of each kind, and what is to be said of it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.pt").write_bytes(b"x")
    plant(tmp_path / "future", "a.ckpt", b"data")
    target = tmp_path / "future" / record_path("a.ckpt")
    target.write_text(json.dumps(json.loads(target.read_text()) | {"schema": 99}))
    (tmp_path / "file").write_text("x")
    return {
        "none": (tmp_path / "fututre", f"there is no directory {tmp_path}/fututre (did you mean {tmp_path}/future?)"),
        "empty": (tmp_path / "empty", "holds no checkpoint"),
        "foreign": (tmp_path / "foreign", "has no record, but files such as model.pt; 'checkpointer adopt'"),
        "future": (tmp_path / "future", "has schema 99; this version of torch-checkpointer reads up to 1"),
        "file": (tmp_path / "file", "is a file"),
    }


@pytest.mark.parametrize("kind", ["none", "empty", "foreign", "future", "file"])
@pytest.mark.parametrize("argv", [["ls"], ["last"], ["best"], ["verify", "last"], ["show", "last"]])
def test_a_directory_that_is_no_good_is_said_on_stderr_and_left_as_it_is(
    tmp_path: Path, kind: str, argv: list[str]
) -> None:
    """One line that says what is wrong, exit code 2, nothing on stdout, nothing changed."""
    folder, expected = bad_inputs(tmp_path)[kind]
    before = snapshot(tmp_path)
    said = command(argv[0], folder, *argv[1:])
    assert (2, "") == (said.code, said.out)
    assert expected in said.err
    assert 1 == len(said.err.splitlines())
    assert before == snapshot(tmp_path)


def test_a_corrupt_record_is_reported_and_the_others_are_listed(run: Path) -> None:
    """One bad file does not hide the good ones, and the exit code says that there is one."""
    (run / record_path("epoch=1-step=20.ckpt")).write_bytes(b"{")
    for argv in (["ls", "--json"], ["last"]):
        said = command(argv[0], run, *argv[1:])
        assert 1 == said.code
        assert "damaged: .checkpointer/records/epoch=1-step=20.ckpt.json is not valid JSON" in said.err
    assert [30, 40] == [item["step"] for item in command("ls", run, "--json").data]
    said = command("verify", run)
    assert (1, True) == (said.code, "2 of 3 whole, 1 bad" in said.out)
    assert "is not valid JSON" in command("show", run, "epoch=1-step=20.ckpt").err


def test_a_typo_in_a_policy_is_reported_with_its_place(run: Path, tmp_path: Path) -> None:
    """The file, the path in it, and the nearest name."""
    (tmp_path / "p.yaml").write_text("when:\n  EverySteps: {n: 1}\nkeep:\n- KeepBset: {k: 1, metric: a, mode: min}\n")
    said = command("ls", run, "-p", tmp_path / "p.yaml")
    assert (2, "") == (said.code, said.out)
    assert f"{tmp_path}/p.yaml, line 4: in 'keep[0]': 'KeepBset' is not known (did you mean 'KeepBest'?)" in said.err


def test_signed_directories_need_their_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another key every record is damaged; the key itself is never shown."""
    monkeypatch.setenv("CKPT_KEY", "0f3c5a" * 8)
    monkeypatch.setenv("CKPT_OTHER", "ffffff" * 8)
    folder = train(tmp_path / "run", 0.5, trust=HMACKey.from_env("CKPT_KEY"))
    assert 1 == len(command("ls", folder, "--key-env", "CKPT_KEY", "--json").data)
    said = command("ls", folder, "--key-env", "CKPT_OTHER")
    assert 1 == said.code
    assert "has a signature that this key did not make" in said.err
    assert "0f3c5a" not in said.err + said.out


def test_storage_options_are_never_printed(tmp_path: Path) -> None:
    """They hold credentials."""
    said = command("ls", tmp_path, "--storage-options", '{"secret": "hunter2"')
    assert (2, "") == (said.code, said.out)
    assert "is not a JSON object" in said.err
    assert "hunter2" not in said.err
    said = command("ls", "nosuch://user:hunter2@host/path")
    assert 2 == said.code
    assert "hunter2" not in said.err


def test_a_url_is_listed_as_a_path_is(tmp_path: Path) -> None:
    """Whatever fsspec reaches."""
    with CheckpointManager("memory://cli/run", POLICY, state=dict) as manager:
        manager.observe({"loss": 0.5}, step=10, epoch=0)
    data = command("ls", "memory://cli/run", "--json").data
    assert [("memory://cli/run/epoch=0-step=10.ckpt")] == [item["path"] for item in data]


def test_usage_errors_exit_with_2_and_name_the_nearest_command(tmp_path: Path) -> None:
    """As every command line does."""
    said = command("lst", tmp_path)
    assert (2, "") == (said.code, said.out)
    assert "Did you mean 'last', 'ls'?" in " ".join(said.err.split())


# The library beneath


def test_what_a_memory_storage_holds_can_be_looked_at_too() -> None:
    """The commands are thin: the library gives the same answers."""
    storage = MemoryStorage()
    with CheckpointManager(storage, POLICY, state=dict) as manager:
        manager.observe({"loss": 0.5}, step=10, epoch=0)
    catalog = look_at(storage)
    assert ["epoch=0-step=10.ckpt"] == [record.name for record in catalog.records]
    assert 10 == catalog.find("10").step


def test_a_hard_linked_alias_is_recognised_by_its_file(tmp_path: Path) -> None:
    """Copies of the same size are distinguished."""
    folder = train(tmp_path / "run", 0.9, 0.2, 0.5)
    catalog = look_at(open_storage(folder, ""))
    assert {"last.ckpt": "epoch=2-step=30.ckpt", "best.ckpt": "epoch=1-step=20.ckpt"} == catalog.aliases


class Seconds(MemoryStorage):
    """Distinguishes versions by whole seconds, and everything happened in the same one, as over SFTP."""

    def list(self, prefix: str = "") -> dict[str, Stat]:
        """See `Storage.list`."""
        return {path: Stat(stat.size, "1.000000", modified_s=1.0) for path, stat in super().list(prefix).items()}


def test_a_copy_is_not_guessed_to_be_of_what_was_written_in_the_same_second() -> None:
    """If three files have one size and time, the output says that the original is not known."""
    storage = Seconds()
    with CheckpointManager(storage, attrs.evolve(POLICY, last="copy"), state=lambda: {"w": 1}) as manager:
        for step, loss in ((1, 0.9), (2, 0.2), (3, 0.5)):
            manager.observe({"loss": loss}, step=step, epoch=0, epoch_end=False)
    catalog = look_at(storage)
    assert {"last.ckpt": "", "best.ckpt": ""} == catalog.aliases
    assert 3 == catalog.find("last").step
    with pytest.raises(NotFoundError, match="best is an alias, and which checkpoint it stands for is not known"):
        catalog.find("best")


# As a process


def test_the_command_runs_as_a_process_and_imports_no_torch(run: Path) -> None:
    """ls answers at once; loading torch would take seconds."""
    code = (
        "import sys; from checkpointer.cli.app import run; code = run(sys.argv[1:]); "
        "print({m.partition('.')[0] for m in sys.modules} & {'torch', 'numpy'}, code)"
    )
    command = [sys.executable, "-c", code, "show", str(run), "last"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "2 tensors, 9 elements" in done.stdout
    assert "set() 0" == done.stdout.splitlines()[-1]


def test_without_the_extra_the_command_names_it() -> None:
    """In an interpreter that cannot import typer."""
    code = "import sys; sys.modules['typer'] = None; from checkpointer.cli import main; main(['ls'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (2, "") == (done.returncode, done.stdout)
    assert "pip install 'torch-checkpointer[cli]'" in done.stderr


def test_a_reader_that_has_enough_is_no_error(run: Path) -> None:
    """As in ``checkpointer ls runs | head -1``."""
    command = f"{sys.executable} -m checkpointer.cli show {run} last --json | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert ("{0\n", "") == (done.stdout, done.stderr)


def test_ls_of_a_directory_of_runs_lists_the_runs(tmp_path: Path) -> None:
    """Of any depth, on a disk or at a URL; and no hint says to adopt them."""
    train(tmp_path / "runs" / "digits", 0.9, 0.2)
    train(tmp_path / "runs" / "old" / "mnist", 0.5)
    url = f"memory://runs/{tmp_path.name}"
    for name in ("digits", "old/mnist"):
        assert 0 == command("copy", tmp_path / "runs" / name, f"{url}/{name}").code
    for place in (str(tmp_path / "runs"), url):
        said = command("ls", place, "--json").data
        assert [("digits", 2, 20), ("old/mnist", 1, 10)] == [
            (item["directory"], item["checkpoints"], item["step"]) for item in said
        ]
        assert [f"{place}/digits", f"{place}/old/mnist"] == [item["path"] for item in said]
        text = command("ls", place)
        assert (0, True, True) == (text.code, "directories below: 2" in text.out, "old/mnist" in text.out)
        one = command("ls", place, "--limit", 1)
        assert (False, "1 more not shown" in one.err) == ("old/mnist" in one.out, True)
        other = command("last", place)
        assert (2, True) == (other.code, "these directories below have: digits, old/mnist" in other.err)
        assert "adopt" not in other.err


def test_ls_of_a_directory_of_runs_shows_which_one_cannot_be_read(tmp_path: Path) -> None:
    """The others are listed all the same."""
    for name in ("a", "b"):
        train(tmp_path / name, 0.5)
    path = next((tmp_path / "a" / ".checkpointer" / "records").iterdir())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    (tmp_path / "a" / ".checkpointer" / "index.json").unlink(missing_ok=True)
    broken, whole = command("ls", tmp_path, "--json").data
    assert (True, 1, "") == ("99" in broken["error"], whole["checkpoints"], whole["error"])


def test_a_manager_says_which_runs_lie_below(tmp_path: Path) -> None:
    """A directory of runs is mostly a name that was typed too short; restoring from it is an error."""
    train(tmp_path / "digits", 0.5)
    with pytest.warns(CheckpointerWarning, match="these directories below have checkpoints of their own: digits"):
        manager = CheckpointManager(tmp_path)
    with pytest.raises(NoValidCheckpointError, match="these directories below have: digits"):
        manager.restore()


def test_verify_prints_a_bad_checkpoint_when_it_is_found(tmp_path: Path) -> None:
    """So Ctrl-C loses no line. The second payload has 40 GB of zeros, so the command would read on for seconds."""
    plant(tmp_path, "a.ckpt", b"data", step=1, serial=1)
    (tmp_path / "a.ckpt").write_bytes(b"dato")
    plant(tmp_path, "b.ckpt", b"data", step=2, serial=2, size=40 * 10**9)
    os.truncate(tmp_path / "b.ckpt", 40 * 10**9)  # A sparse file takes no room.
    argv = [sys.executable, "-m", "checkpointer", "verify", str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("BAD   a.ckpt: ")
        assert process.poll() is None
        process.kill()
        assert "" == process.stdout.read()
