"""A directory with several runs: commands say which one they chose, and take no checkpoint of two silently."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.commands import POLICY, command, snapshot, train

from checkpointer import CheckpointerWarning, CheckpointManager, EverySteps, KeepAll, KeepBest, Policy
from checkpointer.storage import open_storage
from checkpointer.tools.catalog import Catalog, look_at

RANKED = ("a/epoch=0-step=16-val_loss=0.9.ckpt", "a/epoch=1-step=32-val_loss=0.5.ckpt")
PLAIN = ("b/epoch=0-step=16.ckpt", "b/epoch=1-step=32.ckpt", "b/epoch=2-step=48.ckpt")


def save(folder: Path, *names: str) -> None:
    """Write files as two ModelCheckpoints do that have a folder each."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        torch.save({"model": {"w": torch.full((2,), float(number))}}, folder / name)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two adopted runs: only ``a`` has a score, and ``b`` has the newest checkpoint."""
    folder = tmp_path / "lit"
    save(folder, *RANKED, *PLAIN)
    assert 0 == command("adopt", folder).code
    return folder


def runs_of(folder: Path) -> dict[str, str]:
    """Return the id of the run of each checkpoint."""
    return {record.name: record.run for record in catalog_of(folder).records}


def catalog_of(folder: Path) -> Catalog:
    """Look at a directory."""
    return look_at(open_storage(str(folder), ""))


def test_each_command_that_chooses_a_run_says_which_and_how_to_choose_another(two: Path, tmp_path: Path) -> None:
    """The run of the newest checkpoint is taken; the result on stdout is as with one run."""
    runs = runs_of(two)
    a, b = runs[RANKED[0]], runs[PLAIN[0]]
    POLICY.to_yaml(tmp_path / "policy.yaml")
    Policy(EverySteps(1), [KeepAll()]).to_yaml(tmp_path / "all.yaml")
    for argv in (
        ["last", two],
        ["show", two, "last"],
        ["verify", two, "last"],
        ["prune", two, "--policy", tmp_path / "all.yaml"],
        ["plot", two, tmp_path / "out.svg"],
        ["report", two, tmp_path / "out.html"],
        ["simulate", two, "--policy", tmp_path / "policy.yaml"],
        ["pin", two, "last"],
        ["unpin", two, "last"],
        ["export", two, "last", tmp_path / "last.safetensors"],
        ["diff", two, "last", PLAIN[-1]],
        ["copy", two, tmp_path / "copy", "--only", "last"],
    ):
        said = command(*argv)
        assert 0 == said.code, (argv, said.err)
        assert [f"{two} has 2 runs; this is run {b}, because it has the newest checkpoint, {PLAIN[-1]}"] == [
            line.partition("; --run")[0] for line in said.err.splitlines() if " 2 runs" in line
        ], argv
        assert f"; --run takes another one: {a} (newest: {RANKED[-1]})" in said.err, argv
        chosen = command(*argv[:2], *argv[2:], "--run", b)
        assert " 2 runs" not in chosen.err, argv
    assert f"{two / RANKED[-1]}\n" == command("last", two, "--run", a).out


def test_a_metric_or_best_that_only_another_run_has_names_that_run(two: Path, tmp_path: Path) -> None:
    """ "No checkpoint has it" would be false of the directory."""
    runs = runs_of(two)
    a, b = runs[RANKED[0]], runs[PLAIN[0]]
    by = ["--by", "val_loss", "--mode", "min"]
    Policy(EverySteps(1), [KeepBest(1, "val_loss", mode="min")]).to_yaml(tmp_path / "policy.yaml")
    for argv in (
        ["best", two, *by],
        ["plot", two, tmp_path / "out.svg", *by],
        ["average", two, "--best", 1, "--out", tmp_path / "mean.pt", *by],
        ["prune", two, "--policy", tmp_path / "policy.yaml"],
        ["best", two, "--policy", tmp_path / "policy.yaml"],
    ):
        said = command(*argv)
        assert 2 == said.code, argv
        assert f"of run {b} has the metric 'val_loss'; run {a} has it: pass --run {a}" in said.err, (argv, said.err)
        chosen = command(*argv, "--run", a)
        assert 0 == chosen.code, (argv, chosen.err)
    assert f"{two / RANKED[1]}\n" == command("best", two, *by, "--run", a).out


def test_a_noted_policy_that_only_another_run_has_names_that_run(tmp_path: Path) -> None:
    """So `best`, `prune` and `policy show` do not ask for what is there."""
    folder = train(tmp_path / "run", 0.9, 0.2)
    (own,) = catalog_of(folder).runs
    save(folder, "b/step=90.ckpt")
    assert 0 == command("adopt", folder, "--run", "other").code
    for argv in (["best", folder], ["prune", folder], ["policy", "show", folder], ["show", folder, "best"]):
        said = command(*argv, "--run", "other")
        assert 2 == said.code, (argv, said.out)
        assert f"run {own[0]} has" in said.err, (argv, said.err)
        assert f"pass --run {own[0]}" in said.err, (argv, said.err)
        assert 0 == command(*argv, "--run", own[0]).code, argv


def test_a_step_that_two_checkpoints_have_names_both(two: Path, tmp_path: Path) -> None:
    """None is taken, and nothing is written or removed; the name or the run says which is meant."""
    runs = runs_of(two)
    a, before = runs[RANKED[0]], snapshot(two)
    for argv in (
        ["show", two, 32],
        ["export", two, 32, tmp_path / "out.pt"],
        ["verify", two, 32],
        ["diff", two, 16, "last"],
        ["rm", two, 32, "--apply"],
        ["pin", two, 32],
        ["unpin", two, 32],
        ["copy", two, tmp_path / "copy", "--only", 32],
        ["average", two, 32, 48, "--out", tmp_path / "mean.pt"],
    ):
        said = command(*argv)
        step = 16 if argv[0] == "diff" else 32
        assert 2 == said.code, argv
        assert f"{two} has 2 checkpoints of step {step}: a/" in said.err, (argv, said.err)
        assert f"(run {a}), b/" in said.err
        assert "name one of them, or pass --run" in said.err
    assert before == snapshot(two)
    assert not (tmp_path / "out.pt").exists()
    assert RANKED[1] == command("show", two, 32, "--run", a, "--json").data["name"]
    assert 0 == command("export", two, 32, tmp_path / "out.pt", "--run", a).code
    assert 1.0 == torch.load(tmp_path / "out.pt")["w"][0]


def test_two_files_that_differ_in_their_extension_are_not_confused(tmp_path: Path) -> None:
    """A name without its extension may mean both."""
    save(tmp_path, "x/one_1.pt", "y/one_2.pt")
    assert 0 == command("adopt", tmp_path, "--step", "x/one_1.pt=1", "--step", "y/one_2.pt=2").code
    save(tmp_path, "x/one_1.ckpt")
    assert 0 == command("adopt", tmp_path, "--step", "x/one_1.ckpt=3").code
    said = command("show", tmp_path, "x/one_1")
    assert 2 == said.code
    assert "2 checkpoints of the name x/one_1: x/one_1.pt (run " in said.err
    assert 0 == command("show", tmp_path, "x/one_1.ckpt").code


def test_a_step_that_was_trained_again_is_that_of_the_checkpoint_that_counts(tmp_path: Path) -> None:
    """The abandoned one has its name."""
    policy = Policy(EverySteps(1), [KeepAll()])
    folder = train(tmp_path / "run", 0.9, 0.5, 0.4, policy=policy)
    with CheckpointManager(folder, policy, state=lambda: {"model": {}}) as manager:
        manager.restore(10)
        manager.observe({"loss": 0.1}, step=20, epoch=1)
    names = [record.name for record in catalog_of(folder).records if record.step == 20]
    assert 2 == len(names)
    assert names[-1] == command("show", folder, 20, "--json").data["name"]


def test_of_two_labels_of_a_run_one_is_chosen_by_its_name(tmp_path: Path) -> None:
    """Two managers of one training share its id."""
    for label, loss in (("", 0.5), ("ema", 0.4)):
        policy = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")], name=f"{label}{{step}}")
        with CheckpointManager(tmp_path, policy, state=lambda: {"model": {}}, label=label, run="r") as manager:
            manager.observe({"loss": loss}, step=1, epoch=0)
    said = command("last", tmp_path)
    assert f"{tmp_path / 'emastep=1.ckpt'}\n" == said.out
    assert "--run takes another one: r/ (newest: step=1.ckpt)" in said.err
    assert f"{tmp_path / 'step=1.ckpt'}\n" == command("last", tmp_path, "--run", "r/").out
    assert [1] == [len(command("ls", tmp_path, "--run", "r/ema", "--json").data)]


def test_best_as_a_name_is_what_best_prints(tmp_path: Path) -> None:
    """Without an alias too: by the policy that the run has noted."""
    policy = Policy(EverySteps(1), [KeepBest(2, "loss", mode="min")])
    folder = train(tmp_path / "run", 0.9, 0.2, 0.5, policy=policy)
    path = command("best", folder).out.strip()
    assert path.endswith("step=20-loss=0.2.ckpt") or "20" in path
    assert path == command("show", folder, "best", "--json").data["path"]
    out = tmp_path / "out.safetensors"
    assert [Path(path).name] == command("export", folder, "best", out, "--json").data["of"]
    assert 0 == command("pin", folder, "best").code
    assert "step" in command("verify", folder, "best").out
    Policy(EverySteps(1), [KeepBest(2, "acc", mode="min")]).to_yaml(tmp_path / "policy.yaml")
    worst = command("show", folder, "best", "--policy", tmp_path / "policy.yaml", "--json").data
    assert worst["path"] == command("best", folder, "--policy", tmp_path / "policy.yaml").out.strip()
    assert worst["path"] != path


@pytest.mark.parametrize("name", ["best.ckpt", "model_best.pth.tar"])
def test_best_finds_an_adopted_file_that_is_called_best(tmp_path: Path, name: str) -> None:
    """Also in a folder, also as an alias, because it has the bytes of another checkpoint."""
    for folder, of in (("own", 1), ("alias", 2)):
        save(tmp_path / folder, "c/step=1.ckpt", "c/step=2.ckpt", "c/step=3.ckpt")
        state = torch.load(tmp_path / folder / "c/step=2.ckpt")
        torch.save(state | ({"step": 2} if of == 1 else {}), tmp_path / folder / "c" / name)
        if of == 2:
            (tmp_path / folder / "c" / name).write_bytes((tmp_path / folder / "c/step=2.ckpt").read_bytes())
        assert 0 == command("adopt", tmp_path / folder, "--step", f"c/{name}=2").code
        found = f"c/{name}" if of == 1 else "c/step=2.ckpt"
        assert f"{tmp_path / folder / found}\n" == command("best", tmp_path / folder).out
        assert found == command("show", tmp_path / folder, "best", "--json").data["name"]


def test_a_folder_of_an_adopted_run_names_the_directory_of_its_records(two: Path) -> None:
    """`adopt` would only answer that they have records."""
    run = runs_of(two)[RANKED[0]]
    for argv in (["ls", two / "a"], ["best", two / "a"], ["last", two / "a"], ["prune", two / "a"]):
        said = command(*argv)
        assert 2 == said.code
        assert f"{two / 'a'} has no record of its own; those of its files are in {two}: " in said.err
        assert f"pass {two} with --run {run}" in said.err
        assert "'checkpointer adopt'" not in said.err


def test_a_plot_counts_only_what_its_own_run_has_lost(tmp_path: Path) -> None:
    """A training in the same directory retired three; of the adopted run all are there."""
    save(tmp_path, *PLAIN)
    assert 0 == command("adopt", tmp_path).code
    with pytest.warns(CheckpointerWarning, match="3 checkpoints of other runs"):
        train(tmp_path, 0.9, 0.8, 0.7, 0.6)
    adopted = runs_of(tmp_path)[PLAIN[0]]
    assert 0 == command("report", tmp_path, tmp_path / "out.html", "--run", adopted).code
    assert "survivor" not in (tmp_path / "out.html").read_text().partition("</head>")[2].partition("<script")[0]


def test_where_no_record_can_be_read_there_is_no_run_to_choose(tmp_path: Path) -> None:
    """The damage is what the commands report."""
    folder = train(tmp_path / "run", 0.5)
    (path,) = (folder / ".checkpointer" / "records").iterdir()
    path.write_text("{")
    POLICY.to_yaml(tmp_path / "policy.yaml")
    for argv, code in ((["prune", folder, "--policy", tmp_path / "policy.yaml"], 1), (["last", folder], 2)):
        said = command(*argv)
        assert (code, True) == (said.code, "damaged: " in said.err), said


def test_each_run_and_label_has_an_id_that_finds_only_it(tmp_path: Path) -> None:
    """A run may be called as a run and its label together."""
    every = Policy(EverySteps(1), [KeepAll()])
    runs = [("a", ""), ("a", "x"), ("a/x", "")]
    for step, (run, label) in enumerate(runs, start=1):
        with CheckpointManager(tmp_path, every, state=dict, run=run, label=label) as manager:
            manager.observe({}, step=step, epoch=0, epoch_end=False)
    catalog = catalog_of(tmp_path)
    assert ["a/", "a/x", "a/x/"] == [catalog.id_of(*one) for one in runs]
    assert [(one,) for one in runs] == [catalog.named(catalog.id_of(*one)) for one in runs]


def test_watch_says_that_a_run_was_adopted_and_which_others_there_are(two: Path) -> None:
    """No manager of it was closed, and nothing is known of the program that wrote it."""
    runs = runs_of(two)
    said = command("watch", two, "--once")
    assert 1 == said.code
    assert f"{runs[PLAIN[0]]}: adopted; nothing is known of the program that wrote it" in said.out
    assert f"others  {runs[RANKED[0]]}; --run ID shows one" in said.out
    assert "process" not in said.out
    other = command("watch", two, "--once", "--run", runs[RANKED[0]])
    assert (True, False) == (f"{runs[RANKED[0]]}: adopted" in other.out, "others" in other.out)
