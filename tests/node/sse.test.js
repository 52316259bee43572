// The wire of a channel without the SDK: headers, frames, resuming, ends.

import assert from "node:assert/strict";
import { test } from "node:test";

import { sessions } from "@trigger.dev/sdk";

import { COUNTS_BYTES } from "./lib/server.js";
import { EventReader, metered } from "./lib/sse.js";
import { eventually, sessionBody, suite, unique } from "./lib/suite.js";

const context = suite();

async function started(count = 0, io = "out") {
  const externalId = unique("wire");
  const { id } = await sessions.start(sessionBody({ externalId }));
  for (let n = 0; n < count; n++) await context.append(externalId, io, `body ${n}`);
  return { id, externalId, path: `/realtime/v1/sessions/${externalId}/${io}` };
}

const open = (path, headers, token) => EventReader.open(context, path, { headers, token });
const seqs = (records) => records.map((record) => record.seq_num);
const lasts = { "Timeout-Seconds": "60" };

test("the headers of a stream", async () => {
  const { path } = await started(1);
  const events = await open(path, { Origin: "https://app.example" });
  const headers = events.response.headers;
  assert.match(headers.get("content-type"), /^text\/event-stream/);
  assert.equal(headers.get("cache-control"), "no-cache, no-transform");
  assert.equal(headers.get("x-accel-buffering"), "no");
  assert.equal(headers.get("x-stream-version"), "v2");
  assert.equal(headers.get("x-session-settled"), null);
  assert.equal(headers.get("access-control-allow-origin"), "https://app.example");
  assert.match(headers.get("access-control-expose-headers"), /\*/);
  events.close();
});

test("headers come at once, before there is any record", async () => {
  const { path } = await started();
  const events = await open(path, lasts);
  const first = await events.next();
  assert.equal(first.event, "ping", "at the tail the first frame is a ping");
  const { timestamp, tail } = JSON.parse(first.data);
  assert.equal(tail.seq_num, 0);
  assert.ok(Math.abs(timestamp - Date.now()) < 60_000, "the timestamp is in milliseconds");
  assert.equal(typeof tail.timestamp, "number");
  events.close();
});

test("batches carry the records, and an id of last number, count and metered bytes", async () => {
  const { path, externalId } = await started(3);
  const events = await open(path, lasts);
  let [count, bytes, next] = [0, 0, 0];
  const follow = async (until) => {
    while (next < until) {
      const event = await events.nextBut();
      assert.equal(event.event, "batch");
      const { records, tail } = JSON.parse(event.data);
      for (const record of records) {
        assert.equal(record.seq_num, next++);
        assert.ok(Math.abs(record.timestamp - Date.now()) < 60_000);
        const { data, id } = JSON.parse(record.body);
        assert.equal(data, `body ${record.seq_num}`, "the append route stores the body as a JSON string");
        assert.ok(id.length > 0);
        assert.equal(record.headers, undefined, "no headers are left out, not sent empty");
        count += 1;
        bytes += metered(record);
      }
      const [last, delivered, size] = event.id.split(",").map(Number);
      assert.deepEqual([last, delivered], [next - 1, count]);
      assert.ok(COUNTS_BYTES ? size === bytes : size >= bytes, event.id);
      if (tail) assert.ok(tail.seq_num >= next);
    }
  };
  await follow(3);
  const ping = await events.next();
  assert.equal(ping.event, "ping", "having caught up it says so");
  assert.equal(JSON.parse(ping.data).tail.seq_num, 3);
  for (let n = 3; n < 6; n++) await context.append(externalId, "out", `body ${n}`);
  await follow(6);
  events.close();
});

test("a record's body survives as it was sent", async () => {
  const { path, externalId } = await started(0, "in");
  const bodies = ['{"kind":"message","payload":{"text":"hi"}}', "plain", "ü日本🎉", 'quotes " and \\ and \n lines', "[DONE]", "event: x\ndata: y\n\n", " "];
  for (const body of bodies) await context.append(externalId, "in", body);
  const events = await open(path, lasts);
  const records = await events.records(bodies.length);
  assert.deepEqual(records.map((record) => JSON.parse(record.body).data), bodies);
  events.close();
});

test("each form of Last-Event-ID resumes after its number", async () => {
  const { path, id } = await started(6);
  for (const form of ["2", "2-0", "2-anything", "2,3,120"]) {
    for (const address of [path, `/realtime/v1/sessions/${id}/out`]) {
      const events = await open(address, { ...lasts, "Last-Event-ID": form });
      assert.deepEqual(seqs(await events.records(3)), [3, 4, 5], form);
      events.close();
    }
  }
});

test("the id of a frame can be sent back as it is", async () => {
  const { path } = await started(5);
  const first = await open(path, lasts);
  const { id, data } = await first.nextBut();
  first.close();
  const read = JSON.parse(data).records.length;
  await context.append(path.split("/")[4], "out", "more");
  const second = await open(path, { ...lasts, "Last-Event-ID": id });
  assert.equal((await second.records(1))[0].seq_num, read);
  second.close();
});

test("a Last-Event-ID past the tail waits at the tail", async () => {
  const { path, externalId } = await started(2);
  const events = await open(path, { ...lasts, "Last-Event-ID": "1000" });
  assert.equal((await events.next()).event, "ping");
  await context.append(externalId, "out", "body 2");
  assert.deepEqual(seqs(await events.records(1)), [2]);
  events.close();
});

test("a Last-Event-ID that is none is refused", async () => {
  const { path } = await started(2);
  for (const form of ["abc", "-1", "1.5", "x-1"]) {
    const { error } = await context.json(400, "GET", path, { headers: { "Last-Event-ID": form } });
    assert.equal(typeof error, "string", form);
  }
});

test("Timeout-Seconds bounds the wait for a record, and the end is clean", async () => {
  const { path } = await started(2);
  const begun = performance.now();
  const events = await open(path, { "Timeout-Seconds": "1" });
  const { events: seen, clean } = await events.rest();
  const took = performance.now() - begun;
  assert.ok(took > 900 && took < 5_000, `ended after ${took} ms`);
  assert.equal(clean, true);
  assert.deepEqual(seen.at(-1), { data: "[DONE]" });
  assert.deepEqual(seen.filter((event) => event.event === "batch").flatMap((event) => seqs(JSON.parse(event.data).records)), [0, 1]);
});

test("each record starts the wait anew", async () => {
  const { path, externalId } = await started();
  const events = await open(path, { "Timeout-Seconds": "2" });
  const begun = performance.now();
  for (let n = 0; n < 3; n++) {
    // The pause is the thing tested here, not a wait for something to happen.
    await new Promise((resolve) => setTimeout(resolve, 1_000));
    await context.append(externalId, "out", `body ${n}`);
  }
  assert.deepEqual(seqs(await events.records(3)), [0, 1, 2]);
  const { events: seen, clean } = await events.rest();
  assert.ok(performance.now() - begun > 4_500);
  assert.equal(clean, true);
  assert.deepEqual(seen.at(-1), { data: "[DONE]" });
});

test("a Timeout-Seconds outside 1 to 600 is refused", async () => {
  const { path } = await started();
  for (const value of ["0", "601", "abc", "-1", "1.5", ""]) {
    const { error } = await context.json(400, "GET", path, { headers: { "Timeout-Seconds": value } });
    assert.equal(typeof error, "string", value);
  }
  const events = await open(path, { "Timeout-Seconds": "600" });
  events.close();
});

test("X-Trigger-Stream-Start: latest skips what is stored, and Last-Event-ID wins over it", async () => {
  const { path, externalId } = await started(3);
  const latest = { ...lasts, "X-Trigger-Stream-Start": "latest" };
  const live = await open(path, latest);
  assert.equal((await live.next()).event, "ping");
  await context.append(externalId, "out", "body 3");
  assert.deepEqual(seqs(await live.records(1)), [3]);
  live.close();
  const resumed = await open(path, { ...latest, "Last-Event-ID": "0" });
  assert.deepEqual(seqs(await resumed.records(3)), [1, 2, 3]);
  resumed.close();
});

test("a settled peek of a channel that is not settled waits as usual", async () => {
  for (const count of [0, 2]) {
    const { path, externalId } = await started(count);
    const events = await open(path, { ...lasts, "X-Peek-Settled": "1" });
    assert.equal(events.response.headers.get("x-session-settled"), null);
    await context.append(externalId, "out", `body ${count}`);
    assert.equal((await events.records(count + 1)).at(-1).seq_num, count);
    events.close();
  }
});

test("closing the session ends its streams with [DONE] after the last record", async () => {
  const { path, externalId } = await started(1);
  const streams = await Promise.all(["out", "in", "channels/side/out"].map((tail) => open(path.replace(/out$/, tail), lasts)));
  for (const events of streams) await eventually("the tail", async () => (await events.next()).event === "ping");
  await context.append(externalId, "out", "last");
  await sessions.close(externalId);
  for (const events of streams) {
    const { events: seen, clean } = await events.rest();
    assert.equal(clean, true);
    assert.deepEqual(seen.at(-1), { data: "[DONE]" });
  }
  const late = await (await open(path, lasts)).rest();
  assert.equal(late.clean, true);
  assert.deepEqual(late.events.at(-1), { data: "[DONE]" });
  assert.deepEqual(late.events.filter(({ event }) => event === "batch").flatMap(({ data }) => seqs(JSON.parse(data).records)), [0, 1, 2], "the last one tells of the close");
});

test("stopping the server does not end a stream cleanly", async () => {
  const { path } = await started(1);
  const events = await open(path, lasts);
  await events.records(1);
  const ended = events.rest();
  assert.equal(await context.server.stop(), 0);
  const { events: seen, clean } = await ended;
  await context.server.restart();
  assert.ok(!seen.some(({ data }) => data === "[DONE]"), "[DONE] would tell the SDK that this was all");
  assert.ok(!clean || seen.at(-1)?.event === "error", "the body ended as if this was all");
});

test("HEAD answers without a body", async () => {
  const { path } = await started(1);
  const response = await context.http("HEAD", path);
  assert.equal(response.status, 200);
  assert.notEqual(response.headers.get("x-last-chunk-index"), null);
});

test("an append answers its sequence number, and a repeated part id answers the first one's", async () => {
  const { externalId } = await started();
  assert.equal(await context.append(externalId, "out", "a", { partId: "p1" }), 0);
  assert.equal(await context.append(externalId, "out", "b", { partId: "p2" }), 1);
  assert.equal(await context.append(externalId, "out", "a", { partId: "p1" }), 0);
  const path = `/realtime/v1/sessions/${externalId}/out/append`;
  const clash = await context.json(422, "POST", path, { body: "other", headers: { "X-Part-Id": "p1" } });
  assert.equal(clash.code, "idempotency_mismatch");
  assert.equal(await context.append(externalId, "in", "a", { partId: "p1" }), 0, "each channel has its own part ids");
  await context.server.kill();
  await context.server.restart();
  assert.equal(await context.append(externalId, "out", "b", { partId: "p2" }), 1, "also after a restart");
  const { records } = await context.json(200, "GET", `/realtime/v1/sessions/${externalId}/out/records`);
  assert.deepEqual(records.map(({ data, id }) => [data, id]), [["a", "p1"], ["b", "p2"]]);
});

test("records answers what follows a cursor, all of it or a page", async () => {
  const { path } = await started(7);
  const get = (query) => context.json(200, "GET", `${path}/records${query}`);
  const numbers = ({ records }) => records.map((record) => record.seqNum);
  assert.deepEqual(numbers(await get("")), [0, 1, 2, 3, 4, 5, 6]);
  assert.deepEqual(numbers(await get("?afterEventId=4")), [5, 6]);
  assert.deepEqual(numbers(await get("?afterEventId=400")), []);
  assert.deepEqual(numbers(await get("?limit=3")), [0, 1, 2]);
  assert.deepEqual(numbers(await get("?afterEventId=2&limit=2")), [3, 4]);
  await context.json(400, "GET", `${path}/records?afterEventId=x`);
  assert.deepEqual((await context.json(200, "GET", `/realtime/v1/sessions/${unique("nobody")}/out/records`)).records, []);
  await context.json(404, "GET", "/realtime/v1/sessions/session_nobody/out/records");
});

test("neither another direction nor a bad channel name is a channel", async () => {
  const { path, externalId } = await started();
  await context.json(400, "GET", path.replace(/out$/, "sideways"));
  await context.json(400, "GET", `/realtime/v1/sessions/${externalId}/channels/a%20b/out`);
  await context.json(400, "GET", `/realtime/v1/sessions/${externalId}/channels/${"x".repeat(129)}/out`);
  const events = await open(`/realtime/v1/sessions/${externalId}/channels/${"x".repeat(128)}/out`, lasts);
  events.close();
});
