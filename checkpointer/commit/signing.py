"""Signs each record with a secret key, so that another writer to the storage cannot plant a checkpoint."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from checkpointer.errors import PolicyError, UntrustedError

MIN_KEY_BYTES: Final = 16
MAX_KEY_BYTES: Final = 1 << 16
SIGNATURE: Final = "signature"
_SCHEME: Final = "hmac-sha256:"
_MAKE_ONE: Final = 'make one with: python -c "import secrets; print(secrets.token_hex(32))"'


class HMACKey:
    """A secret key that signs and verifies. It appears in no repr, error or pickle.

    Args:
        key: At least 16 random bytes.

    Raises:
        PolicyError: If the key is too short, or is not bytes.

    Example:
        >>> from checkpointer import HMACKey
        >>> key = HMACKey(b"0123456789abcdef0123456789abcdef")
        >>> key.verify(b"data", key.sign(b"data")), key.verify(b"other", key.sign(b"data"))
        (True, False)
        >>> key
        <HMACKey, hidden>
    """

    __slots__ = ("_mac",)

    def __init__(self, key: bytes) -> None:
        if not isinstance(key, bytes):
            msg = f"the key is a {type(key).__name__}; pass bytes, or use HMACKey.from_env or HMACKey.from_file"
            raise PolicyError(msg)
        _check_length(key, "the key")
        # The object keeps the keyed hash instead of the key, so code that prints or copies attributes does not find it.
        self._mac: Final = hmac.new(key, digestmod=hashlib.sha256)

    @classmethod
    def from_env(cls, name: str) -> HMACKey:
        """Take the key from an environment variable, as text.

        Raises:
            PolicyError: If it is not set, or too short.
        """
        key = os.environ.get(name, "").encode(errors="surrogateescape")
        if not key:
            msg = f"the environment variable {name} is not set; put the key there ({_MAKE_ONE})"
            raise PolicyError(msg)
        _check_length(key, f"the key in the environment variable {name}")
        return cls(key)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> HMACKey:
        """Take the key from a file, without a newline at its end.

        The file's permissions are not checked, because every process in a container can often read its secrets.

        Raises:
            PolicyError: If the file cannot be read, or does not hold a key.
        """
        where = os.fspath(path)
        try:
            with open(where, "rb") as stream:
                key = stream.read(MAX_KEY_BYTES + 1)
        except OSError as error:
            msg = f"the key file {where} cannot be read ({error.strerror}); {_MAKE_ONE}"
            raise PolicyError(msg) from error
        if len(key) > MAX_KEY_BYTES:
            msg = f"{where} is larger than {MAX_KEY_BYTES} bytes, so it is not a key file; {_MAKE_ONE}"
            raise PolicyError(msg)
        key = key.removesuffix(b"\n").removesuffix(b"\r")
        _check_length(key, f"the key in {where}")
        return cls(key)

    def sign(self, data: bytes) -> str:
        """Return the signature of ``data``: ``"hmac-sha256:"`` and 64 hex digits."""
        mac = self._mac.copy()
        mac.update(data)
        return _SCHEME + mac.hexdigest()

    def verify(self, data: bytes, signature: str) -> bool:
        """Return whether this key made the signature of ``data``, in a time that does not depend on the signature."""
        return hmac.compare_digest(self.sign(data).encode(), signature.encode(errors="replace"))

    def __repr__(self) -> str:
        return "<HMACKey, hidden>"

    def __reduce__(self) -> NoReturn:
        msg = "a key is not pickled or copied; make it again where it is needed: HMACKey.from_env or HMACKey.from_file"
        raise TypeError(msg)


class _Unchecked(HMACKey):
    """Stands for the key of a signed directory where a reader does not have it: what is not signed is not believed.

    A signature is not checked, because only the key could do that. It signs nothing.
    """

    def __init__(self) -> None:
        pass

    def sign(self, data: bytes) -> str:
        msg = "nothing is written without the key"
        raise UntrustedError(msg)

    def verify(self, data: bytes, signature: str) -> bool:
        return True


UNCHECKED: Final = _Unchecked()


def has_key(trust: HMACKey | None) -> bool:
    """Return whether a key was given."""
    return trust not in (None, UNCHECKED)


def _check_length(key: bytes, what: str) -> None:
    if len(key) < MIN_KEY_BYTES:
        msg = f"{what} has {len(key)} bytes, and can be guessed; use at least {MIN_KEY_BYTES} ({_MAKE_ONE})"
        raise PolicyError(msg)


def refuse_unsigned(count: int, place: object, trust: HMACKey | None) -> None:
    """Raise `UntrustedError` if a directory has ``count`` signed records, one or more, and there is no key."""
    if count and not has_key(trust):
        msg = (
            f"{count} checkpoints in {place} are signed; pass their key (in Python pass trust=, on the command line "
            "--key-env or --key-file). Nothing is changed there without it, because unsigned records may be planted"
        )
        raise UntrustedError(msg)


def signed(data: Mapping[str, Any], trust: HMACKey | None) -> dict[str, Any]:
    """Return plain data with its signature; without a key as it is."""
    plain = {key: value for key, value in data.items() if key != SIGNATURE}
    return plain if trust is None else plain | {SIGNATURE: trust.sign(_canonical(plain))}


def check_signature(data: object, where: str, trust: HMACKey | None) -> None:
    """Raise `UntrustedError` unless the key made the signature in ``data``. Without a key nothing is checked.

    If ``data`` is not an object, its reader refuses it anyway.
    """
    if trust is None or not isinstance(data, dict):
        return
    signature = data.get(SIGNATURE)
    if signature is None:
        msg = (
            f"{where} is not signed: it was planted, or saved without trust=. It is left alone; if you know that it "
            "is yours, copy its payload into another directory, and run 'checkpointer adopt' there"
        )
        raise UntrustedError(msg)
    plain = {key: value for key, value in data.items() if key != SIGNATURE}
    try:
        if isinstance(signature, str) and trust.verify(_canonical(plain), signature):
            return
    except (ValueError, RecursionError):
        pass  # Signed data is never nested so deeply, and has no NaN.
    msg = (
        f"{where} has a signature that this key did not make for it: it was changed, it was signed with another key, "
        "or the key given here is the wrong one. It is left alone; pass the key that the run was saved with"
    )
    raise UntrustedError(msg)


def _canonical(data: Mapping[str, Any]) -> bytes:
    """Return the JSON text of ``data`` that does not depend on order and layout in its file."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
