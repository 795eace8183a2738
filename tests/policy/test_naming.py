"""Names: a template filled from an observation, made unique, never leaving the directory."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest

from checkpointer.errors import NamingError, PolicyError
from checkpointer.policy.naming import Naming, fixed_parts
from checkpointer.records.names import MAX_PART_BYTES, check_name

METRICS = {"val_loss": 0.31, "val/loss": 0.25, "a.b": 2.0, "n": 3.0}


@pytest.mark.parametrize(
    ("naming", "expected"),
    [
        (Naming(), "epoch=3-step=400"),
        (Naming("{epoch:02d}-{val_loss:.3f}"), "epoch=03-val_loss=0.310"),
        (Naming("{val_loss}"), "val_loss=0.31"),
        (Naming("{val/loss:.2f}"), "val_loss=0.25"),
        (Naming("{val/loss:.2f}", slashes="keep"), "val/loss=0.25"),
        (Naming("{a.b:.1f}"), "a.b=2.0"),
        (Naming("{n:03d}"), "n=003"),
        (Naming("fixed"), "fixed"),
        (Naming("model-{step}"), "model-step=400"),
        (Naming("{epoch}/{step}"), "epoch=3/step=400"),
        (Naming("{{x}}-{step}"), "{x}-step=400"),
        (Naming("{epoch}-{step}", auto_insert=False), "3-400"),
        (Naming("{epoch:02d}_{val_loss:.2f}", auto_insert=False), "03_0.31"),
        (Naming(join="_", equals=""), "epoch3_step400"),
        (Naming("{epoch}.{step}", join="."), "epoch=3.step=400"),
        (Naming(join=""), "epoch=3step=400"),
        (Naming("{step:>6}"), "step=   400"),
    ],
)
def test_templates(naming: Naming, expected: str) -> None:
    """A template and its settings make this stem at epoch 3 and step 400."""
    assert expected == naming.stem(METRICS, step=400, epoch=3)


def test_a_reported_epoch_comes_before_the_count() -> None:
    """A loop that logs its own epoch or step sees that one in the name, as a whole number."""
    assert "epoch=7-step=400" == Naming().stem({"epoch": 7.0}, step=400, epoch=3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reported_step_that_is_no_number_is_written_as_it_is(value: float) -> None:
    """Not even a NaN under a built-in name breaks naming."""
    assert f"step={value}" == Naming("{step}").stem({"step": value}, step=1, epoch=0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(math.nan, "v=nan"), (math.inf, "v=inf"), (-0.5, "v=-0.500"), (1e300, "v=1e+300"), (-1.5e200, "v=-1.5e+200")],
)
def test_any_float_has_a_name(value: float, expected: str) -> None:
    """A run that diverges or explodes is still saved: no value makes a name too long for the disk."""
    assert expected == Naming("{v:.3f}").stem({"v": value}, step=1, epoch=0)


@pytest.mark.parametrize(
    ("template", "known", "expected"),
    [
        ("{epoch}-{val_loss:.2f}", ["val_loss"], "epoch=1"),
        ("{val_loss:.2f}-{epoch}", ["val_loss"], "epoch=1"),
        ("{epoch}-{val_loss:.2f}-{step}", ["val_loss"], "epoch=1-step=5"),
        ("{epoch}/{val_loss:.2f}", ["val_loss"], "epoch=1"),
        ("{val_loss:.2f}", ["val_loss"], "epoch=1-step=5"),
        ("model{val_loss:.2f}x-{step}", ["val_loss"], "step=5"),
    ],
)
def test_a_part_whose_metric_comes_later_is_left_out(template: str, known: list[str], expected: str) -> None:
    """A known metric that is not there yet takes its part out of the name, and nothing else."""
    assert expected == Naming(template).stem({}, step=5, epoch=1, known=known)


def test_an_unknown_field_lists_what_there_is() -> None:
    """A misspelt metric is an error with the names that would do."""
    with pytest.raises(
        NamingError, match=r"asks for 'val_los', which was not reported \(have: epoch, step, val_loss\)"
    ):
        Naming("{epoch}-{val_los}").stem({"val_loss": 1.0}, step=1, epoch=0)


@pytest.mark.parametrize(
    ("template", "expected"),
    [("{epoch}-last", "last"), ("my-{val/loss:.2f}-last", "my-last"), ("{epoch}", ""), ("last", "last")],
)
def test_the_fixed_parts_of_a_template_are_left_of_it(template: str, expected: str) -> None:
    """What an alias can be called that was asked for as a template."""
    assert expected == fixed_parts(template)


def test_zero_stands_for_an_unknown_field() -> None:
    """A metric that is only not there yet is left out: zero would be a score."""
    naming = Naming("{step}-{val_loss:.2f}-{typo:.2f}", missing="zero")
    assert "step=1-typo=0.00" == naming.stem({}, step=1, epoch=0, known={"val_loss"})


def test_missing_may_be_zero_as_in_lightning() -> None:
    """The flags dialect formats a missing metric as 0."""
    assert "val_loss=0.00-step=1" == Naming("{val_loss:.2f}-{step}", missing="zero").stem({}, step=1, epoch=0)


def test_a_format_that_does_not_fit_the_value_says_so() -> None:
    """A whole-number format for a fraction names the field and the value."""
    with pytest.raises(NamingError, match=r"\{n:d\} cannot format 0\.5"):
        Naming("{n:d}").stem({"n": 0.5}, step=1, epoch=0)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "expected text such as"),
        (3, "the template is 3; expected text"),
        ("{epoch", "cannot be parsed.*literal brace"),
        ("{}", "not {name} or {name:format}"),
        ("{epoch!r}", "not {name} or {name:format}"),
        ("{epoch:{width}}", "not {name} or {name:format}"),
        ("{epoch:zz}", "'zz', which is not a number format"),
        ("{epoch:s}", "'s', which is not a number format"),
        ("../{epoch}", "must stay inside"),
        ("a/../{epoch}", "must stay inside"),
        ("a//{epoch}", "empty part"),
        ("/tmp/{epoch}", "is absolute"),
        ("C:/{epoch}", "is absolute"),
        ("a\\{epoch}", "backslash or control character"),
        ("a\n{epoch}", "backslash or control character"),
        ("\ud800{epoch}", "lone surrogate"),
        (".checkpointer/{epoch}", "is reserved"),
        ("x" * 256, "longer than 255 bytes"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_at_once(template: Any, message: str) -> None:
    """What can never be a name fails when it is written, not at the first save."""
    with pytest.raises(NamingError, match=message):
        Naming(template)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"extension": "ckpt"}, NamingError, r"the extension 'ckpt' has no dot; write it as '\.ckpt'"),
        ({"last": "{epoch}"}, NamingError, "the alias name '{epoch}' holds a brace"),
        ({"best": "../best"}, NamingError, "must stay inside"),
        ({"last": ""}, NamingError, "empty part"),
        ({"first_version": -1}, PolicyError, "Naming.first_version is -1; expected a whole number of at least 0"),
        ({"missing": "skip"}, PolicyError, "Naming.missing is 'skip'; expected 'error' or 'zero'"),
        ({"slashes": True}, PolicyError, "Naming.slashes is True; expected 'replace' or 'keep'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], error: Any, message: str) -> None:
    """The error names the setting, the value and what was expected."""
    with pytest.raises(error, match=message):
        Naming(**settings)


@pytest.mark.parametrize("key", ["..", "a/../b", "/abs", "a\\b", 'a"b', "a:b"])
def test_a_metrics_name_cannot_lead_out_of_the_directory(key: str) -> None:
    """Slashes and hostile characters of a metric's name become underscores."""
    stem = Naming("{" + key.replace(":", "") + "}").stem({key.replace(":", ""): 1.0}, step=1, epoch=0)
    assert "/" not in stem
    assert stem == check_name(stem)


def test_kept_slashes_cannot_lead_out_either() -> None:
    """Asking for folders does not ask for folders elsewhere."""
    with pytest.raises(NamingError, match="must stay inside"):
        Naming("{a/../b}", slashes="keep").stem({"a/../b": 1.0}, step=1, epoch=0)


def test_versions_count_up_from_the_first_free() -> None:
    """A taken name gets -v1, -v2 and so on, before the extension."""
    naming = Naming()
    assert "a.ckpt" == naming.free_name("a", set())
    assert "a-v1.ckpt" == naming.free_name("a", {"a.ckpt"})
    assert "a-v3.ckpt" == naming.free_name("a", {"a.ckpt", "a-v1.ckpt", "a-v2.ckpt"})
    assert "a-v1.ckpt" == naming.free_name("a", {"a.ckpt", "a-v2.ckpt"})


@pytest.mark.parametrize("count", [1, 99, 100, 101, 102, 103, 150, 5000])
def test_the_version_after_very_many_is_the_next(count: int) -> None:
    """All lower ones being taken it is the lowest that is free, however many they are."""
    taken = {"a.ckpt", *(f"a-v{version}.ckpt" for version in range(1, count + 1))}
    assert f"a-v{count + 1}.ckpt" == Naming("a").free_name("a", taken)
    assert f"a-v{count}.ckpt" == Naming("a").free_name("a", taken, replaceable={f"a-v{count}.ckpt"})


def test_one_of_very_many_versions_is_found_with_few_questions() -> None:
    """A save must not ask for a hundred thousand names."""
    asked: list[object] = []

    class Taken(set[str]):
        def __contains__(self, name: object) -> bool:
            asked.append(name)
            return super().__contains__(name)

    taken = Taken({"a.ckpt", *(f"a-v{version}.ckpt" for version in range(1, 100_001))})
    assert "a-v100001.ckpt" == Naming("a").free_name("a", taken)
    assert len(asked) < 200


def test_a_version_among_very_many_with_gaps_is_free() -> None:
    """Whatever gaps there are: the name is free, and the version below it is taken."""
    taken = {"a.ckpt", *(f"a-v{version}.ckpt" for version in range(1, 5000) if version % 7 or version < 100)}
    version = int(Naming("a").free_name("a", taken).removeprefix("a-v").removesuffix(".ckpt"))
    assert f"a-v{version}.ckpt" not in taken
    assert f"a-v{version - 1}.ckpt" in taken


def test_versions_follow_the_settings() -> None:
    """Join character, first number and extension are the user's."""
    naming = Naming(join="_", first_version=0, extension=".pt")
    assert "a_v0.pt" == naming.free_name("a", {"a.pt"})


def test_a_replaceable_name_is_taken_again() -> None:
    """What may be replaced does not force a version."""
    assert "a.ckpt" == Naming().free_name("a", {"a.ckpt"}, replaceable={"a.ckpt"})
    assert "a-v1.ckpt" == Naming().free_name("a", {"a.ckpt", "a-v1.ckpt"}, replaceable={"a-v1.ckpt"})


def test_a_version_that_makes_the_name_too_long_is_an_error() -> None:
    """The bound holds for the whole file name."""
    stem = "x" * (MAX_PART_BYTES - len(".ckpt"))
    assert len(Naming().free_name(stem, set())) == MAX_PART_BYTES
    with pytest.raises(NamingError, match="longer than 255 bytes"):
        Naming().free_name(stem, {stem + ".ckpt"})


def test_aliases_carry_the_extension() -> None:
    """Alias files end like the payloads they name."""
    naming = Naming(last="newest", best="top", extension=".safetensors")
    assert ("newest.safetensors", "top.safetensors") == (naming.last_file, naming.best_file)
    assert ("last.ckpt", "best.ckpt") == (Naming().last_file, Naming().best_file)


def test_keys_are_the_metrics_asked_for() -> None:
    """The built-in counts are not among them."""
    assert ("val/loss", "acc") == Naming("{epoch}-{val/loss:.2f}-{acc}").keys


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{epoch}.keras", "epoch=3.keras"),
        ("{epoch:02d}.weights.h5", "epoch=03.weights.h5"),
        ("net/{step}.pth.tar", "net/step=400.pth.tar"),
        ("v1.5-{epoch}", "v1.5-epoch=3.ckpt"),
        ("model-v1.5", "model-v1.5.ckpt"),
        ("{epoch}", "epoch=3.ckpt"),
    ],
)
def test_a_template_may_end_with_its_extension(template: str, expected: str) -> None:
    """It is not followed by another one, a version goes before it, and the aliases have it too."""
    naming = Naming(template)
    stem = naming.stem({}, step=400, epoch=3)
    assert expected == naming.free_name(stem, ())
    assert f"{stem}-v1{naming.suffix}" == naming.free_name(stem, {expected})
    assert naming.last_file == f"last{naming.suffix}"
    assert naming == attrs.evolve(naming)


def test_an_extension_that_is_given_is_the_extension() -> None:
    """Whatever the template ends with, as Lightning has it."""
    assert "a.pt.ckpt" == Naming("a.pt", extension=".ckpt").free_name("a.pt", ())
