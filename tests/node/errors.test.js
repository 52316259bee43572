// Errors as the SDK maps them, and what every one of them says.

import assert from "node:assert/strict";
import { test } from "node:test";

import {
  ApiError,
  auth,
  AuthenticationError,
  BadRequestError,
  ConflictError,
  NotFoundError,
  PermissionDeniedError,
  sessions,
  UnprocessableEntityError,
} from "@trigger.dev/sdk";

import { sessionBody, suite, unique } from "./lib/suite.js";

const context = suite();

/** The act fails at once with this class and, if given, this wire word. */
async function fails(kind, act, code) {
  context.requests.length = 0;
  let thrown;
  await assert.rejects(act, (error) => {
    assert.ok(error instanceof kind, `${error.constructor.name}: ${error.message}`);
    assert.ok(error.message.length > 0);
    if (code) assert.equal(error.code, code);
    thrown = error;
    return true;
  });
  assert.equal(context.requests.length, 1, "the SDK retried what cannot get better");
  return thrown;
}

test("what does not exist is NotFoundError", async () => {
  for (const id of [unique("nobody"), "session_nobody", "a/b"]) {
    await fails(NotFoundError, () => sessions.retrieve(id), "not_found");
    await fails(NotFoundError, () => sessions.update(id, { tags: [] }));
    await fails(NotFoundError, () => sessions.close(id));
    await fails(NotFoundError, () => sessions.open(id).in.send("x"));
  }
});

test("bad credentials are AuthenticationError, too small ones PermissionDeniedError", async () => {
  const wrong = { baseURL: context.url, accessToken: "tr_dev_wrong" };
  await auth.withAuth(wrong, () => fails(AuthenticationError, () => sessions.retrieve("x")));
  const token = await auth.createPublicToken({ scopes: { read: { sessions: "y" } } });
  const error = await auth.withAuth({ baseURL: context.url, accessToken: token }, () => fails(PermissionDeniedError, () => sessions.retrieve("x"), "unauthorized"));
  assert.equal(error.type, "authorization");
  assert.equal(error.param, "access_token");
});

test("a broken rule is UnprocessableEntityError, exactly one over its limit", async () => {
  const long = (length) => "x".repeat(length);
  const fields = [
    [{ externalId: `${unique("e")}${long(256)}`.slice(-256) }, { externalId: long(257) }],
    [{ type: long(64) }, { type: long(65) }],
    [{ taskIdentifier: long(128) }, { taskIdentifier: long(129) }],
    [{ tags: Array.from({ length: 10 }, (_, i) => `${i}`) }, { tags: Array.from({ length: 11 }, (_, i) => `${i}`) }],
    [{ tags: [long(128)] }, { tags: [long(129)] }],
  ];
  for (const [allowed, refused] of fields) {
    await sessions.start(sessionBody(allowed));
    await fails(UnprocessableEntityError, () => sessions.start(sessionBody(refused)), "validation_failed");
  }
  await fails(UnprocessableEntityError, () => sessions.start(sessionBody({ type: "" })));
  const { id } = await sessions.start(sessionBody());
  assert.equal((await sessions.close(id, { reason: long(256) })).closedReason, long(256));
  await fails(UnprocessableEntityError, () => sessions.close(id, { reason: long(257) }));
});

test("what cannot be read is BadRequestError", async () => {
  await fails(BadRequestError, () => sessions.start(sessionBody({ tags: "not a list" })));
  await fails(BadRequestError, () => sessions.start(sessionBody({ metadata: "not an object" })));
  await fails(BadRequestError, () => sessions.start(sessionBody({ type: 7 })));
  await fails(BadRequestError, () => sessions.start(sessionBody({ taskIdentifier: undefined })));
  for (const body of ["", "{", "null", "[]", '"text"']) {
    const { error } = await context.json(400, "POST", "/api/v1/sessions", { body });
    assert.equal(typeof error, "string", body);
  }
});

test("a closed externalId is ConflictError", async () => {
  const externalId = unique("closed");
  await sessions.start(sessionBody({ externalId }));
  await sessions.close(externalId);
  const error = await fails(ConflictError, () => sessions.start(sessionBody({ externalId })));
  assert.match(error.message, /^Session is closed; use a different externalId/);
  assert.equal(error.headers["x-should-retry"], "false");
});

test("an append to a closed session says so, in each direction's own way", async () => {
  const externalId = unique("sealed");
  await sessions.start(sessionBody({ externalId }));
  await sessions.close(externalId, { reason: "over" });
  const error = await fails(ConflictError, () => sessions.open(externalId).in.send("late"), "session_closed");
  assert.equal(error.body.closedReason, "over");
  assert.equal(error.body.ok, false);
  const response = await context.http("POST", `/realtime/v1/sessions/${externalId}/out/append`, { body: "late" });
  assert.equal(response.status, 400);
  assert.equal(response.headers.get("x-should-retry"), "false");
  const body = await response.json();
  assert.deepEqual([body.ok, body.code, body.closedReason], [false, "session_closed", "over"]);
  assert.match(body.error, /closed/);
});

test("an append to an expired session is BadRequestError", async () => {
  const externalId = unique("stale");
  await sessions.start(sessionBody({ externalId, expiresAt: new Date(Date.now() + 500) }));
  // Appends are accepted until the moment itself, so the refusal is what we wait for.
  for (;;) {
    const refused = await sessions.open(externalId).in.send("x").then(() => undefined, (error) => error);
    if (!refused) continue;
    assert.ok(refused instanceof BadRequestError, String(refused));
    assert.equal(refused.code, "session_expired");
    break;
  }
});

test("a record may fill a mebibyte and not a byte more", async () => {
  const externalId = unique("large");
  await sessions.start(sessionBody({ externalId }));
  // Overhead of the stored record: 8, and the envelope around the text.
  const room = 1_048_576 - 8 - Buffer.byteLength('{"data":"","id":"part"}');
  await context.append(externalId, "in", "x".repeat(room), { partId: "part" });
  const path = `/realtime/v1/sessions/${externalId}/in/append`;
  const over = await context.json(413, "POST", path, { body: "x".repeat(room + 1), headers: { "X-Part-Id": "part" } });
  assert.equal(over.ok, false);
  await context.json(413, "POST", path, { body: "x".repeat(1_048_577) });
  // Each of these is two bytes once it is written as JSON.
  await context.json(413, "POST", path, { body: '"'.repeat(600_000) });
  const { records } = await context.json(200, "GET", `/realtime/v1/sessions/${externalId}/in/records`);
  assert.equal(records.length, 1, "what was refused is not stored");
});

test("a control body may have 32 KiB and not a byte more", async () => {
  const body = (length) => {
    const empty = JSON.stringify(sessionBody({ metadata: { pad: "" } }));
    return empty.replace('"pad":""', `"pad":"${"x".repeat(length - empty.length)}"`);
  };
  await context.json(201, "POST", "/api/v1/sessions", { body: body(32_768) });
  await context.json(413, "POST", "/api/v1/sessions", { body: body(32_769) });
});

test("every error names its kind", async () => {
  const response = await context.http("GET", `/api/v1/sessions/${unique("nobody")}`);
  assert.equal(response.headers.get("content-type"), "application/json");
  const { error, code } = await response.json();
  assert.deepEqual([typeof error, code], ["string", "not_found"]);
  await assert.rejects(sessions.retrieve("session_x"), ApiError);
});

test("a page of another origin may call the API", async () => {
  const headers = {
    Origin: "https://app.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,trigger-version,x-part-id,last-event-id",
  };
  const preflight = await context.http("OPTIONS", "/realtime/v1/sessions/x/in/append", { headers, token: null });
  assert.ok(preflight.ok);
  assert.equal(preflight.headers.get("access-control-allow-origin"), "https://app.example");
  for (const method of ["GET", "PUT", "PATCH", "POST"]) assert.ok(preflight.headers.get("access-control-allow-methods").includes(method));
  const allowed = preflight.headers.get("access-control-allow-headers").toLowerCase();
  for (const name of headers["Access-Control-Request-Headers"].split(",")) assert.ok(allowed.includes(name), name);
  const refused = await context.http("GET", "/api/v1/sessions", { headers: { Origin: "https://app.example" }, token: null });
  assert.equal(refused.status, 401);
  assert.equal(refused.headers.get("access-control-allow-origin"), "https://app.example", "an error is readable too");
});

test("the document describes every route of a session", () => {
  const session = "/api/v1/sessions";
  const channel = "/realtime/v1/sessions/{}";
  const routes = [
    `GET ${session}`, `POST ${session}`, `GET ${session}/{}`, `PATCH ${session}/{}`, `POST ${session}/{}/close`,
    "POST /api/v1/auth/jwt/claims", "POST /api/v1/auth/jwt", "POST /api/v1/auth/public-tokens",
    ...["/{}", "/channels/{}/{}"].flatMap((io) => [
      `GET ${channel}${io}`, `HEAD ${channel}${io}`, `PUT ${channel}${io}`, `POST ${channel}${io}/append`, `GET ${channel}${io}/records`,
    ]),
  ];
  const described = new Set(context.conformance.operations().map((operation) => operation.replace(/\{[^}]*\}/g, "{}")));
  assert.deepEqual(routes.filter((route) => !described.has(route)), []);
});
