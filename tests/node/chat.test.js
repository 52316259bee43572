// A whole chat: the AI SDK's chat on the SDK's transport in the page, the SDK's writers in the agent, this server between.

import assert from "node:assert/strict";
import { test } from "node:test";

import { auth, sessions } from "@trigger.dev/sdk";

import { Agent, Chat, transport } from "./lib/chat.js";
import { drain, eventually, sessionBody, suite, take, unique } from "./lib/suite.js";

const context = suite();

function opened(options) {
  const id = unique("chat");
  const page = transport(context, options);
  return { id, page, chat: new Chat({ id, transport: page }), agent: new Agent(context, id) };
}

/** One whole turn. */
async function turn({ chat, agent }, question, words) {
  const asked = chat.sendMessage({ text: question });
  const heard = await agent.next();
  await agent.say(words);
  const completed = await agent.complete();
  await asked;
  return { heard, completed };
}

test("a question goes to the agent, its answer comes back word by word", async () => {
  const own = opened();
  const { id, page, chat, agent } = own;
  const asked = chat.sendMessage({ text: "how are you?" });
  const heard = await agent.next();
  assert.equal(heard.kind, "message");
  assert.equal(heard.payload.chatId, id);
  assert.deepEqual(heard.payload.message.parts, [{ type: "text", text: "how are you?" }]);
  await agent.say(["I ", "am ", "well."], async (n) => {
    if (n === 2) await eventually("the words so far", () => chat.text === "I am ");
  });
  assert.equal(chat.status, "streaming", "until the turn is complete");
  const { lastEventId } = await agent.complete();
  await asked;
  assert.deepEqual([chat.status, chat.text], ["ready", "I am well."]);
  const { isStreaming, lastEventId: seen } = page.getSession(id);
  assert.deepEqual([isStreaming, seen], [false, lastEventId]);

  const second = await turn(own, "and now?", ["Still ", "well."]);
  assert.deepEqual(second.heard.payload.message.parts, [{ type: "text", text: "and now?" }]);
  assert.deepEqual(chat.messages.map(({ role }) => role), ["user", "assistant", "user", "assistant"]);
  assert.equal(chat.text, "Still well.");
  assert.deepEqual([page.told.starts, page.told.tokens], [1, 0]);
  const told = page.told.events.map(({ type }) => type);
  assert.deepEqual(told.filter((type) => /sent|completed|error/.test(type)), ["message-sent", "turn-completed", "message-sent", "turn-completed"]);
});

test("a reload in the middle of a turn gets the whole turn", async () => {
  const { id, page, chat, agent } = opened();
  const asked = chat.sendMessage({ text: "tell me a story" });
  await agent.next();
  let goOn;
  const reloaded = new Promise((resolve) => (goOn = resolve));
  const said = agent.say(["Once ", "upon ", "a time."], (n) => (n === 2 ? reloaded : undefined));
  await eventually("the first words", () => chat.text === "Once upon ");
  const kept = structuredClone(page.getSession(id));
  page.dispose();
  await asked.catch(() => {});

  const after = transport(context, { sessions: { [id]: kept } });
  const again = new Chat({ id, transport: after, messages: [] });
  const resumed = again.resumeStream();
  await eventually("the words from before", () => again.text === "Once upon ");
  goOn();
  await said;
  await agent.complete();
  await resumed;
  assert.equal(again.text, "Once upon a time.");
  assert.equal(after.getSession(id).isStreaming, false);
});

test("a reload after the turn is told at once that it is over", async () => {
  const own = opened();
  await turn(own, "quick one", ["Done."]);
  const { id, page } = own;
  const { publicAccessToken, lastEventId } = page.getSession(id);
  // A page that was closed before it saw the end.
  const after = transport(context, { sessions: { [id]: { publicAccessToken, lastEventId, isStreaming: true } } });
  const stream = await after.reconnectToStream({ chatId: id });
  assert.deepEqual(await drain(stream.getReader()), []);
  assert.ok(after.told.answers.some(({ endpoint, settled }) => endpoint === "out" && settled === "true"));
  assert.ok(!after.told.events.some(({ type }) => type === "stream-error"));

  const fromStart = transport(context, { sessions: { [id]: { publicAccessToken, isStreaming: true } } });
  const replayed = await drain((await fromStart.reconnectToStream({ chatId: id })).getReader());
  assert.deepEqual(replayed.map(({ type }) => type), ["start", "text-start", "text-delta", "text-end", "finish"]);
});

test("a stop reaches the agent, and the next turn is its own", async () => {
  const own = opened();
  const { id, page, chat, agent } = own;
  const asked = chat.sendMessage({ text: "count to a million" });
  await agent.next();
  let stopped;
  const stop = new Promise((resolve) => (stopped = resolve));
  const said = agent.say(["1 ", "2 ", "3 "], (n) => (n === 2 ? stop : undefined));
  await eventually("the first words", () => chat.text === "1 2 ");
  assert.equal(await page.stopGeneration(id), true);
  assert.deepEqual(await agent.next(), { kind: "stop" });
  stopped();
  await said;
  await agent.complete();
  await asked;
  assert.equal(chat.text, "1 2 ");
  await turn(own, "never mind", ["Fine."]);
  assert.equal(chat.text, "Fine.", "nothing of the stopped turn");
});

test("a chat whose session is closed is marked closed, and sends nothing any more", async () => {
  const own = opened();
  const { id, page, chat } = own;
  await turn(own, "hello", ["Hi."]);
  await sessions.close(id, { reason: "done" });
  await chat.sendMessage({ text: "one more" });
  assert.equal(chat.status, "error");
  assert.match(String(chat.error), /closed/);
  assert.deepEqual([page.sessionStatus(id), page.sessionClosedReason(id)], ["closed", "done"]);
  const asked = page.told.answers.length;
  await chat.sendMessage({ text: "and another" });
  assert.equal(await page.reconnectToStream({ chatId: id }), null);
  assert.equal(page.told.answers.length, asked, "it does not even ask");
  const closed = page.told.events.filter(({ type }) => type === "session-closed");
  assert.deepEqual(closed.map(({ reason, source }) => ({ reason, source })), [{ reason: "done", source: "append" }]);
});

test("a close in the middle of a turn ends it, for the page and for the agent", async () => {
  const { id, page, chat, agent } = opened();
  const asked = chat.sendMessage({ text: "tell me a story" });
  await agent.next();
  let closed;
  const close = new Promise((resolve) => (closed = resolve));
  const said = agent.say(["Once ", "upon ", "a time."], (n) => (n === 2 ? close : undefined));
  await eventually("the first words", () => chat.text === "Once upon ");
  const waits = agent.next();
  await sessions.close(id, { reason: "enough" });
  await asked;
  assert.deepEqual([chat.status, chat.error, chat.text], ["ready", undefined, "Once upon "]);
  assert.deepEqual([page.sessionStatus(id), page.sessionClosedReason(id)], ["closed", "enough"]);
  assert.deepEqual(page.told.events.filter(({ type }) => type === "session-closed").map(({ source }) => source), ["stream"]);
  assert.deepEqual(await waits, { kind: "message", payload: { trigger: "close" } });
  closed();
  await assert.rejects(said);
});

test("a watching page stops to ask once its session is closed or expired", async () => {
  for (const end of ["closed", "expired"]) {
    const id = unique("chat");
    const expiresAt = end === "expired" ? new Date(Date.now() + 3_000).toISOString() : undefined;
    const { publicAccessToken } = await sessions.start(sessionBody({ externalId: id, ...(expiresAt && { expiresAt }) }));
    const watcher = transport(context, { watch: true, sessions: { [id]: { publicAccessToken, isStreaming: true } } });
    const reader = (await watcher.reconnectToStream({ chatId: id })).getReader();
    const ended = drain(reader);
    await eventually("it watches", () => watcher.told.answers.length > 0);
    const before = watcher.told.answers.length;
    if (end === "closed") await sessions.close(id, { reason: "done" });
    assert.deepEqual(await ended, [], end);
    assert.ok(watcher.told.answers.length - before <= 2, `${end}: ${JSON.stringify(watcher.told.answers)}`);
    assert.ok(!watcher.told.events.some(({ type }) => type === "stream-error"), end);
  }
});

test("an agent that closes with its last turn says so in the stream", async () => {
  const { id, page, chat, agent } = opened();
  const asked = chat.sendMessage({ text: "bye" });
  await agent.next();
  await agent.say(["Bye."]);
  await agent.complete([["session-closed", "true"], ["session-closed-reason", "farewell"]]);
  await asked;
  assert.equal(chat.text, "Bye.");
  assert.deepEqual([page.sessionStatus(id), page.sessionClosedReason(id)], ["closed", "farewell"]);
});

test("a token that the server does not take is renewed once, and a session that is gone is started", async () => {
  const own = opened();
  await turn(own, "hello", ["Hi."]);
  const { id } = own;
  const after = transport(context, { sessions: { [id]: { publicAccessToken: "stale", isStreaming: false } } });
  const chat = new Chat({ id, transport: after });
  await turn({ chat, agent: own.agent }, "still there?", ["Yes."]);
  assert.equal(after.told.tokens, 1);

  const elsewhere = unique("elsewhere");
  const { publicAccessToken } = after.getSession(id);
  // The page gets a token for a session that has never been.
  const scopes = { read: { sessions: elsewhere }, write: { sessions: elsewhere } };
  const lost = transport(context, {
    sessions: { [elsewhere]: { publicAccessToken, isStreaming: false } },
    accessToken: () => auth.createPublicToken({ scopes }),
  });
  const fresh = new Chat({ id: elsewhere, transport: lost });
  await turn({ chat: fresh, agent: new Agent(context, elsewhere) }, "anyone?", ["Here."]);
  assert.deepEqual([fresh.text, lost.told.starts], ["Here.", 1]);
});

/** Tokens that end after two seconds, and how many have been asked for. */
function shortTokens(id) {
  const made = { count: 0, next: () => (made.count++, auth.createPublicToken({ scopes: { read: { sessions: id }, write: { sessions: id } }, expirationTime: "2s" })) };
  return made;
}

test("a token that ends in mid-turn costs no word", async () => {
  const id = unique("chat");
  await sessions.start(sessionBody({ externalId: id }));
  const tokens = shortTokens(id);
  const page = transport(context, { accessToken: tokens.next, sessions: { [id]: { publicAccessToken: await tokens.next() } } });
  const chat = new Chat({ id, transport: page });
  const agent = new Agent(context, id);
  const asked = chat.sendMessage({ text: "sixty words, slowly" });
  await agent.next();
  const words = Array.from({ length: 60 }, (_, n) => `${n} `);
  const before = tokens.count;
  await agent.say(words, async (n) => {
    if (n === 20) await eventually("a second token", () => tokens.count > before);
    if (n === 40) await eventually("a third token", () => tokens.count > before + 1);
  });
  await agent.complete();
  await asked;
  assert.deepEqual([chat.status, chat.text], ["ready", words.join("")]);
  assert.ok(!page.told.events.some(({ type }) => type === "stream-error"));
});

test("a watching page outlives three tokens", async () => {
  const own = opened();
  await turn(own, "first", ["One."]);
  const tokens = shortTokens(own.id);
  const watcher = transport(context, { watch: true, accessToken: tokens.next, sessions: { [own.id]: { publicAccessToken: await tokens.next() } } });
  const reader = (await watcher.reconnectToStream({ chatId: own.id })).getReader();
  const deltas = async () => (await take(reader, 5)).flatMap(({ delta }) => delta ?? []);
  assert.deepEqual(await deltas(), ["One."]);
  await eventually("the fourth token", () => tokens.count > 3);
  await turn(own, "second", ["Two."]);
  assert.deepEqual(await deltas(), ["Two."]);
  watcher.dispose();
});

test("a watcher sees one turn after the other", async () => {
  const own = opened();
  await turn(own, "first", ["One."]);
  const { publicAccessToken } = own.page.getSession(own.id);
  const watcher = transport(context, { watch: true, sessions: { [own.id]: { publicAccessToken } } });
  const reader = (await watcher.reconnectToStream({ chatId: own.id })).getReader();
  const deltas = async () => (await take(reader, 5)).flatMap(({ delta }) => delta ?? []);
  assert.deepEqual(await deltas(), ["One."]);
  await turn(own, "second", ["Two."]);
  assert.deepEqual(await deltas(), ["Two."]);
  watcher.dispose();
});
