// graphql-transport-ws through its reference client, and what that client never sends through a bare socket.

import assert from "node:assert/strict";
import { once } from "node:events";
import { test } from "node:test";

import { createClient } from "graphql-ws";
import WebSocket from "ws";

import { text } from "./lib/documents.js";
import { Proxy } from "./lib/proxy.js";
import { bearer, Collector, delay, eventually, recordsOf, SECRET, suite, unique, WRONG_TOKEN } from "./lib/suite.js";

const context = suite(undefined, { SESSIOND_GRAPHQL__INIT_TIMEOUT: "2s", SESSIOND_GRAPHQL__PING_INTERVAL: "1s" });

/** A client and what happened to it: `events` is a list of names, `sockets` every socket it opened. */
function client(options = {}) {
  const events = [];
  const sockets = [];
  const note = (name) => (value) => (events.push(name), options.on?.[name]?.(value));
  const made = createClient({
    url: context.wsUrl,
    webSocketImpl: WebSocket,
    connectionParams: bearer(),
    retryAttempts: 0,
    ...options,
    on: {
      ...options.on,
      connecting: note("connecting"),
      opened: (socket) => (events.push("opened"), sockets.push(socket)),
      connected: note("connected"),
      closed: note("closed"),
    },
  });
  return Object.assign(made, { events, sockets });
}

function subscribe(over, name, variables) {
  const collector = new Collector();
  collector.stop = over.subscribe({ query: text(name), variables }, collector.observer);
  return collector;
}

const out = ({ sessionId }, fields = {}) => ({ by: { sessionId }, io: "OUT", ...fields });
const events = (collector) => collector.values.map(({ data, errors }) => (assert.equal(errors, undefined), data.channelRecords));
const caughtUp = (collector) => collector.until("caughtUp", () => events(collector).some((event) => event.caughtUp));

test("a subscription gives the history, live records and the end", async () => {
  const session = await context.session();
  await context.append(session, [1, "two", { three: [3, null] }]);
  const ws = client();
  const collector = subscribe(ws, "ChannelRecords", out(session));
  await caughtUp(collector);
  assert.deepEqual(recordsOf(events(collector)), [1, "two", { three: [3, null] }]);
  await context.append(session, [4]);
  await context.close(session, "done");
  await collector.all();
  assert.deepEqual(recordsOf(events(collector)), [1, "two", { three: [3, null] }, 4]);
  const last = events(collector).at(-1);
  assert.deepEqual([last.closed.status, last.closed.reason, last.endCursor], ["CLOSED", "done", "4"]);
  assert.ok(events(collector).slice(0, -1).every(({ closed }) => closed === null), "only the last event is the end");
  await ws.dispose();
});

test("a closed session's history ends at once, from the start and after any cursor", async () => {
  const session = await context.session();
  await context.append(session, ["a", "b", "c"]);
  await context.close(session);
  const ws = client();
  for (const [after, rest] of [[null, ["a", "b", "c"]], ["0", ["b", "c"]], ["2", []]]) {
    const collector = subscribe(ws, "ChannelRecords", out(session, { after }));
    await collector.all();
    assert.deepEqual(recordsOf(events(collector)), rest, `after ${after}`);
    assert.equal(events(collector).at(-1).closed.status, "CLOSED");
  }
  await ws.dispose();
});

test("batches hold at most what was asked", async () => {
  const session = await context.session();
  await context.append(session, Array.from({ length: 25 }, (_, i) => i));
  const ws = client();
  const collector = subscribe(ws, "ChannelRecords", out(session, { batch: 10 }));
  await caughtUp(collector);
  assert.deepEqual(recordsOf(events(collector)), Array.from({ length: 25 }, (_, i) => i));
  assert.ok(events(collector).every(({ records }) => records.length <= 10));
  assert.equal(events(collector).filter((event) => event.caughtUp).length, 1);
  for (const { records, endCursor } of events(collector)) assert.equal(endCursor, records.at(-1)?.cursor ?? endCursor);
  await ws.dispose();
});

test("LATEST skips the history", async () => {
  const session = await context.session();
  await context.append(session, ["old"]);
  const ws = client();
  const collector = subscribe(ws, "LiveRecords", out(session));
  await caughtUp(collector);
  await context.append(session, ["new"]);
  await collector.until("the live record", () => recordsOf(events(collector)).length > 0);
  assert.deepEqual(recordsOf(events(collector)), ["new"]);
  collector.stop();
  await ws.dispose();
});

test("completing early ends one subscription and not its neighbours", async () => {
  const session = await context.session();
  const ws = client({ lazyCloseTimeout: 1_000 });
  const [early, late] = [subscribe(ws, "ChannelRecords", out(session)), subscribe(ws, "ChannelRecords", out(session))];
  await Promise.all([caughtUp(early), caughtUp(late)]);
  early.stop();
  await early.all();
  await context.append(session, ["after"]);
  await late.until("the record", () => recordsOf(events(late)).length === 1);
  assert.deepEqual(recordsOf(events(early)), []);
  assert.equal(ws.sockets.length, 1);
  late.stop();
  await ws.dispose();
});

test("many operations share one socket", async () => {
  const sessions = await Promise.all(Array.from({ length: 5 }, () => context.session()));
  const ws = client();
  const collectors = sessions.flatMap((session) => Array.from({ length: 8 }, () => subscribe(ws, "ChannelRecords", out(session))));
  await Promise.all(collectors.map(caughtUp));
  const queries = await Promise.all(
    sessions.map(({ sessionId }) => subscribe(ws, "OneSession", { by: { sessionId } }).all()),
  );
  assert.deepEqual(queries.map(([{ data }]) => data.session.sessionId), sessions.map(({ sessionId }) => sessionId));
  for (const [i, session] of sessions.entries()) {
    await context.append(session, [i]);
    await context.close(session);
  }
  await Promise.all(collectors.map((collector) => collector.all()));
  assert.deepEqual(collectors.map((collector) => recordsOf(events(collector))), sessions.flatMap((_, i) => Array.from({ length: 8 }, () => [i])));
  assert.equal(ws.sockets.length, 1);
  await ws.dispose();
});

test("a session's changes, first the row as it is", async () => {
  const session = await context.session({ tags: ["one"] });
  const ws = client();
  const collector = subscribe(ws, "SessionChanged", { by: { sessionId: session.sessionId } });
  const seen = () => collector.values.map(({ data }) => [data.sessionChanged.tags[0], data.sessionChanged.status]);
  await collector.until("the row", (values) => values.length === 1);
  await context.mutate("UpdateSession", { by: { sessionId: session.sessionId }, tags: ["two"] });
  await collector.until("the change", (values) => values.length === 2);
  await context.close(session);
  await collector.all();
  assert.deepEqual(seen(), [["one", "ACTIVE"], ["two", "ACTIVE"], ["two", "CLOSED"]]);
  await ws.dispose();
});

test("changes of every session that matches, and of no other", async () => {
  const tag = `tag-${process.pid}-${performance.now()}`;
  const before = await context.session({ tags: [tag] });
  const ws = client();
  const collector = subscribe(ws, "SessionsChanged", { filter: { tags: { any: [tag] } } });
  // There is no first event to wait for, so changes are made until one is heard.
  let round = 0;
  await eventually("the first change", async () => {
    await context.mutate("UpdateSession", { by: { sessionId: before.sessionId }, metadata: { round: ++round } });
    return collector.values.length > 0;
  });
  await context.session({ tags: ["another"] });
  const made = await context.session({ tags: [tag] });
  await context.close(made);
  const status = ({ data }) => data.sessionsChanged.sessionId === made.sessionId && data.sessionsChanged.status;
  await collector.until("both changes", (values) => values.some((value) => status(value) === "CLOSED"));
  assert.deepEqual(collector.values.map(status).filter(Boolean), ["ACTIVE", "CLOSED"]);
  assert.ok(collector.values.every(({ data }) => data.sessionsChanged.tags[0] === tag));
  collector.stop();
  await ws.dispose();
});

test("an externalId that no session has yet is waited for", async () => {
  const externalId = unique("early");
  const ws = client();
  const collector = subscribe(ws, "ChannelRecords", { by: { externalId }, io: "OUT" });
  // Another operation behind it on the same socket, so that it is under way.
  await subscribe(ws, "Viewer", {}).all();
  const session = await context.session({ externalId });
  await context.append(session, ["welcome"]);
  await context.close(session);
  await collector.all();
  assert.deepEqual(recordsOf(events(collector)), ["welcome"]);
  await ws.dispose();
});

test("errors before the first event are error messages, and the socket stays", async () => {
  const ws = client({ lazyCloseTimeout: 1_000 });
  const codes = [];
  for (const request of [
    { query: "{" },
    { query: "{ nothing }" },
    { query: text("ChannelRecords"), variables: out({ sessionId: "session_doesnotexist" }) },
    { query: text("ChannelRecords"), variables: {} },
  ]) {
    const collector = new Collector();
    ws.subscribe(request, collector.observer);
    const errors = await collector.failure();
    assert.ok(Array.isArray(errors), `not an error message but ${JSON.stringify(errors)}`);
    assert.deepEqual(collector.values, []);
    codes.push(errors[0].extensions.code);
  }
  assert.deepEqual(codes, ["GRAPHQL_PARSE_FAILED", "GRAPHQL_VALIDATION_FAILED", "NOT_FOUND", "GRAPHQL_VALIDATION_FAILED"]);
  assert.equal(ws.sockets.length, 1);
  await ws.dispose();
});

test("a wrong token closes with 4403, and a client told not to retry stops there", async () => {
  const ws = client({ connectionParams: bearer(WRONG_TOKEN), retryAttempts: 5, shouldRetry: ({ code }) => code !== 4403 });
  const closed = await subscribe(ws, "Viewer", {}).failure();
  assert.equal(closed.code, 4403);
  assert.ok(Buffer.byteLength(closed.reason) <= 123);
  assert.equal(ws.events.filter((name) => name === "connecting").length, 1);
});

test("a client that retries 4403 gets in once its token is good", async () => {
  const tokens = [WRONG_TOKEN, WRONG_TOKEN, SECRET];
  const ws = client({ connectionParams: () => bearer(tokens.shift()), retryAttempts: 5, retryWait: () => delay(1) });
  const [{ data }] = await subscribe(ws, "Viewer", {}).all();
  assert.equal(data.viewer.tokenKind, "ROOT_KEY");
  assert.equal(tokens.length, 0);
  await ws.dispose();
});

test("a wrong token in the header of the upgrade is refused as well", async () => {
  const socket = new WebSocket(context.wsUrl, "graphql-transport-ws", { headers: bearer(WRONG_TOKEN) });
  const refused = await Promise.race([
    once(socket, "unexpected-response").then(([, response]) => response.statusCode),
    once(socket, "open").then(async () => {
      socket.send('{"type":"connection_init"}');
      return (await once(socket, "close"))[0];
    }),
  ]);
  assert.ok([401, 4403].includes(refused), String(refused));
});

test("a token that ends takes its connection along, with 4403", async () => {
  const session = await context.session();
  const input = { scopes: [`read:sessions:${session.sessionId}`], expiresIn: 2 };
  const { token } = await context.mutate("CreatePublicToken", input);
  const ws = client({ connectionParams: bearer(token) });
  const collector = subscribe(ws, "ChannelRecords", out(session));
  await caughtUp(collector);
  assert.equal((await collector.failure()).code, 4403);
});

test("the header of the upgrade is as good as connection_init", async () => {
  class WithHeader extends WebSocket {
    constructor(url, protocols) {
      super(url, protocols, { headers: bearer() });
    }
  }
  const ws = client({ webSocketImpl: WithHeader, connectionParams: undefined });
  const [{ data }] = await subscribe(ws, "Viewer", {}).all();
  assert.equal(data.viewer.tokenKind, "ROOT_KEY");
  await ws.dispose();
});

test("without a token one may ask for the schema and nothing else", async () => {
  const ws = client({ connectionParams: undefined });
  const [{ data }] = await ws.iterate({ query: "{ __typename __schema { queryType { name } } }" }).next().then(({ value }) => [value]);
  assert.deepEqual(data, { __typename: "Query", __schema: { queryType: { name: "Query" } } });
  const session = await context.session();
  for (const [name, variables] of [["Viewer", {}], ["ChannelRecords", out(session)], ["SessionsChanged", {}]]) {
    const collector = subscribe(ws, name, variables);
    const answer = await collector.failure().catch(() => collector.values[0].errors);
    assert.equal(answer[0].extensions.code, "UNAUTHENTICATED", name);
  }
  await ws.dispose();
});

test("the client's own timeouts and pings are kept", async () => {
  const pongs = [];
  const ws = client({
    lazy: false,
    keepAlive: 50,
    connectionAckWaitTimeout: 5_000,
    on: { pong: (received, payload) => received && pongs.push(payload) },
  });
  await eventually("three pongs", () => pongs.length >= 3);
  assert.deepEqual(ws.events, ["connecting", "opened", "connected"]);
  await ws.dispose();
});

test("a client that hears nothing takes itself off, and comes back after its last record", async () => {
  const session = await context.session();
  await context.append(session, ["a", "b"]);
  const proxy = await Proxy.to(context.url);
  const ws = client({ url: proxy.through(context.wsUrl), keepAlive: 100, on: { ping: (received) => received || watchPong() } });
  let timer;
  const watchPong = () => (timer = setTimeout(() => ws.terminate(), 200));
  ws.on("pong", (received) => received && clearTimeout(timer));
  const first = subscribe(ws, "ChannelRecords", out(session));
  await caughtUp(first);
  proxy.freeze();
  assert.equal((await first.failure()).code, 4499);
  await context.append(session, ["c"]);
  const second = subscribe(ws, "ChannelRecords", out(session, { after: events(first).at(-1).endCursor }));
  await second.until("the missed record", () => recordsOf(events(second)).length > 0);
  assert.deepEqual(recordsOf(events(second)), ["c"]);
  second.stop();
  clearTimeout(timer);
  await ws.dispose();
  proxy.close();
});

test("a lazy client connects for the first operation and leaves after the last", async () => {
  const codes = [];
  const ws = client({ lazy: true, on: { closed: ({ code }) => codes.push(code) } });
  assert.deepEqual(ws.events, []);
  await subscribe(ws, "Viewer", {}).all();
  await eventually("the close", () => ws.events.includes("closed"));
  await subscribe(ws, "Viewer", {}).all();
  await eventually("the second close", () => codes.length === 2);
  assert.deepEqual(codes, [1000, 1000]);
  assert.equal(ws.sockets.length, 2);
});

// The rest is what the client above never does.

const INIT = { type: "connection_init", payload: bearer() };
const TYPENAME = { id: "1", type: "subscribe", payload: { query: "{ __typename }" } };

/** Sends each message in turn, waiting for the answer named first in a pair; answers the code of the close. */
async function closeCode(messages, protocols = "graphql-transport-ws") {
  const socket = new WebSocket(context.wsUrl, protocols);
  const closed = once(socket, "close").then(([code, reason]) => (assert.ok(reason.length <= 123), code));
  const received = [];
  socket.on("message", (data) => received.push(JSON.parse(data).type));
  await once(socket, "open");
  for (const message of messages) {
    if (typeof message === "function") await eventually("the answer", () => message(received) || socket.readyState !== WebSocket.OPEN);
    else socket.send(message instanceof Buffer || typeof message === "string" ? message : JSON.stringify(message));
  }
  const code = await Promise.race([closed, delay(10_000).then(() => `still open after ${received}`)]);
  socket.terminate();
  return code;
}

const acked = (received) => received.includes("connection_ack");

for (const [what, code, messages, protocols] of [
  ["a subprotocol we do not speak", 4406, [], "graphql-ws"],
  ["silence instead of connection_init", 4408, []],
  ["a second connection_init", 4429, [INIT, INIT]],
  ["a subscribe before the ack", 4401, [TYPENAME]],
  ["text that is not JSON", 4400, ["{"]],
  ["JSON that is no message", 4400, ["[]"]],
  ["a message of no known type", 4400, [INIT, acked, { type: "start", id: "1", payload: { query: "{ __typename }" } }]],
  ["a subscribe without an id", 4400, [INIT, acked, { ...TYPENAME, id: undefined }]],
  ["a subscribe without a query", 4400, [INIT, acked, { ...TYPENAME, payload: {} }]],
  ["a binary message", 4400, [INIT, acked, Buffer.from(JSON.stringify(TYPENAME))]],
  ["a wrong token", 4403, [{ ...INIT, payload: bearer(WRONG_TOKEN) }]],
]) {
  test(`${what} closes with ${code}`, async () => assert.equal(await closeCode(messages, protocols), code));
}

test("an id in use closes with 4409", async () => {
  const session = await context.session();
  const long = { id: "1", type: "subscribe", payload: { query: text("ChannelRecords"), variables: out(session) } };
  assert.equal(await closeCode([INIT, acked, long, (received) => received.includes("next"), long]), 4409);
});

test("a ping is answered with a pong that carries its payload", async () => {
  const socket = new WebSocket(context.wsUrl, "graphql-transport-ws");
  await once(socket, "open");
  socket.send(JSON.stringify(INIT));
  assert.equal(JSON.parse((await once(socket, "message"))[0]).type, "connection_ack");
  socket.send('{"type":"ping","payload":{"n":1}}');
  assert.deepEqual(JSON.parse((await once(socket, "message"))[0]), { type: "pong", payload: { n: 1 } });
  socket.close();
});

test("a client that answers no ping of the transport is cut, and one that does is kept", async () => {
  const open = async (options) => {
    const socket = new WebSocket(context.wsUrl, "graphql-transport-ws", options);
    await once(socket, "open");
    socket.send(JSON.stringify(INIT));
    await once(socket, "message");
    return socket;
  };
  const [dead, alive] = [await open({ autoPong: false }), await open({})];
  let pings = 0;
  alive.on("ping", () => pings++);
  const [code] = await once(dead, "close", { signal: AbortSignal.timeout(15_000) });
  assert.ok(code !== 1000, String(code));
  await eventually("four pings", () => pings >= 4);
  assert.equal(alive.readyState, WebSocket.OPEN);
  alive.close();
});
