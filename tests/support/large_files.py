"""Files of a megabyte whose parts are harmless, and that stand for very much."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from support.odd_files import (
    Made,
    Named,
    dcp_file,
    dcp_metadata,
    legacy_file,
    pickled,
    safetensors_file,
    tensor,
    torch_file,
    zipped,
)

MEGABYTE: Final = 1_000_000


def _many(inner: bytes, count: int, first: bytes = b"") -> bytes:
    """Return the pickle of a tuple that holds a value, memoised as 0, and others."""
    return b"\x80\x04(" + first + inner * count + b"t."


def _shared(levels: int = 30) -> bytes:
    """Return the pickle of lists of ten lists of ten lists ..., each of which is written once."""
    data = b"\x80\x04]\x94X\x02\0\0\0haa"
    for level in range(levels):
        data += b"](" + b"h" + bytes([level]) + (b"h" + bytes([level])) * 9 + b"e\x94"
    return data + b"."


def _memoised(value: Any) -> bytes:
    return pickled(value)[2:-1] + b"\x94"


def _pickles() -> Mapping[str, Callable[[], bytes]]:
    text, numbers = "a" * (MEGABYTE // 2), [*range(60_000)]
    again = MEGABYTE // 4
    state = {"a": Made(Named("torch.nn", "Linear"), (), {"_parameters": {}, "_buffers": {}, "_modules": {}})}
    return {
        "sets": lambda: _many(b"\x8f", MEGABYTE),
        "numbers of one list": lambda: _many(b"h\0", again, _memoised(numbers)),
        "names of one text": lambda: _many(b"h\0", again, _memoised(text)),
        "mappings with one long key": lambda: _many(b"}h\0]s", 100_000, _memoised(text)),
        "classes of one module": lambda: _many(b"h\0h\0\x93", 100_000, _memoised("m" * 500)),
        "lists of lists of one list": _shared,
        "levels": lambda: b"\x80\x04" + b"]" * (MEGABYTE // 2) + b"a" * (MEGABYTE // 2 - 1) + b".",
        "digits": lambda: pickled({"w": tensor(), "n": 1 << 8 * 900_000}),
        "dimensions": lambda: pickled({"w": tensor(shape=(1 << 40,) * 50_000, stride=(1,) * 50_000)}),
        "keys of one class": lambda: _many(b"", 0, pickled({(number, "a"): number for number in range(50_000)})[2:-1]),
        "modules": lambda: pickled([state] * 5000),
        "a claim": lambda: pickled({"w": tensor(count=1 << 40, shape=(1 << 40,))}),
        "an expanded tensor": lambda: pickled({"w": tensor(count=1, shape=(1 << 40,), stride=(0,))}),
        "memory": lambda: b"\x80\x04Nr\xff\xff\x0f\0" + b"N\x94" * 400_000 + b"(" + b"t.",
    }


def _zipped(make: Callable[[], bytes]) -> bytes:
    return zipped(make(), {"0": bytes(16)})


def _payloads() -> dict[str, Callable[[], bytes]]:
    content = bytes(400_000)
    made: dict[str, Callable[[], bytes]] = {}
    for name, make in _pickles().items():
        made[f"{name}, in a zip file"] = partial(_zipped, make)
        if name == "digits":
            made[f"{name}, alone"] = make
    views = {f"w{number}": tensor(count=100_000, shape=(100_000,)) for number in range(3000)}
    made["views of one storage"] = lambda: torch_file(views, {"0": content})
    made["a list of storages"] = lambda: legacy_file({}, tuple(map(str, range(100_000))), ())
    made["a count"] = lambda: legacy_file({"w": tensor(shape=(1 << 40,), count=1 << 40)}, ("0",), (1 << 60,))
    made["levels of a header"] = lambda: safetensors_file(b'{"a":' + b"[" * (MEGABYTE - 8))
    made["digits in a header"] = lambda: safetensors_file(b'{"a":' + b"9" * (MEGABYTE - 8) + b"}")
    made["the length of a header"] = lambda: struct.pack("<Q", 90_000_000) + b"{}"
    entry = {"dtype": "F32", "shape": [100_000], "data_offsets": [0, 400_000]}
    made["tensors of one range"] = lambda: safetensors_file({f"w{n}": entry for n in range(7000)}, content)
    odd = {"dtype": "F9", "shape": [1 << 40], "data_offsets": [0, 0]}
    made["an unknown dtype"] = lambda: safetensors_file({"w": odd})
    return made


def _tables() -> dict[str, Callable[[], bytes]]:
    table = dcp_metadata()
    names = {
        f"w{number}": Made(Named("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"), ())
        for number in range(9000)
    }
    paths = {name: (name, 999_999) for name in names}
    return {
        "a tensor": lambda: dcp_file(dcp_metadata(size=(1 << 40,), chunk=(1 << 40,))),
        "lists": lambda: dcp_file({**table, "state_dict_metadata": names, "planner_data": paths}),
        "names": lambda: dcp_file({**table, "state_dict_metadata": names, "planner_data": None}),
        "levels": lambda: b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
    }


def _texts() -> dict[tuple[str, str], Callable[[], bytes]]:
    rows = [{"step": 5, f"m{number}": 1} for number in range(40_000)]
    return {
        ("trainer", "a history"): lambda: json.dumps({"global_step": 5, "log_history": rows}).encode(),
        ("trainer", "levels"): lambda: b"[" * MEGABYTE,
        ("trainer", "digits"): lambda: b'{"global_step": ' + b"9" * 4000 + b', "log_history": []}',
        ("metrics", "columns"): lambda: ",".join(map(str, range(150_000))).encode() + b"\n1\n",
        ("metrics", "columns without a step"): lambda: (",".join(map(str, range(150_000))) + "\n1\n").encode(),
        ("metrics", "lines of one step"): lambda: "\n".join(map(json.dumps, rows)).encode(),
        ("metrics", "a column twice"): lambda: ("step," + ",".join(map(str, range(150_000))) + ",step\n").encode(),
        ("policy", "keys"): lambda: ("{" + ",".join(f"a{n}: 1" for n in range(24_000)) + ",a1: 1}").encode(),
        ("policy", "levels"): lambda: b"[" * 200_000,
        ("json", "a key twice"): lambda: ("{" + ",".join(f'"{n}":1' for n in range(90_000)) + ',"89999":1}').encode(),
        ("json", "levels"): lambda: b"[" * MEGABYTE,
        ("json", "lists"): lambda: b"[" + b"[]," * 300_000 + b"[]]",
    }


def large_files() -> dict[tuple[str, str], Callable[[], bytes]]:
    """Return what makes each file, by its kind and name."""
    files = {("payload", name): make for name, make in _payloads().items()}
    files |= {("dcp", name): make for name, make in _tables().items()}
    return files | _texts()
