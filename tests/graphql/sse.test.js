// GraphQL over server-sent events, distinct connections mode, through its reference client.

import assert from "node:assert/strict";
import { test } from "node:test";

import { createClient, NetworkError } from "graphql-sse";

import { text } from "./lib/documents.js";
import { bearer, Collector, delay, eventually, recordsOf, SECRET, suite, watchedFetch, WRONG_TOKEN } from "./lib/suite.js";

const context = suite();

function client({ token = SECRET, ...options } = {}) {
  const fetchFn = watchedFetch();
  const made = createClient({ url: context.url, headers: bearer(token), fetchFn, retryAttempts: 0, ...options });
  return Object.assign(made, { seen: fetchFn.seen });
}

function subscribe(over, name, variables, query = text(name)) {
  const collector = new Collector();
  collector.stop = over.subscribe({ query, variables }, collector.observer);
  return collector;
}

const out = ({ sessionId }, fields = {}) => ({ by: { sessionId }, io: "OUT", ...fields });
const events = (collector) => collector.values.map(({ data, errors }) => (assert.equal(errors, undefined), data.channelRecords));
const caughtUp = (collector) => collector.until("caughtUp", () => events(collector).some((event) => event.caughtUp));

test("a subscription gives the history, live records and the end", async () => {
  const session = await context.session();
  await context.append(session, ["a", "b"]);
  const sse = client();
  const collector = subscribe(sse, "ChannelRecords", out(session));
  await caughtUp(collector);
  assert.match(sse.seen[0].type, /^text\/event-stream/);
  await context.append(session, ["c"]);
  await context.close(session, "done");
  await collector.all();
  assert.deepEqual(recordsOf(events(collector)), ["a", "b", "c"]);
  assert.equal(events(collector).at(-1).closed.reason, "done");
});

test("queries and mutations are streams of one result", async () => {
  const sse = client();
  const session = await context.session();
  const by = { sessionId: session.sessionId };
  const [{ data }, ...more] = await subscribe(sse, "OneSession", { by }).all();
  assert.equal(data.session.externalId, session.externalId);
  assert.deepEqual(more, []);
  const [closed] = await subscribe(sse, "CloseSession", { input: { by, reason: "sse" } }).all();
  assert.equal(closed.data.closeSession.session.closedReason, "sse");
});

test("many subscriptions at once, each on its own connection", async () => {
  const sse = client();
  const session = await context.session();
  const collectors = Array.from({ length: 10 }, () => subscribe(sse, "ChannelRecords", out(session)));
  await Promise.all(collectors.map(caughtUp));
  await context.append(session, [1, 2, 3]);
  await context.close(session);
  await Promise.all(collectors.map((collector) => collector.all()));
  for (const collector of collectors) assert.deepEqual(recordsOf(events(collector)), [1, 2, 3]);
  assert.equal(sse.seen.length, 10);
});

test("completing early ends the request", async () => {
  const signals = [];
  const sse = client({ fetchFn: (input, init) => (signals.push(init.signal), fetch(input, init)) });
  const session = await context.session();
  const collector = subscribe(sse, "ChannelRecords", out(session));
  await caughtUp(collector);
  collector.stop();
  await eventually("the abort", () => signals[0].aborted);
  await context.append(session, ["unheard"]);
  assert.deepEqual(recordsOf(events(collector)), []);
});

test("errors reach the client, as a result or as the refusal of the request", async () => {
  const stranger = await context.publicToken("read:sessions:another");
  const session = await context.session();
  for (const [code, sse, variables, query] of [
    ["GRAPHQL_PARSE_FAILED", client(), {}, "{"],
    ["GRAPHQL_VALIDATION_FAILED", client(), {}, "{ nothing }"],
    ["NOT_FOUND", client(), out({ sessionId: "session_doesnotexist" })],
    ["UNAUTHORIZED", client({ token: stranger }), out(session)],
    ["UNAUTHENTICATED", client({ token: null }), out(session)],
    ["UNAUTHENTICATED", client({ token: WRONG_TOKEN }), out(session)],
  ]) {
    const collector = subscribe(sse, "ChannelRecords", variables, query);
    let errors;
    try {
      [{ errors }] = await collector.all();
    } catch (error) {
      assert.ok(error instanceof NetworkError, String(error));
      ({ errors } = await error.response.json());
    }
    assert.equal(errors[0].extensions.code, code);
  }
});

test("a client that retries comes back after a restart of the server, and starts where its variables say", async () => {
  const session = await context.session();
  await context.append(session, ["a", "b"]);
  const sse = client({ retryAttempts: 100, retry: () => delay(50) });
  const collector = subscribe(sse, "ChannelRecords", out(session, { after: "0" }));
  await caughtUp(collector);
  await context.server.kill();
  await context.server.restart();
  await context.append(session, ["c"]);
  await context.close(session);
  await collector.all();
  // The client repeats its request word for word; resuming is the caller's part.
  assert.deepEqual(recordsOf(events(collector)), ["b", "b", "c"]);
});

test("a stop of the server does not look like the end", async () => {
  const session = await context.session();
  const sse = client();
  const collector = subscribe(sse, "ChannelRecords", out(session));
  await caughtUp(collector);
  const failed = collector.failure();
  assert.equal(await context.server.stop(), 0);
  await context.server.restart();
  assert.ok((await failed) instanceof NetworkError);
});
