// S2's own client on our endpoint: two versions of it, both transports, with a channel's token and with a secret key.

import assert from "node:assert/strict";
import { test } from "node:test";

import * as pinned from "@s2-dev/streamstore";
import { sessions } from "@trigger.dev/sdk";
import * as newest from "streamstore-newest";

import { initialize, open, payloads, started } from "./lib/direct.js";
import { drain, eventually, SECRET, suite, take, unique } from "./lib/suite.js";

const context = suite();

const VARIANTS = ["s2s", "fetch"].flatMap((transport) =>
  ["token", "key"].flatMap((credentials) =>
    [["the SDK's client", pinned], ["the newest client", newest]].map(([name, client]) => ({
      title: `${name}, ${transport}, ${credentials}`,
      client,
      transport,
      credentials,
    })),
  ),
);

/** A new session's `.out`, as the client of one variant sees it. */
async function opened({ client, transport, credentials }, io = "out") {
  const session = await started("s2");
  const channel = await channelOf(session, credentials, io);
  return { session, channel, stream: open(client, channel, { transport }) };
}

async function channelOf({ id, externalId }, credentials, io) {
  if (credentials === "token") return initialize(context, externalId, io);
  const endpoint = `${context.url}/v1`;
  return { accessToken: SECRET, basin: "sessiond", endpoint, stream: `sessions/${id}/${io}` };
}

const text = (bytes) => new TextDecoder().decode(bytes);
const bytes = (text) => new TextEncoder().encode(text);
const bodies = (records) => records.map(({ body }) => body);
const letters = (from, to) => Array.from({ length: to - from }, (_, i) => `record ${from + i}`);

async function collect(iterable, count) {
  const values = [];
  for await (const value of iterable) {
    values.push(value);
    if (values.length === count) break;
  }
  return values;
}

/** Fills a stream with `record 0` and so on, three in a batch. */
async function filled({ AppendInput, AppendRecord }, stream, count) {
  for (let n = 0; n < count; n += 3) {
    const records = letters(n, Math.min(n + 3, count)).map((body) => AppendRecord.string({ body }));
    await stream.append(AppendInput.create(records));
  }
}

for (const variant of VARIANTS) {
  const { AppendInput, AppendRecord } = variant.client;
  const each = (title, run) => test(`${title} (${variant.title})`, run);

  each("a batch comes back as it was, as text and as bytes", async () => {
    const { stream } = await opened(variant);
    const odd = new Uint8Array([0, 255, 128, 10]);
    const ack = await stream.append(
      AppendInput.create([
        AppendRecord.string({ body: "\u{1f600} text", headers: [["a", "1"], ["a", ""]] }),
        AppendRecord.bytes({ body: odd, headers: [[bytes("b"), odd]] }),
      ]),
    );
    assert.deepEqual([ack.start.seqNum, ack.end.seqNum, ack.tail.seqNum], [0, 2, 2]);
    await stream.append(AppendInput.create([AppendRecord.string({ body: "" })]));
    const { records } = await stream.read({ start: { from: { seqNum: 0 } } });
    assert.deepEqual(records.map(({ seqNum }) => seqNum), [0, 1, 2]);
    assert.deepEqual([records[0].body, records[0].headers, records[2].body], ["\u{1f600} text", [["a", "1"], ["a", ""]], ""]);
    const raw = await stream.read({ start: { from: { seqNum: 0 } } }, { as: "bytes" });
    assert.equal(text(raw.records[0].body), "\u{1f600} text");
    assert.deepEqual([raw.records[1].body, raw.records[1].headers], [odd, [[bytes("b"), odd]]]);
    const followed = await collect(await stream.readSession({ start: { from: { seqNum: 0 } } }, { as: "bytes" }), 3);
    assert.deepEqual(followed, raw.records);
  });

  each("a read begins and ends where it is told to", async () => {
    const { stream } = await opened(variant);
    assert.equal((await stream.checkTail()).tail.seqNum, 0);
    await filled(variant.client, stream, 10);
    const { tail } = await stream.checkTail();
    assert.equal(tail.seqNum, 10);
    const read = async (start, stop) => bodies((await stream.read({ start, stop })).records);
    assert.deepEqual(await read({ from: { seqNum: 4 } }, { limits: { count: 3 } }), letters(4, 7));
    assert.deepEqual(await read({ from: { tailOffset: 2 } }), letters(8, 10));
    assert.deepEqual(await read({ from: { timestamp: 0 } }, { limits: { bytes: 35 } }), letters(0, 2));
    await assert.rejects(read({ from: { seqNum: 50 }, clamp: true }), { status: 416 }, "at the tail there is nothing to read");
    const session = await stream.readSession({ start: { from: { seqNum: 7 } }, stop: { limits: { count: 2 } } });
    assert.deepEqual(bodies(await collect(session)), letters(7, 9));
    assert.equal(session.nextReadPosition().seqNum, 9);
  });

  each("an append session acknowledges every batch in order", async () => {
    const { stream, session: { externalId } } = await opened(variant);
    const session = await stream.appendSession({ maxInflightBatches: 16 });
    const tickets = [];
    for (const n of Array(120).keys()) {
      const records = [{ data: n, id: `a-${n}` }, { data: `${n}`, id: `b-${n}` }].map((body) => AppendRecord.string({ body: JSON.stringify(body) }));
      // Waits as soon as the window is full.
      tickets.push(await session.submit(AppendInput.create(records, { matchSeqNum: 2 * n })));
    }
    const acks = await Promise.all(tickets.map((ticket) => ticket.ack()));
    assert.deepEqual(acks.map(({ start, end }) => [start.seqNum, end.seqNum]), Array.from({ length: 120 }, (_, n) => [2 * n, 2 * n + 2]));
    assert.equal(session.lastAckedPosition().end.seqNum, 240);
    await session.close();
    assert.deepEqual(await payloads(context, externalId), Array.from({ length: 120 }, (_, n) => [n, `${n}`]).flat());
  });

  each("a stream of batches is written through", async () => {
    const { stream } = await opened(variant);
    const session = await stream.appendSession();
    const source = ReadableStream.from(letters(0, 60).map((body) => AppendInput.create([AppendRecord.string({ body })])));
    const acks = collect(session.acks(), 60);
    await source.pipeTo(session.writable);
    assert.deepEqual((await acks).map(({ start }) => start.seqNum), [...Array(60).keys()]);
    const { records } = await stream.read({ start: { from: { seqNum: 0 } } });
    assert.deepEqual(bodies(records), letters(0, 60));
  });

  each("the largest record and the longest batch fit, both ways", async () => {
    const { stream } = await opened(variant);
    const body = "\u00e9".repeat(AppendRecord.maxBodyBytes() / 2);
    const long = Array.from({ length: 1000 }, (_, n) => AppendRecord.string({ body: `${n}` }));
    await stream.append(AppendInput.create([AppendRecord.string({ body })]));
    await stream.append(AppendInput.create(long));
    const session = await stream.appendSession();
    for (const records of [[AppendRecord.bytes({ body: bytes(body) })], long]) await (await session.submit(AppendInput.create(records))).ack();
    await session.close();
    const records = await collect(await stream.readSession({ start: { from: { seqNum: 0 } } }), 2002);
    const expected = [body, ...long.map((record) => record.body)];
    // Compared as a whole: a failure must not print it.
    assert.ok(bodies(records).join() === [...expected, ...expected].join());
    const { records: read } = await stream.read({ start: { from: { seqNum: 0 } } });
    assert.ok(read.length === 1 && read[0].body === body, "one read is at most as much as one batch");
  });

  each("a read session follows what is written", async () => {
    const { stream } = await opened(variant);
    await filled(variant.client, stream, 5);
    const session = await stream.readSession({ start: { from: { seqNum: 0 } } });
    const reader = session.getReader();
    const next = async (count) => bodies(await take(reader, count));
    assert.deepEqual(await next(5), letters(0, 5));
    for (const body of letters(5, 8)) {
      await stream.append(AppendInput.create([AppendRecord.string({ body })]));
      assert.deepEqual(await next(1), [body]);
    }
    await reader.cancel();
  });

  each("a read session ends when its session is closed, with everything read", async () => {
    const { stream, session } = await opened(variant);
    await filled(variant.client, stream, 3);
    const reader = (await stream.readSession({ start: { from: { seqNum: 0 } } })).getReader();
    assert.deepEqual(bodies(await take(reader, 3)), letters(0, 3));
    await stream.append(AppendInput.create([AppendRecord.string({ body: "last words" })]));
    await sessions.close(session.externalId);
    assert.deepEqual(bodies(await drain(reader)), ["last words", ""], "and what tells of the close");
  });

  each("fences, conditions and trims", async () => {
    const { stream } = await opened(variant);
    const { FencingTokenMismatchError, SeqNumMismatchError } = variant.client;
    await filled(variant.client, stream, 6);
    await stream.append(AppendInput.create([AppendRecord.fence("mine")]));
    const record = AppendRecord.string({ body: "x" });
    await stream.append(AppendInput.create([record], { fencingToken: "mine" }));
    const fenced = AppendInput.create([record], { fencingToken: "yours" });
    const displaced = AppendInput.create([record], { matchSeqNum: 3 });
    const overSession = async (input) => {
      const session = await stream.appendSession();
      const ticket = await session.submit(input);
      await ticket.ack().finally(() => session.close().catch(() => {}));
    };
    for (const append of [(input) => stream.append(input), overSession]) {
      await assert.rejects(append(fenced), (error) => {
        assert.ok(error instanceof FencingTokenMismatchError, String(error));
        assert.deepEqual([error.status, error.expectedFencingToken], [412, "mine"]);
        return true;
      });
      await assert.rejects(append(displaced), (error) => {
        assert.ok(error instanceof SeqNumMismatchError, String(error));
        assert.deepEqual([error.status, error.expectedSeqNum], [412, 8]);
        return true;
      });
    }
    assert.equal((await stream.checkTail()).tail.seqNum, 8);
    await stream.append(AppendInput.create([AppendRecord.trim(4)]));
    const first = async () => (await stream.read({ start: { from: { seqNum: 0 } } })).records[0].seqNum;
    await eventually("the trim", async () => (await first()) === 4);
    const session = await stream.readSession({ start: { from: { seqNum: 0 } }, ignoreCommandRecords: true });
    assert.deepEqual((await collect(session, 3)).map(({ seqNum }) => seqNum), [4, 5, 7]);
  });

  each("refusals are errors with a status and a code", async () => {
    const { S2Error, RangeNotSatisfiableError } = variant.client;
    const { session, channel, stream } = await opened(variant);
    const input = AppendInput.create([AppendRecord.string({ body: "x" })]);
    const overSession = async (stream, input) => {
      const session = await stream.appendSession();
      const ticket = await session.submit(input);
      await ticket.ack().finally(() => session.close().catch(() => {}));
    };
    const overRead = async (stream) => collect(await stream.readSession({ start: { from: { seqNum: 0 } } }));
    const writes = { append: (stream, input) => stream.append(input), overSession };
    const ways = { ...writes, tail: (stream) => stream.checkTail(), read: (stream) => stream.read(), overRead };
    const refuses = async (stream, status, code, ways, refused = input) => {
      for (const [way, attempt] of Object.entries(ways)) {
        const error = await attempt(stream, refused).then(() => assert.fail(`${way}: not refused`), (error) => error);
        assert.ok(error instanceof S2Error, `${way}: ${error}`);
        assert.deepEqual({ way, status: error.status, code: error.code }, { way, status, code });
        assert.ok(error.message.length > 5, `${way}: ${error.message}`);
      }
    };
    const at = (changes) => open(variant.client, { ...channel, ...changes }, { transport: variant.transport });
    await refuses(at({ accessToken: "nonsense" }), 401, "authn", ways);
    const other = await started("other");
    const another = await initialize(context, other.externalId, "out");
    await refuses(at({ accessToken: another.accessToken }), 403, "permission_denied", ways);
    const nobody = unique("nobody");
    const early = variant.credentials === "key" ? { stream: `sessions/${nobody}/out` } : await initialize(context, nobody, "out");
    await refuses(at(early), 404, "stream_not_found", writes);
    const absent = { accessToken: SECRET, stream: "sessions/session_nobody/out" };
    await refuses(at(absent), 404, "stream_not_found", ways);
    await refuses(at({ basin: "somebody-elses" }), 404, "basin_not_found", ways);
    await refuses(stream, 422, "invalid", writes, AppendInput.create([AppendRecord.fence("x".repeat(36)), AppendRecord.string({ body: "x", headers: [["", "unknown"]] })]));
    await assert.rejects(stream.read({ start: { from: { seqNum: 0 } } }), (error) => {
      assert.ok(error instanceof RangeNotSatisfiableError, String(error));
      assert.deepEqual([error.status, error.tail.seqNum], [416, 0]);
      return true;
    });
    await stream.append(input);
    await sessions.close(session.externalId);
    await refuses(stream, 409, "session_closed", writes);
    assert.deepEqual(bodies((await stream.read({ start: { from: { seqNum: 0 } } })).records), ["x", ""], "it stays readable");
  });
}

test("frames may be compressed", async () => {
  const { channel } = await opened({ client: newest, transport: "s2s", credentials: "token" });
  const { AppendInput, AppendRecord } = newest;
  const stream = open(newest, channel, { transport: "s2s", compression: "gzip" });
  const session = await stream.appendSession();
  const body = "all the same ".repeat(50_000);
  for (let n = 0; n < 3; n++) await (await session.submit(AppendInput.create([AppendRecord.string({ body })]))).ack();
  await session.close();
  const records = await collect(await stream.readSession({ start: { from: { seqNum: 0 } } }), 3);
  assert.ok(records.every((record) => record.body === body));
});

test("the control plane says how streams are made, and an encryption key is refused", async () => {
  for (const client of [pinned, newest]) {
    const s2 = new client.S2({ accessToken: SECRET, endpoints: { account: context.url, basin: context.url }, retry: { maxAttempts: 3, minBaseDelayMillis: 1 } });
    const basin = s2.basin("sessiond");
    for (const [what, attempt] of Object.entries({
      ensure: () => basin.streams.ensure?.({ stream: "sessions/x/out" }) ?? basin.streams.create({ stream: "sessions/x/out" }),
      list: () => basin.streams.list(),
      basins: () => s2.basins.list(),
    })) {
      await assert.rejects(attempt(), (error) => {
        assert.ok(error instanceof client.S2Error, `${what}: ${error}`);
        assert.deepEqual([error.status, error.code], [501, "not_implemented"], what);
        assert.match(error.message, /POST \/api\/v1\/sessions/, what);
        return true;
      });
    }
  }
  const { AppendInput, AppendRecord } = newest;
  const { channel } = await opened({ client: newest, transport: "fetch", credentials: "key" });
  const bare = open(newest, { ...channel, endpoint: context.url }, { transport: "fetch" });
  await bare.append(AppendInput.create([AppendRecord.string({ body: "at the origin" })]));
  const key = Buffer.alloc(32, 7).toString("base64");
  await assert.rejects(bare.withEncryptionKey(key).append(AppendInput.create([AppendRecord.string({ body: "a secret" })])), { status: 400, code: "bad_header" });
  assert.deepEqual(bodies((await bare.read({ start: { from: { seqNum: 0 } } })).records), ["at the origin"]);
});
