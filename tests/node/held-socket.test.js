// Restarts behind a socket that somebody else holds: who connects meanwhile waits.

import assert from "node:assert/strict";
import { test } from "node:test";

import { numbered, started, stored } from "./lib/direct.js";
import { delay, eventually, suite } from "./lib/suite.js";

const context = suite(undefined, async () => ({ held: true }));

test("the SDK's writer outlives three seconds without a server: every record once", async () => {
  const { handle, externalId } = await started("held");
  const count = 200;
  let restarted = false;
  async function* source() {
    for (const chunk of numbered(0, count)) {
      // Some are written before, some while nobody runs, and the last ones only once somebody does again.
      if (chunk.n === 150) await eventually("the next server", () => restarted);
      yield chunk;
      await delay(10);
    }
  }
  const { waitUntilComplete } = handle.out.pipe(source());
  await eventually("the first records", async () => (await stored(context, externalId)).length > 20);
  await context.server.stop();
  // How long it is away is the thing tested.
  await delay(3000);
  await context.server.restart();
  restarted = true;
  await waitUntilComplete();
  assert.deepEqual((await stored(context, externalId)).map(({ data }) => data), numbered(0, count));
});
