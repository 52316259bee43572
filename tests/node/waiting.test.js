// Waiting for input as the SDK does it inside a run. There is no run engine here, so the test is the run: it sets the
// task context, and a runtime manager that awaits waitpoints by long-poll. The SDK itself is the published one.

import assert from "node:assert/strict";
import { afterEach, test } from "node:test";

import { apiClientManager, runtime, sessionStreams, taskContext } from "@trigger.dev/core/v3";
import { StandardSessionStreamManager } from "@trigger.dev/core/v3/workers";
import { sessions, wait } from "@trigger.dev/sdk";

import { eventually, sessionBody, suite, unique } from "./lib/suite.js";

let manager;
const context = suite(async () => {
  manager = new StandardSessionStreamManager(apiClientManager.clientOrThrow(), context.url);
  sessionStreams.setGlobalManager(manager);
  runtime.setGlobalRuntimeManager(new LongPolls());
});

/** Awaits waitpoints the way a run that has no engine can. */
class LongPolls {
  disable() {}

  async waitForWaitpoint({ waitpointFriendlyId }) {
    for (;;) {
      const path = `/api/v1/waitpoints/tokens/${waitpointFriendlyId}?wait=60`;
      const { status, output, outputType, outputIsError } = await context.json(200, "GET", path);
      if (status !== "WAITING") return { ok: !outputIsError, output, outputType };
    }
  }
}

afterEach(() => manager?.reset());

/** A session whose run the test now is. */
async function running(name) {
  const externalId = unique(name);
  const session = await sessions.start(sessionBody({ externalId }));
  const task = { id: "assistant", filePath: "assistant.js" };
  const run = { id: session.runId, tags: [], isTest: false, createdAt: new Date(), startedAt: new Date() };
  const ctx = { run, task, attempt: { number: 1 }, environment: { id: "env", slug: "dev", type: "DEVELOPMENT" } };
  taskContext.setGlobalTaskContext({ ctx, worker: { id: "worker", version: "1" }, isWarmStart: false });
  return { ...session, externalId, handle: sessions.open(externalId) };
}

async function waiting(session) {
  const path = `/api/v1/waitpoints/tokens?filter[session]=${session}&filter[status]=WAITING`;
  return eventually("the wait", async () => (await context.json(200, "GET", path)).data[0]);
}

test("in.wait gets what in.send sends while it waits, one record after the other", async () => {
  const { handle, externalId } = await running("waits");
  for (const text of ["first", "second"]) {
    const waited = handle.in.wait({ timeout: "1h", tags: ["input"] });
    const waitpoint = await waiting(externalId);
    assert.deepEqual(waitpoint.tags, ["input"]);
    await handle.in.send({ kind: "message", payload: { text } });
    assert.deepEqual(await waited, { ok: true, output: { kind: "message", payload: { text } } });
  }
});

test("in.wait gets at once what was sent before it", async () => {
  const { handle } = await running("before");
  await handle.in.send({ n: 1 });
  assert.deepEqual(await handle.in.wait(), { ok: true, output: { n: 1 } });
});

test("in.wait times out", async () => {
  const { handle } = await running("times-out");
  const waited = await handle.in.wait({ timeout: "1s" });
  assert.equal(waited.ok, false);
  assert.equal(waited.error.name, "WaitpointTimeoutError");
});

test("in.wait ends when the session is closed", async () => {
  const { handle, externalId } = await running("closed");
  const waited = handle.in.wait({ timeout: "1h" });
  await waiting(externalId);
  await sessions.close(externalId, { reason: "done" });
  const { ok, error } = await waited;
  assert.deepEqual([ok, error.message], [false, "The session was closed"]);
});

test("a restart of the server while a run waits loses nothing", async () => {
  const { handle, externalId } = await running("restart");
  const waited = handle.in.wait({ timeout: "1h" });
  // The long-poll breaks with the server; the run asks again, as an engine would.
  const outcome = waited.catch((error) => error);
  const { id } = await waiting(externalId);
  await context.server.stop();
  await context.server.restart();
  await context.append(externalId, "in", JSON.stringify({ n: 1 }));
  const found = await wait.retrieveToken(id);
  assert.deepEqual([found.status, found.output], ["COMPLETED", { n: 1 }]);
  await outcome;
});

test("the wait functions of the SDK list, answer and retrieve waits", async () => {
  const { handle, externalId, runId } = await running("inbox");
  const waited = handle.in.wait({ timeout: "1h", tags: ["approval"], idempotencyKey: externalId });
  const { id } = await waiting(externalId);
  const listed = [];
  for await (const token of wait.listTokens({ status: "WAITING", tags: ["approval"] })) listed.push(token.id);
  assert.deepEqual(listed, [id]);
  const found = await wait.retrieveToken(id);
  assert.deepEqual([found.status, found.tags, found.output], ["WAITING", ["approval"], undefined]);
  assert.deepEqual(await wait.completeToken(id, { approved: true }), { success: true });
  assert.deepEqual(await waited, { ok: true, output: { approved: true } });
  assert.deepEqual((await wait.retrieveToken(id)).output, { approved: true });
  // A retry of the same step finds the same wait.
  const body = { session: externalId, io: "in", idempotencyKey: externalId };
  const again = await context.json(200, "POST", `/api/v1/runs/${runId}/session-streams/wait`, { body });
  assert.deepEqual(again, { waitpointId: id, isCached: true });
});

test("endAndContinueSession hands the session over once", async () => {
  const { externalId, runId } = await running("hands-over");
  const client = apiClientManager.clientOrThrow();
  const done = await client.endAndContinueSession(externalId, { callingRunId: runId, reason: "upgrade" });
  assert.equal(done.swapped, true);
  assert.equal((await sessions.retrieve(externalId)).currentRunId, done.runId);
  const late = await client.endAndContinueSession(externalId, { callingRunId: runId, reason: "upgrade" });
  assert.deepEqual([late.swapped, late.runId], [false, done.runId]);
});
