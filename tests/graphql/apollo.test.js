// Apollo Client 4 over every link it has for a server like this one.

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { test } from "node:test";

import { ApolloClient, ApolloLink, CombinedGraphQLErrors, HttpLink, InMemoryCache, ServerError } from "@apollo/client";
import { relayStylePagination } from "@apollo/client/utilities";
import { BatchHttpLink } from "@apollo/client/link/batch-http";
import { PersistedQueryLink } from "@apollo/client/link/persisted-queries";
import { GraphQLWsLink } from "@apollo/client/link/subscriptions";
import { parse } from "graphql";
import { createClient } from "graphql-ws";
import WebSocket from "ws";

import { document } from "./lib/documents.js";
import { bearer, Collector, eventually, recordsOf, SECRET, suite, unique, watchedFetch, WRONG_TOKEN } from "./lib/suite.js";

const context = suite();

function apollo(link, cache = new InMemoryCache()) {
  return new ApolloClient({ link, cache, defaultOptions: { query: { fetchPolicy: "network-only" } } });
}

function http({ token = SECRET, ...options } = {}) {
  const fetch = watchedFetch();
  const link = new HttpLink({ uri: context.url, fetch, headers: bearer(token), ...options });
  return { client: apollo(link), seen: fetch.seen, link };
}

function subscribed(client, options) {
  const collector = new Collector();
  collector.subscription = client.subscribe(options).subscribe(collector.observer);
  return collector;
}

test("a query and a mutation by POST", async () => {
  const { client, seen } = http();
  const externalId = unique("apollo");
  const input = { type: "chat.agent", taskIdentifier: "assistant", externalId, metadata: { deep: [1, { a: null }] }, clientMutationId: "m1" };
  const { data: made } = await client.mutate({ mutation: document("CreateSession"), variables: { input } });
  assert.equal(made.createSession.created, true);
  assert.equal(made.createSession.clientMutationId, "m1");
  const { data } = await client.query({ query: document("OneSession"), variables: { by: { externalId } } });
  assert.deepEqual(data.session, made.createSession.session);
  assert.deepEqual(data.session.metadata, { deep: [1, { a: null }] });
  assert.deepEqual(seen.map(({ method, status }) => [method, status]), [["POST", 200], ["POST", 200]]);
  assert.match(seen[0].type, /^application\/(graphql-response\+)?json/);
});

test("a query by GET, while mutations stay POST", async () => {
  const { client, seen } = http({ useGETForQueries: true });
  const session = await context.session();
  const { data } = await client.query({ query: document("OneSession"), variables: { by: { sessionId: session.sessionId } } });
  assert.equal(data.session.externalId, session.externalId);
  await client.mutate({ mutation: document("CloseSession"), variables: { input: { by: { sessionId: session.sessionId } } } });
  assert.deepEqual(seen.map(({ method, status }) => [method, status]), [["GET", 200], ["POST", 200]]);
});

for (const useGETForHashedQueries of [false, true]) {
  test(`automatic persisted queries, hashes by ${useGETForHashedQueries ? "GET" : "POST"}`, async () => {
    const sha256 = (query) => createHash("sha256").update(query).digest("hex");
    const { link, seen } = http();
    const client = apollo(ApolloLink.from([new PersistedQueryLink({ sha256, useGETForHashedQueries }), link]));
    // No other test may have registered this text.
    const query = parse(`query Q${unique("apq").replaceAll("-", "_")} { viewer { tokenKind } }`);
    for (let i = 0; i < 2; i++) assert.equal((await client.query({ query })).data.viewer.tokenKind, "ROOT_KEY");
    const [miss, registration, hit] = seen;
    assert.equal(seen.length, 3, "miss, registration, hit");
    const carried = ({ method, url, body }) => (method === "GET" ? url.searchParams.get("query") : body.query) ?? null;
    assert.deepEqual([carried(miss), carried(hit)], [null, null]);
    assert.match(carried(registration), /viewer/);
    assert.equal(hit.method, useGETForHashedQueries ? "GET" : "POST");
    assert.equal(hit.status, 200);
  });
}

test("a subscription by multipart: the history, live records, the end", async () => {
  const { client, seen } = http();
  const waited = await followed(client, () => assert.match(seen.at(-1).type, /^multipart\/mixed/));
  // The server's heartbeat comes after five seconds of silence; nothing may need it to be seen.
  assert.ok(waited < 4000, `a record was shown after ${waited} ms`);
});

test("a subscription by WebSocket: the history, live records, the end", async () => {
  const ws = createClient({ url: context.wsUrl, webSocketImpl: WebSocket, connectionParams: bearer() });
  await followed(apollo(new GraphQLWsLink(ws)), () => {});
  await ws.dispose();
});

async function followed(client, check) {
  const session = await context.session();
  await context.append(session, ["a", "b"]);
  const variables = { by: { sessionId: session.sessionId }, io: "OUT", batch: 1 };
  const collector = subscribed(client, { query: document("ChannelRecords"), variables });
  const events = () => collector.values.map(({ data, error }) => (assert.equal(error, undefined), data.channelRecords));
  await collector.until("caughtUp", () => events().some(({ caughtUp }) => caughtUp));
  assert.deepEqual(recordsOf(events()), ["a", "b"]);
  check();
  await context.append(session, ["c"]);
  const appended = Date.now();
  await collector.until("the live record", () => recordsOf(events()).length === 3);
  const waited = Date.now() - appended;
  await context.close(session, "enough");
  await collector.all();
  assert.deepEqual(recordsOf(events()), ["a", "b", "c"]);
  assert.deepEqual(events().at(-1).closed.reason, "enough");
  return waited;
}

test("unsubscribing from multipart ends the request", async () => {
  const signals = [];
  const watched = (input, init) => (signals.push(init.signal), fetch(input, init));
  const client = apollo(new HttpLink({ uri: context.url, fetch: watched, headers: bearer() }));
  const session = await context.session();
  const collector = subscribed(client, { query: document("ChannelRecords"), variables: { by: { sessionId: session.sessionId }, io: "OUT" } });
  const [first] = await collector.until("the first event", (values) => values.length > 0);
  assert.equal(first.data?.channelRecords.caughtUp, true, String(first.error));
  collector.subscription.unsubscribe();
  await eventually("the abort", () => signals[0].aborted);
  await context.append(session, ["unheard"]);
  assert.equal(collector.values.length, 1);
});

test("queries and mutations by WebSocket", async () => {
  const ws = createClient({ url: context.wsUrl, webSocketImpl: WebSocket, connectionParams: bearer() });
  const client = apollo(new GraphQLWsLink(ws));
  const session = await context.session();
  const by = { sessionId: session.sessionId };
  const { data } = await client.query({ query: document("OneSession"), variables: { by } });
  assert.equal(data.session.externalId, session.externalId);
  const { data: closed } = await client.mutate({ mutation: document("CloseSession"), variables: { input: { by, reason: "ws" } } });
  assert.equal(closed.closeSession.session.closedReason, "ws");
  await ws.dispose();
});

test("the cache joins the pages of a connection", async () => {
  const tag = unique("page");
  for (let i = 0; i < 5; i++) await context.session({ tags: [tag] });
  const typePolicies = { Query: { fields: { sessions: relayStylePagination(["filter"]) } } };
  const client = apollo(http().link, new InMemoryCache({ typePolicies }));
  const query = document("ManySessions");
  const variables = { filter: { tags: { any: [tag] } }, first: 3 };
  const watched = client.watchQuery({ query, variables, fetchPolicy: "network-only" });
  const collector = new Collector();
  const subscription = watched.subscribe(collector.observer);
  await collector.until("the first page", (values) => values.at(-1)?.data?.sessions?.edges.length === 3);
  const { pageInfo } = collector.values.at(-1).data.sessions;
  assert.equal(pageInfo.hasNextPage, true);
  await watched.fetchMore({ variables: { after: pageInfo.endCursor } });
  const values = await collector.until("both pages", (values) => values.at(-1)?.data?.sessions?.edges.length === 5);
  const { sessions } = values.at(-1).data;
  assert.equal(new Set(sessions.edges.map(({ node }) => node.id)).size, 5);
  assert.equal(sessions.pageInfo.hasNextPage, false);
  assert.equal(sessions.totalCount, "5");
  assert.equal(client.readQuery({ query, variables }).sessions.edges.length, 5);
  subscription.unsubscribe();
});

test("a mutation's answer updates what a query put into the cache", async () => {
  const client = apollo(http().link);
  const session = await context.session();
  const by = { sessionId: session.sessionId };
  await client.query({ query: document("OneSession"), variables: { by } });
  await client.mutate({ mutation: document("CloseSession"), variables: { input: { by, reason: "cached" } } });
  assert.equal(client.readQuery({ query: document("OneSession"), variables: { by } }).session.status, "CLOSED");
});

test("errors arrive as CombinedGraphQLErrors with a code", async () => {
  const reader = await context.publicToken("read:sessions:other");
  const session = await context.session();
  const { client } = http({ token: reader });
  const variables = { by: { sessionId: session.sessionId } };
  await assert.rejects(client.query({ query: document("OneSession"), variables }), combined("UNAUTHORIZED"));
  await assert.rejects(http().client.query({ query: parse("{ nothing }") }), combined("GRAPHQL_VALIDATION_FAILED"));
  const variablesOfUnknown = { by: { sessionId: "session_doesnotexist" }, io: "OUT" };
  const { values } = await ended(subscribed(http().client, { query: document("ChannelRecords"), variables: variablesOfUnknown }));
  combined("NOT_FOUND")(values.at(-1).error);
});

/** A subscription that fails gives its error out as a value or as the error, depending on when it failed. */
async function ended(collector) {
  await collector.until("an error", (values) => values.at(-1)?.error !== undefined).catch((error) => collector.values.push({ error }));
  return collector;
}

function combined(code) {
  return (error) => {
    assert.ok(CombinedGraphQLErrors.is(error), String(error?.stack ?? error));
    assert.equal(error.errors[0].extensions.code, code);
    return true;
  };
}

test("a wrong token and a missing one are told apart from a broken network", async () => {
  for (const token of [WRONG_TOKEN, null]) {
    const { client, seen } = http({ token });
    await assert.rejects(client.query({ query: document("Viewer") }), (error) => {
      // What Apollo makes of a 401 depends on the content type of the answer.
      if (CombinedGraphQLErrors.is(error)) return combined("UNAUTHENTICATED")(error);
      assert.ok(ServerError.is(error), String(error));
      assert.equal(JSON.parse(error.bodyText).errors[0].extensions.code, "UNAUTHENTICATED");
      return true;
    });
    assert.equal(seen[0].status, 401);
  }
});

test("a business failure is a user error and no error", async () => {
  const session = await context.session();
  await context.close(session);
  const input = { by: { sessionId: session.sessionId }, io: "OUT", records: [{ text: "late" }] };
  const { data, error } = await http().client.mutate({ mutation: document("AppendRecords"), variables: { input } });
  assert.equal(error, undefined);
  assert.deepEqual(data.appendRecords.records, []);
  assert.deepEqual(data.appendRecords.userErrors.map(({ code }) => code), ["SESSION_CLOSED"]);
});

test("operations of one tick go out as one batch and come back each to its own", async () => {
  const fetch = watchedFetch();
  const client = apollo(new BatchHttpLink({ uri: context.url, fetch, headers: bearer(), batchMax: 10, batchInterval: 5 }));
  const sessions = [await context.session(), await context.session(), await context.session()];
  const answers = await Promise.all(
    sessions.map(({ sessionId }) => client.query({ query: document("OneSession"), variables: { by: { sessionId } } })),
  );
  assert.deepEqual(answers.map(({ data }) => data.session.externalId), sessions.map(({ externalId }) => externalId));
  assert.equal(fetch.seen.length, 1);
  assert.equal(fetch.seen[0].body.length, 3);
});

test("in a batch one failure leaves the others alone", async () => {
  const client = apollo(new BatchHttpLink({ uri: context.url, headers: bearer(), batchInterval: 5 }));
  const [good, bad] = await Promise.allSettled([
    client.query({ query: document("Viewer") }),
    client.query({ query: parse("{ nothing }") }),
  ]);
  assert.equal(good.value?.data.viewer.tokenKind, "ROOT_KEY");
  combined("GRAPHQL_VALIDATION_FAILED")(bad.reason);
});
