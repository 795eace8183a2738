"""What networks and servers do to saves and restores on S3 and over ssh: lost replies, cuts, stalls, 500, 503.

After each of them everything that was acknowledged restores, nothing of others is touched, and the next save works.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
from plain_format import PlainFormat
from servers import ChaosProxy, Server
from servers.chaosproxy import Answer, Cut, LoseReply, Pass, Plan, Refuse, Stall
from servers.fixtures import Serve

from checkpointer import CheckpointManager, EverySteps, KeepBest, KeepLast, Policy, index, restoring
from checkpointer.errors import CheckpointerWarning, SaveError, StorageError
from checkpointer.owner import new_owner
from checkpointer.storage import open_storage
from checkpointer.storage.retrying import Retry

pytestmark = pytest.mark.slow

MIB = 1 << 20
POLICY = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min"), KeepLast(2)], last="copy", best="copy")
RECORD = rb"^PUT \S*/records/"
PART = rb"^PUT \S*partNumber="
BEGIN = rb"^POST \S*[?&]uploads"
COMPLETE = rb"^POST \S*uploadId="
COPY = rb"(?is)^PUT .*\r\nx-amz-copy-source:"
DELETE = rb"^DELETE "
LIST = rb"^GET \S*list-type=2"
GET = rb"^GET \S*\.ckpt\?|^GET \S*\.ckpt "


class Bytes(PlainFormat):
    """A payload of twenty megabytes, and the step."""

    def write(self, state: Any, stream: Any) -> None:
        stream.write(state["step"].to_bytes(8, "big"))
        for _ in range(state["mib"]):
            stream.write(bytes(MIB))

    def read(self, stream: Any, *, weights_only: bool, map_location: Any) -> Any:
        data = stream.read()
        return {"step": int.from_bytes(data[:8], "big"), "mib": len(data) // MIB}


@attrs.define
class Run:
    """A training on a server that is reached through a proxy, and the same directory as seen without it."""

    server: Server
    proxy: ChaosProxy
    url: str
    retry: Retry = attrs.field(default=Retry(deadline_s=60))
    mib: int = 20
    step: int = 0
    acknowledged: list[int] = attrs.field(factory=list)

    def options(self, **config: Any) -> dict[str, Any]:
        through = attrs.evolve(self.server, port=self.proxy.port)
        options = {**through.storage_options, "retry": self.retry}
        if config:
            options["config_kwargs"] = {**options.get("config_kwargs", {}), **config}
        return options

    def manager(self, **kwargs: Any) -> CheckpointManager:
        through = attrs.evolve(self.server, port=self.proxy.port)
        url = self.url.replace(f":{self.server.port}", f":{through.port}")
        kwargs.setdefault("storage_options", self.options())
        return CheckpointManager(
            url, POLICY, state=lambda: {"step": self.step, "mib": self.mib}, format=Bytes(), **kwargs
        )

    def save(self, manager: CheckpointManager) -> bool:
        self.step += 1
        if saved := bool(manager.observe({"loss": 1.0}, step=self.step, epoch=0, epoch_end=False)):
            self.acknowledged.append(self.step)
        return saved

    def check(self) -> None:
        """Look without the proxy: what was acknowledged and is kept is whole, and what is not ours is there."""
        storage = open_storage(self.url, new_owner(), self.server.storage_options)
        records = [entry.record for entry in index.load(storage).entries.values()]
        assert {1, *self.acknowledged[-2:]} == {record.step for record in records} & {1, *self.acknowledged}
        for record in records:
            restoring.verify(storage, record)
        with storage.open("theirs/file.ckpt") as stream:
            assert b"theirs" == stream.read()
        with storage.open("last.ckpt") as stream:
            assert self.acknowledged[-1] == int.from_bytes(stream.read(8), "big")
        storage.close()  # type: ignore[attr-defined]


@pytest.fixture
def run(serve: Serve) -> Iterator[Run]:
    server = serve("s3")
    with ChaosProxy(server.port) as proxy:
        url = server.fresh()
        open_storage(url, new_owner(), server.storage_options).write("theirs/file.ckpt", b"theirs")
        yield Run(server, proxy, url)


FAULTS: dict[str, Plan] = {
    "reply to the first record lost": LoseReply(RECORD),
    "reply to the second record lost": LoseReply(RECORD, nth=2),
    "reply to beginning an upload lost": LoseReply(BEGIN),
    "reply to a part lost": LoseReply(PART),
    "reply to completing an upload lost": LoseReply(COMPLETE),
    "reply to a copy lost": LoseReply(COPY, times=2),
    "reply to a delete lost": LoseReply(DELETE),
    "reply to a listing lost": LoseReply(LIST, times=2),
    "503 for records": Answer(RECORD, 503, "SlowDown", times=3),
    "503 for parts": Answer(PART, 503, "SlowDown", times=3),
    "500 for completing": Answer(COMPLETE, 500, "InternalError", times=2),
    "500 for copies": Answer(COPY, 500, "InternalError", times=2),
    "503 for listings": Answer(LIST, 503, "ServiceUnavailable", times=2),
    "503 for deletes": Answer(DELETE, 503, "SlowDown", times=2),
    "cut in a part": Cut(up=9 * MIB),
    "cut in every part of the first try": Cut(up=5 * MIB, times=3),
    "cut in an early request": Cut(up=700),
    "cut in an early reply": Cut(down=200),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.filterwarnings("ignore::checkpointer.errors.CheckpointerWarning")
def test_a_save_goes_on_through_what_passes(run: Run, fault: str) -> None:
    """It is tried again, and a lost reply is no other writer's success."""
    with run.manager() as manager:
        assert run.save(manager)
        assert run.save(manager)
        assert run.save(manager)
        run.proxy.plan = FAULTS[fault]
        assert run.save(manager)
        assert run.proxy.hits > 0, "the fault was not met"
        run.proxy.plan = Pass()
        assert run.save(manager)
    run.check()
    with run.manager() as manager:
        restored = manager.restore()
        assert restored is not None
        assert run.acknowledged[-1] == restored.step == restored.state["step"]


@pytest.mark.parametrize("plan", [Refuse(), Stall()], ids=["refused", "stalled"])
def test_a_save_waits_for_a_server_that_is_away_for_a_while(run: Run, plan: Plan) -> None:
    """Connections are refused, or opened and then silent."""
    options = run.options(read_timeout=1, connect_timeout=1)
    with run.manager(storage_options=options) as manager:
        assert run.save(manager)
        run.proxy.plan = plan
        back = threading.Timer(2.5, setattr, (run.proxy, "plan", Pass()))
        back.start()
        assert run.save(manager)
        back.join()
    run.check()


@pytest.mark.parametrize("plan", [Answer(rb"^(PUT|POST|GET|DELETE|HEAD) ", times=10**6), Refuse()], ids=["503", "gone"])
def test_a_server_that_stays_away_is_a_clear_error_in_time_and_training_goes_on(run: Run, plan: Plan) -> None:
    """As often as that is tolerated; then it works again."""
    run.retry = Retry(deadline_s=1)
    with run.manager(tolerate_failures=2) as manager:
        assert run.save(manager)
        run.proxy.plan = plan
        for _ in range(2):
            with pytest.warns(CheckpointerWarning, match="was not saved .*older checkpoints are untouched"):
                assert not run.save(manager)
        with pytest.raises(SaveError, match="was not saved"):
            run.save(manager)
        run.proxy.plan = Pass()
        assert run.save(manager)
        assert run.save(manager)
    run.check()


@pytest.mark.parametrize(
    "plan",
    [Cut(down=11 * MIB), Cut(down=5 * MIB, times=3), LoseReply(GET, times=2), Answer(GET, times=2)],
    ids=["cut", "cut thrice", "lost", "503"],
)
def test_a_restore_goes_on_where_it_was(run: Run, plan: Plan) -> None:
    """The newest checkpoint is restored, not an older one for want of a connection."""
    with run.manager() as manager:
        assert run.save(manager)
        assert run.save(manager)
    with run.manager() as manager, warnings.catch_warnings():
        warnings.simplefilter("error")
        run.proxy.plan = plan
        restored = manager.restore()
        assert run.proxy.hits > 0, "the fault was not met"
        run.proxy.plan = Pass()
        assert restored is not None
        assert 2 == restored.step == restored.state["step"]


def test_a_connection_over_ssh_that_is_cut_in_a_payload_fails_that_save_only(serve: Serve) -> None:
    """A stream cannot be sent again from its middle; the next save connects anew."""
    server = serve("sftp")
    with ChaosProxy(server.port) as proxy:
        url = server.fresh()
        open_storage(url, new_owner(), server.storage_options).write("theirs/file.ckpt", b"theirs")
        run = Run(server, proxy, url, mib=4)
        with run.manager(tolerate_failures=1) as manager:
            assert run.save(manager)
            proxy.plan = Cut(up=2 * MIB)
            with pytest.warns(CheckpointerWarning, match="was not saved"):
                assert not run.save(manager)
            proxy.plan = Pass()
            assert run.save(manager)
            proxy.plan = Cut(down=100)
            assert run.save(manager)
            assert proxy.hits > 0
            proxy.plan = Pass()
        run.check()


def test_no_secret_is_shown_or_stored_whatever_fails(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """Each error names the place and what to check."""
    caplog.set_level(logging.DEBUG, "checkpointer")
    secret = "hush-hush-hush"
    run.retry = Retry(deadline_s=0.5)
    nowhere = {**run.options(), "secret": secret, "endpoint_url": "http://127.0.0.1:1"}
    unknown = {**run.options(), "secret": secret, "endpoint_url": "http://no-such-host.invalid"}
    bucket = "s3://no-such-bucket-at-all/runs"
    texts = []
    for url, options in (
        (run.url, {**run.options(), "secret": secret}),
        (run.url, nowhere),
        (run.url, unknown),
        (bucket, run.options()),
    ):
        with pytest.raises(StorageError, match=r"cannot use s3://.*; check the path or URL, the cred") as caught:
            CheckpointManager(url, POLICY, state=dict, storage_options=options, verbose=True)
        assert url in str(caught.value)
        texts.append(f"{caught.value!r} {caught.value.__cause__!r}")
    with run.manager(verbose=True) as manager:
        run.save(manager)
        texts.append(f"{manager!r}")
    storage = open_storage(run.url, new_owner(), run.server.storage_options)
    files = [path for path in storage.list() if path.startswith(".checkpointer/")]
    assert files
    for path in files:
        with storage.open(path) as stream:
            texts.append(stream.read().decode())
    own = str(run.server.storage_options["secret"])
    for text in (*texts, caplog.text):
        assert secret not in text
        assert len(own) < 6 or own not in text
