// How the playground is served, without a browser.

import assert from "node:assert/strict";
import { request } from "node:http";
import { after, before, test } from "node:test";
import { gunzipSync } from "node:zlib";

import { Server } from "../node/lib/server.js";

let server;

before(async () => {
  server = await Server.start();
});

after(() => server?.remove());

/** As `fetch`, which would decompress and follow. */
function ask(method, path, headers = {}) {
  return new Promise((resolve, reject) => {
    const asking = request(server.baseUrl + path, { method, headers }, (response) => {
      const pieces = [];
      response.on("data", (piece) => pieces.push(piece)).on("error", reject);
      response.on("end", () => resolve({ status: response.statusCode, headers: response.headers, body: Buffer.concat(pieces) }));
    });
    asking.on("error", reject).end();
  });
}

async function assets() {
  const page = (await ask("GET", "/playground/")).body.toString();
  const found = [...page.matchAll(/(?:src|href)="\.\/(assets\/[^"]+)"/g)].map((match) => `/playground/${match[1]}`);
  assert.ok(found.length > 0, `no playground in this binary; run cargo xtask playground, then build:\n${page}`);
  return found;
}

test("the page is found with and without its last slash, and is asked for anew each time", async () => {
  const short = await ask("GET", "/playground");
  assert.equal(short.status, 308);
  assert.equal(new URL(short.headers.location, `${server.baseUrl}/playground`).pathname, "/playground/");
  const page = await ask("GET", "/playground/");
  assert.equal(page.status, 200);
  assert.equal(page.headers["content-type"], "text/html; charset=utf-8");
  assert.equal(page.headers["cache-control"], "no-cache");
  assert.match(page.body.toString(), /<title>sessiond playground<\/title>/);
  const again = await ask("GET", "/playground/", { "If-None-Match": page.headers.etag });
  assert.equal(again.status, 304);
  assert.equal(again.body.length, 0);
});

test("the policy allows our own files and nothing else", async () => {
  for (const path of ["/playground/", ...(await assets())]) {
    const { headers } = await ask("GET", path);
    const policy = new Map(headers["content-security-policy"].split(/; */).map((rule) => [rule.split(" ")[0], rule]));
    assert.equal(policy.get("default-src"), "default-src 'none'", path);
    assert.equal(policy.get("script-src"), "script-src 'self'", path);
    assert.equal(policy.get("connect-src"), "connect-src 'self'", path);
    for (const name of ["frame-ancestors", "base-uri", "form-action"]) assert.equal(policy.get(name), `${name} 'none'`, path);
    assert.equal(headers["x-content-type-options"], "nosniff", path);
    assert.equal(headers["referrer-policy"], "no-referrer", path);
  }
});

test("a file is the same with gzip and without, and is kept for ever", async () => {
  for (const path of await assets()) {
    const plain = await ask("GET", path);
    const packed = await ask("GET", path, { "Accept-Encoding": "gzip, br" });
    assert.equal(plain.headers["content-encoding"], undefined);
    assert.equal(Number(plain.headers["content-length"]), plain.body.length);
    assert.equal(packed.headers["content-encoding"], "gzip");
    assert.ok(gunzipSync(packed.body).equals(plain.body), path);
    assert.match(packed.headers["cache-control"], /max-age=31536000, immutable/);
    assert.match(packed.headers.vary, /Accept-Encoding/);
    const head = await ask("HEAD", path, { "Accept-Encoding": "gzip" });
    assert.equal(head.status, 200);
    assert.equal(head.body.length, 0);
    assert.equal(Number(head.headers["content-length"]), packed.body.length);
  }
});

test("what is not there is refused as everywhere else", async () => {
  for (const path of ["/playground/assets/none.js", "/playground/%2e%2e/Cargo.toml", "/playground/assets/"]) {
    const { status, headers, body } = await ask("GET", path);
    assert.equal(status, 404, path);
    assert.equal(headers["content-type"], "application/json");
    assert.equal(JSON.parse(body).code, "not_found");
  }
  assert.equal((await ask("POST", "/playground/")).status, 405);
});
