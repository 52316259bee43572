// What ends a direct writer, and what it has left behind then: closes, expiry, revoked keys, sessions that are not there.

import assert from "node:assert/strict";
import { test } from "node:test";

import { S2Error } from "@s2-dev/streamstore";
import { auth, BadRequestError, sessions } from "@trigger.dev/sdk";

import { numbered, payloads, Source, started } from "./lib/direct.js";
import { eventually, sessionBody, suite, unique } from "./lib/suite.js";

const context = suite();

/** A pipe that is under way: its first records are stored. */
async function piping(handle, session) {
  const source = new Source();
  const pipe = handle.out.pipe(source.stream);
  pipe.waitUntilComplete().catch(() => {});
  source.write(10);
  await eventually("the first records", async () => (await payloads(context, session)).length === 10);
  return { source, pipe };
}

/** Every answer since the last look, as `METHOD status`. */
function answers() {
  return context.requests.splice(0).map(({ method, status }) => `${method} ${status}`);
}

function refused(error, status, code, message) {
  assert.ok(error instanceof S2Error, String(error));
  assert.deepEqual({ status: error.status, code: error.code }, { status, code });
  assert.match(error.message, message);
  return true;
}

/** What is stored is what was written, in order, from the first on, and nothing is added any more. */
async function assertSettled(session, { written }, end) {
  const kept = await payloads(context, session);
  assert.deepEqual(kept, written.slice(0, kept.length));
  assert.ok(kept.length < written.length, "the last one was refused");
  await end?.();
  assert.equal((await payloads(context, session)).length, kept.length);
}

test("an externalId can be written to once its session exists, and not before", async () => {
  const externalId = unique("early");
  const handle = sessions.open(externalId);
  await assert.rejects(handle.out.append("too early"), (error) => refused(error, 404, "stream_not_found", /not found/));
  await assert.rejects(handle.out.writeControl("turn-complete"), (error) => refused(error, 404, "stream_not_found", /not found/));
  assert.deepEqual(answers(), ["PUT 202", "PUT 202", "POST 404"]);
  await sessions.start(sessionBody({ externalId }));
  await handle.out.append("in time");
  assert.deepEqual(await payloads(context, externalId), ["in time"]);
});

test("a closed session is refused at once, whichever way it is written to", async () => {
  const { handle, externalId, id } = await started("closed");
  const cold = sessions.open(externalId);
  await handle.out.append("before");
  await sessions.close(externalId);
  answers();
  for (const write of [
    () => cold.out.append("x"),
    () => cold.out.pipe(ReadableStream.from(numbered(0, 5))).waitUntilComplete(),
    () => cold.channel("side").out.append("x"),
    () => sessions.open(id).out.append("x"),
    () => cold.out.writeControl("turn-complete"),
    () => cold.out.trimTo(1),
  ]) {
    await assert.rejects(write, (error) => {
      assert.ok(error instanceof BadRequestError, String(error));
      assert.match(error.message, /Cannot initialize a channel on a closed session/);
      return true;
    });
    assert.deepEqual(answers(), ["PUT 400"], "no retry");
  }
  // This one still has the token from before.
  await assert.rejects(handle.out.append("late"), (error) => refused(error, 409, "session_closed", /closed/));
  assert.deepEqual(await payloads(context, externalId), ["before"]);
  assert.deepEqual(await payloads(context, externalId, { channel: "side" }), []);
});

test("a pipe ends when its session expires, and nothing is stored later", async () => {
  const { handle, externalId } = await started("expires", { expiresAt: new Date(Date.now() + 5000) });
  const { source, pipe } = await piping(handle, externalId);
  refused(await source.exhaust(pipe), 409, "session_expired", /expired/);
  answers();
  await assertSettled(externalId, source, async () => {
    await assert.rejects(sessions.open(externalId).out.append("late"), /Cannot initialize a channel on an expired session/);
    await assert.rejects(handle.out.append("late"), /Cannot initialize a channel on an expired session/);
  });
  assert.deepEqual(answers().filter((answer) => answer.startsWith("PUT")), ["PUT 400", "PUT 400"]);
});

test("a pipe that is busy when its session is closed fails at once and says so", async () => {
  const { handle, externalId } = await started("busy");
  const { source, pipe } = await piping(handle, externalId);
  const end = source.exhaust(pipe);
  await sessions.close(externalId);
  const kept = (await payloads(context, externalId)).length;
  refused(await end, 409, "session_closed", /closed/);
  await assertSettled(externalId, source);
  assert.equal((await payloads(context, externalId)).length, kept, "nothing came after the close");
});

test("a pipe that is idle when its session is closed fails with its next chunk", async () => {
  const { handle, externalId } = await started("idle");
  const side = handle.channel("side");
  const { source, pipe } = await piping(handle, externalId);
  const beside = new Source();
  const sidePipe = side.out.pipe(beside.stream);
  sidePipe.waitUntilComplete().catch(() => {});
  beside.write(3);
  await eventually("the side channel", async () => (await payloads(context, externalId, { channel: "side" })).length === 3);
  await sessions.close(externalId);
  refused(await source.exhaust(pipe), 409, "session_closed", /closed/);
  refused(await beside.exhaust(sidePipe), 409, "session_closed", /closed/);
  assert.deepEqual(await payloads(context, externalId), numbered(0, 10));
  assert.deepEqual(await payloads(context, externalId, { channel: "side" }), numbered(0, 3));
});

test("a pipe ends with the key that it was opened with", async () => {
  const { externalId } = await started("revoked");
  const { id, secretKey } = await context.server.operate("keys", "create", "--label", "writer");
  await auth.withAuth({ baseURL: context.url, accessToken: secretKey }, async () => {
    const handle = sessions.open(externalId);
    const source = new Source();
    const pipe = handle.out.pipe(source.stream);
    source.write(10);
    await eventually("the first records", async () => (await payloads(context, externalId)).length === 10);
    const end = source.exhaust(pipe);
    await context.server.operate("keys", "revoke", id);
    refused(await end, 401, "authn", /revoked|invalid|ended/);
    await assertSettled(externalId, source, () => assert.rejects(handle.out.append("late"), { status: 401 }));
  });
  await sessions.open(externalId).out.append("with a living key");
});
