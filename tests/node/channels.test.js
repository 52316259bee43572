// The data plane as the SDK drives it: sending, the stream manager, reading, side channels, restarts.

import assert from "node:assert/strict";
import { afterEach, test } from "node:test";

import { apiClientManager, sessionStreams } from "@trigger.dev/core/v3";
import { StandardSessionStreamManager } from "@trigger.dev/core/v3/workers";
import { ApiError, NotFoundError, sessions } from "@trigger.dev/sdk";

import { drain, eventually, sessionBody, suite, take, unique } from "./lib/suite.js";

const context = suite();
let manager;

/** The manager that the SDK installs inside a run; outside one it has none. The first one registered stays. */
function manage() {
  if (!manager) {
    manager = new StandardSessionStreamManager(apiClientManager.clientOrThrow(), context.url);
    sessionStreams.setGlobalManager(manager);
  }
  return manager;
}

afterEach(() => manager?.reset());

async function started(name) {
  const externalId = unique(name);
  const session = await sessions.start(sessionBody({ externalId }));
  return { ...session, handle: sessions.open(externalId), externalId };
}

async function reading(handle, options) {
  const abort = new AbortController();
  const stream = await handle.out.read({ timeoutInSeconds: 60, signal: abort.signal, ...options });
  const reader = stream.getReader();
  return { reader, stop: () => abort.abort() };
}

const numbered = (from, to) => Array.from({ length: to - from }, (_, i) => `chunk ${from + i}`);

test("what in.send sends, in.once receives, in order and parsed", async () => {
  manage();
  const { handle } = await started("once");
  const first = handle.in.once();
  await handle.in.send({ kind: "message", payload: { text: "one" } });
  await handle.in.send("two, as text");
  assert.deepEqual(await first, { ok: true, output: { kind: "message", payload: { text: "one" } } });
  assert.deepEqual(await handle.in.once(), { ok: true, output: "two, as text" });
  assert.equal(handle.in.lastDispatchedSeqNum(), 1);
});

test("in.on sees what was sent before and after it was registered", async () => {
  manage();
  const { handle } = await started("on");
  await handle.in.send({ n: 0 });
  const seen = [];
  const { off } = handle.in.on((data) => {
    seen.push(data.n);
  });
  for (let n = 1; n < 10; n++) await handle.in.send({ n });
  await eventually("ten messages", () => seen.length >= 10);
  assert.deepEqual(seen, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
  off();
});

test("in.peek looks at the next message without taking it", async () => {
  manage();
  const { handle } = await started("peek");
  assert.equal(handle.in.peek(), undefined);
  await handle.in.send({ n: 0 });
  await handle.in.send({ n: 1 });
  assert.deepEqual(await handle.in.once(), { ok: true, output: { n: 0 } });
  assert.deepEqual(await eventually("the second message", () => handle.in.peek()), { n: 1 });
  assert.deepEqual(handle.in.peek(), { n: 1 });
  assert.deepEqual(await handle.in.once(), { ok: true, output: { n: 1 } });
  assert.equal(handle.in.peek(), undefined);
});

test("in.once gives up after its timeout", async () => {
  manage();
  const { handle } = await started("timeout");
  assert.equal((await handle.in.once({ timeoutMs: 200 })).ok, false);
});

test("a manager that starts from a sequence number sees only what follows it", async () => {
  const { handle, externalId } = await started("from");
  for (let n = 0; n < 5; n++) await handle.in.send({ n });
  manage().setLastSeqNum(externalId, "in", 2);
  assert.deepEqual(await handle.in.once(), { ok: true, output: { n: 3 } });
});

test("the stream manager goes on after a restart of the server", async () => {
  manage();
  const { handle } = await started("manager-restart");
  const seen = [];
  handle.in.on((data) => {
    seen.push(data.n);
  });
  for (let n = 0; n < 3; n++) await handle.in.send({ n });
  await eventually("three messages", () => seen.length === 3);
  await context.server.kill();
  await context.server.restart();
  for (let n = 3; n < 6; n++) await handle.in.send({ n });
  await eventually("six messages", () => seen.length >= 6);
  assert.deepEqual(seen, [0, 1, 2, 3, 4, 5]);
});

test("out.read yields every record from the start, then live ones", async () => {
  const { handle, externalId } = await started("read");
  for (const text of numbered(0, 3)) await context.append(externalId, "out", text);
  const parts = [];
  const { reader, stop } = await reading(handle, { onPart: (part) => parts.push(part) });
  assert.deepEqual(await take(reader, 3), numbered(0, 3));
  for (const text of numbered(3, 6)) await context.append(externalId, "out", text);
  assert.deepEqual(await take(reader, 3), numbered(3, 6));
  assert.deepEqual(parts.map((part) => part.id), ["0", "1", "2", "3", "4", "5"]);
  assert.equal(new Set(parts.map((part) => part.recordId)).size, 6);
  assert.ok(parts.every((part, i) => i === 0 || part.timestamp >= parts[i - 1].timestamp));
  stop();
});

test("out.read resumes after lastEventId", async () => {
  const { handle, id, externalId } = await started("resume");
  for (const text of numbered(0, 10)) await context.append(externalId, "out", text);
  for (const [lastEventId, from] of [["0", 1], [6, 7], ["8", 9]]) {
    for (const address of [handle, sessions.open(id)]) {
      const { reader, stop } = await reading(address, { lastEventId });
      assert.deepEqual(await take(reader, 10 - from), numbered(from, 10));
      stop();
    }
  }
});

for (const [how, end] of [["kill -9", "kill"], ["a graceful stop", "stop"]]) {
  test(`out.read survives ${how} of the server: nothing lost, nothing twice`, async () => {
    const { handle, externalId } = await started(end);
    for (const text of numbered(0, 20)) await context.append(externalId, "out", text);
    let completed = false;
    const { reader, stop } = await reading(handle, { onComplete: () => (completed = true) });
    assert.deepEqual(await take(reader, 10), numbered(0, 10));
    await context.server[end]();
    await context.server.restart();
    for (const text of numbered(20, 40)) await context.append(externalId, "out", text);
    assert.deepEqual(await take(reader, 30), numbered(10, 40));
    assert.equal(completed, false, "a stop must not look like the end of the stream");
    stop();
  });
}

test("a send that meets a restart arrives exactly once", async () => {
  const { handle, externalId } = await started("retry");
  await context.server.kill();
  const sent = handle.in.send({ text: "held up" });
  await context.server.restart();
  await sent;
  const { records } = await apiClientManager.clientOrThrow().readSessionStreamRecords(externalId, "in");
  assert.deepEqual(records.map((record) => JSON.parse(record.data)), [{ text: "held up" }]);
});

test("out.read ends cleanly when the session is closed", async () => {
  const { handle, externalId } = await started("close");
  await context.append(externalId, "out", "last words");
  let completed = 0;
  const { reader } = await reading(handle, { onComplete: () => completed++ });
  assert.deepEqual(await take(reader, 1), ["last words"]);
  await sessions.close(externalId);
  assert.deepEqual(await drain(reader), []);
  assert.equal(completed, 1);
  const { reader: late } = await reading(handle);
  assert.deepEqual(await drain(late), ["last words"], "a closed session stays readable");
});

test("out.read of an externalId that does not exist yet attaches when it is created", async () => {
  const externalId = unique("early");
  const { reader, stop } = await reading(sessions.open(externalId));
  const first = reader.read();
  await eventually("the subscription", () => context.requests.some(({ path }) => path.endsWith(`${externalId}/out`)));
  await sessions.start(sessionBody({ externalId }));
  await context.append(externalId, "out", "welcome");
  assert.deepEqual(await first, { done: false, value: "welcome" });
  stop();
});

test("out.read of an unknown session_ id is not found", async () => {
  const { reader } = await reading(sessions.open("session_doesnotexist"));
  await assert.rejects(reader.read(), NotFoundError);
});

test("two readers see the same records", async () => {
  const { handle, externalId } = await started("fan-out");
  const readers = await Promise.all(Array.from({ length: 5 }, () => reading(handle)));
  for (const text of numbered(0, 20)) await context.append(externalId, "out", text);
  for (const { reader, stop } of readers) {
    assert.deepEqual(await take(reader, 20), numbered(0, 20));
    stop();
  }
});

test("a side channel is a log of its own, in both directions", async () => {
  manage();
  const { handle, externalId } = await started("side");
  const cursors = handle.channel("cursors.v1");
  const heard = cursors.in.once();
  await cursors.in.send({ x: 1 });
  assert.deepEqual(await heard, { ok: true, output: { x: 1 } });
  await context.append(externalId, "out", "main");
  for (const text of numbered(0, 3)) await context.append(externalId, "out", text, { channel: "cursors.v1" });
  await context.append(externalId, "out", "another", { channel: "other" });
  const { reader, stop } = await reading(cursors);
  assert.deepEqual(await take(reader, 3), numbered(0, 3));
  stop();
  const client = apiClientManager.clientOrThrow();
  const records = async (options) => (await client.readSessionStreamRecords(externalId, "out", options)).records;
  assert.deepEqual((await records({ channel: "cursors.v1", afterEventId: "0" })).map(({ data, seqNum }) => [seqNum, data]), [
    [1, "chunk 1"],
    [2, "chunk 2"],
  ]);
  assert.deepEqual((await records()).map(({ data }) => data), ["main"]);
  assert.deepEqual((await client.readSessionStreamRecords(externalId, "in")).records, []);
  await sessions.close(externalId);
  await assert.rejects(cursors.in.send("late"), ApiError, "a close seals the side channels too");
});

test("records drains a channel at once", async () => {
  const { externalId } = await started("records");
  const client = apiClientManager.clientOrThrow();
  assert.deepEqual((await client.readSessionStreamRecords(externalId, "out")).records, []);
  for (const text of numbered(0, 5)) await context.append(externalId, "out", text, { partId: `part-${text}` });
  const { records } = await client.readSessionStreamRecords(externalId, "out", { afterEventId: "2" });
  assert.deepEqual(
    records.map(({ data, id, seqNum }) => ({ data, id, seqNum })),
    [3, 4].map((n) => ({ data: `chunk ${n}`, id: `part-chunk ${n}`, seqNum: n })),
  );
});
