// Snapshots and transcripts as the SDK's agent runtime and its storage write and read them.

import assert from "node:assert/strict";
import { test } from "node:test";

import { apiClientManager, serializeTranscriptSnapshot } from "@trigger.dev/core/v3";
import { sessions } from "@trigger.dev/sdk";
import {
  __readChatSnapshotProductionPathForTests as readSnapshot,
  __writeChatSnapshotProductionPathForTests as writeSnapshot,
  snapshotTranscriptStorage,
} from "@trigger.dev/sdk/ai";

import { SECRET, sessionBody, suite, unique } from "./lib/suite.js";

const context = suite();

function message(id, text = "hello") {
  return { id, role: "user", parts: [{ type: "text", text: `${text} – ünïcode 🎉` }] };
}

function snapshot(ids, { text, ...fields } = {}) {
  const messages = ids.map((id) => ({ id, final: id !== "draft", message: message(id, text) }));
  return { version: 2, savedAt: 1_700_000_000_000, messages, state: { private: "lane" }, lastOutEventId: "41", lastInEventId: "3", ...fields };
}

async function started(name) {
  const externalId = unique(name);
  await sessions.start(sessionBody({ externalId }));
  return externalId;
}

function transcript(session, options) {
  return apiClientManager.clientOrThrow().getSessionTranscript(session, options);
}

test("a session without a snapshot has none to read and an empty transcript", async () => {
  const session = await started("none");
  assert.equal(await readSnapshot(session), undefined);
  assert.deepEqual(await transcript(session), { messages: [] });
});

test("what the runtime writes after a turn it reads back at the next boot", async () => {
  const session = await started("turns");
  const first = snapshot(["a", "b"]);
  await writeSnapshot(session, first);
  assert.deepEqual(await readSnapshot(session), first);
  const second = snapshot(["a", "b", "c", "draft"], { lastOutEventId: "57", state: null });
  await writeSnapshot(session, second);
  assert.deepEqual(await readSnapshot(session), second);
  const uploads = context.requests.filter(({ method, path }) => method === "PUT" && path.startsWith("/blobs/"));
  assert.deepEqual(uploads.map(({ status }) => status), [200, 200]);
});

test("a snapshot survives kill -9 as soon as it is written", async () => {
  const session = await started("killed");
  const written = snapshot(["a"]);
  await writeSnapshot(session, written);
  await context.server.kill();
  await context.server.restart();
  assert.deepEqual(await readSnapshot(session), written);
});

test("a snapshot can still be written once the session is closed", async () => {
  const session = await started("closed");
  await sessions.close(session);
  await writeSnapshot(session, snapshot(["a"]));
  assert.deepEqual((await transcript(session)).messages, [message("a")]);
});

for (const text of ["short", "long ".repeat(40_000)]) {
  test(`the storage pages through a transcript of ${text.length > 100 ? "long" : "short"} messages, newest page first`, async () => {
    const session = await started("pages");
    const ids = ["m0", "m1", "m2", "m3", "draft"];
    await writeSnapshot(session, snapshot(ids, { text }));
    const storage = snapshotTranscriptStorage();
    const pages = [];
    let before;
    do {
      const page = await storage.load({ chatId: session }, { limit: 2, before });
      assert.deepEqual(page.cursors, { lastOutEventId: "41", lastInEventId: "3" });
      assert.equal(page.state, null, "the transcript must not carry what is the model's");
      pages.push(page.messages);
      before = page.nextCursor;
    } while (before !== undefined);
    assert.deepEqual(pages, [["m3", "draft"], ["m1", "m2"], ["m0"]].map((page) => page.map((id) => message(id, text))));
    // The SDK falls back to the whole snapshot when a page is refused, which this must not have been.
    assert.equal(context.requests.filter(({ path }) => path.startsWith("/blobs/")).length, 1);
    const all = await transcript(session);
    assert.deepEqual(all.messages, ids.map((id) => message(id, text)));
    assert.equal(all.nextCursor, undefined);
  });
}

test("a snapshot of version 1 is read as released SDKs wrote it", async () => {
  const session = await started("old");
  const { presignedUrl } = await apiClientManager.clientOrThrow().createChatSnapshotUploadUrl(session);
  const old = { version: 1, savedAt: 5, messages: [message("a"), { role: "user" }, message("b")], lastOutEventId: "9" };
  const put = await fetch(presignedUrl, { method: "PUT", headers: { "content-type": "application/json" }, body: JSON.stringify(old) });
  assert.equal(put.status, 200);
  assert.deepEqual(await transcript(session), { messages: [message("a"), message("b")], cursors: { lastOutEventId: "9" } });
  assert.deepEqual((await readSnapshot(session)).messages.map(({ id }) => id), ["a", "b"]);
});

test("the bytes and the type come back as they were put, to a page of another origin too", async () => {
  const session = await started("bytes");
  const client = apiClientManager.clientOrThrow();
  await writeSnapshot(session, snapshot(["a"]));
  const { presignedUrl } = await client.getChatSnapshotUrl(session);
  assert.ok(presignedUrl.startsWith(`${context.url}/blobs/v1/`), presignedUrl);
  const response = await fetch(presignedUrl, { headers: { Origin: "https://a.example" } });
  assert.equal(response.headers.get("content-type"), "application/vnd.trigger.transcript+ndjson");
  assert.equal(response.headers.get("access-control-allow-origin"), "https://a.example");
  const text = await response.text();
  assert.equal(text, serializeTranscriptSnapshot(snapshot(["a"])));
  const tail = await fetch(presignedUrl, { headers: { Range: "bytes=-22" } });
  assert.equal(tail.status, 206);
  assert.equal(await tail.text(), text.slice(-22));
  const refused = await fetch(presignedUrl, { method: "PUT", body: "x" });
  assert.equal(refused.status, 403);
  await refused.arrayBuffer();
});

test("a public token may have a URL as far as its scopes go, and no transcript", async () => {
  const session = await started("public");
  const token = (await context.json(200, "POST", "/api/v1/auth/public-tokens", { token: SECRET, body: { scopes: [`read:sessions:${session}`] } })).token;
  const path = `/api/v1/sessions/${session}`;
  await context.json(200, "GET", `${path}/snapshot-url`, { token });
  await context.json(403, "PUT", `${path}/snapshot-url`, { token });
  await context.json(403, "GET", `${path}/transcript`, { token });
  await context.json(404, "GET", `/api/v1/sessions/${unique("nobody")}/snapshot-url`);
});
