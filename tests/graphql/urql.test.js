// urql over every way it has to reach a server like this one.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Client, cacheExchange, fetchExchange, subscriptionExchange } from "@urql/core";
import { persistedExchange } from "@urql/exchange-persisted";
import { createClient } from "graphql-ws";
import { parse } from "graphql";
import WebSocket from "ws";

import { document } from "./lib/documents.js";
import { bearer, Collector, eventually, recordsOf, SECRET, suite, unique, watchedFetch, WRONG_TOKEN } from "./lib/suite.js";

const context = suite();

function urql({ token = SECRET, exchanges = [fetchExchange], ...options } = {}) {
  const fetch = watchedFetch();
  const client = new Client({
    url: context.url,
    fetch,
    fetchOptions: { headers: bearer(token) },
    requestPolicy: "network-only",
    preferGetMethod: false,
    exchanges,
    ...options,
  });
  return Object.assign(client, { seen: fetch.seen });
}

/** The data of a result that must be good. */
function good({ data, error }) {
  assert.equal(error, undefined);
  return data;
}

test("a query and a mutation by POST", async () => {
  const client = urql({ exchanges: [cacheExchange, fetchExchange] });
  const externalId = unique("urql");
  const input = { type: "chat.agent", taskIdentifier: "assistant", externalId, metadata: { a: [null, 1.5] } };
  const { createSession } = good(await client.mutation(document("CreateSession"), { input }));
  assert.equal(createSession.created, true);
  const { session } = good(await client.query(document("OneSession"), { by: { externalId } }));
  assert.equal(session.sessionId, createSession.session.sessionId);
  assert.deepEqual(session.metadata, { a: [null, 1.5] });
  assert.deepEqual(client.seen.map(({ method, status }) => [method, status]), [["POST", 200], ["POST", 200]]);
});

test("a query by GET, while mutations stay POST", async () => {
  const client = urql({ preferGetMethod: "force" });
  const { sessionId, externalId } = await context.session();
  const { session } = good(await client.query(document("OneSession"), { by: { sessionId } }));
  assert.equal(session.externalId, externalId);
  good(await client.mutation(document("CloseSession"), { input: { by: { sessionId } } }));
  assert.deepEqual(client.seen.map(({ method, status }) => [method, status]), [["GET", 200], ["POST", 200]]);
});

for (const preferGetForPersistedQueries of [false, "force"]) {
  test(`automatic persisted queries, hashes by ${preferGetForPersistedQueries ? "GET" : "POST"}`, async () => {
    const client = urql({ exchanges: [persistedExchange({ preferGetForPersistedQueries }), fetchExchange] });
    // No other test may have registered this text.
    const query = parse(`query Q${unique("apq").replaceAll("-", "_")} { viewer { tokenKind } }`);
    for (let i = 0; i < 2; i++) assert.equal(good(await client.query(query, {})).viewer.tokenKind, "ROOT_KEY");
    const carried = ({ method, url, body }) => (method === "GET" ? url.searchParams.get("query") : body.query) ?? "";
    assert.deepEqual(client.seen.map((request) => carried(request) !== ""), [false, true, false]);
    assert.equal(client.seen.at(-1).method, preferGetForPersistedQueries ? "GET" : "POST");
  });
}

test("a subscription by WebSocket: the history, live records, the end", async () => {
  const ws = createClient({ url: context.wsUrl, webSocketImpl: WebSocket, connectionParams: bearer() });
  const forwardSubscription = (request) => ({ subscribe: (sink) => ({ unsubscribe: ws.subscribe(request, sink) }) });
  await followed(urql({ exchanges: [fetchExchange, subscriptionExchange({ forwardSubscription })] }));
  await ws.dispose();
});

test("queries and mutations by WebSocket", async () => {
  const ws = createClient({ url: context.wsUrl, webSocketImpl: WebSocket, connectionParams: bearer() });
  const forwardSubscription = (request) => ({ subscribe: (sink) => ({ unsubscribe: ws.subscribe(request, sink) }) });
  const client = urql({ exchanges: [subscriptionExchange({ forwardSubscription, enableAllOperations: true })] });
  const { sessionId, externalId } = await context.session();
  assert.equal(good(await client.query(document("OneSession"), { by: { sessionId } })).session.externalId, externalId);
  const { closeSession } = good(await client.mutation(document("CloseSession"), { input: { by: { sessionId } } }));
  assert.equal(closeSession.session.status, "CLOSED");
  assert.deepEqual(client.seen, []);
  await ws.dispose();
});

test("a subscription by fetch: the history, live records, the end", async () => {
  const client = urql({ fetchSubscriptions: true });
  await followed(client);
  // urql takes events and multipart alike; it prefers events.
  assert.match(client.seen.at(-1).type, /^text\/event-stream/);
});

async function followed(client) {
  const session = await context.session();
  await context.append(session, ["a", "b"]);
  const collector = new Collector();
  const variables = { by: { sessionId: session.sessionId }, io: "OUT", batch: 1 };
  client.subscription(document("ChannelRecords"), variables).subscribe(collector.observer.next);
  const events = () => collector.values.map((result) => good(result).channelRecords);
  await collector.until("caughtUp", () => events().some(({ caughtUp }) => caughtUp));
  await context.append(session, ["c"]);
  await collector.until("the live record", () => recordsOf(events()).length === 3);
  await context.close(session, "enough");
  await collector.until("the end", () => events().at(-1).closed !== null);
  assert.deepEqual(recordsOf(events()), ["a", "b", "c"]);
  assert.equal(events().at(-1).closed.reason, "enough");
}

test("unsubscribing ends the request", async () => {
  const signals = [];
  const watched = (input, init) => (signals.push(init.signal), fetch(input, init));
  const client = urql({ fetchSubscriptions: true, fetch: watched });
  const session = await context.session();
  const collector = new Collector();
  const variables = { by: { sessionId: session.sessionId }, io: "OUT" };
  const { unsubscribe } = client.subscription(document("ChannelRecords"), variables).subscribe(collector.observer.next);
  const [first] = await collector.until("the first event", (values) => values.length > 0);
  assert.equal(good(first).channelRecords.caughtUp, true);
  unsubscribe();
  await eventually("the abort", () => signals[0].aborted);
});

test("errors arrive with a code", async () => {
  const stranger = await context.publicToken("read:sessions:another");
  const { sessionId } = await context.session();
  const code = async (client, query, variables) => (await client.query(query, variables)).error?.graphQLErrors[0]?.extensions.code;
  assert.equal(await code(urql({ token: stranger }), document("OneSession"), { by: { sessionId } }), "UNAUTHORIZED");
  assert.equal(await code(urql(), parse("{ nothing }"), {}), "GRAPHQL_VALIDATION_FAILED");
  assert.equal(await code(urql({ token: null }), document("Viewer"), {}), "UNAUTHENTICATED");
  assert.equal(await code(urql({ token: WRONG_TOKEN }), document("Viewer"), {}), "UNAUTHENTICATED");
  const collector = new Collector();
  const variables = { by: { sessionId: "session_doesnotexist" }, io: "OUT" };
  urql({ fetchSubscriptions: true }).subscription(document("ChannelRecords"), variables).subscribe(collector.observer.next);
  const [{ error }] = await collector.until("the error", (values) => values.length > 0);
  assert.equal(error.graphQLErrors[0].extensions.code, "NOT_FOUND");
});

test("a business failure is a user error and no error", async () => {
  const { sessionId } = await context.session();
  await context.close({ sessionId });
  const input = { by: { sessionId }, io: "OUT", records: [{ text: "late" }] };
  const { appendRecords } = good(await urql().mutation(document("AppendRecords"), { input }));
  assert.deepEqual(appendRecords.userErrors.map(({ code }) => code), ["SESSION_CLOSED"]);
});
