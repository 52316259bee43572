// The SDK's writers, which go past the append route and straight to the S2 wire.

import assert from "node:assert/strict";
import { test } from "node:test";

import { ChatChunkTooLargeError, sessions } from "@trigger.dev/sdk";

import { numbered, payloads, started, stored } from "./lib/direct.js";
import { eventually, suite, take } from "./lib/suite.js";

const context = suite();

/** The SDK's own limit of an encoded envelope, `{"data":...,"id":"1234567"}`. */
const ENVELOPE_MAX = 1024 * 1024 - 1024;
const ENVELOPE_FRAME = Buffer.byteLength(JSON.stringify({ data: "", id: "1234567" }));

async function reading(handle, options) {
  const abort = new AbortController();
  const stream = await handle.out.read({ timeoutInSeconds: 60, signal: abort.signal, ...options });
  return { reader: stream.getReader(), stop: () => abort.abort() };
}

const initializations = () => context.requests.filter(({ method }) => method === "PUT").length;

test("out.append stores a value, not its text, and readers get the value", async () => {
  const { handle, externalId } = await started("append");
  const values = [{ text: "\u{1f600} \u2028 \0" }, "plain", 0, -1.5, true, [], ["a", { b: null }], ""];
  for (const value of values) await handle.out.append(value);
  assert.deepEqual(await payloads(context, externalId), values);
  assert.equal(initializations(), 1, "one initialization serves every write of a handle");
  const { reader, stop } = await reading(handle);
  assert.deepEqual(await take(reader, values.length), values);
  stop();
});

test("out.pipe stores every chunk in order and says where it ended", async () => {
  const { handle, externalId } = await started("pipe");
  async function* source() {
    for (const chunk of numbered(0, 300)) {
      yield chunk;
      if (chunk.n % 50 === 0) await new Promise(setImmediate);
    }
  }
  const { stream, waitUntilComplete } = handle.out.pipe(source());
  const local = [];
  for await (const chunk of stream) local.push(chunk);
  const { lastEventId } = await waitUntilComplete();
  assert.equal(lastEventId, "299");
  assert.deepEqual(local, numbered(0, 300));
  assert.deepEqual(await payloads(context, externalId), numbered(0, 300));
  await handle.out.append("the next");
  const { reader, stop } = await reading(handle, { lastEventId });
  assert.deepEqual(await take(reader, 1), ["the next"]);
  stop();
});

test("a live reader sees what a writer writes, while it writes", async () => {
  const { handle } = await started("live");
  const { reader, stop } = await reading(handle);
  let more;
  const pause = new Promise((resolve) => (more = resolve));
  const { waitUntilComplete } = handle.out.writer({
    execute: async ({ write }) => {
      for (const chunk of numbered(0, 5)) write(chunk);
      await pause;
      for (const chunk of numbered(5, 10)) write(chunk);
    },
  });
  assert.deepEqual(await take(reader, 5), numbered(0, 5));
  more();
  assert.deepEqual(await take(reader, 5), numbered(5, 10));
  assert.deepEqual(await waitUntilComplete(), { lastEventId: "9" });
  stop();
});

test("a writer merges streams without losing a record of any", async () => {
  const { handle, externalId } = await started("merge");
  const stream = (from, count) => ReadableStream.from(Array.from({ length: count }, (_, i) => ({ from, i })));
  const { waitUntilComplete } = handle.out.writer({
    execute: ({ write, merge }) => {
      write({ from: "own", i: 0 });
      merge(stream("a", 200));
      merge(stream("b", 300));
      write({ from: "own", i: 1 });
    },
  });
  assert.deepEqual(await waitUntilComplete(), { lastEventId: "501" });
  const records = await stored(context, externalId);
  assert.deepEqual(records.map(({ seqNum }) => seqNum), Array.from({ length: 502 }, (_, i) => i));
  for (const [from, count] of [["own", 2], ["a", 200], ["b", 300]]) {
    const own = records.map(({ data }) => data).filter((data) => data.from === from);
    assert.deepEqual(own.map(({ i }) => i), Array.from({ length: count }, (_, i) => i), from);
  }
});

test("writers of one channel and of its side channels do not get into each other's way", async () => {
  const { handle, externalId } = await started("many");
  const channels = [undefined, undefined, undefined, undefined, "left", "right.2"];
  const writers = channels.map((name, writer) => {
    const { out } = name === undefined ? handle : handle.channel(name);
    return out.pipe(ReadableStream.from(Array.from({ length: 250 }, (_, i) => ({ writer, i }))));
  });
  await Promise.all(writers.map(({ waitUntilComplete }) => waitUntilComplete()));
  for (const channel of [undefined, "left", "right.2"]) {
    const records = await stored(context, externalId, { channel });
    const writing = channels.flatMap((name, writer) => (name === channel ? [writer] : []));
    assert.deepEqual(records.map(({ seqNum }) => seqNum), Array.from({ length: 250 * writing.length }, (_, i) => i));
    for (const writer of writing) {
      const own = records.map(({ data }) => data).filter((data) => data.writer === writer);
      assert.deepEqual(own.map(({ i }) => i), Array.from({ length: 250 }, (_, i) => i), `writer ${writer}`);
    }
  }
});

test("append routes and direct writers share one order", async () => {
  const { handle, externalId } = await started("mixed");
  for (let n = 0; n < 6; n += 2) {
    assert.equal(await context.append(externalId, "out", `${n}`), n);
    await handle.out.append({ n: n + 1 });
  }
  const expected = ["0", { n: 1 }, "2", { n: 3 }, "4", { n: 5 }];
  assert.deepEqual(await payloads(context, externalId), expected);
  await handle.in.send({ hello: "agent" });
  assert.deepEqual(await payloads(context, externalId, { io: "in" }), ['{"hello":"agent"}']);
});

test("out.writeControl reaches onControl and no reader's data", async () => {
  const { handle } = await started("control");
  const seen = [];
  const { reader, stop } = await reading(handle, { onControl: (event) => seen.push(event) });
  await handle.out.append("before");
  const headers = [["public-access-token", "t"], ["session-in-event-id", "7"]];
  assert.deepEqual(await handle.out.writeControl("turn-complete", headers), { lastEventId: "1" });
  assert.deepEqual(await handle.channel("side").out.writeControl("pending-version"), { lastEventId: "0" });
  await handle.out.append("after");
  assert.deepEqual(await take(reader, 2), ["before", "after"]);
  assert.equal(seen.length, 1);
  assert.deepEqual({ ...seen[0], timestamp: 0 }, {
    subtype: "turn-complete",
    headers: [["trigger-control", "turn-complete"], ...headers],
    seqNum: 1,
    timestamp: 0,
  });
  stop();
});

test("out.trimTo makes readers begin at the first survivor", async () => {
  const { handle, externalId } = await started("trim");
  await handle.out.pipe(ReadableStream.from(numbered(0, 10))).waitUntilComplete();
  await handle.out.trimTo(6);
  await eventually("the trim", async () => (await stored(context, externalId))[0].seqNum === 6);
  const { reader, stop } = await reading(handle);
  assert.deepEqual(await take(reader, 4), numbered(6, 10));
  stop();
  const resumed = await reading(handle, { lastEventId: "2" });
  assert.deepEqual(await take(resumed.reader, 4), numbered(6, 10));
  resumed.stop();
  // Backward, it takes a place in the order and does nothing else.
  await handle.out.trimTo(3);
  await handle.out.append("next");
  assert.deepEqual((await stored(context, externalId)).map(({ seqNum }) => seqNum), [6, 7, 8, 9, 12]);
});

test("the largest record that the SDK lets through is stored whole; one byte more is its own error", async () => {
  const { handle, externalId } = await started("large");
  const fitting = "x".repeat(ENVELOPE_MAX - ENVELOPE_FRAME);
  await handle.out.append(fitting);
  await assert.rejects(handle.out.append(`${fitting}x`), (error) => {
    assert.ok(error instanceof ChatChunkTooLargeError, String(error));
    assert.equal(error.chunkSize, ENVELOPE_MAX + 1);
    return true;
  });
  const { waitUntilComplete } = handle.out.pipe(ReadableStream.from([fitting, fitting, fitting]));
  assert.deepEqual(await waitUntilComplete(), { lastEventId: "3" });
  const lengths = (await payloads(context, externalId)).map((text) => text.length);
  assert.deepEqual(lengths, Array(4).fill(fitting.length), "nothing of what was refused");
  const { reader, stop } = await reading(handle);
  assert.deepEqual(await take(reader, 4), Array(4).fill(fitting));
  stop();
});

test("an abort ends a writer where it is and leaves the channel to the next one", async () => {
  const { handle, externalId } = await started("abort");
  const abort = new AbortController();
  let source;
  const stream = new ReadableStream({ start: (controller) => void (source = controller) });
  const { waitUntilComplete } = handle.out.pipe(stream, { signal: abort.signal });
  for (const chunk of numbered(0, 5)) source.enqueue(chunk);
  await eventually("five records", async () => (await stored(context, externalId)).length === 5);
  abort.abort();
  source.enqueue({ n: 5 });
  await waitUntilComplete();
  assert.deepEqual(await payloads(context, externalId), numbered(0, 5));
  await handle.out.append("goes on");
  assert.deepEqual(await payloads(context, externalId), [...numbered(0, 5), "goes on"]);
  assert.deepEqual(await sessions.open(externalId).out.pipe(ReadableStream.from([])).waitUntilComplete(), { lastEventId: undefined });
});
