// Listing as the SDK drives it: every filter, and pages in both directions.

import assert from "node:assert/strict";
import { test } from "node:test";

import { BadRequestError, sessions } from "@trigger.dev/sdk";

import { eventually, sessionBody, suite, unique } from "./lib/suite.js";

const context = suite(prepare);
const COUNT = 23;
/** Newest first, as the server lists them. */
let all = [];

const ids = (list) => list.map((session) => session.id);
const listed = async (options) => {
  const { data } = await sessions.list({ limit: 100, ...options });
  return ids(data);
};
const expected = (matches) => ids(all.filter(matches));

async function prepare() {
  for (let i = 0; i < COUNT; i++) {
    const session = await sessions.start(
      sessionBody({
        externalId: unique(`list-${i}`),
        type: ["chat", "support", "batch"][i % 3],
        taskIdentifier: `task-${i % 4}`,
        tags: [`mod2:${i % 2}`, `mod5:${i % 5}`, ...(i === 7 ? ["with,comma"] : [])],
        expiresAt: i % 8 === 3 ? new Date(Date.now() + 1_000) : undefined,
      }),
    );
    all.push({ ...session, number: i, status: i % 8 === 3 ? "EXPIRED" : "ACTIVE" });
  }
  for (const session of all.filter(({ number }) => number % 6 === 1)) {
    await sessions.close(session.id, { reason: "listed" });
    session.status = "CLOSED";
  }
  all.sort((a, b) => b.createdAt - a.createdAt || (a.id < b.id ? 1 : -1));
  const expiring = all.filter(({ status }) => status === "EXPIRED").length;
  await eventually("expiry", async () => (await listed({ status: "EXPIRED" })).length === expiring);
}

test("without a filter the newest come first, twenty of them", async () => {
  const page = await sessions.list();
  assert.deepEqual(ids(page.data), ids(all).slice(0, 20));
  assert.equal(page.hasNextPage(), true);
  assert.equal(page.hasPreviousPage(), false);
});

test("a listed session is the one that retrieve answers", async () => {
  const { data } = await sessions.list({ limit: 1 });
  const { triggerConfig: _, ...retrieved } = await sessions.retrieve(data[0].id);
  const { triggerConfig: __, ...item } = data[0];
  assert.deepEqual(item, retrieved);
});

test("filter by type, one and several", async () => {
  assert.deepEqual(await listed({ type: "chat" }), expected((s) => s.type === "chat"));
  assert.deepEqual(await listed({ type: ["chat", "batch"] }), expected((s) => s.type !== "support"));
  assert.deepEqual(await listed({ type: "nothing" }), []);
});

test("filter by tag: any of several, and a tag that holds a comma", async () => {
  assert.deepEqual(await listed({ tag: "mod2:1" }), expected((s) => s.number % 2 === 1));
  assert.deepEqual(await listed({ tag: ["mod5:0", "mod5:3"] }), expected((s) => [0, 3].includes(s.number % 5)));
  assert.deepEqual(await listed({ tag: "with,comma" }), expected((s) => s.number === 7));
});

test("filter by task, one and several", async () => {
  assert.deepEqual(await listed({ taskIdentifier: "task-2" }), expected((s) => s.number % 4 === 2));
  assert.deepEqual(await listed({ taskIdentifier: ["task-0", "task-3"] }), expected((s) => [0, 3].includes(s.number % 4)));
});

test("filter by externalId", async () => {
  assert.deepEqual(await listed({ externalId: all[4].externalId }), [all[4].id]);
  assert.deepEqual(await listed({ externalId: "nobody" }), []);
});

test("filter by status, one, several and all", async () => {
  for (const status of ["ACTIVE", "CLOSED", "EXPIRED"]) {
    assert.deepEqual(await listed({ status }), expected((s) => s.status === status), status);
  }
  assert.deepEqual(await listed({ status: ["CLOSED", "EXPIRED"] }), expected((s) => s.status !== "ACTIVE"));
  assert.deepEqual(await listed({ status: ["ACTIVE", "CLOSED", "EXPIRED"] }), ids(all));
});

test("filter by time of creation: a period, and inclusive bounds as dates or numbers", async () => {
  assert.deepEqual(await listed({ period: "1h" }), ids(all));
  const [from, to] = [all[15].createdAt, all[6].createdAt];
  const within = expected((s) => s.createdAt >= from && s.createdAt <= to);
  assert.deepEqual(await listed({ from, to }), within);
  assert.deepEqual(await listed({ from: from.getTime(), to: to.getTime() }), within);
  assert.deepEqual(await listed({ to: new Date(all.at(-1).createdAt.getTime() - 1) }), []);
});

test("filters are joined by and", async () => {
  assert.deepEqual(
    await listed({ type: ["chat", "support"], tag: ["mod2:0"], taskIdentifier: ["task-0", "task-2"], status: ["ACTIVE"], period: "1d" }),
    expected((s) => s.type !== "batch" && s.number % 2 === 0 && s.status === "ACTIVE"),
  );
});

test("pages go forward to the end without a gap or a repeat", async () => {
  const seen = [];
  let page = await sessions.list({ limit: 5 });
  for (;;) {
    seen.push(...page.data);
    if (!page.hasNextPage()) break;
    page = await page.getNextPage();
    assert.equal(page.hasPreviousPage(), true);
  }
  assert.deepEqual(ids(seen), ids(all));
  assert.equal(page.data.length, COUNT % 5);
});

test("previous after next answers the page before", async () => {
  const first = await sessions.list({ limit: 5 });
  const second = await first.getNextPage();
  const third = await second.getNextPage();
  assert.deepEqual(ids((await third.getPreviousPage()).data), ids(second.data));
  assert.deepEqual(ids((await second.getPreviousPage()).data), ids(first.data));
});

test("next after previous goes forward again", async () => {
  const first = await sessions.list({ limit: 5 });
  const second = await first.getNextPage();
  const third = await second.getNextPage();
  const back = await third.getPreviousPage();
  assert.deepEqual(ids((await back.getNextPage()).data), ids(third.data));
  const start = await second.getPreviousPage();
  const seen = [];
  for await (const session of start) {
    seen.push(session.id);
    assert.ok(seen.length <= COUNT, "iteration goes round in circles");
  }
  assert.deepEqual(seen, ids(all));
});

test("a backward page that comes out short still knows its next page", async () => {
  const first = await sessions.list({ limit: 5 });
  const second = await first.getNextPage();
  const wide = await sessions.list({ limit: 50, before: second.pagination.previous });
  assert.deepEqual(ids(wide.data), ids(first.data));
  assert.equal(wide.hasNextPage(), true);
  const onward = await sessions.list({ limit: 5, after: wide.pagination.next });
  assert.deepEqual(ids(onward.data), ids(second.data));
});

test("paging keeps the filters", async () => {
  const seen = [];
  for await (const session of sessions.list({ limit: 2, type: ["chat", "batch"], status: ["ACTIVE", "CLOSED"] })) seen.push(session.id);
  assert.deepEqual(seen, expected((s) => s.type !== "support" && s.status !== "EXPIRED"));
});

test("for await walks every session over many pages", async () => {
  context.requests.length = 0;
  const seen = [];
  for await (const session of sessions.list({ limit: 3 })) seen.push(session.id);
  assert.deepEqual(seen, ids(all));
  assert.equal(context.requests.length, Math.ceil(COUNT / 3));
});

test("a session made while paging does not disturb the pages behind it", async () => {
  const first = await sessions.list({ limit: 10 });
  const late = await sessions.start(sessionBody());
  const rest = [];
  for await (const session of await first.getNextPage()) rest.push(session.id);
  assert.deepEqual([...ids(first.data), ...rest], ids(all));
  all = [{ ...late, number: COUNT, status: "ACTIVE" }, ...all];
});

test("a bad cursor, size, period or status is a bad request", async () => {
  for (const options of [{ after: "nonsense" }, { before: "AAAA" }, { limit: 101 }, { limit: -1 }, { period: "soon" }, { status: "OPEN" }]) {
    await assert.rejects(sessions.list(options), BadRequestError, JSON.stringify(options));
  }
});
