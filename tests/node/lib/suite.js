// What every test file starts with: a fresh server, the SDK pointed at it, and a watch on every answer.

import assert from "node:assert/strict";
import { createHmac, randomUUID } from "node:crypto";
import { after, afterEach, before } from "node:test";
import { setTimeout as delay } from "node:timers/promises";

import { Conformance } from "./openapi.js";
import { SECRET, Server } from "./server.js";

// The SDK reads these, and CI machines set some of them.
for (const name of Object.keys(process.env)) {
  if (/^(TRIGGER_|VERCEL_|GITHUB_SHA)/.test(name)) delete process.env[name];
}
const { configure } = await import("@trigger.dev/sdk");
const rawFetch = globalThis.fetch;

/**
 * Registers the hooks of a test file and answers what its tests use. `prepare` runs once the server is up, `settings`
 * before: it answers the server's.
 */
export function suite(prepare = async () => {}, settings = async () => ({})) {
  const context = new Context();
  // One hook, because several do not wait for each other.
  before(async () => {
    await context.start(await settings());
    await prepare();
  });
  afterEach(() => context.settle());
  after(() => context.end());
  return context;
}

class Context {
  server;
  conformance;
  /** `{method, path, status}` of every answer since the test began. */
  requests = [];

  get url() {
    return this.server.baseUrl;
  }

  async start(settings) {
    this.server = await Server.start(settings);
    this.conformance = await Conformance.load(this.url);
    globalThis.fetch = (input, init) => this.#watched(input, init);
    configure({ baseURL: this.url, accessToken: SECRET });
  }

  async end() {
    globalThis.fetch = rawFetch;
    await this.server?.remove();
  }

  settle() {
    this.requests.length = 0;
    assert.deepEqual(this.conformance?.take() ?? [], [], "answers that differ from /openapi.json");
  }

  async #watched(input, init) {
    const request = new URL(input instanceof Request ? input.url : input);
    const method = init?.method ?? (input instanceof Request ? input.method : "GET");
    const response = await rawFetch(input, init);
    if (request.origin === this.url) {
      this.requests.push({ method, path: request.pathname, status: response.status });
      // A preflight belongs to CORS, not to the API.
      if (method !== "OPTIONS") await this.conformance.check(method, request.pathname, response);
    }
    return response;
  }

  /** A request without the SDK. A JSON body may be given as an object; the token defaults to the secret key. */
  async http(method, path, { body, token = SECRET, headers = {}, signal } = {}) {
    const authorization = token === null ? {} : { Authorization: `Bearer ${token}` };
    return fetch(this.url + path, {
      method,
      signal,
      headers: { ...authorization, "Content-Type": "application/json", ...headers },
      body: typeof body === "object" ? JSON.stringify(body) : body,
    });
  }

  /** As `http`, and reads the JSON answer, whose status must be the one expected. */
  async json(expected, method, path, options) {
    const response = await this.http(method, path, options);
    const text = await response.text();
    assert.equal(response.status, expected, `${method} ${path}: ${text}`);
    return text === "" ? undefined : JSON.parse(text);
  }

  /** Appends one record; answers its sequence number. */
  async append(session, io, body, { token, partId, channel } = {}) {
    const side = channel === undefined ? "" : `/channels/${channel}`;
    const path = `/realtime/v1/sessions/${encodeURIComponent(session)}${side}/${io}/append`;
    const headers = partId === undefined ? {} : { "X-Part-Id": partId };
    const answer = await this.json(200, "POST", path, { body, token, headers });
    assert.equal(answer.ok, true);
    return answer.seq;
  }
}

/** A name that no other test uses. */
export function unique(name) {
  return `${name}-${randomUUID()}`;
}

/** What `sessions.start` needs at least. */
export function sessionBody(fields = {}) {
  return {
    type: "chat.agent",
    taskIdentifier: "assistant",
    triggerConfig: { basePayload: { hello: "world" } },
    ...fields,
  };
}

/** Signs claims as the SDK does, but lets a test choose every one of them. */
export function signToken(claims, { key = SECRET, alg = "HS256" } = {}) {
  const encode = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");
  const signed = `${encode({ alg })}.${encode(claims)}`;
  const signature = alg === "none" ? "" : createHmac("sha256", key).update(signed).digest("base64url");
  return `${signed}.${signature}`;
}

/** Waits until `look` answers something other than undefined or false. */
export async function eventually(what, look, withinMs = 15_000) {
  const deadline = performance.now() + withinMs;
  while (performance.now() < deadline) {
    const seen = await look();
    if (seen !== undefined && seen !== false) return seen;
    await delay(20);
  }
  assert.fail(`${what} did not happen in ${withinMs} ms`);
}

/** The first `count` values of a stream, which stays open. */
export async function take(reader, count) {
  const values = [];
  while (values.length < count) {
    const { done, value } = await reader.read();
    assert.equal(done, false, `the stream ended after ${values.length} of ${count} values`);
    values.push(value);
  }
  return values;
}

/** Every value up to the clean end of a stream. */
export async function drain(reader) {
  const values = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return values;
    values.push(value);
  }
}

export { SECRET, delay };
