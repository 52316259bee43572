// What a public token can write directly, and what it cannot, through any door: `.in` only, and never a command or a
// control record.

import assert from "node:assert/strict";
import { test } from "node:test";

import * as s2 from "@s2-dev/streamstore";
import { auth, PermissionDeniedError, sessions } from "@trigger.dev/sdk";

import { initialize, open, payloads, started, stored } from "./lib/direct.js";
import { drain, eventually, sessionBody, suite, unique } from "./lib/suite.js";

// GraphQL is not in the document that the suite holds every other answer to.
const rawFetch = globalThis.fetch;
const context = suite();
const { AppendInput, AppendRecord } = s2;

const envelope = (data, id) => AppendRecord.string({ body: JSON.stringify({ data, id }) });
const utf8 = (text) => new TextEncoder().encode(text);

async function publicly(name) {
  const session = await started(name);
  const token = await auth.createPublicToken({ scopes: { read: { sessions: session.id }, write: { sessions: session.id } } });
  return { ...session, token };
}

/** `.in` of a session for whoever has its public token: with the token that initialize gives, and with that itself. */
async function inputs({ id, token }) {
  const given = await initialize(context, id, "in", { token });
  assert.equal(given.status, 202);
  return { given, own: { ...given, accessToken: token } };
}

async function overSession(stream, input) {
  const session = await stream.appendSession();
  const ticket = await session.submit(input);
  await ticket.ack().finally(() => session.close().catch(() => {}));
}

/** Every way to hand records to the S2 wire: unary in JSON or, with bytes, in protobuf; and sessions. */
const WAYS = {
  unary: [{}, (stream, input) => stream.append(input)],
  "s2s session": [{ transport: "s2s" }, overSession],
  "fetch session": [{ transport: "fetch" }, overSession],
};

test("a public token writes to .in, which readers then have", async () => {
  const session = await publicly("in");
  let sent = 0;
  for (const channel of Object.values(await inputs(session))) {
    for (const [options, append] of Object.values(WAYS)) {
      await append(open(s2, channel, options), AppendInput.create([envelope({ n: sent }, `part-${sent}`)]));
      sent++;
    }
  }
  assert.deepEqual(await payloads(context, session.id, { io: "in" }), Array.from({ length: sent }, (_, n) => ({ n })));
  const side = await initialize(context, session.id, "in", { token: session.token, channel: "side" });
  await open(s2, side).append(AppendInput.create([envelope("beside", "p")]));
  assert.deepEqual(await payloads(context, session.id, { io: "in", channel: "side" }), ["beside"]);
});

test("a claim that only the server may make does not get through", async () => {
  const session = await publicly("claim");
  const { given } = await inputs(session);
  const forged = { kind: "message", payload: { actionSource: "webhook", text: "hi" } };
  for (const [options, append] of Object.values(WAYS)) {
    await append(open(s2, given, options), AppendInput.create([envelope(forged, unique("p"))]));
  }
  const honest = { kind: "message", payload: { text: "hi" } };
  assert.deepEqual(await payloads(context, session.id, { io: "in" }), [honest, honest, honest]);
});

test("a public token neither initializes nor writes .out", async () => {
  const session = await publicly("out");
  for (const channel of [undefined, "side"]) {
    assert.equal((await initialize(context, session.id, "out", { token: session.token, channel })).status, 403);
  }
  await auth.withAuth({ baseURL: context.url, accessToken: session.token }, async () => {
    const { out } = sessions.open(session.id);
    for (const write of [() => out.append("x"), () => out.writeControl("turn-complete"), () => out.trimTo(1)]) {
      await assert.rejects(write, PermissionDeniedError);
    }
  });
  const { given, own } = await inputs(session);
  for (const channel of [given, own]) {
    for (const side of ["", "/channels/side"]) {
      const out = { ...channel, stream: `sessions/${session.id}${side}/out` };
      for (const [way, [options, append]] of Object.entries(WAYS)) {
        const refused = append(open(s2, out, options), AppendInput.create([envelope("x", "p")]));
        await assert.rejects(refused, { status: 403, code: "permission_denied" }, `${way} ${out.stream}`);
      }
    }
  }
  assert.deepEqual(await payloads(context, session.id), []);
});

test("a public token forges no command and no control record", async () => {
  const session = await publicly("forge");
  await sessions.open(session.id).in.send("kept");
  const header = (name, value) => AppendRecord.string({ body: "", headers: [[name, value]] });
  const forgeries = {
    trim: [AppendRecord.trim(1)],
    fence: [AppendRecord.fence("mine")],
    "fence in bytes": [AppendRecord.bytes({ body: utf8("mine"), headers: [[new Uint8Array(), utf8("fence")]] })],
    control: [header("trigger-control", "turn-complete")],
    "control in bytes": [AppendRecord.bytes({ body: utf8(""), headers: [[utf8("trigger-control"), utf8("turn-complete")]] })],
    "control in capitals": [header("Trigger-Control", "turn-complete")],
    "a later header": [AppendRecord.string({ body: "", headers: [["x", "y"], ["trigger-control", "turn-complete"]] })],
    "behind an honest record": [envelope("honest", "h"), AppendRecord.trim(1)],
  };
  for (const channel of Object.values(await inputs(session))) {
    for (const [what, records] of Object.entries(forgeries)) {
      for (const [way, [options, append]] of Object.entries(WAYS)) {
        const refused = append(open(s2, channel, options), AppendInput.create(records));
        await assert.rejects(refused, { status: 403, code: "permission_denied" }, `${what}, ${way}`);
      }
    }
  }
  await assertUntouched(session.id);
});

test("nor does it through the append route", async () => {
  const session = await publicly("route");
  await sessions.open(session.id).in.send("kept");
  const { given } = await inputs(session);
  const path = `/realtime/v1/sessions/${session.id}/in/append`;
  const records = JSON.stringify({ records: [{ headers: [["trigger-control", "turn-complete"]], body: "" }] });
  const headers = { "trigger-control": "turn-complete", "S2-Format": "raw" };
  await context.json(200, "POST", path, { token: session.token, body: records, headers });
  const [, forged] = await stored(context, session.id, { io: "in" });
  assert.deepEqual([forged.data, forged.headers], [records, undefined], "it is text and nothing else");
  // The token for direct writes opens the S2 wire alone.
  await context.json(401, "POST", path, { token: given.accessToken, body: "x" });
  await context.json(401, "GET", `/api/v1/sessions/${session.id}`, { token: given.accessToken });
});

test("nor does it through GraphQL", async () => {
  const session = await publicly("graphql");
  await sessions.open(session.id).in.send("kept");
  const { given } = await inputs(session);
  const by = `by: {sessionId: "${session.id}"}`;
  const ask = async (token, document) => {
    const headers = { Authorization: `Bearer ${token}`, "Content-Type": "application/json" };
    const response = await rawFetch(`${context.url}/graphql`, { method: "POST", headers, body: JSON.stringify({ query: `mutation { ${document} }` }) });
    return JSON.stringify(await response.json());
  };
  const trim = (io) => `trimChannel(input: {${by}, io: ${io}, before: 1}) { userErrors { code } }`;
  const append = (io, record) => `appendRecords(input: {${by}, io: ${io}, records: [${record}]}) { userErrors { code } }`;
  for (const document of [trim("IN"), trim("OUT"), append("OUT", '{text: "x"}')]) {
    assert.match(await ask(session.token, document), /"UNAUTHORIZED"/, document);
    assert.match(await ask(given.accessToken, document), /"UNAUTHENTICATED"/, document);
  }
  assert.match(await ask(session.token, append("IN", '{text: "x", headers: [["trigger-control", "x"]]}')), /headers/);
  await assertUntouched(session.id);
});

test("a token for direct writes opens one channel of one session", async () => {
  const [mine, other] = [await publicly("mine"), await publicly("other")];
  const { given } = await inputs(mine);
  const input = AppendInput.create([envelope("x", "p")]);
  for (const stream of [`sessions/${other.id}/in`, `sessions/${mine.id}/channels/side/in`, `sessions/${mine.externalId}/in`, "nothing"]) {
    await assert.rejects(open(s2, { ...given, stream }).append(input), { status: 403 }, stream);
    await assert.rejects(open(s2, { ...given, stream }).checkTail(), { status: 403 }, stream);
  }
  const reader = await auth.createPublicToken({ scopes: { read: { sessions: mine.id } } });
  assert.equal((await initialize(context, mine.id, "in", { token: reader })).status, 403, "who may not write gets none");
});

test("a token that was given before its session existed opens it once it does", async () => {
  const externalId = unique("early");
  const token = await auth.createPublicToken({ scopes: { write: { sessions: externalId } } });
  const given = await initialize(context, externalId, "in", { token });
  const stream = open(s2, given);
  const input = AppendInput.create([envelope("hello", "p")]);
  await assert.rejects(stream.append(input), { status: 404, code: "stream_not_found" });
  await sessions.start(sessionBody({ externalId }));
  await stream.append(input);
  assert.deepEqual(await payloads(context, externalId, { io: "in" }), ["hello"]);
});

test("what a public token was given, and what it has opened, end with it", async () => {
  const { id } = await started("ends");
  const expirationTime = Math.floor(Date.now() / 1000) + 5;
  const token = await auth.createPublicToken({ scopes: { read: { sessions: id }, write: { sessions: id } }, expirationTime });
  const given = await initialize(context, id, "in", { token });
  const readers = ["s2s", "fetch"].map(async (transport) => {
    const session = await open(s2, given, { transport }).readSession({ start: { from: { seqNum: 0 } } });
    return drain(session.getReader()).then(() => "a clean end", (error) => `${error.status} ${error.code}`);
  });
  const writing = await open(s2, given, { transport: "s2s" }).appendSession();
  const write = (n) => writing.submit(AppendInput.create([envelope(n, `${n}`)])).then((ticket) => ticket.ack());
  let n = 0;
  const end = await eventually("the end of the writer", () => write(n++).then(() => false, (error) => error));
  assert.deepEqual([end.status, end.code], [401, "authn"]);
  assert.deepEqual(await Promise.all(readers), ["401 authn", "401 authn"]);
  const late = AppendInput.create([envelope("late", "late")]);
  await assert.rejects(open(s2, given).append(late), { status: 401, code: "authn" });
  assert.deepEqual(await payloads(context, id, { io: "in" }), Array.from({ length: n - 1 }, (_, n) => n));
});

/** One record in `.in`, none in `.out`, and no fence: a command would have taken a place. */
async function assertUntouched(id) {
  assert.deepEqual(await payloads(context, id, { io: "in" }), ["kept"]);
  for (const [io, seqNum] of [["in", 1], ["out", 0]]) {
    const { tail } = await open(s2, await initialize(context, id, io)).checkTail();
    assert.equal(tail.seqNum, seqNum, io);
  }
}
