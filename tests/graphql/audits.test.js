// GraphQL over HTTP, as the audits of its reference implementation read the specification.

import assert from "node:assert/strict";
import { test } from "node:test";

import { serverAudits } from "graphql-http";

import { bearer, SECRET, suite } from "./lib/suite.js";

const context = suite();

for (const [who, token] of [["anonymous", null], ["with a key", SECRET]]) {
  const fetchFn = (input, init) => fetch(input, { ...init, headers: { ...init?.headers, ...bearer(token) } });
  const audits = serverAudits({ url: () => context.url, fetchFn });

  test(`${who}: there are 61 audits`, () => assert.equal(audits.length, 61));

  for (const audit of audits) {
    test(`${who}: ${audit.id} ${audit.name}`, async () => {
      const result = await audit.fn();
      const body = result.response && (await result.response.text().catch(() => "(read)"));
      assert.equal(result.status, "ok", `${result.reason}; ${result.response?.status} ${body}`);
    });
  }
}
