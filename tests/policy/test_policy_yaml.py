"""Policies as YAML: what is written is what is read, and a bad file says where it is bad."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest

from checkpointer.errors import PolicyError
from checkpointer.policy.naming import Naming
from checkpointer.policy.policy import Policy
from checkpointer.policy.retention import Budget, KeepAll, KeepBest, KeepEvery, KeepLast
from checkpointer.policy.triggers import AnyOf, AtSteps, EveryEpochs, EverySeconds, EverySteps
from checkpointer.policy.yaml_codec import parse_yaml
from checkpointer.records.record import Progress

EACH = EverySteps(1)


def f1(metrics: Mapping[str, float]) -> float:
    """Score a checkpoint by two metrics."""
    return metrics["precision"] * metrics["recall"]


@attrs.frozen
class OddSteps:
    """A user's own trigger."""

    offset: int = 0

    def due(self, now: Progress, since: Progress) -> str | None:
        """See `Trigger.due`."""
        return "odd" if (now.step + self.offset) % 2 else None


@pytest.mark.parametrize(
    "policy",
    [
        Policy(EACH, []),
        Policy(EverySteps(10, after=5), [KeepLast(3)]),
        Policy(EveryEpochs(2, after=1), [KeepAll()]),
        Policy(EverySeconds(timedelta(minutes=5)), [KeepEvery(steps=100)]),
        Policy(AtSteps(3, 1), [KeepEvery(epochs=2), KeepEvery(seconds=0.5)]),
        Policy(AtSteps(), [KeepEvery(seconds=float("inf"))]),
        Policy(AnyOf(), [KeepAll()]),
        Policy(AnyOf(EverySteps(10), AnyOf(EverySeconds(60), AtSteps(5))), [Budget(bytes=10**12), KeepAll()]),
        Policy(EACH, [KeepBest(3, "val/loss", mode="min", ties="newest", after_step=7)], best="copy"),
        Policy(EACH, [KeepBest(1, "yes", mode="max"), KeepBest(2, "1.0", mode="min")]),
        Policy(EACH, [KeepAll()], name="{epoch:02d}-{val_loss:.3f}"),
        Policy(EACH, [KeepAll()], name="größe: {step}"),
        Policy(
            EACH,
            [KeepAll()],
            name=Naming(
                "{step}",
                auto_insert=False,
                join="_",
                equals="",
                extension=".pt",
                last="newest",
                best="top",
                first_version=0,
                version_counter=False,
                missing="zero",
                slashes="keep",
            ),
        ),
        Policy(EACH, [KeepAll()], last="link", contents="weights", rescue=False),
        Policy.from_flags(monitor="val_loss", save_top_k=3, save_last=True),
    ],
)
def test_every_policy_round_trips(policy: Policy) -> None:
    """Reading what was written gives an equal policy."""
    assert policy == Policy.from_yaml(policy.to_yaml())


def test_a_file_is_written_and_read(tmp_path: Path) -> None:
    """By path, as text in UTF-8."""
    policy = Policy(EACH, [KeepBest(1, "größe", mode="min")])
    text = policy.to_yaml(tmp_path / "policy.yaml")
    assert text == (tmp_path / "policy.yaml").read_text(encoding="utf-8")
    assert "größe" in text
    assert policy == Policy.from_yaml(tmp_path / "policy.yaml") == Policy.from_yaml(str(tmp_path / "policy.yaml"))


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    """No YAML error hides that there is no file."""
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        Policy.from_yaml(tmp_path / "none.yaml")


def test_scores_go_by_name() -> None:
    """The file names no code; who reads it says which function is meant."""
    policy = Policy(EACH, [KeepBest(2, f1, mode="max")])
    text = policy.to_yaml()
    assert "score: f1" in text
    assert policy == Policy.from_yaml(text, known={"f1": f1})
    with pytest.raises(
        PolicyError, match=r"in 'keep\[\d\]\.KeepBest\.metric': .*'f1'.* is not a known function; pass it as known"
    ):
        Policy.from_yaml(text)


def test_own_classes_go_by_name() -> None:
    """A user's attrs class is written like ours and read when it is passed."""
    policy = Policy(AnyOf(EACH, OddSteps(3)), [KeepAll()])
    assert policy == Policy.from_yaml(policy.to_yaml(), known={"OddSteps": OddSteps})
    with pytest.raises(PolicyError, match=r"in 'when\.AnyOf\[1\]': 'OddSteps' is not known.*known="):
        Policy.from_yaml(policy.to_yaml())


def test_a_class_that_cannot_be_written_says_so() -> None:
    """Only attrs classes have arguments that can be read off."""

    class Plain:
        def due(self, now: Progress, since: Progress) -> str | None:
            return None

    with pytest.raises(PolicyError, match="cannot be written as YAML; make its class an attrs class"):
        Policy(Plain(), []).to_yaml()


def test_handwritten_short_forms() -> None:
    """A class without arguments may stand alone, and a name may be its template alone."""
    text = "when: {EverySteps: {n: 5}}\nkeep: [KeepAll, KeepLast: {n: 2}]\nname: '{step}'\n"
    assert Policy(EverySteps(5), [KeepAll(), KeepLast(2)], name="{step}") == Policy.from_yaml(text)


WHEN = "when: {EverySteps: {n: 5}}\n"
KEEP = "keep: [KeepAll]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [\n", "not valid YAML"),
        ("\n", "in 'policy': expected a mapping, found None"),
        ("- 1\n- 2\n", "in 'policy': expected a mapping, found"),
        (WHEN, "in 'policy': 'keep' is missing"),
        (KEEP, "in 'policy': 'when' is missing"),
        (WHEN + KEEP + "lst: link\n", r"in 'policy\.lst': Policy has no 'lst' \(did you mean 'last'\?\)"),
        (WHEN + KEEP + "last: maybe\n", r"Policy\.last is 'maybe'; expected None or 'link' or 'copy'"),
        (WHEN + KEEP + "best: link\n", "no rule ranks"),
        (WHEN + "keep: KeepAll\n", "in 'keep': expected a list of rules, found 'KeepAll'"),
        (WHEN + "keep: [KeepBset: {k: 1}]\n", r"in 'keep\[0\]': 'KeepBset' is not known \(did you mean 'KeepBest'\?\)"),
        (WHEN + "keep: [3]\n", r"in 'keep\[0\]': expected one name with its arguments"),
        (WHEN + "keep: [KeepLast: {n: 0}]\n", r"in 'keep\[0\]\.KeepLast': KeepLast\.n is 0; expected a whole"),
        (WHEN + "keep: [KeepLast: {m: 1}]\n", r"in 'keep\[0\]\.KeepLast\.m': KeepLast has no 'm'"),
        (WHEN + "keep: [KeepLast: 3]\n", r"in 'keep\[0\]\.KeepLast': expected a mapping, found 3"),
        (WHEN + "keep: [KeepLast]\n", r"in 'keep\[0\]\.KeepLast': 'n' is missing"),
        (WHEN + "keep: [KeepBest: {k: 1, metric: [a], mode: min}]\n", r"in 'keep\[0\]\.KeepBest': metric is \['a'\]"),
        (
            WHEN + "keep: [KeepBest: {k: 1, metric: a}]\n",
            r"KeepBest': Metric.mode is None; expected 'min' or 'max'",
        ),
        (WHEN + "keep: [EverySteps: {n: 1}]\n", r"Policy\.keep has EverySteps"),
        ("when: {KeepAll: {}}\n" + KEEP, r"Policy\.when is KeepAll"),
        ("when: {EverySteps: {n: x}}\n" + KEEP, r"in 'when\.EverySteps': EverySteps\.n is 'x'"),
        ("when: {AnyOf: {n: 1}}\n" + KEEP, r"in 'when\.AnyOf': expected a list, found"),
        ("when: {AtSteps: [1, a]}\n" + KEEP, r"in 'when\.AtSteps': AtSteps has 'a'"),
        ("when: {AnyOf: [EverySteps: {n: 0}]}\n" + KEEP, r"in 'when\.AnyOf\[0\]\.EverySteps': EverySteps\.n is 0"),
        ("when: &a\n  AnyOf: [*a]\n" + KEEP, "refers to itself or is nested too deeply"),
        (WHEN + KEEP + "name: {template: '../x'}\n", r"in 'name': the name '\.\./x'"),
        (WHEN + KEEP + "name: {temlpate: x}\n", r"in 'name\.temlpate': Naming has no 'temlpate' \(did you mean"),
        (WHEN + KEEP + "name: {join: 3}\n", "in 'name': "),
        (WHEN + KEEP + "name: [x]\n", r"in 'name': expected a mapping"),
        ("when: !!python/object:os.system {}\n" + KEEP, "not valid YAML"),
    ],
)
def test_a_bad_file_says_where_and_what_was_expected(text: str, message: str) -> None:
    """Every bad value is a PolicyError with its path in the file."""
    with pytest.raises(PolicyError, match=f"(?s){message}"):
        Policy.from_yaml(text)


def test_a_file_that_is_no_text_is_a_policy_error(tmp_path: Path) -> None:
    """A checkpoint passed by mistake is not a UnicodeDecodeError."""
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(PolicyError, match="not valid YAML"):
        Policy.from_yaml(path)


def test_known_does_not_replace_a_metric_that_is_no_function() -> None:
    """A class of the user's that is called as a metric is not taken for a score."""
    known: dict[str, Any] = {"f1": f1, "loss": 3}
    policy = Policy(EACH, [KeepBest(1, "loss", mode="min")])
    assert policy == Policy.from_yaml(policy.to_yaml(), known=known)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("08", 8),
        ("-0500", -500),
        ("1_000", 1000),
        ("0x1F", 31),
        ("0o17", 15),
        ("0b11", 3),
        ("1e3", 1000.0),
        ("1.5E-3", 0.0015),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("1:30", "1:30"),
        ("190:20:30.15", "190:20:30.15"),
        ("'010'", "010"),
        ("1.2.3", "1.2.3"),
        ("!!int 010", 10),
    ],
)
def test_a_number_means_what_it_says(text: str, value: object) -> None:
    """YAML 1.1 reads 010 as 8, 1:30 as 90 and 1e3 as text; PyYAML does, too."""
    found = parse_yaml(f"a: {text}\n".encode())["a"]
    assert (value, type(value)) == (found, type(found))


def test_an_interval_with_a_leading_zero_is_not_octal() -> None:
    """A policy saves as often as its file says; a time with a colon is refused instead of counted in base 60."""
    keep = "keep: [{KeepLast: {n: 1}}]\n"
    assert EverySteps(100) == Policy.from_yaml(f"when: {{EverySteps: {{n: 0100}}}}\n{keep}").when
    with pytest.raises(PolicyError, match="1:30"):
        Policy.from_yaml(f"when: {{EverySeconds: {{seconds: 1:30}}}}\n{keep}")


@pytest.mark.parametrize("text", ["010", "1:30", "1e3", "0o7", "1_0", ".5", "5.", "0x1F", "1e", "-.inf", "null", "yes"])
def test_a_text_that_looks_like_a_number_is_read_as_it_was_written(text: str) -> None:
    """It is quoted."""
    policy = Policy(EACH, [KeepBest(1, text, mode="min")])
    assert policy == Policy.from_yaml(policy.to_yaml())
