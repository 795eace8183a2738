"""The policy that a run notes in its directory, and the policy file: check, init, show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.commands import POLICY, command, snapshot, train

from checkpointer import CheckpointManager, EverySteps, HMACKey, KeepAll, KeepBest, KeepLast, Policy
from checkpointer.policy import yaml_codec
from checkpointer.tools.policy_file import START, check_policy

PAGE = Path(__file__).parents[2] / "docs" / "policy-file.md"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose best checkpoint is of step 20, and which has no best alias."""
    policy = Policy(EverySteps(1), [KeepBest(2, "loss", mode="min"), KeepLast(1)])
    return train(tmp_path / "run", 0.9, 0.2, 0.5, 0.7, policy=policy)


# The run's own policy


def test_ones_own_run_needs_no_flags(run: Path, tmp_path: Path) -> None:
    """The directory knows by what its run ranks, and what it keeps."""
    assert f"{run}/epoch=1-step=20.ckpt\n" == command("best", run).out
    out = tmp_path / "mean.safetensors"
    said = command("average", run, "--best", 2, "-o", out)
    assert (0, True) == (said.code, "epoch=1-step=20.ckpt" in said.out and "epoch=2-step=30.ckpt" in said.out)
    said = command("prune", run)
    assert (0, True) == (said.code, "nothing to remove, keep 3" in said.out)
    assert "noted: save every step; keep the best 2 by loss (min) and the newest" in said.err
    assert {"#1 of the best 2 by loss (min)", "#2 of the best 2 by loss (min)", "the newest"} == {
        one["why"] for one in command("ls", run, "--json").data
    }


def test_ls_at_80_columns_shows_the_metric_that_the_run_ranks_by(tmp_path: Path) -> None:
    """The others are left out first."""
    policy = Policy(EverySteps(1), [KeepBest(2, "val_loss", mode="min")], name="{epoch}-{step}-{val_loss:.6f}-name")
    with CheckpointManager(tmp_path / "run", policy, state=dict) as manager:
        metrics = {"a_long_metric": 0.123456, "b_long_metric": 0.234567, "val_loss": 0.5}
        manager.observe(metrics, step=100, epoch=0)
    head = command("ls", tmp_path / "run", columns=80).out.splitlines()[1].split()
    assert "val_loss" in head
    assert "b_long_metric" not in head


def test_what_a_command_is_given_comes_before_what_the_run_noted(run: Path, tmp_path: Path) -> None:
    """The noted policy is advice."""
    thrifty = tmp_path / "thrifty.yaml"
    Policy(EverySteps(1), [KeepBest(1, "acc", mode="min")]).to_yaml(thrifty)
    assert f"{run}/epoch=3-step=40.ckpt\n" == command("best", run, "--policy", thrifty).out
    assert f"{run}/epoch=3-step=40.ckpt\n" == command("best", run, "--by", "loss", "--mode", "max").out
    said = command("prune", run, "--policy", thrifty)
    assert ("", True) == (said.err, "would remove 2 checkpoints" in said.out)


def test_the_newest_policy_of_a_run_counts(run: Path) -> None:
    """Also after a command has held the run, which has no policy."""
    with CheckpointManager(run, Policy(EverySteps(1), [KeepBest(1, "acc", mode="min")]), state=dict) as manager:
        manager.restore()
    command("pin", run, "20")
    assert f"{run}/epoch=3-step=40.ckpt\n" == command("best", run).out


@pytest.mark.parametrize("text", ["", "when: {Own: {}}\nkeep:\n- Own: {}\n", "[", "when: {AtSteps: []}\nkeep: []\n"])
def test_a_policy_that_cannot_be_read_is_not_known(run: Path, text: str) -> None:
    """Then a command asks for one, as it does for a run of an older version."""
    for path in run.glob(".checkpointer/terms/*/*.json"):
        data = json.loads(path.read_text())
        path.write_text(json.dumps({**data, "policy": text}))
    if "AtSteps" not in text:
        said = command("prune", run)
        assert (2, True) == (said.code, "has not noted its policy; pass --policy FILE" in said.err)
    said = command("best", run)
    assert (2, True) == (said.code, "which is best?" in said.err)
    assert all(one["why"] for one in command("ls", run, "--json").data)


def test_a_manager_without_rules_notes_nothing(run: Path) -> None:
    """Its policy would be advice to remove everything."""
    with CheckpointManager(run, state=dict) as manager:
        manager.restore()
    assert "nothing to remove" in command("prune", run).out


def test_without_a_policy_the_reason_says_that_it_is_an_old_one(tmp_path: Path) -> None:
    """Two rows that are both "#1 of the best" were so at different times."""
    folder = train(tmp_path / "run", 0.9, 0.5)
    for path in folder.glob(".checkpointer/terms/*/*.json"):
        path.unlink()
    assert {True} == {one["why"].startswith("when it was saved: ") for one in command("ls", folder, "--json").data}


def test_in_a_signed_directory_the_policy_counts_if_it_is_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the key an edited one is not used."""
    monkeypatch.setenv("CKPT_KEY", "0f3c5a" * 8)
    folder = train(tmp_path / "run", 0.9, 0.5, trust=HMACKey.from_env("CKPT_KEY"))
    assert 0 == command("prune", folder, "--key-env", "CKPT_KEY").code
    path = next(folder.glob(".checkpointer/terms/*/1.json"))
    path.write_text(path.read_text().replace("KeepBest", "KeepLast"))
    said = command("prune", folder, "--key-env", "CKPT_KEY")
    assert (2, True) == (said.code, "has not noted its policy" in said.err)


def test_the_policy_costs_no_request(tmp_path: Path) -> None:
    """It is a part of the claim, which a run writes anyway."""
    train(tmp_path / "run", 0.5)
    names = {path.name for path in (tmp_path / "run" / ".checkpointer").rglob("*") if path.is_file()}
    assert {"1.json", "1.end", "directory.json", "index.json", "last.ckpt.json", "best.ckpt.json"} == names - {
        "epoch=0-step=10.ckpt.json"
    }


# The policy file


def test_check_reports_each_error_with_its_line_and_the_nearest_name(tmp_path: Path) -> None:
    """All at once, so that one round is enough."""
    file = tmp_path / "p.yaml"
    file.write_text(
        "# comment\nwhen:\n  AnyOf:\n  - EverySteps: {n: 10}\n  - EverySecond: {seconds: 3}\n"
        "keep:\n- KeepLast: {n: 2}\n- KeepBest:\n    k: 3\n    metirc: loss\n    mode: min\nlats: link\n"
    )
    said = command("policy", "check", file)
    assert (1, "") == (said.code, said.err)
    lines = said.out.splitlines()
    assert f"{file}, line 5: in 'when.AnyOf[1]': 'EverySecond' is not known (did you mean 'EverySeconds'?)" in lines[0]
    assert f"{file}, line 10: in 'keep[1].KeepBest.metirc': KeepBest has no 'metirc' (did you" in lines[1]
    assert f"{file}, line 12: in 'policy.lats': Policy has no 'lats' (did you mean 'last'?)" == lines[2]
    assert f"{file}: 3 problems" == lines[3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("when: [\n", "line 2: the policy is not valid YAML"),
        ("", "in 'policy': expected a mapping, found None"),
        ("keep:\n- KeepAll\n", "line 1: in 'policy': 'when' is missing"),
        ("when: EveryEpochs\nkeep: []\n", "line 1: in 'when.EveryEpochs': 'n' is missing"),
        ("when: {EverySteps: {n: 1}}\nkeep: KeepAll\n", "in 'keep': expected a list of rules, found 'KeepAll'"),
        ("when: {EverySteps: {n: 1}}\nkeep: []\nbest: link\n", "Policy.best is 'link', but no rule ranks"),
    ],
)
def test_every_kind_of_error_is_one_line(text: str, expected: str) -> None:
    """Also those of YAML itself, which draws the place."""
    policy, problems = check_policy(text.encode())
    assert (None, 1) == (policy, len(problems))
    assert expected in str(problems[0])
    assert "\n" not in str(problems[0])


def test_check_prints_what_a_policy_means(tmp_path: Path) -> None:
    """As a manager logs it."""
    file = tmp_path / "p.yaml"
    POLICY.to_yaml(file)
    assert f"{file}: {POLICY}\n" == command("policy", "check", file).out
    assert {"policy": str(POLICY), "problems": []} == command("policy", "check", file, "--json").data


def test_init_writes_a_policy_that_is_right_and_replaces_nothing(tmp_path: Path) -> None:
    """Each comment in it is right as well."""
    file = tmp_path / "policy.yaml"
    assert 0 == command("policy", "init", file).code
    assert 0 == command("policy", "check", file).code
    before = snapshot(tmp_path)
    said = command("policy", "init", file)
    assert (2, True) == (said.code, "is there already; choose another name" in said.err)
    assert before == snapshot(tmp_path)
    full = re.sub(r"^(\s*)# (- |name:|best:)", r"\1\2", START, flags=re.MULTILINE)
    policy, problems = check_policy(full.encode())
    assert [] == problems
    assert policy is not None
    assert len(policy.keep) > 4
    assert START == command("policy", "init").out


def test_show_prints_the_policy_of_a_run_as_a_file(run: Path, tmp_path: Path) -> None:
    """To be edited, and passed to a command."""
    (tmp_path / "own.yaml").write_text(command("policy", "show", run).out)
    assert Policy(EverySteps(1), [KeepBest(2, "loss", mode="min"), KeepLast(1)]).keep == (
        Policy.from_yaml(tmp_path / "own.yaml").keep
    )


def test_the_page_on_the_file_has_every_trigger_and_rule_and_its_examples_are_right() -> None:
    """A rule that is added must be described."""
    text = PAGE.read_text()
    for name in yaml_codec._TYPES:
        assert f"`{name}`" in text, name
    blocks = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        assert [] == check_policy(block.encode())[1], block
    assert KeepAll.__name__ in text
