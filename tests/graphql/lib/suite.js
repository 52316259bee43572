// What every test file starts with: a fresh server, plain requests to its /graphql, and things to ask for.

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { after, before } from "node:test";
import { setTimeout as delay } from "node:timers/promises";

import { SECRET, Server } from "../../node/lib/server.js";
import { text } from "./documents.js";

/** The schema as the repository has it. */
export const SCHEMA_FILE = new URL("../../../schema.graphql", import.meta.url);
export const WRONG_TOKEN = "tr_dev_thiskeyopensnothing00000000";

/** Registers the hooks of a test file and answers what its tests use. `prepare` runs once the server is up. */
export function suite(prepare = async () => {}, settings = {}) {
  const context = new Context();
  // One hook, because several do not wait for each other.
  before(async () => {
    context.server = await Server.start(settings);
    await prepare();
  });
  after(() => context.server?.remove());
  return context;
}

class Context {
  server;

  get url() {
    return `${this.server.baseUrl}/graphql`;
  }

  get wsUrl() {
    return this.url.replace(/^http/, "ws");
  }

  /** Posts one operation; answers the whole result. */
  async post(query, variables, { token = SECRET, headers = {}, signal } = {}) {
    const response = await fetch(this.url, {
      method: "POST",
      signal,
      headers: { "content-type": "application/json", accept: "application/json", ...bearer(token), ...headers },
      body: JSON.stringify({ query, variables }),
    });
    return response.json();
  }

  /** Runs an operation of documents.graphql that must succeed; answers its data. */
  async run(name, variables, options) {
    const result = await this.post(text(name), variables, options);
    assert.equal(result.errors, undefined, `${name}: ${JSON.stringify(result.errors)}`);
    return result.data;
  }

  /** Runs a mutation that must leave no user error; answers its payload. */
  async mutate(name, input, options) {
    const [payload] = Object.values(await this.run(name, { input }, options));
    assert.deepEqual(payload.userErrors, [], name);
    return payload;
  }

  /** A new session. */
  async session(fields = {}) {
    const input = { type: "chat.agent", taskIdentifier: "assistant", externalId: unique("session"), ...fields };
    return (await this.mutate("CreateSession", input)).session;
  }

  /** Appends to `.out` one record for each value. */
  async append({ sessionId }, values, { io = "OUT", ...fields } = {}) {
    const records = values.map((data) => ({ data }));
    return this.mutate("AppendRecords", { by: { sessionId }, io, records, ...fields });
  }

  async close({ sessionId }, reason) {
    return this.mutate("CloseSession", { by: { sessionId }, reason });
  }

  async publicToken(...scopes) {
    return (await this.mutate("CreatePublicToken", { scopes })).token;
  }
}

/** The header that shows a token; none for null. */
export function bearer(token = SECRET) {
  return token === null ? {} : { authorization: `Bearer ${token}` };
}

/** A name that no other test uses. */
export function unique(name) {
  return `${name}-${randomUUID()}`;
}

/** A fetch that notes what was asked and what came. */
export function watchedFetch() {
  const seen = [];
  const watched = async (input, init) => {
    const request = new Request(input, init);
    const body = request.method === "POST" ? JSON.parse(await request.clone().text()) : undefined;
    const response = await fetch(input, init);
    seen.push({ method: request.method, url: new URL(request.url), body, status: response.status, type: response.headers.get("content-type") });
    return response;
  };
  return Object.assign(watched, { seen });
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

/** What an observable (of any of the clients) gave out: `next(count)` waits, `end()` waits for complete or error. */
export class Collector {
  values = [];
  error;
  completed = false;
  #wake = new Set();

  /** The observer to subscribe with. */
  get observer() {
    return {
      next: (value) => this.#note(() => this.values.push(value)),
      error: (error) => this.#note(() => (this.error = error)),
      complete: () => this.#note(() => (this.completed = true)),
    };
  }

  #note(change) {
    change();
    for (const wake of this.#wake) wake();
  }

  async #until(what, ready, withinMs = 15_000) {
    const deadline = AbortSignal.timeout(withinMs);
    while (!ready()) {
      if (deadline.aborted) assert.fail(`no ${what} in ${withinMs} ms, but ${JSON.stringify(this.values)}`);
      await new Promise((resolve) => {
        const wake = () => {
          this.#wake.delete(wake);
          deadline.removeEventListener("abort", wake);
          resolve();
        };
        this.#wake.add(wake);
        deadline.addEventListener("abort", wake);
      });
    }
  }

  /** Waits until `count` values have come, or one that `ready` likes. */
  async until(what, ready) {
    await this.#until(what, () => ready(this.values) || this.error !== undefined || this.completed);
    if (!ready(this.values)) throw this.error ?? new Error(`the end came before ${what}`);
    return this.values;
  }

  /** Waits for the error that must come. */
  async failure() {
    await this.#until("error", () => this.error !== undefined || this.completed);
    assert.notEqual(this.error, undefined, `completed after ${JSON.stringify(this.values)}`);
    return this.error;
  }

  /** Waits for the completion that must come; answers all values. */
  async all() {
    await this.#until("completion", () => this.error !== undefined || this.completed);
    if (this.error !== undefined) throw this.error;
    return this.values;
  }
}

/** The data of the records in a list of channel events; control records, such as the one that tells of a close, have none. */
export function recordsOf(events) {
  return events.flatMap(({ records }) => records.map(({ data }) => data)).filter((data) => data !== null);
}

export { SECRET, delay };
