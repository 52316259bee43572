// What the tests of direct writers share: a session, what its channels hold, and S2's own client on one of them.

import assert from "node:assert/strict";

import { sessions } from "@trigger.dev/sdk";

import { eventually, sessionBody, unique } from "./suite.js";

/** A new session under an external id of its own, with a handle on it. */
export async function started(name, fields = {}) {
  const externalId = unique(name);
  const session = await sessions.start(sessionBody({ externalId, ...fields }));
  return { ...session, externalId, handle: sessions.open(externalId) };
}

function channelPath(session, io, channel) {
  const side = channel === undefined ? "" : `/channels/${channel}`;
  return `/realtime/v1/sessions/${encodeURIComponent(session)}${side}/${io}`;
}

/** What a channel holds but for commands: `{data, id, seqNum, headers?}` each. */
export async function stored(context, session, { io = "out", channel } = {}) {
  return (await context.json(200, "GET", `${channelPath(session, io, channel)}/records`)).records;
}

/** The payloads that a channel holds, without the control record that tells of a close. */
export async function payloads(context, session, options) {
  const records = await stored(context, session, options);
  return records.filter(({ headers }) => headers?.[0]?.[1] !== "session-closed").map(({ data }) => data);
}

/** Asks for direct writes to a channel; answers what the headers say. */
export async function initialize(context, session, io, { token, channel } = {}) {
  const response = await context.http("PUT", channelPath(session, io, channel), { token });
  await response.arrayBuffer();
  const header = (name) => response.headers.get(`x-s2-${name}`);
  return {
    status: response.status,
    accessToken: header("access-token"),
    basin: header("basin"),
    endpoint: header("endpoint"),
    stream: header("stream-name"),
  };
}

/** S2's own client, as one version of its package, on a stream. */
export function open({ S2 }, { accessToken, basin, endpoint, stream }, { transport, ...options } = {}) {
  const s2 = new S2({ accessToken, endpoints: { account: endpoint, basin: endpoint }, ...options });
  return s2.basin(basin).stream(stream, { forceTransport: transport });
}

export const numbered = (from, to) => Array.from({ length: to - from }, (_, i) => ({ n: from + i }));

/** A source that a test feeds, and that never ends by itself. */
export class Source {
  #controller;
  /** What has been written so far. */
  written = [];
  stream = new ReadableStream({ start: (controller) => void (this.#controller = controller) });

  write(count = 1) {
    for (const chunk of numbered(this.written.length, this.written.length + count)) {
      this.written.push(chunk);
      this.#controller.enqueue(chunk);
    }
  }

  /** Writes on and on, until the pipe has had enough; answers why it has. */
  async exhaust({ waitUntilComplete }) {
    let ended = false;
    const end = waitUntilComplete().then(
      () => assert.fail("the pipe has ended well"),
      (error) => {
        ended = true;
        return error;
      },
    );
    await eventually("the end of the pipe", () => {
      this.write();
      return ended;
    });
    return end;
  }
}
