"""A large payload is sent to S3 in parts out of a few buffers, which are used again."""

from __future__ import annotations

import asyncio
import io
import random

import attrs
import pytest
from support.servers import ChaosProxy
from support.servers.chaosproxy import Answer, CutRequest, Plan
from support.servers.fixtures import Serve

from checkpointer.storage import open_storage
from checkpointer.storage.retry import Retry
from checkpointer.storage.s3 import Body

checksums = pytest.importorskip("botocore.httpchecksum", reason="needs torch-checkpointer[s3]")
MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [
        CutRequest(rb"^PUT \S+partNumber=[3-6]", 5_000_000, times=3),
        Answer(rb"^PUT \S+partNumber=[1-7]", 503, "SlowDown", times=9),
    ],
    ids=["cut", "SlowDown"],
)
def test_each_part_has_its_own_bytes_although_requests_fail(serve: Serve, plan: Plan) -> None:
    """A buffer is used again only after its part is sent."""
    server, data = serve("s3"), random.Random(1).randbytes(100 * MIB + 7)
    with ChaosProxy(server.port) as proxy:
        url = server.fresh()
        behind = attrs.evolve(server, port=proxy.port)
        options = {**behind.storage_options, "retry": Retry(deadline_s=60.0, first_wait_s=0.01)}
        proxy.plan = plan
        upload = open_storage(url, "", options).upload("x")
        for start in range(0, len(data), 3 * MIB):
            upload.write(data[start : start + 3 * MIB])
        upload.finish()
        upload.publish(replace=True)
        assert proxy.hits > 1
    with open_storage(url, "", server.storage_options).open("x") as stream:
        assert data == stream.read()


def test_a_part_is_read_for_its_checksum_and_sent_in_chunks() -> None:
    """As the drivers do it: over HTTP, and in the encoding of HTTPS, which has the checksum at its end."""
    data = random.Random(1).randbytes(2 * MIB + 5)
    body = Body(memoryview(data))

    async def sent() -> bytes:
        return b"".join([chunk async for chunk in body])

    assert data == body.read()
    assert (len(data), 0) == (body.tell(), body.seek(0))
    assert data == asyncio.run(sent()) == asyncio.run(sent())
    files = [io.BytesIO(data), Body(memoryview(data))]
    crc = {"checksum_cls": checksums.Crc32Checksum, "checksum_name": "crc"}
    whole, ours = [checksums.AwsChunkedWrapper(file, **crc).read() for file in files]
    assert whole == ours
