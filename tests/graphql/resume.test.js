// The promise of a durable channel: whoever comes back after its last cursor misses nothing and sees nothing twice,
// whatever happens to its socket, to the network or to the server.

import assert from "node:assert/strict";
import { randomInt } from "node:crypto";
import { test } from "node:test";

import { createClient } from "graphql-ws";
import WebSocket from "ws";

import { text } from "./lib/documents.js";
import { Proxy } from "./lib/proxy.js";
import { bearer, delay, suite } from "./lib/suite.js";

const SEED = Number(process.env.RESUME_SEED ?? randomInt(2 ** 31));
const SUBSCRIBERS = 20;
const RECORDS = Number(process.env.RESUME_RECORDS ?? 1500);
const WRITERS = 5;
/** The appends take about this long, so that there is time for things to break. */
const WRITING_MS = 3_000;
const WITHIN_MS = 60_000;

/** mulberry32: small, and the same everywhere. */
function random(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Every actor draws from a source of its own, so that timing does not change what it draws. */
function dice(actor) {
  const next = random(SEED + actor * 1_000_003);
  return { below: (n) => Math.floor(next() * n), chance: (p) => next() < p };
}

const context = suite();

// Half of the subscribers ask word for word the same, as browsers of one page do; each of the others has its own words.
const SHARED = { query: text("ChannelRecords"), field: "channelRecords", batch: 100 };
const ARGUMENTS = "by: $by, io: $io, after: $after, batch: $batch";
const own = (i) => ({
  query: `subscription Own${i}($by: SessionBy!, $io: ChannelIO!, $after: Cursor, $batch: Int) {
    mine${i}: channelRecords(${ARGUMENTS}) {
      ${i % 2 === 0 ? "caughtUp tail { seqNum }" : ""}
      endCursor closed { status reason } records { seqNum data ${i % 3 === 0 ? "cursor partId headers { name value }" : "timestamp"} }
    }
  }`,
  field: `mine${i}`,
  batch: [1, 7, 25, 64, 100][i % 5],
});

/** One that may be terminated while it connects: `ws` then emits an error that nobody listens for any more. */
class Socket extends WebSocket {
  constructor(...given) {
    super(...given);
    this.on("error", () => {});
  }
}

class Subscriber {
  seqNums = [];
  values = [];
  connections = 0;
  events = 0;
  closed;
  #socket;

  constructor(number, by, url) {
    this.number = number;
    this.by = by;
    this.kind = number % 2 === 0 ? SHARED : own(number);
    this.client = createClient({
      url,
      webSocketImpl: Socket,
      connectionParams: bearer(),
      retryAttempts: 0,
      on: { opened: (socket) => ((this.#socket = socket), this.connections++), closed: () => (this.#socket = undefined) },
    });
  }

  /** Reads to the end of the channel, however often it has to start again. */
  async run(stopped) {
    const { below } = dice(100 + this.number);
    while (!stopped.aborted) {
      try {
        await this.#follow();
        return;
      } catch (problem) {
        // A close of the socket or a refused connection; anything else is not what this test breaks.
        if (problem instanceof assert.AssertionError || Array.isArray(problem)) throw problem;
        await delay(below(40));
      }
    }
  }

  async #follow() {
    const variables = { by: this.by, io: "OUT", after: this.cursor, batch: this.kind.batch };
    for await (const { data, errors } of this.client.iterate({ query: this.kind.query, variables })) {
      assert.equal(errors, undefined, `subscriber ${this.number}`);
      this.#take(data[this.kind.field]);
    }
    assert.ok(this.closed, `subscriber ${this.number} was told complete, but not closed, at ${this.seqNums.length} records`);
  }

  #take({ records, endCursor, closed }) {
    assert.equal(this.closed, undefined, `subscriber ${this.number} got an event after closed`);
    this.events += 1;
    assert.ok(records.length <= this.kind.batch, `${records.length} records in a batch of ${this.kind.batch}`);
    for (const { seqNum, data } of records) {
      assert.equal(seqNum, String(this.seqNums.length), `subscriber ${this.number}, connection ${this.connections}, after ${this.cursor}`);
      this.seqNums.push(seqNum);
      this.values.push(data);
    }
    if (records.length > 0) assert.equal(endCursor, records.at(-1).seqNum);
    this.cursor = endCursor ?? this.cursor;
    this.closed = closed ?? undefined;
  }

  /** Breaks its connection from its own side, in one of the ways in which that happens. */
  hurt(way) {
    const socket = this.#socket;
    if (!socket) return false;
    if (way === 0) socket.terminate();
    else if (way === 1) this.client.terminate();
    else socket.close(4000, "gone");
    return true;
  }
}

/** Appends its share, in batches of its own size, each until it is in; the server must know a repeated one. */
class Writer {
  retries = 0;
  repeated = 0;

  constructor(number, session, count) {
    Object.assign(this, { number, session, count, dice: dice(200 + number) });
  }

  async run(stopped, note) {
    for (let from = 0; from < this.count && !stopped.aborted; ) {
      const size = this.number === 0 ? 1 : Math.min(1 + this.dice.below(20), this.count - from);
      const values = Array.from({ length: size }, (_, i) => ({ writer: this.number, n: from + i }));
      await this.#insist(stopped, () => (this.number === 0 ? this.#overRest(values[0]) : this.#overGraphQL(values)));
      from += size;
      note(size);
      // Sent again although it is in, as by a client that lost the answer.
      if (this.dice.chance(0.05)) await this.#insist(stopped, () => (this.number === 0 ? this.#overRest(values[0]) : this.#overGraphQL(values)));
      await delay((WRITING_MS * size * (0.5 + this.dice.below(100) / 100)) / this.count);
    }
  }

  async #insist(stopped, send) {
    while (!stopped.aborted) {
      try {
        if (await send()) return;
      } catch (problem) {
        if (problem instanceof assert.AssertionError) throw problem;
      }
      this.retries += 1;
      await delay(20);
    }
  }

  async #overGraphQL(values) {
    const records = values.map((data) => ({ data, idempotencyKey: `${data.writer}-${data.n}` }));
    const input = { by: { sessionId: this.session.sessionId }, io: "OUT", records };
    const { data, errors } = await context.post(text("AppendRecords"), { input });
    if (errors) {
      assert.equal(errors[0].extensions.code, "UNAVAILABLE", JSON.stringify(errors));
      return false;
    }
    assert.deepEqual(data.appendRecords.userErrors, []);
    assert.deepEqual(data.appendRecords.records.map((record) => record.data), values, "what was appended, first or repeated");
    this.repeated += data.appendRecords.repeated ? 1 : 0;
    return true;
  }

  /** The other front end takes text, one record a request. */
  async #overRest(value) {
    const url = `${context.server.baseUrl}/realtime/v1/sessions/${this.session.sessionId}/out/append`;
    const headers = { ...bearer(), "content-type": "application/json", "x-part-id": `${value.writer}-${value.n}` };
    const response = await fetch(url, { method: "POST", headers, body: JSON.stringify(value) });
    const answer = await response.text();
    if (response.status >= 500) return false;
    assert.equal(response.status, 200, answer);
    return true;
  }
}

/** Records over REST are text; compared by what they say. */
const said = (value) => {
  const { writer, n } = typeof value === "string" ? JSON.parse(value) : value;
  return `${writer}-${n}`;
};

test(`${SUBSCRIBERS} subscribers of ${RECORDS} records miss nothing and see nothing twice, RESUME_SEED=${SEED}`, { timeout: WITHIN_MS + 30_000 }, async (t) => {
  const began = performance.now();
  const stop = new AbortController();
  const timer = setTimeout(() => stop.abort(), WITHIN_MS);
  const session = await context.session();
  const by = { sessionId: session.sessionId };
  const proxy = await Proxy.to(context.url);
  // Every other pair is behind the proxy, so that both kinds of document meet both kinds of break.
  const url = (i) => (i % 4 < 2 ? context.wsUrl : proxy.through(context.wsUrl));
  const subscribers = Array.from({ length: SUBSCRIBERS }, (_, i) => new Subscriber(i, by, url(i)));
  const writers = Array.from({ length: WRITERS }, (_, i) => new Writer(i, session, RECORDS / WRITERS));
  // Out of time: whoever still waits for an event is told so.
  stop.signal.addEventListener("abort", () => subscribers.forEach(({ client }) => client.terminate()));
  let written = 0;
  let writing = true;
  let restarts = 0;
  let hurts = 0;

  async function breakThings() {
    const { below, chance } = dice(300);
    while (writing && !stop.signal.aborted) {
      await delay(5 + below(50));
      if (chance(0.4)) hurts += proxy.drop(below) ? 1 : 0;
      else hurts += subscribers[below(SUBSCRIBERS)].hurt(below(3)) ? 1 : 0;
      if (restarts === 0 && written >= RECORDS / 2) {
        restarts += 1;
        await context.server.kill();
        await context.server.restart();
      }
    }
  }

  try {
    const breaking = breakThings();
    const reading = Promise.all(subscribers.map((subscriber) => subscriber.run(stop.signal)));
    reading.catch(() => stop.abort());
    await Promise.all(writers.map((writer) => writer.run(stop.signal, (size) => (written += size))));
    writing = false;
    await breaking;
    await context.close(session, "all written");
    await reading;
  } finally {
    clearTimeout(timer);
    stop.abort();
    const sum = (of) => subscribers.reduce((total, subscriber) => total + of(subscriber), 0);
    const [connections, events] = [sum((s) => s.connections), sum((s) => s.events)];
    const [retries, repeated] = [writers.reduce((n, w) => n + w.retries, 0), writers.reduce((n, w) => n + w.repeated, 0)];
    t.diagnostic(`seed ${SEED}: ${Math.round(performance.now() - began)} ms, ${written} written, ${connections} connections, ` +
      `${hurts} broken on purpose, ${restarts} restart, ${events} events, ${retries} appends retried, ${repeated} known as repeated`);
    proxy.close();
  }

  assert.equal(restarts, 1);
  assert.ok(hurts > 100, `only ${hurts} breaks`);
  assert.equal(written, RECORDS);
  const expected = Array.from({ length: WRITERS }, (_, writer) => Array.from({ length: RECORDS / WRITERS }, (_, n) => `${writer}-${n}`)).flat();
  for (const { number, seqNums, values } of subscribers) {
    assert.deepEqual([seqNums.pop(), values.pop()], [String(RECORDS), null], `subscriber ${number}: the last one tells of the close`);
  }
  const order = subscribers[0].values.map(said);
  assert.deepEqual([...order].sort(), expected.sort(), "every record once");
  for (const { number, closed, seqNums, values } of subscribers) {
    assert.equal(seqNums.length, RECORDS, `subscriber ${number}`);
    assert.deepEqual(values.map(said), order, `subscriber ${number} saw what subscriber 0 saw`);
    assert.deepEqual([closed?.status, closed?.reason], ["CLOSED", "all written"], `subscriber ${number}`);
  }
  for (let writer = 0; writer < WRITERS; writer++) {
    const numbers = order.filter((name) => name.startsWith(`${writer}-`)).map((name) => Number(name.split("-")[1]));
    assert.ok(numbers.every((n, i) => n === i), `writer ${writer}'s records are in its order`);
  }
});
