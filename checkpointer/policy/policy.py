"""A policy composes when to save, what to keep and how to name; `checkpointer.policy.decide` applies it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal

import attrs
import yaml

from checkpointer._display import lines_html
from checkpointer._new_file import new_file
from checkpointer._validation import one_of
from checkpointer.errors import PolicyError
from checkpointer.policy import yaml_codec as config
from checkpointer.policy.naming import Naming
from checkpointer.policy.ranking import Metric
from checkpointer.policy.retention import KeepAll, KeepBest, KeepLast, Limit, Rule
from checkpointer.policy.triggers import AtSteps, EveryEpochs, EverySeconds, EverySteps, Trigger
from checkpointer.records.record import Contents, Record

MAX_NOTED: Final = 1 << 16
"""A policy of more characters is not noted with a run."""


def _as_naming(value: Any) -> Naming:
    if value is None or isinstance(value, str):
        return Naming(value)
    if isinstance(value, Naming):
        return value
    msg = f"Policy.name is {value!r}; expected a template such as '{{epoch}}-{{step}}', or a Naming"
    raise PolicyError(msg)


def _is_trigger(instance: object, field: object, value: Any) -> None:
    if isinstance(value, type) or not isinstance(value, Trigger):
        msg = f"Policy.when is {value!r}; expected a trigger such as EverySteps(100)"
        raise PolicyError(msg)


def _as_rules(value: Any) -> tuple[Rule | Limit, ...]:
    rules = (value,) if isinstance(value, (Rule, Limit)) else tuple(value)
    for rule in rules:
        if isinstance(rule, type) or not isinstance(rule, (Rule, Limit)):
            msg = f"Policy.keep has {rule!r}; expected rules such as KeepLast(1)"
            raise PolicyError(msg)
    return rules


@attrs.frozen
class Policy:
    """When to save, what to keep, and under which names. A value: it never does anything.

    Args:
        when: The trigger; compose several with `AnyOf`.
        keep: Rules, whose union is kept, and limits such as `Budget` that take away from it.
        name: A template, or a `Naming` with more settings.
        last: A ``last`` alias as a relative symlink (``"link"``) or as a hard link or server-side copy
            (``"copy"``); it always names the newest state, so with it every due observation is saved.
        best: A ``best`` alias for the best by the first `KeepBest`, in the same two ways.
        contents: ``"weights"`` for checkpoints that cannot resume a run.
        rescue: Save if an exception leaves the manager's ``with`` block. The rescue has the step of the last
            observation, and the state at the moment of the exception. If the exception was raised in the middle of a
            step, the saved state is from the middle of that step. If your resume must be bit-exact, pass False, or call
            ``manager.rescue(step=...)`` at a step boundary. ``checkpointer_torch.Loop`` does that for signals.

    Raises:
        PolicyError: If an argument is none of these, or ``best`` is asked for without a `KeepBest`.

    Example:
        >>> from checkpointer import EveryEpochs, KeepBest, KeepLast, Policy
        >>> print(Policy(EveryEpochs(1), [KeepBest(3, "val_loss", mode="min"), KeepLast(1)]))
        save every epoch; keep the best 3 by val_loss (min) and the newest
    """

    when: Trigger = attrs.field(validator=_is_trigger)
    keep: tuple[Rule | Limit, ...] = attrs.field(converter=_as_rules)
    name: Naming = attrs.field(default=None, converter=_as_naming, kw_only=True)
    last: Literal["link", "copy"] | None = attrs.field(
        default=None, validator=one_of(None, "link", "copy"), kw_only=True
    )
    best: Literal["link", "copy"] | None = attrs.field(
        default=None, validator=one_of(None, "link", "copy"), kw_only=True
    )
    contents: Contents = attrs.field(default="full", validator=one_of("full", "weights"), kw_only=True)
    rescue: bool = attrs.field(default=True, validator=one_of(True, False), kw_only=True)
    rules: tuple[Rule, ...] = attrs.field(init=False, repr=False, eq=False)
    """What keeps."""
    limits: tuple[Limit, ...] = attrs.field(init=False, repr=False, eq=False)
    """What takes away."""

    def __attrs_post_init__(self) -> None:
        # Once: each save asks several times, and a Protocol is slow to say what an object is.
        object.__setattr__(self, "rules", tuple(rule for rule in self.keep if isinstance(rule, Rule)))
        object.__setattr__(self, "limits", tuple(rule for rule in self.keep if isinstance(rule, Limit)))
        if self.best and self.ranking is None:
            msg = f"Policy.best is {self.best!r}, but no rule ranks; add KeepBest(1, metric, mode=...) to keep"
            raise PolicyError(msg)
        if self.last and self.best and self.name.last == self.name.best:
            msg = f"the last and best aliases are both {self.name.last!r}; name them apart: Naming(best=...)"
            raise PolicyError(msg)

    @property
    def ranking(self) -> Metric | None:
        """The metric that says which is best: the first `KeepBest`'s."""
        return self.best_rule.metric if self.best_rule else None

    @property
    def best_rule(self) -> KeepBest | None:
        """The rule that says which is best: the first `KeepBest`."""
        return next((rule for rule in self.keep if isinstance(rule, KeepBest)), None)

    @property
    def aliases(self) -> dict[str, Literal["link", "copy"]]:
        """File name of each alias, and how it is made."""
        wanted = {self.name.last_file: self.last, self.name.best_file: self.best}
        return {name: how for name, how in wanted.items() if how}

    @property
    def known_metrics(self) -> frozenset[str]:
        """Metrics that rules name: right in a template before they are first reported."""
        metrics = (rule.metric for rule in self.keep if isinstance(rule, KeepBest))
        return frozenset(metric.key for metric in metrics if isinstance(metric.key, str))

    def _repr_html_(self) -> str:
        keep = "\n".join(map(str, self.rules)) or "nothing"
        aliases = ", ".join(f"{name} ({how})" for name, how in self.aliases.items())
        lines = [("save", str(self.when)), ("keep", keep), ("limits", "\n".join(map(str, self.limits)))]
        return lines_html("Policy", [*lines, ("names", self.name.template or ""), ("aliases", aliases)])

    def best_first(self, records: Iterable[Record]) -> list[Record]:
        """Return the records that the first `KeepBest` ranks, best first; empty if no rule ranks."""
        return self.best_rule.ranked(records) if self.best_rule else []

    def best_of(self, records: Iterable[Record]) -> Record | None:
        """Return the best of these records, or None if none is ranked."""
        return self.best_rule.best(records) if self.best_rule else None

    def top(self, records: Iterable[Record]) -> list[Record]:
        """Return the records that the first `KeepBest` keeps, best first; ``records`` are oldest first."""
        return self.best_rule.top(records) if self.best_rule else []

    def scores(self, records: Iterable[Record]) -> dict[str, float]:
        """Return name and score of the best k by the first `KeepBest`, best first."""
        metric = self.ranking
        best = self.top(records)
        return {record.name: value for record in best if metric and (value := metric.value(record)) is not None}

    @classmethod
    def from_flags(
        cls,
        *,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        save_last: bool | Literal["link"] | None = None,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        train_time_interval: timedelta | None = None,
        filename: str | None = None,
        auto_insert_metric_name: bool = True,
        enable_version_counter: bool = True,
        save_weights_only: bool = False,
        save_on_exception: bool = False,
    ) -> Policy:
        """Build a policy from the arguments of Lightning's ``ModelCheckpoint``, with their meanings.

        ``save_top_k``: -1 keeps all, 0 none (but ``last``), k the best k by ``monitor``; without ``monitor`` 1 keeps
        the newest. At most one of the three triggers; none means every epoch, 0 turns one off. A template field that
        is missing is 0, as there. Differences: ``last`` is the newest state at every due observation, and an
        exception's checkpoint gets another name if a file has its name.

        Raises:
            PolicyError: For what Lightning refuses too: ``save_top_k < -1``, ``save_top_k >= 2`` without
                ``monitor``, another mode, several triggers, negative intervals.

        Example:
            >>> from checkpointer import Policy
            >>> print(Policy.from_flags(monitor="val_loss", save_top_k=3))
            save every epoch; keep the best 3 by val_loss (min); no rescue on exceptions
        """
        if save_last not in (None, True, False, "link"):
            msg = f"save_last is {save_last!r}; expected True, False, None or 'link'"
            raise PolicyError(msg)
        name = Naming(
            filename,
            auto_insert=auto_insert_metric_name,
            version_counter=enable_version_counter,
            missing="zero",
            rescue="template",
        )
        return cls(
            _trigger_of(every_n_train_steps, every_n_epochs, train_time_interval),
            _rules_of(monitor, mode, save_top_k),
            name=name,
            last="link" if save_last == "link" else "copy" if save_last else None,
            contents="weights" if save_weights_only else "full",
            rescue=save_on_exception,
        )

    def to_yaml(self, path: str | Path | None = None) -> str:
        """Return the policy as YAML, and write it whole to ``path`` if given. Scores are written by name.

        Example:
            >>> from checkpointer import EverySteps, KeepLast, Policy
            >>> print(Policy(EverySteps(100), [KeepLast(2)]).to_yaml())
            when:
              EverySteps:
                n: 100
            keep:
            - KeepLast:
                n: 2
            <BLANKLINE>
        """
        data: dict[str, Any] = {"when": config.to_plain(self.when), "keep": list(map(config.to_plain, self.keep))}
        if self.name != Naming():
            data["name"] = config.to_plain(self.name)["Naming"]
        for field in ("last", "best", "contents", "rescue"):
            value = getattr(self, field)
            if value != getattr(attrs.fields(Policy), field).default:
                data[field] = value
        text = config.dump_yaml(data)
        if path is not None:
            with new_file(path, replaces=True) as stream:
                stream.write(text.encode())
        return text

    @classmethod
    def from_yaml(cls, path: str | Path, *, known: Mapping[str, Any] | None = None) -> Policy:
        """Read what `to_yaml` wrote.

        Args:
            path: The file, or the YAML text itself if it has more than one line.
            known: Score functions and classes of your own, by the names the file uses. The file itself can name no
                code to import.

        Raises:
            PolicyError: If the file is not YAML, or a value in it is bad; the message has its path in the file.
            FileNotFoundError: If there is no such file.
        """
        if isinstance(path, str) and "\n" in path:
            data = path.encode(errors="surrogatepass")
        else:
            with open(path, "rb") as stream:
                data = stream.read(config.MAX_YAML_BYTES + 1)
        return _policy_from_plain(config.parse_yaml(data), known or {})

    def __str__(self) -> str:
        rules = " and ".join(map(str, self.rules)) or "nothing"
        limits = "".join(f", {limit}" for limit in self.limits)
        to = {"link": "a link to", "copy": "a copy of"}
        every = "so every due checkpoint is saved, even if no rule keeps it"
        last = f"; {self.name.last_file} is {to[self.last]} the newest checkpoint, {every}" if self.last else ""
        best = f"; {self.name.best_file} is {to[self.best]} the best checkpoint" if self.best else ""
        contents = "; weights only" if self.contents == "weights" else ""
        rescue = "" if self.rescue else "; no rescue on exceptions"
        return f"save {self.when}; keep {rules}{limits}{last}{best}{contents}{rescue}"


def noted(policy: Policy) -> str:
    """Return the policy as YAML for the claim of a run; empty if it keeps nothing, or cannot be written.

    A manager without a policy of its user's has one that keeps nothing, which must not be advice to remove all.
    """
    if not policy.rules and not policy.last:
        return ""
    try:
        text = policy.to_yaml()
    except (PolicyError, yaml.YAMLError):
        return ""  # It has a rule of the user's own.
    return text if len(text) <= MAX_NOTED else ""


def _policy_from_plain(data: object, known: Mapping[str, Any]) -> Policy:
    arguments = dict(config.mapping(Policy, data, "policy"))
    arguments["when"] = config.from_plain(arguments["when"], "when", known)
    keep = arguments["keep"]
    if not isinstance(keep, list):
        msg = f"in 'keep': expected a list of rules, found {keep!r:.80}"
        raise PolicyError(msg)
    arguments["keep"] = [config.from_plain(rule, f"keep[{i}]", known) for i, rule in enumerate(keep)]
    arguments["name"] = config.naming_from_plain(arguments.get("name"), "name")
    return Policy(**arguments)


# The flags of Lightning's ModelCheckpoint. Their meanings and validation errors follow Lightning 2.6.


def _trigger_of(steps: int | None, epochs: int | None, interval: timedelta | None) -> Trigger:
    triggers: dict[str, Trigger] = {}
    for name, value, kind in (("every_n_train_steps", steps, EverySteps), ("every_n_epochs", epochs, EveryEpochs)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            msg = f"{name} is {value!r}; expected a whole number of at least 0 (0 turns it off)"
            raise PolicyError(msg)
        if value:
            triggers[name] = kind(value)
    if interval is not None:
        triggers["train_time_interval"] = EverySeconds(interval)
    if len(triggers) > 1:
        msg = (
            f"{' and '.join(triggers)} are mutually exclusive; compose them instead: "
            f"Policy(when=AnyOf({', '.join(map(repr, triggers.values()))}), ...)"
        )
        raise PolicyError(msg)
    if steps is None and epochs is None and interval is None:
        return EveryEpochs(1)
    return next(iter(triggers.values()), AtSteps())


def _rules_of(monitor: str | None, mode: Literal["min", "max"], top_k: int) -> list[Rule | Limit]:
    if mode not in ("min", "max"):
        msg = f"mode is {mode!r}; expected 'min' or 'max'"
        raise PolicyError(msg)
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < -1:
        msg = f"save_top_k is {top_k!r}; expected -1 (all), 0 (none) or how many to keep"
        raise PolicyError(msg)
    if monitor is None and top_k not in (-1, 0, 1):
        msg = (
            f"save_top_k={top_k} with monitor=None has nothing to rank by; name the metric with monitor=, "
            f"or keep the newest ones with Policy(keep=[KeepLast({top_k})])"
        )
        raise PolicyError(msg)
    if top_k == 0:
        return []
    if monitor is None:
        return [KeepAll()] if top_k == -1 else [KeepLast(1)]
    if top_k == -1:
        return [KeepAll(), KeepBest(1, monitor, mode=mode, ties="incumbent")]
    return [KeepBest(top_k, monitor, mode=mode, ties="incumbent")]
