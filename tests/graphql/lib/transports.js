// The ways in which an operation reaches /graphql, each without a client, so that a test sees what the server says.
//
// Each answers an Outcome: `{ results, complete, status, type, closeCode }`. `results` are GraphQL results in their
// order (a WebSocket `error` message counts as a result of errors alone); `complete` says whether the transport's own
// sign of the end came; `status` and `type` are those of the HTTP answer, `closeCode` that of a socket closed on us.

import assert from "node:assert/strict";
import { once } from "node:events";

import WebSocket from "ws";

import { bearer } from "./suite.js";

const MULTIPART = 'multipart/mixed;subscriptionSpec="1.0", application/json';
const WITHIN_MS = 15_000;

export const transports = {
  post: { subscriptions: false, mutations: true, run: (url, operation, token) => byPost(url, operation, token, "application/json") },
  "post, graphql-response": {
    subscriptions: false,
    mutations: true,
    run: (url, operation, token) => byPost(url, operation, token, "application/graphql-response+json"),
  },
  get: { subscriptions: false, mutations: false, run: byGet },
  ws: { subscriptions: true, mutations: true, run: byWebSocket },
  sse: { subscriptions: true, mutations: true, run: (url, operation, token) => byPost(url, operation, token, "text/event-stream") },
  "sse by get": { subscriptions: true, mutations: false, run: (url, operation, token) => byGet(url, operation, token, "text/event-stream") },
  multipart: { subscriptions: true, mutations: true, run: (url, operation, token) => byPost(url, operation, token, MULTIPART) },
};

function byPost(url, operation, token, accept) {
  const headers = { accept, "content-type": "application/json", ...bearer(token) };
  return answered(fetch(url, { method: "POST", headers, body: JSON.stringify(operation), signal: AbortSignal.timeout(WITHIN_MS) }));
}

function byGet(url, { query, variables, operationName }, token, accept = "application/json") {
  const asked = new URL(url);
  asked.searchParams.set("query", query);
  if (variables) asked.searchParams.set("variables", JSON.stringify(variables));
  if (operationName) asked.searchParams.set("operationName", operationName);
  return answered(fetch(asked, { headers: { accept, ...bearer(token) }, signal: AbortSignal.timeout(WITHIN_MS) }));
}

async function answered(request) {
  const response = await request;
  const type = response.headers.get("content-type");
  const body = await response.text();
  const read = type.startsWith("text/event-stream") ? fromEvents : type.startsWith("multipart/mixed") ? fromParts : fromJson;
  return { status: response.status, type, ...read(body, type) };
}

function fromJson(body) {
  return { results: [JSON.parse(body)], complete: true };
}

function fromEvents(body) {
  const results = [];
  let complete = false;
  for (const block of body.split(/\r?\n\r?\n/)) {
    const lines = block.split(/\r?\n/).filter((line) => line !== "" && !line.startsWith(":"));
    if (lines.length === 0) continue;
    assert.equal(complete, false, "something after complete");
    const field = (name) => lines.filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1).trimStart()).join("\n");
    if (field("event") === "complete") complete = true;
    else {
      assert.equal(field("event"), "next", block);
      results.push(JSON.parse(field("data")));
    }
  }
  return { results, complete };
}

/** Parts of Apollo's multipart subscription protocol: `{}` is a heartbeat, `payload` a result, `payload: null` none. */
function fromParts(body, type) {
  const boundary = /boundary="?([^";]+)"?/.exec(type)?.[1] ?? "-";
  const [preamble, ...parts] = `\r\n${body}`.split(`\r\n--${boundary}`);
  assert.equal(preamble.trim(), "", "something before the first part");
  const complete = parts.at(-1)?.trimEnd() === "--";
  if (complete) parts.pop();
  const results = [];
  for (const part of parts) {
    if (part.trim() === "") continue;
    const [head, text] = part.split(/\r\n\r\n([\s\S]*)/);
    assert.match(head, /content-type:\s*application\/json/i);
    const value = JSON.parse(text);
    assert.equal(value.errors, undefined, "an error of the transport");
    if (value.payload) results.push(value.payload);
  }
  return { results, complete };
}

async function byWebSocket(url, operation, token) {
  const socket = new WebSocket(url.replace(/^http/, "ws"), "graphql-transport-ws");
  const results = [];
  let complete = false;
  socket.on("message", (data) => {
    const { type, id, payload } = JSON.parse(data);
    if (type === "connection_ack") socket.send(JSON.stringify({ id: "1", type: "subscribe", payload: operation }));
    if (type === "ping") socket.send('{"type":"pong"}');
    if (id !== "1") return;
    if (type === "next") results.push(payload);
    if (type === "error") results.push({ errors: payload });
    if (type === "complete") complete = true;
    if (type === "complete" || type === "error") socket.close(1000);
  });
  socket.on("open", () => socket.send(JSON.stringify({ type: "connection_init", ...(token !== null && { payload: bearer(token) }) })));
  const [code] = await once(socket, "close", { signal: AbortSignal.timeout(WITHIN_MS) });
  return { results, complete, closeCode: complete || results.length > 0 ? undefined : code };
}
