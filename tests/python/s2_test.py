"""`s2-sdk`, S2's own client of Python, with a channel as its stream: the endpoint is the bare origin for account and basin alike."""

import asyncio
import unittest
from datetime import timedelta

from s2_sdk import (
    S2,
    AppendInput,
    Compression,
    Endpoints,
    FencingTokenMismatchError,
    ReadLimit,
    Record,
    Retry,
    S2ServerError,
    SeqNum,
    SeqNumMismatchError,
    Timeout,
)

from server import SECRET, Server

# Longest that anything here may keep a test waiting.
PATIENCE = timedelta(seconds=20)
BASIN = "sessiond"


def setUpModule():
    global server
    server = Server()
    unittest.addModuleCleanup(server.remove)


def connect(token=SECRET, **options):
    """A client that asks once, so that what is refused shows at once."""
    timeout, retry = Timeout(request=PATIENCE, connection=PATIENCE), Retry(max_attempts=1)
    return S2(token, endpoints=Endpoints(account=server.url, basin=server.url), timeout=timeout, retry=retry, **options)


async def channel():
    """A new session, and the name of its `.out` as a stream."""
    session = await asyncio.to_thread(server.session)
    return session, f"sessions/{session['sessionId']}/out"


def batch(*bodies, **conditions):
    return AppendInput(records=[Record(body=body) for body in bodies], **conditions)


def bodies(read):
    return [record.body for record in read.records]


async def refusal(asked):
    """The status, the code and the sentence with which the server refuses."""
    try:
        answer = await asked
    except S2ServerError as refused:
        return refused.status_code, refused.code, refused.message
    raise AssertionError(f"it is answered with {answer}")


class Streams(unittest.IsolatedAsyncioTestCase):
    async def test_a_batch_is_appended_and_read_at_its_places(self):
        _, name = await channel()
        async with connect() as s2:
            stream = s2.basin(BASIN).stream(name)
            self.assertEqual((await stream.check_tail()).seq_num, 0)
            ack = await stream.append(batch(b"one", b"two"))
            self.assertEqual((ack.start.seq_num, ack.end.seq_num, ack.tail.seq_num), (0, 2, 2))
            read = await stream.read(start=SeqNum(1), limit=ReadLimit(count=10))
            self.assertEqual([(record.seq_num, record.body) for record in read.records], [(1, b"two")])

    async def test_a_session_of_batches_is_followed_live_in_order(self):
        _, name = await channel()
        written = [b"record %d" % number for number in range(300)]
        async with connect() as s2:
            stream = s2.basin(BASIN).stream(name)

            async def write():
                async with stream.append_session() as session:
                    tickets = [await session.submit(batch(*written[at : at + 3])) for at in range(0, 300, 3)]
                    return [(await ticket).start.seq_num for ticket in tickets]

            async def follow():
                read = []
                async with stream.read_session(start=SeqNum(0)) as session:
                    async for received in session:
                        read += bodies(received)
                        if len(read) >= len(written):
                            return read
                raise AssertionError(f"the session ended after {len(read)} records")

            async with asyncio.timeout(PATIENCE.total_seconds()):
                read, starts = await asyncio.gather(follow(), write())
        self.assertEqual(read, written)
        self.assertEqual(starts, list(range(0, 300, 3)))

    async def test_a_batch_that_is_compressed_is_stored_as_it_was_before(self):
        for coding in (Compression.GZIP, Compression.ZSTD):
            with self.subTest(coding=coding):
                _, name = await channel()
                body = b"the same again and again " * 1000
                async with connect(compression=coding) as s2:
                    await s2.basin(BASIN).stream(name).append(batch(body))
                async with connect() as s2:
                    read = await s2.basin(BASIN).stream(name).read(start=SeqNum(0))
                self.assertEqual(bodies(read), [body])

    async def test_a_condition_that_is_not_met_names_what_is_there(self):
        _, name = await channel()
        async with connect() as s2:
            stream = s2.basin(BASIN).stream(name)
            await stream.append(batch(b"one"))
            with self.assertRaises(SeqNumMismatchError) as refused:
                await stream.append(batch(b"two", match_seq_num=5))
            self.assertEqual(refused.exception.expected_seq_num, 1)
            with self.assertRaises(FencingTokenMismatchError) as refused:
                await stream.append(batch(b"two", fencing_token="another"))
            self.assertEqual(refused.exception.expected_fencing_token, "")
            self.assertEqual((await stream.check_tail()).seq_num, 1)

    async def test_nothing_is_appended_behind_a_close(self):
        session, name = await channel()
        async with connect() as s2:
            stream = s2.basin(BASIN).stream(name)
            await stream.append(batch(b"one"))
            await asyncio.to_thread(server.close, session, "done")
            tail = (await stream.check_tail()).seq_num
            with self.assertRaises(S2ServerError) as refused:
                await stream.append(batch(b"two"))
            self.assertLess(refused.exception.status_code, 500)
            self.assertEqual((await stream.check_tail()).seq_num, tail)


class Refusals(unittest.IsolatedAsyncioTestCase):
    async def test_the_control_plane_says_how_streams_are_made(self):
        async with connect() as s2:
            basin = s2.basin(BASIN)
            asked = [basin.create_stream("any"), basin.ensure_stream("any"), basin.list_streams(), s2.list_basins()]
            for refused in [await refusal(each) for each in asked]:
                status, _, message = refused
                self.assertEqual(status, 501, refused)
                self.assertIn("POST /api/v1/sessions", message)

    async def test_an_encryption_key_is_refused_and_nothing_is_stored(self):
        _, name = await channel()
        async with connect() as s2:
            hidden = s2.basin(BASIN).stream(name, encryption_key="c2VjcmV0" * 5 + "c2U=")
            status, _, message = await refusal(hidden.append(batch(b"secret")))
            self.assertEqual(status, 400)
            self.assertIn("s2-encryption-key", message)
            self.assertEqual((await s2.basin(BASIN).stream(name).check_tail()).seq_num, 0)

    async def test_a_token_for_another_channel_is_refused(self):
        mine, _ = await channel()
        _, other = await channel()
        token = await asyncio.to_thread(server.public_token, f"write:sessions:{mine['sessionId']}")
        async with connect(token) as s2:
            status, _, _ = await refusal(s2.basin(BASIN).stream(other).append(batch(b"one")))
            self.assertEqual(status, 403)
