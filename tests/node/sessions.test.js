// The control plane as the SDK drives it: start, retrieve, update, close.

import assert from "node:assert/strict";
import { test } from "node:test";

import { ConflictError, NotFoundError, sessions, UnprocessableEntityError } from "@trigger.dev/sdk";

import { eventually, sessionBody, suite, unique } from "./lib/suite.js";

const context = suite();

function claims(token) {
  return JSON.parse(Buffer.from(token.split(".")[1], "base64url"));
}

test("a new session carries what was asked, a run and a token for itself", async () => {
  const externalId = unique("new");
  const expiresAt = new Date(Date.now() + 3_600_000);
  const body = sessionBody({
    externalId,
    expiresAt,
    tags: ["a", "b"],
    metadata: { plan: { tier: 3 } },
    triggerConfig: { basePayload: { chatId: externalId }, machine: "small-1x", queue: "q", tags: ["t"], maxAttempts: 3, maxDuration: 60, idleTimeoutInSeconds: 30 },
  });
  const { data: session, response } = await sessions.start(body).withResponse();
  assert.equal(response.status, 201);
  assert.match(session.id, /^session_[a-z0-9]+$/);
  assert.equal(session.externalId, externalId);
  assert.equal(session.type, body.type);
  assert.equal(session.taskIdentifier, body.taskIdentifier);
  assert.deepEqual(session.tags, ["a", "b"]);
  assert.deepEqual(session.metadata, { plan: { tier: 3 } });
  assert.deepEqual(session.triggerConfig, body.triggerConfig);
  assert.deepEqual(session.expiresAt, expiresAt);
  assert.equal(session.closedAt, null);
  assert.equal(session.closedReason, null);
  assert.deepEqual(session.updatedAt, session.createdAt);
  assert.equal(session.isCached, false);
  assert.match(session.runId, /^run_/);
  const { scopes, pub, exp, iat } = claims(session.publicAccessToken);
  assert.deepEqual(scopes, [`read:sessions:${externalId}`, `write:sessions:${externalId}`]);
  assert.equal(pub, true);
  assert.equal(exp - iat, 3600);
});

test("starting the same externalId again answers the same session with the new trigger config", async () => {
  const externalId = unique("cached");
  const first = await sessions.start(sessionBody({ externalId, tags: ["kept"] }));
  const triggerConfig = { basePayload: { turn: 2 }, queue: "other" };
  const { data: second, response } = await sessions.start(sessionBody({ externalId, triggerConfig })).withResponse();
  assert.equal(response.status, 200);
  assert.equal(second.isCached, true);
  assert.equal(second.id, first.id);
  assert.equal(second.runId, first.runId);
  assert.deepEqual(second.tags, ["kept"]);
  assert.deepEqual(second.triggerConfig, triggerConfig);
  assert.deepEqual((await sessions.retrieve(externalId)).triggerConfig, triggerConfig);
});

test("of many starts at once exactly one makes the session", async () => {
  const externalId = unique("race");
  const started = await Promise.all(Array.from({ length: 20 }, () => sessions.start(sessionBody({ externalId }))));
  assert.equal(started.filter((session) => !session.isCached).length, 1);
  assert.equal(new Set(started.map((session) => session.id)).size, 1);
  assert.equal(new Set(started.map((session) => session.runId)).size, 1);
});

test("without an externalId every start makes a session, and a repeated request does not", async () => {
  const [one, two] = [await sessions.start(sessionBody()), await sessions.start(sessionBody())];
  assert.equal(one.externalId, null);
  assert.notEqual(one.id, two.id);
  const { scopes } = claims(one.publicAccessToken);
  assert.deepEqual(scopes, [`read:sessions:${one.id}`, `write:sessions:${one.id}`]);

  const again = { body: sessionBody(), headers: { "x-trigger-request-idempotency-key": unique("request") } };
  const first = await context.json(201, "POST", "/api/v1/sessions", again);
  const second = await context.json(200, "POST", "/api/v1/sessions", again);
  assert.equal(second.id, first.id);
  assert.equal(second.isCached, true);
});

test("both ids retrieve the same session, however odd the externalId", async () => {
  for (const externalId of [unique("plain"), unique("a/b c?d#e%2Fü+&"), unique("日本語")]) {
    const started = await sessions.start(sessionBody({ externalId }));
    const byExternal = await sessions.retrieve(externalId);
    assert.deepEqual(byExternal, await sessions.retrieve(started.id));
    assert.equal(byExternal.externalId, externalId);
    assert.equal(byExternal.currentRunId, started.runId);
  }
});

test("update replaces tags and metadata and leaves the rest", async () => {
  const externalId = unique("update");
  const started = await sessions.start(sessionBody({ externalId, tags: ["old"], metadata: { old: true } }));
  const tagged = await sessions.update(externalId, { tags: ["new", "er"] });
  assert.deepEqual(tagged.tags, ["new", "er"]);
  assert.deepEqual(tagged.metadata, { old: true });
  const described = await sessions.update(started.id, { metadata: { fresh: [1, 2] } });
  assert.deepEqual(described.metadata, { fresh: [1, 2] });
  assert.deepEqual(described.tags, ["new", "er"]);
  const cleared = await sessions.update(started.id, { metadata: null, tags: [] });
  assert.equal(cleared.metadata, null);
  assert.deepEqual(cleared.tags, []);
  assert.deepEqual(cleared.createdAt, started.createdAt);
  assert.ok(cleared.updatedAt >= started.updatedAt);
});

test("an externalId can be changed and cleared, and its log stays with the session", async () => {
  const [before, later] = [unique("before"), unique("later")];
  const { id } = await sessions.start(sessionBody({ externalId: before }));
  await sessions.open(before).in.send({ text: "first" });
  assert.equal((await sessions.update(before, { externalId: later })).externalId, later);
  await assert.rejects(sessions.retrieve(before), NotFoundError);
  assert.equal((await sessions.retrieve(later)).id, id);
  assert.equal((await records(later)).length, 1);

  const reused = await sessions.start(sessionBody({ externalId: before }));
  assert.notEqual(reused.id, id);
  assert.equal((await records(before)).length, 0, "a reused externalId must not show another session's log");

  assert.equal((await sessions.update(later, { externalId: null })).externalId, null);
  await assert.rejects(sessions.retrieve(later), NotFoundError);
  assert.equal((await records(id)).length, 1);
});

async function records(session) {
  return (await context.json(200, "GET", `/realtime/v1/sessions/${session}/in/records`)).records;
}

test("an externalId that is taken is a conflict, and the SDK does not retry it", async () => {
  const [mine, theirs] = [unique("mine"), unique("theirs")];
  await sessions.start(sessionBody({ externalId: mine }));
  await sessions.start(sessionBody({ externalId: theirs }));
  context.requests.length = 0;
  await assert.rejects(sessions.update(mine, { externalId: theirs }), ConflictError);
  assert.equal(context.requests.length, 1);
  assert.equal((await sessions.update(mine, { externalId: mine })).externalId, mine);
});

test("an externalId in the reserved form is refused", async () => {
  await assert.rejects(sessions.start(sessionBody({ externalId: "session_mine" })), UnprocessableEntityError);
  const { id } = await sessions.start(sessionBody());
  await assert.rejects(sessions.update(id, { externalId: "session_mine" }), UnprocessableEntityError);
});

test("close is write-once: whoever comes later gets the first one's row", async () => {
  const externalId = unique("close");
  const { id } = await sessions.start(sessionBody({ externalId }));
  const closed = await sessions.close(externalId, { reason: "done" });
  assert.ok(closed.closedAt instanceof Date);
  assert.equal(closed.closedReason, "done");
  const again = await sessions.close(id, { reason: "other" });
  assert.deepEqual(again, closed);
  assert.deepEqual(await sessions.retrieve(id), closed);
  assert.deepEqual((await sessions.update(id, { tags: ["after"] })).tags, ["after"], "a closed session can be updated");

  const silent = await sessions.start(sessionBody());
  const { closedAt, closedReason } = await sessions.close(silent.id);
  assert.ok(closedAt instanceof Date);
  assert.equal(closedReason, null);
});

test("of many closes at once one wins and all answer its row", async () => {
  const { id } = await sessions.start(sessionBody());
  const closed = await Promise.all(Array.from({ length: 10 }, (_, i) => sessions.close(id, { reason: `reason ${i}` })));
  assert.equal(new Set(closed.map((session) => session.closedReason)).size, 1);
  assert.equal(new Set(closed.map((session) => session.closedAt.getTime())).size, 1);
});

test("a closed externalId cannot be started again, and the SDK does not retry it", async () => {
  const externalId = unique("reuse");
  await sessions.start(sessionBody({ externalId }));
  await sessions.close(externalId);
  context.requests.length = 0;
  await assert.rejects(sessions.start(sessionBody({ externalId })), (error) => {
    assert.ok(error instanceof ConflictError);
    assert.match(error.message, /closed/);
    return true;
  });
  assert.equal(context.requests.length, 1);
});

test("a session expires by itself and stays readable", async () => {
  const externalId = unique("expire");
  const expiresAt = new Date(Date.now() + 1_000);
  await sessions.start(sessionBody({ externalId, expiresAt }));
  await eventually("expiry", async () => (await sessions.list({ externalId, status: "EXPIRED" })).data.length === 1);
  assert.deepEqual((await sessions.retrieve(externalId)).expiresAt, expiresAt);
  await assert.rejects(sessions.start(sessionBody({ externalId })), ConflictError);
  await assert.rejects(sessions.open(externalId).in.send("late"), /expired/i);
  assert.equal((await sessions.close(externalId, { reason: "tidy" })).closedReason, "tidy");
});

test("a session cannot be born expired", async () => {
  const externalId = unique("stillborn");
  const past = sessionBody({ externalId, expiresAt: new Date(Date.now() - 1_000) });
  await assert.rejects(sessions.start(past), UnprocessableEntityError);
  await assert.rejects(sessions.retrieve(externalId), NotFoundError);
  const never = await context.json(201, "POST", "/api/v1/sessions", { body: { ...sessionBody(), expiresAt: null } });
  assert.equal(never.expiresAt, null);
});

test("sessions outlive the process", async () => {
  const externalId = unique("durable");
  const { id } = await sessions.start(sessionBody({ externalId, tags: ["durable"] }));
  await sessions.close(id, { reason: "before the restart" });
  assert.equal(await context.server.stop(), 0, "a stop by SIGTERM is a success");
  await context.server.restart();
  const found = await sessions.retrieve(externalId);
  assert.equal(found.id, id);
  assert.equal(found.closedReason, "before the restart");
});
