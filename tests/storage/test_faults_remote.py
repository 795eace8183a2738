"""Faults of networks and servers, made by a proxy for a real server, cause a retry or an error; nothing is lost."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import socket
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
from support.plain_format import PlainFormat
from support.s3_tools import LARGE, LargeFormat, filesystem, objects, unfinished
from support.servers import ChaosProxy, Server
from support.servers.chaosproxy import Answer, Cut, CutRequest, Delay, LoseReply, Pass, Plan, Refuse, Stall
from support.servers.fixtures import Serve
from support.servers.seaweedfs import BUCKET, KEY, SECRET

from checkpointer import CheckpointManager, EverySteps, KeepBest, KeepLast, Policy
from checkpointer.commit.index import read_bounded
from checkpointer.errors import CheckpointerWarning, SaveError, StorageError
from checkpointer.storage import open_storage
from checkpointer.storage.retry import Retry

pytestmark = pytest.mark.slow

SMALL = 100_000
FOREIGN = "theirs.bin"
POLICY = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min"), KeepLast(1)], last="copy")
PATIENT = Retry(deadline_s=60.0, first_wait_s=0.01)


@attrs.define
class Training:
    """A training whose state is its step, in a directory behind a proxy."""

    server: Server
    proxy: ChaosProxy
    url: str
    size: int = SMALL
    retry: Retry = PATIENT
    options: dict[str, Any] = attrs.field(factory=dict)
    step: int = 0
    acknowledged: int = 0

    def open(self, *, direct: bool = False, **kwargs: Any) -> CheckpointManager:
        """Return a manager, through the proxy unless ``direct``."""
        server = self.server if direct else attrs.evolve(self.server, port=self.proxy.port)
        url = self.url.replace(f":{self.server.port}/", f":{server.port}/")
        options = {**server.storage_options, "retry": self.retry, **self.options}
        return CheckpointManager(
            url,
            POLICY,
            state=lambda: {"step": self.step},
            format=LargeFormat(self.size),
            storage_options=options,
            **kwargs,
        )

    def save(self, manager: CheckpointManager) -> bool:
        """Save the next step, and return whether it was saved."""
        self.step += 1
        is_saved = bool(manager.observe({"loss": self.step}, step=self.step, epoch=0, epoch_end=False))
        if is_saved:
            self.acknowledged = self.step
        return is_saved

    def save_at_last(self, manager: CheckpointManager) -> bool:
        """Save until a save succeeds. On a loaded machine some replies come too late for a short deadline."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointerWarning)
            for _ in range(20):
                with contextlib.suppress(SaveError):
                    if self.save(manager):
                        return True
        return False

    def check(self, manager: CheckpointManager) -> None:
        """Check that no acknowledged step is lost, that the next save succeeds, and that no unfinished file is left."""
        self.proxy.plan, self.retry = Pass(), PATIENT
        manager.close()
        with self.open(direct=True) as again:
            restored = again.restore()
            assert restored is not None
            # A save that failed because a reply was lost may be complete.
            assert restored.step in range(self.acknowledged, self.step + 1)
            assert {"step": restored.step} == restored.state
            self.step = max(self.step, restored.step)
            assert self.save(again)
            assert self.step == again.restore().step  # type: ignore[union-attr]
            names = {record.name for record in again.records}
        storage = open_storage(self.url, "", self.server.storage_options)
        assert b"mine" == read_bounded(storage, FOREIGN)
        assert {"step": self.step} == json.loads(read_bounded(storage, "last.ckpt", LARGE * 2))
        assert names | {"last.ckpt", FOREIGN} == {n for n in storage.list() if not n.startswith(".checkpointer/")}
        if self.server.name == "s3":
            assert [] == unfinished(self.server, self.url)
            assert [] == [name for name in objects(self.server, self.url) if "staging" in name]


@contextlib.contextmanager
def behind_proxy(server: Server, **kwargs: Any) -> Iterator[Training]:
    with ChaosProxy(server.port) as proxy:
        training = Training(server, proxy, server.fresh(), **kwargs)
        open_storage(training.url, "", server.storage_options).write(FOREIGN, b"mine")
        yield training


PAYLOAD, RECORD = rb"^PUT \S+\.ckpt[? ]", rb"^PUT \S+records/\S+\.json "
NEW_PAYLOAD = rb"(?i)^PUT \S+\.ckpt [\s\S]*\r\nif-none-match:"
NEW_RECORD = rb"(?i)^PUT \S+records/\S+\.json [\s\S]*\r\nif-none-match:"
COPY = rb"(?i)^PUT [\s\S]*\r\nx-amz-copy-source:"
ANY = rb"^[A-Z]+ /"

ONCE: dict[str, tuple[Plan, int]] = {
    "payload cut": (CutRequest(PAYLOAD, 50_000), SMALL),
    "part cut": (CutRequest(rb"^PUT \S+partNumber=1", 5_000_000), LARGE),
    "last part cut": (CutRequest(rb"^PUT \S+partNumber=2", 500_000), LARGE),
    "first record cut": (CutRequest(RECORD, 100), SMALL),
    "second record cut": (CutRequest(RECORD, 100, nth=2), SMALL),
    "completing cut": (CutRequest(rb"^POST \S+uploadId=", 10), LARGE),
    "copy cut": (CutRequest(COPY), SMALL),
    "list cut": (CutRequest(rb"^GET \S+list-type"), SMALL),
    "list reply lost": (LoseReply(rb"^GET \S+list-type", times=2), SMALL),
    "new record's reply lost": (LoseReply(NEW_RECORD), SMALL),
    "record's reply lost": (LoseReply(RECORD, nth=2), SMALL),
    "new payload's reply lost": (LoseReply(NEW_PAYLOAD), SMALL),
    "part's reply lost": (LoseReply(rb"^PUT \S+partNumber=1"), LARGE),
    "reply to beginning lost": (LoseReply(rb"^POST \S+\?uploads"), LARGE),
    "reply to completing lost": (LoseReply(rb"^POST \S+uploadId="), LARGE),
    "copy's reply lost": (LoseReply(COPY), SMALL),
    "delete's reply lost": (LoseReply(rb"^DELETE ", times=3), SMALL),
    "500": (Answer(ANY, 500, "InternalError", times=5), SMALL),
    "503": (Answer(ANY, 503, "ServiceUnavailable", times=5), SMALL),
    "SlowDown": (Answer(ANY, 503, "SlowDown", times=5), SMALL),
    "SlowDown of parts": (Answer(rb"^PUT \S+partNumber=", 503, "SlowDown", times=5), LARGE),
    "500 to completing": (Answer(rb"^POST \S+uploadId=", 500, "InternalError", times=3), LARGE),
    "500 to deletes": (Answer(rb"^DELETE ", 500, "InternalError", times=3), SMALL),
    "slow": (Delay(0.02), SMALL),
}


@pytest.mark.parametrize("fault", ONCE)
def test_what_passes_is_not_noticed(serve: Serve, fault: str) -> None:
    """The save succeeds, and so do all later requests."""
    plan, size = ONCE[fault]
    with behind_proxy(serve("s3"), size=size) as training:
        manager = training.open()
        for _ in range(3):
            assert training.save(manager)
        training.proxy.plan = plan
        assert training.save(manager)
        assert training.proxy.hits > 0
        assert training.step == manager.restore().step  # type: ignore[union-attr]
        assert training.save(manager)
        training.check(manager)


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "multipart"])
@pytest.mark.parametrize("plan", [Refuse(), Stall()], ids=["refused", "stalled"])
def test_an_outage_that_ends_before_the_deadline_is_not_noticed(serve: Serve, plan: Plan, size: int) -> None:
    """The driver's timeouts end a request without a reply, or half of our own deadline does."""
    options = {"config_kwargs": {"read_timeout": 1, "connect_timeout": 1}}
    retry = Retry(deadline_s=6.0, first_wait_s=0.01)
    with behind_proxy(serve("s3"), size=size, options=options, retry=retry) as training:
        manager = training.open()
        assert training.save(manager)
        training.proxy.plan = plan
        healing = threading.Timer(1.5, lambda: setattr(training.proxy, "plan", Pass()))
        healing.start()
        try:
            assert training.save(manager)
        finally:
            healing.join()
        training.check(manager)


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "multipart"])
@pytest.mark.parametrize(
    "plan",
    [
        Answer(ANY, times=10**6),
        Answer(rb"^PUT \S+\.ckpt", times=10**6),
        Answer(RECORD, times=10**6),
        Answer(rb"^POST \S+uploadId=", times=10**6),
        LoseReply(RECORD, times=10**6),
        LoseReply(PAYLOAD, times=10**6),
        LoseReply(rb"^POST ", times=10**6),
        Refuse(),
    ],
    ids=["all", "payloads", "records", "completing", "records lost", "payloads lost", "posts lost", "refused"],
)
def test_what_does_not_pass_is_an_error_and_training_goes_on(serve: Serve, plan: Plan, size: int) -> None:
    """A tolerated failure is a warning, the next an error that names checkpoint and reason. Later saves succeed."""
    with behind_proxy(serve("s3"), size=size, retry=Retry(deadline_s=1.0 if size == SMALL else 8.0)) as training:
        manager = training.open(tolerate_failures=1)
        assert training.save_at_last(manager)
        training.proxy.plan = plan
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            first = training.save(manager)
        if not first:
            assert any("failure 1 of 1 tolerated" in str(each.message) for each in caught)
            with pytest.raises(
                SaveError, match=rf"step={training.step + 1}\S*.ckpt was not saved .*; older .* are untouched"
            ):
                training.save(manager)
            training.proxy.plan = Pass()
            assert training.save_at_last(manager)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointerWarning)
            training.check(manager)


def test_a_read_that_is_cut_goes_on_where_it_was(serve: Serve) -> None:
    """It is cut three times, and the payload is not read from its beginning again."""
    with behind_proxy(serve("s3"), size=LARGE) as training:
        manager = training.open()
        assert training.save(manager)
        training.proxy.plan = Cut(down=2_000_000, times=3)
        restored = manager.restore()
        assert restored is not None
        assert 3 == training.proxy.hits
        assert {"step": 1} == restored.state
        training.check(manager)


@pytest.mark.parametrize("name", ["sftp", "ssh"])
def test_a_session_that_is_cut_within_a_payload_is_an_error_and_the_next_save_works(serve: Serve, name: str) -> None:
    """A cut upload cannot continue, so the save fails."""
    with behind_proxy(serve(name), size=8 << 20) as training:
        manager = training.open()
        assert training.save(manager)
        training.proxy.plan = Cut(up=3_000_000)
        with pytest.raises(SaveError, match=r"step=2\S*.ckpt was not saved"):
            training.save(manager)
        assert 1 == training.proxy.hits
        assert training.save(manager)
        training.check(manager)


@pytest.mark.parametrize(
    ("direction", "what", "name"),
    [*itertools.product(["up", "down"], ["list", "restore", "save"], ["sftp"]), ("down", "restore", "ssh")],
)
def test_a_session_that_is_cut_between_payloads_is_opened_anew(
    serve: Serve, name: str, what: str, direction: str
) -> None:
    """The next request may be a list, a restore or a save."""
    with behind_proxy(serve(name), size=SMALL) as training:
        manager = training.open()
        assert training.save(manager)
        training.proxy.plan = Cut(**{direction: 1})
        if what == "list":
            assert FOREIGN in manager._directory.storage.list()
        elif what == "restore":
            assert 1 == manager.restore().step  # type: ignore[union-attr]
        else:
            assert training.save(manager)
        assert 1 == training.proxy.hits
        training.check(manager)


def test_without_a_deadline_a_request_is_sent_once_and_may_take_its_time(serve: Serve) -> None:
    """The deadline ends the attempts after the first one, not the first one."""
    with behind_proxy(serve("s3"), retry=Retry(deadline_s=0.0)) as training:
        training.proxy.plan = Delay(0.02)
        manager = training.open()
        assert training.save(manager)
        training.proxy.plan = Answer(PAYLOAD, 503, "ServiceUnavailable", times=1)
        with pytest.raises(SaveError, match=r"step=2\S*.ckpt was not saved"):
            training.save(manager)
        assert 1 == training.proxy.hits
        training.check(manager)


@pytest.mark.parametrize(("name", "options"), [("sftp", {}), ("ssh", {"keepalive_interval": 1})])
def test_a_server_that_stops_answering_is_an_error_within_the_deadline(
    serve: Serve, name: str, options: dict[str, Any]
) -> None:
    """Connections stay open without data. By themselves paramiko and asyncssh would wait forever."""
    with behind_proxy(serve(name), size=SMALL, options=options, retry=Retry(deadline_s=3.0)) as training:
        manager = training.open()
        assert training.save(manager)
        training.proxy.plan = Stall()
        with pytest.raises(SaveError, match=r"step=2\S*.ckpt was not saved"):
            training.save(manager)
        training.proxy.plan = Pass()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointerWarning)
            training.check(manager)


# Wrong options


def test_a_webhdfs_server_that_never_answers_is_an_error() -> None:
    """By itself ``requests`` would wait forever."""
    pytest.importorskip("requests")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"webhdfs://127.0.0.1:{silent.getsockname()[1]}/runs"
        with pytest.raises(StorageError, match="cannot use webhdfs"):
            CheckpointManager(url, POLICY, state=dict, storage_options={"retry": Retry(deadline_s=1.0)})


def shown(error: BaseException) -> str:
    """Return the text of an error in a log, with its causes."""
    return "".join(traceback.format_exception(error)) + repr(error)


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


WRONG: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "secret": (f"s3://{BUCKET}/run", lambda: {"secret": "not-the-secret"}),
    "key": (f"s3://{BUCKET}/run", lambda: {"key": "not-the-key"}),
    "bucket": ("s3://no-such-bucket/run", dict),
    "port": (f"s3://{BUCKET}/run", lambda: {"endpoint_url": f"http://127.0.0.1:{unused_port()}"}),
    "host": (f"s3://{BUCKET}/run", lambda: {"endpoint_url": "http://no-such-host.invalid:1"}),
}


@pytest.mark.parametrize("state", [dict, None], ids=["writer", "reader"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_option_is_an_error_at_construction(
    serve: Serve, wrong: str, state: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The error shows the URL, and no secret."""
    url, change = WRONG[wrong]
    options = {**serve("s3").storage_options, "retry": Retry(deadline_s=1.0), **change()}
    caplog.set_level(logging.DEBUG, logger="checkpointer")
    with pytest.raises(StorageError, match=url) as caught:
        CheckpointManager(url, POLICY, state=state, format=PlainFormat(), storage_options=options)
    for text in (shown(caught.value), caplog.text):
        assert SECRET not in text
        assert "not-the-secret" not in text


@pytest.mark.parametrize("name", ["sftp", "ssh"])
def test_a_wrong_password_is_an_error_at_construction_and_never_shown(
    serve: Serve, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The password may be in the URL."""
    server = serve(name)
    url = server.fresh().replace("@127", ":not-shown@127")
    options = {"look_for_keys": False, "allow_agent": False} if name == "sftp" else {"known_hosts": None}
    with pytest.raises(StorageError, match=rf"cannot connect to {name}://127\.0\.0\.1:{server.port}") as caught:
        CheckpointManager(url, POLICY, state=dict, storage_options={**options, "retry": Retry(deadline_s=1.0)})
    assert "not-shown" not in shown(caught.value) + caplog.text


def test_credentials_are_neither_logged_nor_stored(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """They are not in a record, an index, a marker, a payload, a log line or a repr."""
    server = serve("s3")
    url = server.fresh()
    caplog.set_level(logging.DEBUG, logger="checkpointer")
    with CheckpointManager(
        url, POLICY, state=dict, format=PlainFormat(), storage_options=dict(server.storage_options), verbose=True
    ) as manager:
        manager.observe({"loss": 1.0}, step=1, epoch=0)
        shown = repr(manager) + repr(manager.records) + str(manager.session.state_dict()) + caplog.text
    root = url.partition("://")[2]
    stored = b"".join(filesystem(server).cat_file(f"{root}/{path}") for path in objects(server, url)).decode()
    assert ".checkpointer/index.json" in objects(server, url)
    for secret in (SECRET, KEY):
        assert secret not in shown + stored
