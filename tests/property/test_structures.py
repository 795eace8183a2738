"""Well-formed files with odd types, sizes, numbers, texts and nesting: only errors of this library, for every reader.

`test_fuzz.py` changes bytes, which hardly ever makes a file that a parser takes and that says something odd.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import xxhash
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.factories import record
from support.odd_files import (
    Deep,
    Made,
    Named,
    Ref,
    bent_zip,
    dcp_file,
    dcp_metadata,
    legacy_file,
    safetensors_file,
    tensor,
    torch_file,
)
from support.plain_format import PlainFormat

from checkpointer import CheckpointerError, CheckpointManager, EverySteps, KeepLast, Policy
from checkpointer.cli import app
from checkpointer.commit import aliases
from checkpointer.commit.index import INDEX, load, record_path
from checkpointer.commit.journal import Journal
from checkpointer.commit.terms import key_of
from checkpointer.errors import ObservationError, PolicyError
from checkpointer.formats.dcp_folder import DcpFormat
from checkpointer.formats.inspection.find_weights import weights_of
from checkpointer.formats.inspection.payload import open_contents, open_stream
from checkpointer.formats.inspection.torch_file import TorchContents
from checkpointer.formats.safetensors_file import SafetensorsFormat
from checkpointer.formats.torch_file import TorchFormat
from checkpointer.storage import MemoryStorage, open_storage
from checkpointer.tools.adopt import adopt, find_foreign
from checkpointer.tools.catalog import look_at
from checkpointer.tools.diff import diff, diff_values
from checkpointer.tools.history import read_history

EXAMPLES: Final = int(os.environ.get("CHECKPOINTER_FUZZ_EXAMPLES", "150"))
"""Files of each kind; with another number other files than in CI."""
quick = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 150,
    suppress_health_check=[*HealthCheck],
    database=None,
)

# Odd values

NUMBERS: Final[list[Any]] = [
    *(0, 1, -1, -(2**63), 2**31, 2**62, 2**63, 2**64, 10**30, 10**400, 10**3000),
    *(0.5, -0.0, 1e308, 5e-324, math.nan, math.inf, -math.inf, True, False, None),
]
TEXTS: Final = [
    *("", "w", "0", "nan", "\ud800", "a\udfff", "\0", "\x1b[31m", "\u202e", "é" * 300, "a" * 5000, "9" * 5000),
    *("..", "../x", "/etc", "C:x", "a\\b", "step", "epoch", "float32", "load", "nn", "__class__", "last.ckpt"),
]
odd_scalars = st.sampled_from([*NUMBERS, *TEXTS])
odd_values = st.recursive(
    odd_scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3),
    max_leaves=6,
)
odd_parts = st.one_of(
    odd_values,
    st.builds(Deep, st.sampled_from([3, 60, 2000]), odd_values),
    st.lists(odd_scalars, max_size=3).map(tuple),
    st.sampled_from([tensor(), tensor(shape=(2,) * 70), tensor(count=1 << 40), Named("torch", "nn"), Ref("0")]),
    st.builds(
        Made, st.builds(Named, st.sampled_from(["builtins", "torch._utils", "torch"]), st.just("set")), st.just(())
    ),
)
"""What may also stand in a pickle."""


@st.composite
def bent(draw: st.DrawFn, template: Any, odd: st.SearchStrategy[Any] = odd_values) -> Any:
    """Return a template in which a few values are odd."""
    count = sum(1 for _ in _places(template))
    left = {number: draw(odd) for number in draw(st.sets(st.integers(0, count - 1), max_size=3))}
    return _replaced(template, left, iter(range(count)))


def _places(value: Any) -> Iterator[Any]:
    yield value
    for child in _children(value):
        yield from _places(child)


def _children(value: Any) -> list[Any]:
    match value:
        case dict():
            return [*value.values()]
        case list() | tuple():
            return [*value]
        case Made(what, args, state):
            return [what, args, state]
        case Ref(identity):
            return [identity]
    return []


def _replaced(value: Any, odd: dict[int, Any], numbers: Iterator[int]) -> Any:
    number = next(numbers)
    inside = [_replaced(child, odd, numbers) for child in _children(value)]
    if number in odd:
        return odd[number]
    match value:
        case dict():
            return dict(zip(value, inside, strict=True))
        case list() | tuple():
            return type(value)(inside)
        case Made() | Ref():
            return type(value)(*inside)
    return value


# Payloads


def refused(read: Callable[[], object]) -> bool:
    """Return whether an error of this library says why something cannot be read; any other error escapes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    except CheckpointerError as error:
        text = str(error)
    else:
        return False
    assert 0 < len(text) < 20_000
    return True


def look(data: bytes) -> None:
    """Do with a file what all commands do."""
    with contextlib.closing(open_stream(io.BytesIO(data), "f")) as contents:
        list(contents.problems())
        refused(lambda: weights_of(contents))
        for name in contents.tensors:
            refused(partial(contents.read, name))
        for name in contents.others:
            contents.value(name)
            str(contents.others[name])
        refused(lambda: [*diff(contents, contents)])
        assert {} == diff_values(contents, contents)
        if isinstance(contents, TorchContents):
            refused(contents.state)


STATE: Final = {
    "model": {"w": tensor(), "b": tensor(shape=(2, 2), stride=(2, 1))},
    "optimizer": {"state": {0: {"exp_avg": tensor()}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    "step": 3,
    "epoch": 1,
    "val_loss": 0.5,
    "rng": Made(Named("collections", "OrderedDict"), ([["a", 1]],), {"_metadata": {"": {"version": 1}}}),
    "mode": Named("argparse", "Namespace"),
}


@quick
@given(bent(STATE, odd_parts))
def test_odd_torch_files(state: Any) -> None:
    """Odd values anywhere in the pickle of a torch file, also where a tensor has its shape, stride or storage."""
    data = torch_file(state)
    refused(lambda: look(data))
    refused(lambda: TorchFormat().read(io.BytesIO(data), weights_only=True, map_location="cpu"))


@quick
@given(bent(STATE, odd_parts), bent(["0"], odd_parts), st.sampled_from([0, 1, 4, -1, 1 << 60]))
def test_odd_legacy_files(state: Any, keys: Any, count: int) -> None:
    """Odd values, lists of storages and counts in what torch before 1.6 wrote."""
    data = legacy_file(state, keys, (count,))
    refused(lambda: look(data))
    refused(lambda: TorchFormat().read(io.BytesIO(data), weights_only=True, map_location="cpu"))


@quick
@given(st.integers(8, 45), st.sampled_from([0, 1, 8, 9, 64, 127, 255]), st.sampled_from(["0", "pkl"]))
def test_odd_zip_directories(offset: int, value: int, member: str) -> None:
    """Flags, methods, sizes, times and offsets of a member that are not as torch writes them."""
    name = b"archive/data/0" if member == "0" else b"archive/data.pkl"
    data = bent_zip(torch_file(STATE), offset, value, name)
    refused(lambda: look(data))
    refused(lambda: TorchFormat().read(io.BytesIO(data), weights_only=True, map_location="cpu"))


HEADER: Final = {
    "__metadata__": {"format": "pt", "tied": "w"},
    "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "I64", "shape": [1], "data_offsets": [8, 16]},
}


@quick
@given(bent(HEADER))
def test_odd_safetensors(header: Any) -> None:
    """Odd dtypes, shapes and offsets in a header."""
    data = safetensors_file(header)
    refused(lambda: look(data))
    refused(lambda: SafetensorsFormat().read(io.BytesIO(data), weights_only=True, map_location="cpu"))


@quick
@given(bent(dcp_metadata(), odd_parts))
def test_odd_dcp_tables(tmp_path_factory: pytest.TempPathFactory, fields: Any) -> None:
    """Text for numbers, dtypes that are none, and paths and sizes that cannot be, in the table of a DCP folder."""
    folder = tmp_path_factory.mktemp("dcp")
    try:
        data = dcp_file(fields)
    except (TypeError, ValueError, KeyError, AttributeError):
        return  # It is not a table of names, offsets and places any more.
    (folder / ".metadata").write_bytes(data)
    (folder / "__0_0.distcp").write_bytes(torch_file(tensor()).ljust(2000, b"\0"))

    def look_into() -> None:
        with open_contents(open_storage(folder, ""), "") as contents:
            list(contents.problems())
            for name in contents.tensors:
                refused(partial(contents.read, name))

    refused(look_into)
    refused(lambda: DcpFormat().read_folder(str(folder), weights_only=True, map_location="cpu"))


# Files of this library, and of loggers


RECORD: Final = {
    "schema": 1,
    "status": "committed",
    "record": record("a.ckpt", step=1).to_dict(),
    "owner": "",
    "previous": None,
}
MARKER: Final = {"schema": 1, "alias": "last.ckpt", "label": "", "owner": ""}
TRAINER: Final = {
    "global_step": 5,
    "epoch": 1.0,
    "log_history": [{"step": 5, "epoch": 1.0, "loss": 0.5}, {"step": 5, "eval_loss": 0.25}],
}


POLICY: Final = {
    "when": {"EverySteps": {"n": 10}},
    "keep": [{"KeepBest": {"k": 3, "metric": "loss", "mode": "min"}}],
    "name": "{epoch}",
}


def as_json(value: Any) -> bytes | None:
    """Return JSON; None if Python cannot write it."""
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return None


@quick
@given(bent(RECORD), bent({"schema": 1, "entries": {record_path("a.ckpt"): [1, "v", RECORD]}}), bent(MARKER))
def test_odd_records_indices_and_markers(entry: Any, index: Any, marker: Any) -> None:
    """A manager that finds them opens, or says in its own error why not."""
    storage = MemoryStorage()
    files = {record_path("a.ckpt"): entry, INDEX: index, ".checkpointer/aliases/last.ckpt.json": marker}
    for path, value in files.items():
        if (data := as_json(value)) is not None:
            storage.write(path, data)
    storage.write("a.ckpt", b"")
    refused(lambda: load(storage))
    journal = Journal(storage, "me")
    refused(lambda: aliases.read_marker(journal, "last.ckpt"))
    policy = Policy(EverySteps(1), [KeepLast(1)])

    def use() -> None:
        with CheckpointManager(storage, policy, state=lambda: {"w": 1}, format=PlainFormat()) as manager:
            manager.observe({}, step=1, epoch=0)

    refused(use)


@quick
@given(
    st.lists(st.fixed_dictionaries({"step": odd_scalars}, optional={"epoch": odd_scalars, "x": odd_values}), max_size=4)
)
def test_odd_metrics(rows: list[dict[str, Any]]) -> None:
    """CSV and lines of JSON: what is read has steps and epochs that a record can have."""
    lines = [line for row in rows if (line := as_json(row)) is not None]
    cells = [",".join(str(row.get(key, ""))[:400].replace("\n", " ") for key in ("step", "epoch", "x")) for row in rows]
    table = "\n".join(["step,epoch,x", *cells]).encode("utf-8", "surrogatepass")
    for data in (b"\n".join(lines), table):
        with contextlib.suppress(ObservationError):
            assert all(now.step < 1 << 63 > now.epoch for now in read_history(data, "f").observations)


@quick
@given(bent(POLICY))
def test_odd_policies(value: Any) -> None:
    """A policy in YAML is refused with a `PolicyError`, or can be printed and written."""
    with contextlib.suppress(PolicyError):
        policy = Policy.from_yaml(_as_yaml(value) + "\n")
        assert str(policy)
        assert policy.to_yaml()


# Commands

OWNER: Final = "node7_1234abcd_99~17~5~0123456789ab"
OWN: Final = {
    "directory.json": {"schema": 1, "created": 1.5},
    "index.json": {"schema": 1, "entries": {record_path("7.ckpt"): [1, "v", RECORD]}},
    "aliases/last.ckpt.json": MARKER,
    f"writers/{OWNER}.json": {"schema": 1, "owner": OWNER, "machine": ""},
    f"changes/{OWNER}.json": {"schema": 1, "owner": OWNER, "entries": [RECORD], "aliases": ["best.ckpt"], "term": 1},
    "terms/{key}/2.json": {
        "schema": 1,
        "run": "r",
        "label": "",
        "term": 2,
        "owner": OWNER,
        "machine": "m",
        "beat_s": 15.0,
        "since": "2026-01-01 00:00:00 UTC",
        "policy": "when: {EverySteps: {n: 1}}",
    },
    "terms/{key}/2.beat": {"time": 5.0, "step": 3, "due": "step 4", "due_step": 4, "written": 5, "mirror": "m"},
    "terms/{key}/2.limits": {"schema": 1, "limits": [[1, 2]], "announced": ["a.ckpt"]},
}
"""Files of this library in its folder; ``{key}`` is that of the run."""


def saved(folder: Path) -> None:
    """Write two checkpoints."""
    with CheckpointManager(
        folder, Policy(EverySteps(1), [KeepLast(9)], last="link"), state=lambda: {"w": torch.ones(4)}
    ) as manager:
        for step in (1, 2):
            manager.observe({"loss": 1.0 / step}, step=step, epoch=0, epoch_end=False)


COMMANDS: Final = (
    *("ls {run}", "ls {run} --json", "ls {top}", "show {run} last", "show {run} 7 --json", "show {run}/{odd}"),
    *("verify {run}", "verify {run} --deep --json", "verify {run}/{odd}", "last {run}", "last {run} --json"),
    *("best {run} --by loss --mode min", "diff {run} 2 7", "diff {run}/{odd} {run}/{odd}", "watch {run} --once"),
    *("watch {run} --once --json", "plot {run} {top}/p.png --by loss --mode min", "report {run} {top}/r.html"),
    *("report {run} {top}/m.html --metrics {top}/m.csv", "report {top}/m.csv {top}/s.html -p {top}/p.yaml"),
    *("policy check {top}/odd.yaml", "policy check {top}/odd.yaml --json", "policy show {run}", "version"),
    *("simulate {run} -p {top}/p.yaml", "simulate {top}/m.csv -p {top}/p.yaml --all --json", "doctor {top}/new"),
    *("simulate {top}/m.jsonl -p {top}/p.yaml", "simulate {top}/m.jsonl -p {top}/odd.yaml"),
    *("export {run} 7 {top}/w.safetensors", "export {run}/{odd} {top}/w.pt", "average {run} 2 7 -o {top}/m.pt"),
    *("adopt {run} --dry-run", "adopt {top}/foreign --step odd_1.ckpt=3", "ls {top}/foreign --json", "ls {run} --json"),
    *("copy {run} {top}/copy", "pin {run} 2", "unpin {run} 2", "rm {run} 7", "rm {run} 7 --apply"),
    *("prune {run} -p {top}/p.yaml", "prune {run} -p {top}/p.yaml --apply", "sweep {run}"),
)
"""Every command. The last ones change the directory."""


def test_every_command_is_driven(tmp_path: Path) -> None:
    """And each of these lines is sound: on a directory without odd files it does its work."""
    assert {name for group in app.COMMANDS.values() for name in group} == {line.split()[0] for line in COMMANDS}
    one = torch_file({"w": tensor(), "step": 7})
    _write_all(tmp_path, "7.ckpt", one, RECORD, POLICY, [{"step": 1, "loss": 0.5}], json.dumps(TRAINER).encode())
    codes = {line: _said(line, tmp_path, "7.ckpt")[0] for line in COMMANDS}
    differ = {"diff {run} 2 7": 1, "watch {run} --once": 1, "watch {run} --once --json": 1}
    assert dict.fromkeys(COMMANDS, 0) | differ == codes


@settings(quick, max_examples=max(EXAMPLES // 50, 1))
@given(
    payload=bent(STATE, odd_parts),
    entry=bent(RECORD),
    policy=bent(POLICY),
    rows=st.lists(st.fixed_dictionaries({"step": odd_scalars, "loss": odd_scalars}), max_size=3),
    trainer=bent(TRAINER),
    files=bent(OWN),
    place=st.sampled_from(["7.ckpt", "a/b/7.ckpt"]),
)
def test_odd_files_and_every_command(tmp_path_factory: pytest.TempPathFactory, place: str, **odd: Any) -> None:
    """Each command ends with 0, 1 or 2, and shows no control character; `adopt` does its work for the other files."""
    top = tmp_path_factory.mktemp("odd")
    payload, trainer = torch_file(odd["payload"]), as_json(odd["trainer"]) or b"{}"
    _write_all(top, place, payload, odd["entry"], odd["policy"], odd["rows"], trainer)
    _write_own(top / "run", odd["files"])
    for line in COMMANDS:
        code, text = _said(line, top, place)
        assert code in (0, 1, 2), line
        assert [] == [char for char in set(text) if unicodedata.category(char)[0] == "C" and char != "\n"], line
    names = {found.record.name for found in load(open_storage(top / "foreign", "")).entries.values()}
    assert {"good.pt"} <= names


def _said(line: str, top: Path, odd: str) -> tuple[int, str]:
    """Run a command; return its exit code, and what it has printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = app.run(line.format(run=top / "run", top=top, odd=odd).split())
    return code, out.getvalue()


def _write_all(top: Path, place: str, payload: bytes, entry: Any, policy: Any, rows: Any, trainer: bytes) -> None:
    """Write a directory with a payload and its record beside two good checkpoints, and what the commands need."""
    saved(top / "run")
    whole = {"size": len(payload), "digest": f"xxh3-128:{xxhash.xxh3_128_hexdigest(payload)}"}
    if isinstance(entry, dict) and isinstance(entry.get("record"), dict):
        entry = {**entry, "record": {**entry["record"], "name": place} | (whole if entry is RECORD else {})}
    for path, data in ((place, payload), (record_path(place), as_json(entry) or b"{}")):
        (top / "run" / path).parent.mkdir(parents=True, exist_ok=True)
        (top / "run" / path).write_bytes(data)
    (top / "p.yaml").write_text("when: {EverySteps: {n: 1}}\nkeep: [KeepAll]\n")
    (top / "odd.yaml").write_text(_as_yaml(policy))
    (top / "m.csv").write_bytes(_as_table(rows))
    (top / "m.jsonl").write_bytes(b"\n".join(filter(None, map(as_json, rows))))
    _write_foreign(top / "foreign", payload, trainer)


def _write_own(folder: Path, files: Any) -> None:
    """Write odd files of this library: marks, changes, the terms of the run."""
    home = folder / ".checkpointer"
    run = json.loads((home / "records/epoch=0-step=1.ckpt.json").read_bytes())["record"]["run"]
    for path, value in files.items() if isinstance(files, dict) else ():
        place = home / path.format(key=key_of(run, ""))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes((b"7\n" if path.endswith(".beat") else b"") + (as_json(value) or b"{}"))


def _as_yaml(value: Any) -> str:
    try:
        return yaml.safe_dump(value)
    except RecursionError:
        return ""


def _as_table(rows: Any) -> bytes:
    cells = [",".join(str(row[key])[:400].replace("\n", " ") for key in ("step", "loss")) for row in rows]
    return "\n".join(["step,loss", *cells]).encode("utf-8", "surrogatepass")


def _write_foreign(folder: Path, data: bytes, trainer: bytes) -> None:
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / "checkpoint-5/trainer_state.json").write_bytes(trainer)
    (folder / "checkpoint-5/model.safetensors").write_bytes(safetensors_file(HEADER))
    (folder / "odd_1.ckpt").write_bytes(data)
    (folder / "good.pt").write_bytes(torch_file({"w": tensor(), "step": 400}))


# What `adopt` reads


@quick
@given(
    step=st.sampled_from(NUMBERS) | st.sampled_from(TEXTS),
    epoch=st.sampled_from(NUMBERS) | st.sampled_from(TEXTS),
    names=st.lists(st.sampled_from(TEXTS), max_size=2),
    is_lightning=st.booleans(),
    trainer=bent(TRAINER),
)
def test_odd_counters_that_adopt_reads(
    step: Any, epoch: Any, names: list[str], is_lightning: bool, trainer: Any
) -> None:
    """Each file is adopted with a record that can be read again, or named and left; the good one is adopted always."""
    state = {
        "w": tensor(),
        "global_step" if is_lightning else "step": step,
        "epoch": epoch,
        **dict.fromkeys(names, 0.5),
    }
    state |= {"pytorch-lightning_version": "2.6", "state_dict": {"w": tensor()}} if is_lightning else {}
    storage = MemoryStorage()
    storage.write("odd_9.ckpt", torch_file(state))
    storage.write("good.pt", torch_file({"w": tensor(), "step": 400}))
    storage.write("checkpoint-5/trainer_state.json", as_json(trainer) or b"{}")
    storage.write("checkpoint-5/model.safetensors", safetensors_file(HEADER))
    catalog = look_at(storage)
    adoption = find_foreign(catalog)
    made = [*adopt(catalog, adoption, Journal(storage, "me"))]
    listing = load(storage)
    assert {} == listing.damaged
    assert {one.name for one in made} == {entry.record.name for entry in listing.entries.values()}
    assert {"odd_9.ckpt", "good.pt", "checkpoint-5"} == {one.name for one in made} | adoption.refused.keys()
    assert "good.pt" in {one.name for one in made}
