// Writers that meet the end of the server, or of their connection: what was acknowledged is there once, in order, and
// so is everything else once the writer is done.

import assert from "node:assert/strict";
import { after, afterEach, test } from "node:test";

import * as s2 from "@s2-dev/streamstore";

import { initialize, numbered, open, payloads, started, stored } from "./lib/direct.js";
import { Relay } from "./lib/relay.js";
import { delay, eventually, suite, take } from "./lib/suite.js";

// Holds writers that come while the server is away, so that how fast it is back decides nothing.
let relay;
const context = suite(
  () => relay.aim(context.url),
  async () => {
    relay = await Relay.start();
    return { SESSIOND_DIRECT__ENDPOINT: `${relay.url}/v1` };
  },
);
// A connection that a test has spoiled is not the next one's.
afterEach(() => relay.cut());
after(() => relay?.close());

/** Writes on and on until told to stop, so that whatever happens happens in the middle. */
class Feed {
  written = 0;
  #stopped = false;

  constructor(handle) {
    Object.assign(this, handle.out.pipe(this.#source()));
  }

  async *#source() {
    while (!this.#stopped) {
      yield { n: this.written++ };
      await delay(1);
    }
  }

  /** Lets it write `count` more, and then come to its end. */
  async finish(count) {
    const last = this.written + count;
    await eventually("more of them", () => this.written >= last);
    this.#stopped = true;
    return this.waitUntilComplete();
  }
}

async function assertOnce(externalId, count) {
  const records = await stored(context, externalId);
  assert.deepEqual(records.map(({ data }) => data), numbered(0, count));
  assert.deepEqual(records.map(({ seqNum }) => seqNum), numbered(0, count).map(({ n }) => n), "nothing in between");
}

const several = (externalId, count) =>
  eventually(`${count} records`, async () => (await stored(context, externalId)).length >= count);

for (const [how, end] of [["kill -9", "kill"], ["a graceful stop", "stop"]]) {
  test(`a pipe survives ${how} of the server: nothing lost, nothing twice`, async () => {
    const { handle, externalId } = await started(end);
    const feed = new Feed(handle);
    await several(externalId, 50);
    await context.server[end]();
    await context.server.restart();
    assert.deepEqual(await feed.finish(50), { lastEventId: `${feed.written - 1}` });
    await assertOnce(externalId, feed.written);
  });
}

for (const [how, end] of [["kill -9", "kill"], ["a broken connection", undefined]]) {
  test(`batches that were stored before ${how} and never acknowledged are sent again and stored once`, async () => {
    const { handle, externalId } = await started("unacknowledged");
    const feed = new Feed(handle);
    await several(externalId, 20);
    relay.mute();
    await eventually("an answer that is lost", () => relay.withheld > 0);
    if (end) {
      await context.server[end]();
      await context.server.restart();
    } else {
      relay.cut();
    }
    assert.deepEqual(await feed.finish(50), { lastEventId: `${feed.written - 1}` });
    await assertOnce(externalId, feed.written);
  });
}

test("a pipe over a connection that breaks again and again arrives whole", async () => {
  const { handle, externalId } = await started("flaky");
  const feed = new Feed(handle);
  for (let round = 0; round < 12; round++) {
    // So many that the writer has heard of one, and does not count this as another failure of the same attempt.
    await eventually("answers", () => relay.passed > 3);
    if (round % 2 === 0) {
      relay.mute();
      await eventually("an answer that is lost", () => relay.withheld > 0);
    }
    relay.cut();
  }
  assert.deepEqual(await feed.finish(50), { lastEventId: `${feed.written - 1}` });
  await assertOnce(externalId, feed.written);
});

test("thousands of records that were stored and never acknowledged are stored once", async () => {
  const { handle, externalId } = await started("thousands");
  let goOn;
  const pause = new Promise((resolve) => (goOn = resolve));
  let done = false;
  async function* source() {
    yield { n: 0 };
    await pause;
    yield* numbered(1, 5000);
    done = true;
  }
  const { waitUntilComplete } = handle.out.pipe(source());
  await several(externalId, 1);
  relay.hold();
  goOn();
  await eventually("an answer, and everything else waiting for it", () => done && relay.withheld > 0);
  relay.letGo();
  await several(externalId, 5000);
  relay.cut();
  assert.deepEqual(await waitUntilComplete(), { lastEventId: "4999" });
  await assertOnce(externalId, 5000);
});

test("several writers of one channel survive kill -9 of the server together", async () => {
  const { handle, externalId } = await started("together");
  const writers = Array.from({ length: 4 }, (_, writer) =>
    handle.out.writer({
      execute: async ({ write }) => {
        for (let i = 0; i < 200; i++) {
          write({ writer, i });
          await delay(1);
        }
      },
    }),
  );
  await eventually("some records", async () => (await stored(context, externalId)).length > 0);
  relay.mute();
  await eventually("an answer that is lost", () => relay.withheld > 0);
  await context.server.kill();
  await context.server.restart();
  await Promise.all(writers.map(({ waitUntilComplete }) => waitUntilComplete()));
  const all = await payloads(context, externalId);
  assert.equal(all.length, 800);
  for (let writer = 0; writer < 4; writer++) {
    const own = all.filter((chunk) => chunk.writer === writer);
    assert.deepEqual(own.map(({ i }) => i), Array.from({ length: 200 }, (_, i) => i), `writer ${writer}`);
  }
});

for (const transport of ["s2s", "fetch"]) {
  test(`S2's read session survives kill -9 of the server (${transport})`, async () => {
    const { handle, externalId } = await started("read");
    await handle.out.pipe(ReadableStream.from(numbered(0, 20))).waitUntilComplete();
    const stream = open(s2, await initialize(context, externalId, "out"), { transport });
    const reader = (await stream.readSession({ start: { from: { seqNum: 0 } } })).getReader();
    const seen = await take(reader, 20);
    await context.server.kill();
    await context.server.restart();
    await handle.out.pipe(ReadableStream.from(numbered(20, 40))).waitUntilComplete();
    seen.push(...(await take(reader, 20)));
    assert.deepEqual(seen.map(({ body }) => JSON.parse(body).data), numbered(0, 40));
    await reader.cancel();
  });
}
