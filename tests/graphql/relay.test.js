// Relay: its compiler accepts the schema, and its store does with the answers what an application expects.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdir, readFile, rm, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

import { createClient } from "graphql-ws";
import relay from "relay-runtime";
import WebSocket from "ws";

import { bearer, Collector, suite, unique } from "./lib/suite.js";

const { commitMutation, ConnectionHandler, createOperationDescriptor, Environment, fetchQuery, getRequest, getSelector, Network, Observable, RecordSource, requestSubscription, ROOT_ID, Store } = relay;
const here = (path) => fileURLToPath(new URL(path, import.meta.url));
const require = createRequire(import.meta.url);
/** What the compiler made of an operation or a fragment of relay/src. */
const made = (name) => require(`./relay/generated/${name}.graphql.js`);

const context = suite(async () => {
  await compile("relay.config.json", "generated");
  // The artifacts require each other without an extension.
  await writeFile(here("relay/generated/package.json"), '{ "type": "commonjs" }');
});

async function compile(config, artifacts) {
  await rm(here(`relay/${artifacts}`), { recursive: true, force: true });
  await mkdir(here(`relay/${artifacts}`));
  const run = promisify(execFile)(here("node_modules/.bin/relay-compiler"), [config], { cwd: here("relay") });
  await run.catch(({ stdout, stderr }) => assert.fail(stdout + stderr));
}

/** An application: a store over the server, and a look at what is in it. */
function application() {
  const ws = createClient({ url: context.wsUrl, webSocketImpl: WebSocket, connectionParams: bearer() });
  const network = Network.create(
    ({ text }, variables) => context.post(text, variables),
    ({ text, name }, variables) => Observable.create((sink) => ws.subscribe({ query: text, operationName: name, variables }, sink)),
  );
  const environment = new Environment({ network, store: new Store(new RecordSource()) });
  return {
    environment,
    dispose: () => ws.dispose(),
    /** Fetches and keeps; answers the data of the query. */
    async fetch(name, variables) {
      environment.retain(createOperationDescriptor(getRequest(made(name)), variables));
      return fetchQuery(environment, made(name), variables, { fetchPolicy: "network-only" }).toPromise();
    },
    /** What the store holds now for a fragment at `ref`. */
    read: (name, ref) => environment.lookup(getSelector(made(name), ref)).data,
    mutate: (name, variables) =>
      new Promise((resolve, reject) => {
        const done = (response, errors) => (errors?.length ? reject(new AggregateError(errors)) : resolve(response));
        commitMutation(environment, { mutation: made(name), variables, onCompleted: done, onError: reject });
      }),
    subscribe(name, variables) {
      const collector = new Collector();
      const { next: onNext, error: onError, complete: onCompleted } = collector.observer;
      collector.stop = requestSubscription(environment, { subscription: made(name), variables, onNext, onError, onCompleted }).dispose;
      return collector;
    },
  };
}

test("custom scalars have the types that the project gives them", async () => {
  const config = JSON.parse(await readFile(here("relay/relay.config.json"), "utf8"));
  const typed = { ...config, language: "typescript", artifactDirectory: "./generated/typescript" };
  await mkdir(here("relay/generated/typescript"), { recursive: true });
  await writeFile(here("relay/generated/typescript.json"), JSON.stringify({ ...typed, customScalarTypes: { ...config.customScalarTypes, JSON: "unknown" } }));
  await promisify(execFile)(here("node_modules/.bin/relay-compiler"), ["generated/typescript.json"], { cwd: here("relay") }).catch(
    ({ stdout, stderr }) => assert.fail(stdout + stderr),
  );
  const records = await readFile(here("relay/generated/typescript/chatRecords.graphql.ts"), "utf8");
  assert.match(records, /readonly seqNum: string;/);
  assert.match(records, /readonly data: unknown/);
  assert.match(records, /readonly cursor: string;/);
});

test("a list is fetched, paged and kept as one connection", async () => {
  const app = application();
  const tag = unique("relay");
  const sessions = [];
  for (let i = 0; i < 5; i++) sessions.unshift(await context.session({ tags: [tag] }));
  const filter = { tags: { any: [tag] } };
  const root = await app.fetch("chatListQuery", { filter, count: 2 });
  const list = () => app.read("chatList", root).sessions;
  assert.equal(list().edges.length, 2);
  while (list().pageInfo.hasNextPage) {
    await app.fetch("chatListPageQuery", { filter, count: 2, cursor: list().pageInfo.endCursor });
  }
  assert.deepEqual(list().edges.map(({ node }) => node.id), sessions.map(({ id }) => id));
  const row = app.read("chatRow", list().edges[0].node);
  assert.deepEqual([row.sessionId, row.status], [sessions[0].sessionId, "ACTIVE"]);
  await app.dispose();
});

test("a new session is prepended to the list", async () => {
  const app = application();
  const tag = unique("relay");
  const filter = { tags: { any: [tag] } };
  const root = await app.fetch("chatListQuery", { filter, count: 10 });
  const connection = ConnectionHandler.getConnectionID(ROOT_ID, "chatList_sessions", { filter });
  const input = { type: "chat.agent", taskIdentifier: "assistant", externalId: tag, tags: [tag] };
  const { createSession } = await app.mutate("chatCreateMutation", { input, connections: [connection] });
  assert.equal(createSession.created, true);
  assert.deepEqual(app.read("chatList", root).sessions.edges.map(({ node }) => node.id), [createSession.session.id]);
  await app.dispose();
});

test("a session is refetched by its node id", async () => {
  const app = application();
  const session = await context.session({ metadata: { v: 1 } });
  const { session: ref } = await app.fetch("chatSessionQuery", { by: { sessionId: session.sessionId }, count: 1 });
  assert.deepEqual(app.read("chatRow", ref).metadata, { v: 1 });
  await context.mutate("UpdateSession", { by: { sessionId: session.sessionId }, metadata: { v: 2 } });
  await app.fetch("chatRowRefetchQuery", { id: ref.id });
  assert.deepEqual(app.read("chatRow", ref).metadata, { v: 2 });
  await app.dispose();
});

test("records are paged through the channel's node id, and appended ones join them", async () => {
  const app = application();
  const session = await context.session();
  await context.append(session, [0, 1, 2, 3, 4]);
  const { session: ref } = await app.fetch("chatSessionQuery", { by: { sessionId: session.sessionId }, count: 2 });
  const channel = () => app.read("chatRecords", ref.out);
  const data = () => channel().records.edges.map(({ node }) => node.data);
  assert.deepEqual(data(), [0, 1]);
  while (channel().records.pageInfo.hasNextPage) {
    await app.fetch("chatRecordsPageQuery", { id: ref.out.id, count: 2, cursor: channel().records.pageInfo.endCursor });
  }
  assert.deepEqual(data(), [0, 1, 2, 3, 4]);
  assert.equal(channel().tail.seqNum, "5");

  const connections = [ConnectionHandler.getConnectionID(ref.out.id, "chatRecords_records")];
  const append = (records) => app.mutate("chatAppendMutation", { input: { by: { id: ref.id }, io: "OUT", records }, connections });
  await append([{ data: 5, idempotencyKey: "five" }, { data: 6 }]);
  assert.deepEqual(data(), [0, 1, 2, 3, 4, 5, 6]);
  assert.equal(channel().tail.seqNum, "7", "the channel in the payload is the channel in the store");
  await append([{ data: 5, idempotencyKey: "five" }]);
  assert.deepEqual(data(), [0, 1, 2, 3, 4, 5, 6], "a repeated record has the id it had");
  await app.dispose();
});

test("a subscription appends to the connection, and a record that came twice is one", async () => {
  const app = application();
  const session = await context.session();
  await context.append(session, ["a", "b"]);
  const by = { sessionId: session.sessionId };
  const { session: ref } = await app.fetch("chatSessionQuery", { by, count: 10 });
  const connections = [ConnectionHandler.getConnectionID(ref.out.id, "chatRecords_records")];
  const data = () => app.read("chatRecords", ref.out).records.edges.map(({ node }) => node.data);
  // After the first of two known records, so that the second comes again.
  const collector = app.subscribe("chatRecordsSubscription", { by, after: "0", connections });
  await collector.until("caughtUp", (values) => values.some(({ channelRecords }) => channelRecords.caughtUp));
  await context.append(session, ["c"]);
  await collector.until("the live record", () => data().length >= 3);
  await context.close(session, "end");
  await collector.all();
  assert.deepEqual(data(), ["a", "b", "c", null], "the last one tells of the close");
  assert.equal(collector.values.at(-1).channelRecords.closed.reason, "end");
  await app.dispose();
});

test("a change that a subscription hears changes the row in the store", async () => {
  const app = application();
  const session = await context.session();
  const by = { sessionId: session.sessionId };
  const { session: ref } = await app.fetch("chatSessionQuery", { by, count: 1 });
  const collector = app.subscribe("chatSessionSubscription", { by });
  await collector.until("the row", (values) => values.length > 0);
  await context.close(session, "heard");
  await collector.all();
  const { status, closedReason } = app.read("chatRow", ref);
  assert.deepEqual([status, closedReason], ["CLOSED", "heard"]);
  await app.dispose();
});

test("a mutation changes the row in the store", async () => {
  const app = application();
  const session = await context.session();
  const { session: ref } = await app.fetch("chatSessionQuery", { by: { sessionId: session.sessionId }, count: 1 });
  await app.mutate("chatCloseMutation", { input: { by: { id: ref.id }, reason: "mine" } });
  assert.equal(app.read("chatRow", ref).closedReason, "mine");
  await app.dispose();
});
