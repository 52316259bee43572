// Pages of other origins write to `.in` directly, with a public token and S2's client, which uses fetch in a browser.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";

import { build } from "vite";

import { SECRET, Server } from "../node/lib/server.js";
import { launch, Page } from "./lib/browser.js";
import { Origin } from "./lib/origin.js";

const CLIENTS = { "/pinned.js": "@s2-dev/streamstore", "/newest.js": "streamstore-newest" };

let browser, server;
const origins = {};

before(async () => {
  const scripts = {};
  for (const [path, name] of Object.entries(CLIENTS)) scripts[path] = await bundled(name);
  browser = await launch();
  for (const name of ["friend", "stranger"]) origins[name] = await Origin.start(scripts);
  server = await Server.start({ SESSIOND_HTTP__CORS_ORIGINS: `["${origins.friend.url}"]` });
});

after(async () => {
  await browser?.close();
  await server?.remove();
  Object.values(origins).forEach((origin) => origin.stop());
});

/** `lib/writer.js` for a page, with one version of the client. */
async function bundled(client) {
  const entry = fileURLToPath(new URL("lib/writer.js", import.meta.url));
  const [{ output }] = await build({
    configFile: false,
    logLevel: "error",
    resolve: { alias: { "@s2-dev/streamstore": client } },
    build: { write: false, minify: false, lib: { entry, formats: ["es"] }, rolldownOptions: { output: { codeSplitting: false } } },
  });
  assert.equal(output.length, 1);
  return output[0].code;
}

async function asked(method, path, body) {
  const response = await fetch(server.baseUrl + path, {
    method,
    headers: { Authorization: `Bearer ${SECRET}`, "Content-Type": "application/json" },
    body: body && JSON.stringify(body),
  });
  const text = await response.text();
  assert.ok(response.ok, `${method} ${path}: ${response.status} ${text}`);
  return JSON.parse(text);
}

/** A session with a public token that reads and writes it. */
async function started() {
  const { id } = await asked("POST", "/api/v1/sessions", { type: "chat", taskIdentifier: "demo" });
  const scopes = [`read:sessions:${id}`, `write:sessions:${id}`];
  const { token } = await asked("POST", "/api/v1/auth/public-tokens", { scopes });
  return { url: server.baseUrl, session: id, token };
}

/** Calls a function of `lib/writer.js` in a page. */
async function from(name, script, call, ...args) {
  const watched = await Page.open(browser);
  try {
    await watched.page.goto(origins[name].url);
    await watched.page.exposeFunction("closeSession", () => asked("POST", `/api/v1/sessions/${args[0].session}/close`, {}));
    return await watched.page.evaluate(
      async ({ script, call, args }) => (await import(script))[call](...args),
      { script, call, args },
    );
  } finally {
    await watched.close();
  }
}

for (const [script, client] of Object.entries(CLIENTS)) {
  test(`a page writes to .in and reads it back (${client})`, async () => {
    const server = await started();
    const seen = await from("friend", script, "converse", server);
    assert.equal(seen.status, 202);
    assert.deepEqual(
      seen.names.sort(),
      ["access-token", "basin", "endpoint", "flush-interval-ms", "max-retries", "stream-name"].map((name) => `x-s2-${name}`),
      "a page may read them",
    );
    const numbers = Array.from({ length: 20 }, (_, n) => n);
    assert.equal(seen.start, 0);
    assert.deepEqual(seen.acks, numbers.map((n) => n + 3));
    assert.equal(seen.tail, 23);
    assert.deepEqual(seen.read, ["unary", "again", "bytes", ...numbers]);
    assert.equal(Buffer.from(seen.bytes).toString(), '{"data":"bytes","id":"c"}');
    assert.deepEqual(seen.followed, [17, 18, 19, "live"]);
    const { records } = await asked("GET", `/realtime/v1/sessions/${server.session}/in/records`);
    assert.deepEqual(records.map(({ data }) => data), [...seen.read, "live"], "what any other reader has");
  });

  test(`a page can read why it is refused (${client})`, async () => {
    const refused = await from("friend", script, "refusals", await started());
    const reasons = Object.fromEntries(Object.entries(refused).map(([what, { status, code }]) => [what, `${status} ${code}`]));
    assert.deepEqual(reasons, {
      trim: "403 permission_denied",
      control: "403 permission_denied",
      elsewhere: "403 permission_denied",
      nonsense: "401 authn",
      displaced: "412 APPEND_CONDITION_FAILED",
      unwritten: "416 undefined",
      closed: "409 session_closed",
    });
    assert.ok(Object.values(refused).every(({ isS2Error }) => isS2Error));
    assert.ok(refused.unwritten.isItsOwn);
  });
}

test("a page cannot initialize .out, and can read that", async () => {
  const { value } = await from("friend", "/pinned.js", "initialized", await started(), "out");
  assert.equal(value.status, 403);
  assert.match(value.body.error, /secret key/);
});

test("a page of an origin that is not allowed initializes nothing", async () => {
  const seen = await from("stranger", "/pinned.js", "initialized", await started(), "in");
  assert.equal(seen.name, "TypeError");
});
