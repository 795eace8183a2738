"""Passwords, keys and tokens are in no message, log line, repr, record or traceback, whatever a driver repeats."""

from __future__ import annotations

import http.server
import json
import logging
import threading
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest
from checkpointer_torch.open_any import Opener
from support.commands import command

from checkpointer import CheckpointManager, EverySteps, KeepLast, Mirror, Policy
from checkpointer._secrets import HIDDEN, Secrets, shown_place, without_secrets
from checkpointer.errors import RestoreError
from checkpointer.storage import open_storage
from checkpointer.storage.retry import Retry

PASSWORD, TOKEN, KEY = "hunter2pass", "tok-4711/+x=", "QUtJQVNFQ1JFVA=="
ONE = Policy(EverySteps(1), [KeepLast(1)])


class Repeating(http.server.BaseHTTPRequestHandler):
    """A server that refuses each request, and repeats all of it in its error, as the drivers' own servers can."""

    status = 403
    given: tuple[str, ...] = ()
    """The secrets that the driver was given."""

    def _refuse(self) -> None:
        said = f"{self.command} {self.path} {dict(self.headers)} {' '.join(self.given)}"
        if "amz" in str(self.headers).lower():
            body = f"<Error><Code>InvalidAccessKeyId</Code><Message>{escape(said)}</Message></Error>"
        else:
            body = json.dumps({
                "error": {"code": self.status, "message": said},
                "RemoteException": {"exception": "AccessControlException", "message": said},
            })  # fmt: skip
        self.send_response(self.status, "Refused")
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    do_GET = do_PUT = do_POST = do_HEAD = do_PROPFIND = do_OPTIONS = _refuse  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Host and port of the server."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Repeating)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def places(address: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """A URL and options for each driver, all with the same secrets."""
    host, _, port = address.partition(":")
    azure = f"DefaultEndpointsProtocol=http;AccountName=me;AccountKey={KEY};BlobEndpoint=http://{address}/me"
    return {
        "s3": (
            "s3://bucket/run",
            {"key": KEY, "secret": PASSWORD, "token": TOKEN, "endpoint_url": f"http://{address}"},
        ),
        "s3 with a URL": (f"s3://{KEY}:{PASSWORD}@bucket/run", {"endpoint_url": f"http://{address}", "token": TOKEN}),
        "gs": ("gs://bucket/run", {"token": "anon", "endpoint_url": f"http://{address}", "secret_key": PASSWORD}),
        "az": ("az://box/run", {"connection_string": azure, "sas_token": TOKEN}),
        "webdav": ("webdav://run", {"base_url": f"http://{address}", "auth": ("me", PASSWORD)}),
        "webhdfs": (f"webhdfs://{address}/run", {"token": TOKEN, "password": PASSWORD}),
        "http": (f"http://me:{PASSWORD}@{address}/run?token={TOKEN}&sig={KEY}", {}),
        "sftp": (f"sftp://me:{PASSWORD}@{host}:{port}/run", {"passphrase": TOKEN}),
        "unknown": (f"nosuch://me:{PASSWORD}@host/run?sig={TOKEN}", {}),
        "wrong options": ("s3://bucket/run", {"key": KEY, "no_such_option": 1, "secret": PASSWORD}),
    }


NAMES = tuple(places("127.0.0.1:1"))


def save_one(where: Any, options: dict[str, Any] | None = None, error: Exception | None = None) -> None:
    with warnings.catch_warnings():
        if error is None:
            warnings.simplefilter("ignore")  # Of the drivers.
        with CheckpointManager(where, ONE, state=dict, storage_options=options) as manager:
            manager.observe({}, step=1, epoch=0)
            if error is not None:
                raise error


def raise_from(error: Exception, cause: Exception) -> None:
    raise error from cause


def assert_hidden(*texts: str) -> None:
    for text in texts:
        for secret in (PASSWORD, TOKEN, KEY, "tok-4711"):
            assert secret not in text, text


def refusing(url: str, options: dict[str, Any], status: int = 403) -> None:
    """Let the server repeat the secrets that the driver is given."""
    Repeating.status = status
    Repeating.given = tuple(secret for secret in (PASSWORD, TOKEN, KEY) if secret in repr((url, options)))


@pytest.mark.parametrize(("name", "status"), [*((name, 403) for name in NAMES), ("s3", 500), ("webhdfs", 500)])
def test_no_driver_s_error_shows_a_secret(
    name: str, status: int, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The error of the manager, with its causes and all that is logged while requests are repeated."""
    caplog.set_level(logging.DEBUG, logger="checkpointer")
    url, options = places(address)[name]
    refusing(url, options, status)
    options = {**options, "retry": Retry(deadline_s=0.5, first_wait_s=0.1)}
    with pytest.raises((OSError, ImportError)) as caught:
        save_one(url, options)
    shown = "".join(traceback.format_exception(caught.value))
    assert_hidden(str(caught.value), repr(caught.value), shown, caplog.text)
    for line in (str(caught.value), shown):
        assert line.strip()


@pytest.mark.parametrize("name", ["s3", "http", "unknown", "wrong options"])
def test_no_command_shows_a_secret(name: str, address: str) -> None:
    """Neither of the URL nor of --storage-options."""
    url, options = places(address)[name]
    refusing(url, options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = command("ls", url, "--storage-options", json.dumps(options))
    assert 2 == said.code, said
    assert_hidden(said.out, said.err)


def test_the_values_of_a_query_are_hidden_in_any_text() -> None:
    """Names stay, and so does what is not a URL."""
    assert "az://box/run?sig=***&sv=***" == without_secrets(f"az://box/run?sig={KEY}&sv=2020")
    assert "http://h/run?***" == without_secrets(f"http://h/run?{PASSWORD}")
    assert "http://h/a 'http://h/b?x=***'" == without_secrets(f"http://u@h/a 'http://u:{PASSWORD}@h/b?x={PASSWORD}'")
    assert "url: /webhdfs/v1/run?op=***&delegation=***" == without_secrets(
        f"url: /webhdfs/v1/run?op=LISTSTATUS&delegation={TOKEN}"
    )
    assert "s3://bucket/run@v2" == without_secrets("s3://AKIA1234:wJalr/K7MDENG/bPx@bucket/run@v2")
    assert "no bucket ***" == Secrets("s3://AKIA1234:wJalr/K7@bucket/run", {}).hide("no bucket wJalr/K7")
    for text in ("http://host:8080/a@b", "http://[::1]:80/a@b", "s3://bucket/a@b"):
        assert text == without_secrets(text)
    for text in ("which? a or b", "step=1-loss=0.5.ckpt", "a@b.c", "https://host/page", "is it 1? no, a=b"):
        assert text == without_secrets(text)
    assert "runs/a?lr=1" == shown_place("runs/a?lr=1")


def test_options_that_say_where_something_is_are_shown() -> None:
    """Hosts, regions and files are not secret, and a message without them helps little."""
    options = {"endpoint_url": "http://host", "key_filename": "/home/me/id_rsa", "key": KEY, "anon": "anon"}
    secrets = Secrets("s3://bucket", {**options, "client_kwargs": {"headers": {"Authorization": f"Bearer {TOKEN}"}}})
    text = f"http://host refused /home/me/id_rsa, {KEY} and Bearer {TOKEN} of bucket"
    assert f"http://host refused /home/me/id_rsa, {HIDDEN} and {HIDDEN} of bucket" == secrets.hide(text)
    assert "<Secrets, hidden>" == repr(secrets)


class StubbornError(Exception):
    """An error whose text does not come from its arguments."""

    def __str__(self) -> str:
        return f"the password is {PASSWORD}"


def test_an_error_whose_text_cannot_be_changed_is_replaced() -> None:
    """It is neither raised nor shown as the cause of another one."""
    secrets = Secrets(f"sftp://me:{PASSWORD}@host/run", {})
    with pytest.raises(OSError, match=r"StubbornError: the password is \*\*\*") as caught, secrets.hidden():
        raise StubbornError
    assert_hidden("".join(traceback.format_exception(caught.value)))
    with pytest.raises(ValueError, match=r"\*\*\* is wrong") as other, secrets.hidden():
        raise_from(ValueError(f"{PASSWORD} is wrong"), StubbornError())
    assert_hidden("".join(traceback.format_exception(other.value)))


def test_no_repr_and_no_record_has_a_secret(tmp_path: Path) -> None:
    """A mirror, a manager, and the reason of a rescue that repeats the text of an exception."""
    mirror = Mirror(f"s3://{KEY}:{PASSWORD}@bucket/run?sig={TOKEN}", options={"secret": PASSWORD})
    assert "Mirror(where='s3://bucket/run?sig=***', keep=None)" == repr(mirror)
    storage = open_storage(f"memory://me:{PASSWORD}@{tmp_path.name}/run", "")
    assert_hidden(str(storage), repr(storage))
    error = RuntimeError(f"cannot read http://me:{PASSWORD}@host/data?token={TOKEN}")
    with pytest.raises(RuntimeError, match=PASSWORD):
        save_one(tmp_path, error=error)
    for path in (tmp_path / ".checkpointer").rglob("*.json"):
        assert_hidden(path.read_text())


def test_a_url_with_a_password_is_listed_and_loaded_without_it(tmp_path: Path) -> None:
    """The runs below it, and the source and the error of weights that are read from it."""
    url = f"memory://me:{PASSWORD}@{tmp_path.name}/runs"
    save_one(f"{url}/a")
    for argv in (
        ("ls", url),
        ("ls", url, "--json"),
        ("last", f"{url}/a", "--json"),
        ("report", f"{url}/a", tmp_path / "r.html"),
    ):
        said = command(*argv)
        assert 0 == said.code, said
        assert_hidden(said.out, said.err)
    assert_hidden((tmp_path / "r.html").read_text())
    assert f"memory://{tmp_path.name}/runs/a" == command("ls", url, "--json").data[0]["path"]
    _, source = Opener(weights_only=True).open(f"{url}/a")
    assert f"memory://{tmp_path.name}/runs/a/epoch=0-step=1.ckpt" == source
    for place in (f"{url}/none", f"{url}/none.pt"):
        with pytest.raises(RestoreError) as caught:
            Opener().open(place)
        assert_hidden("".join(traceback.format_exception(caught.value)))
