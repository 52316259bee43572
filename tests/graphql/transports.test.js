// One operation, one answer, whatever it travels on: HTTP POST and GET, WebSocket, server-sent events, multipart.

import assert from "node:assert/strict";
import { test } from "node:test";

import { text } from "./lib/documents.js";
import { recordsOf, SECRET, suite, unique, WRONG_TOKEN } from "./lib/suite.js";
import { transports } from "./lib/transports.js";

const context = suite(prepare);
let mine;
let closed;
let trimmed;
let stranger;
let reader;

async function prepare() {
  mine = await context.session({ metadata: { n: 1.5, deep: [null, { a: "ü" }] }, tags: ["a", "b"] });
  await context.append(mine, ["one", { two: 2 }, null], { channel: undefined });
  // What a repeated append answers is the same however often it is asked.
  await context.mutate("AppendRecords", appendOnce(mine));
  closed = await context.session();
  await context.append(closed, Array.from({ length: 7 }, (_, i) => ({ i })));
  await context.close(closed, "read me");
  trimmed = await context.session();
  await context.append(trimmed, [0, 1, 2, 3, 4, 5]);
  await context.mutate("TrimChannel", { ...by(trimmed), io: "OUT", before: "4" });
  stranger = await context.publicToken("read:sessions:another", "write:sessions:another");
  reader = await context.publicToken(`read:sessions:${mine.externalId}`);
}

const appendOnce = ({ sessionId }) => ({ by: { sessionId }, io: "OUT", records: [{ text: "once", idempotencyKey: "the-key" }], clientMutationId: "m" });
const by = (session) => ({ by: { sessionId: session.sessionId } });
const unknown = { sessionId: "session_doesnotexist" };

const kindOf = (query) => /^(subscription|mutation)\b/m.exec(query)?.[1] ?? "query";

/** Names of the transports on which an operation can travel. */
function ways(query) {
  const kind = kindOf(query);
  return Object.keys(transports).filter((name) => {
    const { subscriptions, mutations } = transports[name];
    return kind === "query" || (kind === "mutation" ? mutations : subscriptions);
  });
}

for (const [what, query, variables] of [
  ["a query", text("OneSession"), () => by(mine)],
  ["a query for nothing", text("OneSession"), () => by(unknown)],
  ["a query of records", text("ChannelPage"), () => ({ ...by(mine), first: 2 })],
  ["a node", text("NodeById"), () => ({ id: mine.id })],
  ["a chosen one of two operations", `query Not { nothing: __typename } ${text("Viewer")}`, () => undefined, "Viewer"],
  ["a repeated mutation", text("AppendRecords"), () => ({ input: appendOnce(mine) })],
  ["a mutation that the session refuses", text("AppendRecords"), () => ({ input: { ...by(closed), io: "OUT", records: [{ text: "late" }] } })],
  ["a mutation of nothing", text("CloseSession"), () => ({ input: by(unknown) })],
  ["a mutation with bad fields", text("AppendRecords"), () => ({ input: { ...by(mine), io: "OUT", records: [{}] } })],
  ["a mutation at the wrong place", text("AppendRecords"), () => ({ input: { ...by(mine), io: "OUT", records: [{ text: "x" }], expectedSeqNum: "1" } })],
  ["a mutation that reuses a key", text("AppendRecords"), () => ({ input: { ...appendOnce(mine), records: [{ text: "other", idempotencyKey: "the-key" }] } })],
  ["a subscription", text("ChannelRecords"), () => ({ ...by(closed), io: "OUT", batch: 3 })],
  ["a resumed subscription", text("ChannelRecords"), () => ({ ...by(closed), io: "OUT", after: "4" })],
  ["a subscription to a closed session's row", text("SessionChanged"), () => by(closed)],
]) {
  test(`${what} has one answer`, async () => {
    const operationName = what.startsWith("a chosen") ? "Viewer" : undefined;
    const answers = await Promise.all(
      ways(query).map(async (way) => [way, await transports[way].run(context.url, { query, variables: variables(), operationName }, SECRET)]),
    );
    const [[, first]] = answers;
    assert.equal(first.results[0].errors, undefined, JSON.stringify(first.results));
    for (const [way, { results, complete, status }] of answers) {
      assert.deepEqual(results.map(plain), first.results.map(plain), way);
      assert.equal(complete, true, way);
      assert.ok(status === undefined || status === 200, `${way}: ${status}`);
    }
  });
}

/** Extensions say how an answer was made, not what it is. */
const plain = ({ extensions, ...result }) => result;

test("what the table above asks is answered with what it should be", async () => {
  const ask = async (name, variables) => (await transports.sse.run(context.url, { query: text(name), variables }, SECRET)).results;
  const codes = async (input) => (await ask("AppendRecords", { input }))[0].data.appendRecords.userErrors.map(({ code }) => code);
  assert.deepEqual(await codes({ ...by(closed), io: "OUT", records: [{ text: "late" }] }), ["SESSION_CLOSED"]);
  assert.deepEqual(await codes({ ...by(mine), io: "OUT", records: [{}] }), ["VALIDATION_FAILED"]);
  assert.deepEqual(await codes({ ...by(mine), io: "OUT", records: [{ text: "x" }], expectedSeqNum: "1" }), ["SEQ_NUM_MISMATCH"]);
  assert.deepEqual(await codes({ ...appendOnce(mine), records: [{ text: "other", idempotencyKey: "the-key" }] }), ["IDEMPOTENCY_MISMATCH"]);
  assert.deepEqual(await codes({ ...appendOnce(mine) }), []);
  const events = (await ask("ChannelRecords", { ...by(closed), io: "OUT", batch: 3 })).map(({ data }) => data.channelRecords);
  assert.deepEqual(recordsOf(events).map(({ i }) => i), [0, 1, 2, 3, 4, 5, 6]);
  assert.deepEqual(events.map((event) => event.closed?.reason ?? null).filter(Boolean), ["read me"]);
  const [{ data: row }] = await ask("OneSession", by(mine));
  assert.deepEqual(row.session.metadata, { n: 1.5, deep: [null, { a: "ü" }] });
});

const QUERY = text("OneSession");
const SUBSCRIPTION = text("ChannelRecords");
const MUTATION = text("AppendRecords");
const append = (session) => ({ input: { ...by(session), io: "IN", records: [{ text: "x" }] } });
const follow = (session) => ({ ...by(session), io: "OUT" });

// `status` is what application/graphql-response+json carries. With application/json only 401 stays what it is.
for (const [what, code, status, { token = () => SECRET, operations }] of [
  ["a wrong token", "UNAUTHENTICATED", 401, { token: () => WRONG_TOKEN, operations: good }],
  ["a wrong token on what is open to all", "UNAUTHENTICATED", 401, { token: () => WRONG_TOKEN, operations: () => [["{ __typename }"]] }],
  ["a token that is no token", "UNAUTHENTICATED", 401, { token: () => "ä b", operations: good }],
  ["no token", "UNAUTHENTICATED", 401, { token: () => null, operations: good }],
  ["another session's token", "UNAUTHORIZED", 200, { token: () => stranger, operations: good }],
  ["another session's token on nothing", "UNAUTHORIZED", 200, { token: () => stranger, operations: () => [[QUERY, by(unknown)], [SUBSCRIPTION, follow(unknown)]] }],
  ["a reader's token on a write", "UNAUTHORIZED", 200, { token: () => reader, operations: () => [[MUTATION, append(mine)]] }],
  ["a syntax error", "GRAPHQL_PARSE_FAILED", 400, { operations: () => [["{ viewer {"], ["subscription {"], ["mutation } {"]] }],
  ["an unknown field", "GRAPHQL_VALIDATION_FAILED", 400, { operations: () => [["{ nothing }"], ["subscription { nothing }"], ["mutation { nothing }"]] }],
  ["a missing variable", "GRAPHQL_VALIDATION_FAILED", 400, { operations: () => [[QUERY], [SUBSCRIPTION], [MUTATION]] }],
  ["two root fields in a subscription", "GRAPHQL_VALIDATION_FAILED", 400, { operations: () => [[`subscription { a: ${CHANGED} b: ${CHANGED} }`]] }],
  ["an operation that is not there", "GRAPHQL_VALIDATION_FAILED", 400, { operations: () => [["query A { __typename }", undefined, "B"]] }],
  ["a cursor that is none", "GRAPHQL_VALIDATION_FAILED", 400, { operations: () => [[SUBSCRIPTION, { ...follow(mine), after: "x" }]] }],
  ["a cursor that was trimmed", "CURSOR_EXPIRED", 200, { operations: () => [[SUBSCRIPTION, { ...follow(trimmed), after: "1" }]] }],
  ["a cursor beyond the tail", "CURSOR_AHEAD", 200, { operations: () => [[SUBSCRIPTION, { ...follow(trimmed), after: "99" }]] }],
  ["a subscription to nothing", "NOT_FOUND", 200, { operations: () => [[SUBSCRIPTION, follow(unknown)], [text("SessionChanged"), by(unknown)]] }],
]) {
  test(`${what} is ${code} everywhere`, async () => {
    for (const [query, variables, operationName] of operations()) {
      const seen = await Promise.all(
        ways(query).map(async (way) => [way, await transports[way].run(context.url, { query, variables, operationName }, token())]),
      );
      for (const [way, { results, status: answered, closeCode }] of seen) {
        const told = `${way}: ${operationName ?? /^(query|mutation|subscription) ?\w*/m.exec(query)?.[0] ?? query}`;
        if (way === "ws" && closeCode !== undefined) {
          assert.deepEqual([closeCode, code], [4403, "UNAUTHENTICATED"], told);
          assert.notEqual(token(), null, told);
          continue;
        }
        assert.equal(results[0]?.errors?.[0]?.extensions?.code, code, `${told}: ${JSON.stringify(results)}`);
        assert.equal(results.length, 1, told);
        assert.equal(typeof results[0].errors[0].message, "string");
        if (way === "post, graphql-response") assert.equal(answered, status, told);
        if (way === "post") assert.equal(answered, status === 401 ? 401 : 200, told);
      }
    }
  });
}

const CHANGED = 'sessionsChanged(filter: { externalId: "x" }) { id }';
function good() {
  return [[QUERY, by(mine)], [SUBSCRIPTION, follow(mine)], [MUTATION, append(mine)], [text("SessionsChanged")]];
}

test("a mutation by GET is refused, and nothing is done", async () => {
  const externalId = unique("by-get");
  const input = { type: "chat.agent", taskIdentifier: "assistant", externalId };
  const asked = { query: text("CreateSession"), variables: { input } };
  for (const way of ["get", "sse by get"]) {
    const { status, results } = await transports[way].run(context.url, asked, SECRET);
    assert.equal(status, 405, way);
    assert.equal(results[0].errors[0].extensions.code, "METHOD_NOT_ALLOWED");
  }
  assert.equal((await context.run("OneSession", { by: { externalId } })).session, null);
});

test("a request that lacks a variable does nothing of what it asks", async () => {
  const externalId = unique("half");
  const query = `mutation Half($made: CreateSessionInput!, $missing: CloseSessionInput!) {
    createSession(input: $made) { created }
    closeSession(input: $missing) { clientMutationId }
  }`;
  const variables = { made: { type: "chat.agent", taskIdentifier: "assistant", externalId } };
  for (const way of ways(query)) {
    const { results } = await transports[way].run(context.url, { query, variables }, SECRET);
    assert.equal(results[0].errors[0].extensions.code, "GRAPHQL_VALIDATION_FAILED", way);
    assert.ok(!("data" in results[0]), way);
  }
  assert.equal((await context.run("OneSession", { by: { externalId } })).session, null);
});

test("a subscription that cannot stream is refused at once", async () => {
  for (const way of ["post", "post, graphql-response", "get"]) {
    const { status, results } = await transports[way].run(context.url, { query: SUBSCRIPTION, variables: follow(mine) }, SECRET);
    assert.ok(results[0].errors?.length > 0, `${way}: ${JSON.stringify(results)}`);
    assert.ok(results[0].data === undefined || results[0].data === null);
    assert.ok(way === "post" || status >= 400, `${way}: ${status}`);
  }
});

test("without a token the schema is open on every transport", async () => {
  for (const [way, { run }] of Object.entries(transports)) {
    const { results } = await run(context.url, { query: "{ __typename __type(name: \"Session\") { kind } }" }, null);
    assert.deepEqual(results.map(plain), [{ data: { __typename: "Query", __type: { kind: "OBJECT" } } }], way);
  }
});
