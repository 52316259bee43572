// The SDK's own agent, `chat.agent`, at one end and a chat in a page at the other. There is no run engine here, so the test is
// the worker: it installs what the SDK's worker does inside a run, and calls the run.

import assert from "node:assert/strict";
import { afterEach, test } from "node:test";

import {
  apiClientManager, lifecycleHooks, localsAPI, resourceCatalog, runMetadata, sessionStreams, taskContext,
} from "@trigger.dev/core/v3";
import {
  StandardLifecycleHooksManager, StandardLocalsManager, StandardMetadataManager, StandardResourceCatalog,
  StandardSessionStreamManager,
} from "@trigger.dev/core/v3/workers";
import { sessions } from "@trigger.dev/sdk";
import { chat as agents } from "@trigger.dev/sdk/ai";
import { simulateReadableStream, streamText } from "ai";
import { MockLanguageModelV3 } from "ai/test";

import { Chat, transport } from "./lib/chat.js";
import { sessionBody, suite, unique } from "./lib/suite.js";

let manager;
const context = suite(async () => {
  manager = new StandardSessionStreamManager(apiClientManager.clientOrThrow(), context.url);
  sessionStreams.setGlobalManager(manager);
  lifecycleHooks.setGlobalLifecycleHooksManager(new StandardLifecycleHooksManager());
  runMetadata.setGlobalManager(new StandardMetadataManager(context.url));
});
afterEach(() => manager?.reset());
resourceCatalog.setGlobalResourceCatalog(new StandardResourceCatalog());
resourceCatalog.setCurrentFileContext("assistant.js", "assistant");

/** Says these words, one after the other. */
function model(words) {
  const usage = { inputTokens: { total: 1 }, outputTokens: { total: 1 } };
  const chunks = [
    { type: "stream-start", warnings: [] },
    { type: "text-start", id: "t" },
    ...words.map((delta) => ({ type: "text-delta", id: "t", delta })),
    { type: "text-end", id: "t" },
    { type: "finish", finishReason: { unified: "stop" }, usage },
  ];
  return new MockLanguageModelV3({ doStream: async () => ({ stream: simulateReadableStream({ chunks }) }) });
}

agents.agent({
  id: "assistant",
  idleTimeoutInSeconds: 300,
  run: async ({ messages, signal }) => streamText({ model: model(["I ", "am ", "well."]), messages, abortSignal: signal }),
});

agents.agent({
  id: "leaver",
  idleTimeoutInSeconds: 300,
  onBeforeTurnComplete: async () => agents.close({ reason: "farewell" }),
  run: async ({ messages, signal }) => streamText({ model: model(["Good ", "bye."]), messages, abortSignal: signal }),
});

/** Runs the agent of a session as a worker would. */
function run(session, chatId, id) {
  localsAPI.setGlobalLocalsManager(new StandardLocalsManager());
  const task = { id, filePath: "assistant.js" };
  const started = { id: session.runId, tags: [], isTest: false, createdAt: new Date(), startedAt: new Date() };
  const environment = { id: "env", slug: "dev", type: "DEVELOPMENT" };
  const ctx = { run: started, task, attempt: { number: 1 }, environment };
  taskContext.setGlobalTaskContext({ ctx, worker: { id: "worker", version: "1" }, isWarmStart: false });
  const { fns } = resourceCatalog.getTask(id);
  return fns.run({ chatId, trigger: "preload", sessionId: session.id }, { ctx, signal: new AbortController().signal });
}

/** A chat in a page whose agent runs. */
async function running(agent) {
  const id = unique(agent);
  const session = await sessions.start(sessionBody({ externalId: id, taskIdentifier: agent }));
  const page = transport(context);
  return { id, page, chat: new Chat({ id, transport: page }), ended: run(session, id, agent) };
}

/** How often a session's `.out` says that it is closed, and why. */
async function farewells(id) {
  const { records } = await context.json(200, "GET", `/realtime/v1/sessions/${id}/out/records`);
  const closed = records.filter(({ headers }) => headers?.some(([name, value]) => name === "trigger-control" && value === "session-closed"));
  return closed.map(({ headers }) => headers.find(([name]) => name === "session-closed-reason")?.[1]);
}

test("chat.agent answers a page, and its run ends at once when the session is closed", async () => {
  const { id, chat, ended } = await running("assistant");
  await chat.sendMessage({ text: "how are you?" });
  assert.deepEqual([chat.status, chat.text], ["ready", "I am well."]);

  const begin = performance.now();
  await sessions.close(id, { reason: "enough" });
  await ended;
  assert.ok(performance.now() - begin < 1000, "within a second, not after its idle time");
  assert.deepEqual(await farewells(id), ["enough"]);
});

test("a chat.agent that closes its session is told of once, by itself", async () => {
  const { id, page, chat, ended } = await running("leaver");
  await chat.sendMessage({ text: "bye" });
  await ended;
  assert.deepEqual([chat.status, chat.text], ["ready", "Good bye."]);
  assert.deepEqual([page.sessionStatus(id), page.sessionClosedReason(id)], ["closed", "farewell"]);
  assert.deepEqual(await farewells(id), ["farewell"]);
  assert.equal((await sessions.retrieve(id)).closedReason, "farewell");
});
