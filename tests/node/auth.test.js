// Who may do what: tokens minted by the SDK, tokens signed by hand, and keys that are none.

import assert from "node:assert/strict";
import { test } from "node:test";

import { auth, AuthenticationError, NotFoundError, PermissionDeniedError, sessions } from "@trigger.dev/sdk";

import { EventReader } from "./lib/sse.js";
import { drain, eventually, SECRET, sessionBody, signToken, suite, take, unique } from "./lib/suite.js";

const context = suite(prepare);
const [mine, other] = [unique("mine"), unique("other")];
let session;
let environment;

async function prepare() {
  session = await sessions.start(sessionBody({ externalId: mine }));
  await sessions.start(sessionBody({ externalId: other }));
  environment = (await context.json(200, "POST", "/api/v1/auth/jwt/claims")).sub;
  await context.append(mine, "out", "hello");
}

const as = (token, act) => auth.withAuth({ baseURL: context.url, accessToken: token }, act);
const scoped = (scopes, act) => auth.createPublicToken({ scopes }).then((token) => as(token, act));
/** A token whose every claim the test decides. */
function claims(fields = {}) {
  const now = Math.floor(Date.now() / 1000);
  return { iss: "https://id.trigger.dev", aud: "https://api.trigger.dev", sub: environment, pub: true, iat: now, exp: now + 60, ...fields };
}
const appendPath = (io) => `/realtime/v1/sessions/${mine}/${io}/append`;

test("a read token reads its session and writes nothing", async () => {
  await scoped({ read: { sessions: mine } }, async () => {
    assert.equal((await sessions.retrieve(mine)).id, session.id);
    assert.equal((await sessions.retrieve(session.id)).externalId, mine, "either form of the id will do");
    const reader = (await sessions.open(mine).out.read()).getReader();
    assert.deepEqual(await take(reader, 1), ["hello"]);
    await reader.cancel();
    await assert.rejects(sessions.open(mine).in.send("no"), PermissionDeniedError);
    await assert.rejects(sessions.update(mine, { tags: [] }), PermissionDeniedError);
    await assert.rejects(sessions.close(mine), PermissionDeniedError);
    await assert.rejects(sessions.list(), PermissionDeniedError);
    await assert.rejects(sessions.start(sessionBody()), PermissionDeniedError);
  });
});

test("a write token sends to .in, and neither reads nor writes .out", async () => {
  const token = await auth.createPublicToken({ scopes: { write: { sessions: [session.id] } } });
  await as(token, async () => {
    await sessions.open(mine).in.send({ text: "hi" });
    await assert.rejects(sessions.retrieve(mine), PermissionDeniedError);
    const reader = (await sessions.open(mine).out.read()).getReader();
    await assert.rejects(reader.read(), PermissionDeniedError);
  });
  const refusal = await context.json(403, "POST", appendPath("out"), { body: "no", token });
  assert.equal(refusal.ok, false);
  assert.match(refusal.error, /secret key/);
  const anyone = await auth.createPublicToken({ scopes: { write: { all: true } } });
  await context.json(403, "POST", appendPath("out"), { body: "no", token: anyone });
});

test("a token for one session reaches no other, and cannot tell whether it exists", async () => {
  const token = await auth.createPublicToken({ scopes: { read: { sessions: mine }, write: { sessions: mine } } });
  const paths = [
    ["GET", (id) => `/api/v1/sessions/${id}`],
    ["POST", (id) => `/realtime/v1/sessions/${id}/in/append`],
    ["GET", (id) => `/realtime/v1/sessions/${id}/out`],
    ["GET", (id) => `/realtime/v1/sessions/${id}/out/records`],
  ];
  for (const [method, path] of paths) {
    const body = method === "POST" ? "x" : undefined;
    const there = await context.json(403, method, path(other), { token, body });
    for (const absent of [unique("nobody"), "session_nobody"]) {
      assert.deepEqual(await context.json(403, method, path(absent), { token, body }), there, path(absent));
    }
    // One letter off either way is another session.
    await context.json(403, method, path(`${mine}x`), { token, body });
    await context.json(403, method, path(mine.slice(0, -1)), { token, body });
  }
  await as(token, () => assert.rejects(sessions.retrieve(other), PermissionDeniedError));
});

test("a collection scope reaches every session and the list", async () => {
  await scoped({ read: { sessions: true } }, async () => {
    assert.equal((await sessions.retrieve(other)).externalId, other);
    assert.ok((await sessions.list()).data.length >= 2);
    await assert.rejects(sessions.retrieve(unique("nobody")), NotFoundError);
  });
});

test("a task scope starts sessions of that task only", async () => {
  await scoped({ write: { tasks: "assistant" } }, async () => {
    assert.equal((await sessions.start(sessionBody())).isCached, false);
    await assert.rejects(sessions.start(sessionBody({ taskIdentifier: "assistan" })), PermissionDeniedError);
  });
  await scoped({ read: { tasks: "assistant" } }, async () => {
    assert.ok((await sessions.list({ taskIdentifier: "assistant" })).data.length >= 2);
    await assert.rejects(sessions.list({ taskIdentifier: ["assistant", "else"] }), PermissionDeniedError);
    await assert.rejects(sessions.list(), PermissionDeniedError);
  });
});

test("the token that start hands out reads and writes its session", async () => {
  await as(session.publicAccessToken, async () => {
    assert.equal((await sessions.retrieve(mine)).id, session.id);
    await sessions.open(mine).in.send("from the browser");
    await assert.rejects(sessions.retrieve(other), PermissionDeniedError);
  });
});

test("only an admin scope updates and closes, by either id", async () => {
  const doomed = await sessions.start(sessionBody({ externalId: unique("doomed") }));
  for (const scope of [`admin:sessions:${doomed.id}`, `admin:sessions:${doomed.externalId}`]) {
    await as(signToken(claims({ scopes: [scope] })), async () => {
      for (const id of [doomed.id, doomed.externalId]) assert.deepEqual((await sessions.update(id, { tags: [id] })).tags, [id]);
      await assert.rejects(sessions.update(other, { tags: [] }), PermissionDeniedError);
      await assert.rejects(sessions.open(doomed.id).in.send("no"), PermissionDeniedError);
    });
  }
  await as(signToken(claims({ scopes: ["admin"] })), async () => {
    assert.ok((await sessions.close(doomed.externalId)).closedAt instanceof Date);
  });
});

test("withAuth holds inside its callback only, also across awaits", async () => {
  const token = await auth.createPublicToken({ scopes: { read: { sessions: other } } });
  const inside = as(token, async () => {
    await sessions.retrieve(other);
    await assert.rejects(sessions.retrieve(mine), PermissionDeniedError);
  });
  assert.equal((await sessions.retrieve(mine)).id, session.id);
  await inside;
});

test("an expired token is refused", async () => {
  const token = await auth.createPublicToken({ scopes: { read: { sessions: mine } }, expirationTime: Math.floor(Date.now() / 1000) - 5 });
  await as(token, () => assert.rejects(sessions.retrieve(mine), AuthenticationError));
});

test("a stream ends when its token does", async () => {
  const token = await auth.createPublicToken({ scopes: { read: { sessions: mine } }, expirationTime: "2s" });
  const events = await EventReader.open(context, `/realtime/v1/sessions/${mine}/out`, { token, headers: { "Timeout-Seconds": "60" } });
  const started = performance.now();
  await events.rest();
  assert.ok(performance.now() - started < 10_000);
});

test("the SDK's reader ends with the refusal when its token has expired", async () => {
  const token = await auth.createPublicToken({ scopes: { read: { sessions: mine } }, expirationTime: "2s" });
  await as(token, async () => {
    const reader = (await sessions.open(mine).out.read({ timeoutInSeconds: 60 })).getReader();
    assert.deepEqual(await take(reader, 1), ["hello"]);
    await assert.rejects(drain(reader), AuthenticationError);
  });
});

test("the SDK's reader that can renew its token loses no word when one ends", async () => {
  const id = unique("renews");
  await sessions.start(sessionBody({ externalId: id }));
  let made = 0;
  const next = async () => (made++, signToken(claims({ scopes: [`read:sessions:${id}`], exp: Math.floor(Date.now() / 1000) + 2 })));
  const words = Array.from({ length: 60 }, (_, n) => `word ${n}`);
  const options = { baseURL: context.url, accessToken: await next(), refreshAccessToken: next };
  await auth.withAuth(options, async () => {
    const reader = (await sessions.open(id).out.read({ timeoutInSeconds: 60 })).getReader();
    for (const [n, word] of words.entries()) {
      if (n % 20 === 19) await eventually("a new token", () => made > (n + 1) / 20);
      await context.append(id, "out", word);
    }
    assert.deepEqual(await take(reader, 60), words);
    await reader.cancel();
  });
});

test("a token that anyone could have made is refused", async () => {
  const good = claims({ scopes: ["read:sessions"] });
  await context.json(200, "GET", `/api/v1/sessions/${mine}`, { token: signToken(good) });
  const bad = {
    "another key": signToken(good, { key: "tr_dev_another" }),
    "no algorithm": signToken(good, { alg: "none" }),
    "another algorithm": signToken(good, { alg: "HS512" }),
    "another audience": signToken({ ...good, aud: "https://elsewhere.example" }),
    "another issuer": signToken({ ...good, iss: "https://elsewhere.example" }),
    "an unknown environment": signToken({ ...good, sub: "env_unknown" }),
    "no expiry": signToken({ ...good, exp: undefined }),
    "a changed payload": signToken(good).replace(/\.[^.]+\./, `.${Buffer.from(JSON.stringify({ ...good, scopes: ["admin"] })).toString("base64url")}.`),
    "not a token": "a.b.c",
    "an unknown key": "tr_dev_unknown",
  };
  for (const [what, token] of Object.entries(bad)) {
    const response = await context.http("GET", `/api/v1/sessions/${mine}`, { token });
    assert.equal(response.status, 401, what);
    assert.equal(typeof (await response.json()).error, "string", what);
  }
  const { error } = await context.json(401, "GET", `/api/v1/sessions/${mine}`, { token: null });
  assert.equal(error, "Invalid or Missing API key");
});

test("a token without scopes may do nothing", async () => {
  const token = await auth.createPublicToken();
  await as(token, () => assert.rejects(sessions.retrieve(mine), PermissionDeniedError));
});

test("the server mints too, for a secret key only", async () => {
  const scopes = [`read:sessions:${mine}`];
  const jwt = await context.json(200, "POST", "/api/v1/auth/jwt", { body: { claims: { scopes }, expirationTime: "5m" } });
  const minted = await context.json(200, "POST", "/api/v1/auth/public-tokens", { body: { scopes, expirationTime: "5m" } });
  for (const { token } of [jwt, minted]) await as(token, () => sessions.retrieve(mine));
  for (const path of ["/api/v1/auth/jwt", "/api/v1/auth/public-tokens", "/api/v1/auth/jwt/claims"]) {
    const response = await context.http("POST", path, { token: minted.token, body: path.endsWith("claims") ? undefined : { scopes } });
    assert.ok([401, 403].includes(response.status), `${path} answers ${response.status} to a public caller`);
    await response.text();
  }
  await context.json(400, "POST", "/api/v1/auth/public-tokens", { body: { scopes, expirationTime: "31d" } });
});

test("the secret key sees everything", async () => {
  await as(SECRET, async () => assert.equal((await sessions.retrieve(other)).externalId, other));
});
