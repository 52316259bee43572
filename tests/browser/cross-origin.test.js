// Pages of other origins: the one that the server allows reads everything, any other reads nothing.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";

import { SECRET, Server } from "../node/lib/server.js";
import { launch, Page } from "./lib/browser.js";
import { Origin } from "./lib/origin.js";

const QUERY = "{ viewer { tokenKind } }";
const FOLLOW = 'subscription { channelRecords(by: {externalId: "shared"}, io: OUT) { caughtUp endCursor } }';

let browser, server;
const origins = {};

before(async () => {
  browser = await launch();
  for (const name of ["friend", "stranger"]) origins[name] = await Origin.start();
  server = await Server.start({ SESSIOND_HTTP__CORS_ORIGINS: `["${origins.friend.url}"]` });
  const created = await fetch(`${server.baseUrl}/api/v1/sessions`, {
    method: "POST",
    headers: { Authorization: `Bearer ${SECRET}`, "Content-Type": "application/json" },
    body: JSON.stringify({ type: "chat", externalId: "shared", taskIdentifier: "demo" }),
  });
  assert.ok(created.ok, `create: ${created.status}`);
});

after(async () => {
  await browser?.close();
  await server?.remove();
  Object.values(origins).forEach((origin) => origin.stop());
});

/** Runs `script` in a page of that origin; an exception is its answer too. */
async function from(name, script) {
  const { page, close } = await opened(origins[name].url);
  try {
    return await page.evaluate(script, { endpoint: `${server.baseUrl}/graphql`, token: SECRET, QUERY, FOLLOW });
  } finally {
    await close();
  }
}

async function opened(url) {
  const watched = await Page.open(browser);
  await watched.page.goto(url);
  return { page: watched.page, close: () => watched.close() };
}

// These run in the page. Each answers the text that the page could read, or the name of what stopped it.

async function post({ endpoint, token, QUERY }) {
  const headers = { Authorization: `Bearer ${token}`, "Content-Type": "application/json" };
  const asking = fetch(endpoint, { method: "POST", headers, body: JSON.stringify({ query: QUERY }) });
  return asking.then((response) => response.text()).catch((error) => error.name);
}

async function get({ endpoint, token, QUERY }) {
  const asking = fetch(`${endpoint}?query=${encodeURIComponent(QUERY)}`, { headers: { Authorization: `Bearer ${token}` } });
  return asking.then((response) => response.text()).catch((error) => error.name);
}

async function events({ endpoint, token, FOLLOW }) {
  const headers = { Authorization: `Bearer ${token}`, "Content-Type": "application/json", Accept: "text/event-stream" };
  try {
    const response = await fetch(endpoint, { method: "POST", headers, body: JSON.stringify({ query: FOLLOW }) });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    while (!text.includes("caughtUp")) {
      const { done, value } = await reader.read();
      if (done) break;
      text += value;
    }
    await reader.cancel();
    return text;
  } catch (error) {
    return error.name;
  }
}

function socket({ endpoint, token, FOLLOW }) {
  return new Promise((resolve) => {
    const socket = new WebSocket(endpoint.replace("http", "ws"), "graphql-transport-ws");
    const send = (message) => socket.send(JSON.stringify(message));
    let opened = false;
    socket.onopen = () => {
      opened = true;
      send({ type: "connection_init", payload: { authorization: `Bearer ${token}` } });
    };
    socket.onmessage = ({ data }) => {
      const { type } = JSON.parse(data);
      if (type === "connection_ack") send({ id: "1", type: "subscribe", payload: { query: FOLLOW } });
      if (type === "next" || type === "error") {
        resolve(data);
        socket.close();
      }
    };
    socket.onclose = ({ code }) => resolve(opened ? `closed ${code}` : "never open");
  });
}

test("a page of an allowed origin reads answers, events and a socket", async () => {
  assert.match(await from("friend", post), /"tokenKind":"ROOT_KEY"/);
  assert.match(await from("friend", get), /"tokenKind":"ROOT_KEY"/);
  assert.match(await from("friend", events), /event: next[^]*"caughtUp":true/);
  assert.match(await from("friend", socket), /"type":"next"[^]*"caughtUp":true/);
});

test("a page of another origin reads nothing, not even with the token", async () => {
  assert.equal(await from("stranger", post), "TypeError");
  assert.equal(await from("stranger", get), "TypeError");
  assert.equal(await from("stranger", events), "TypeError");
  assert.equal(await from("stranger", socket), "never open");
});

test("no other site may show the playground in a frame", async () => {
  const { page, close } = await opened(origins.friend.url);
  const refused = page.waitForEvent("console", (message) => /frame-ancestors/.test(message.text()));
  await page.evaluate((url) => {
    document.body.append(Object.assign(document.createElement("iframe"), { src: url }));
  }, `${server.baseUrl}/playground/`);
  await refused;
  await close();
});
