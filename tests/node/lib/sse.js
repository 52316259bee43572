// A reader of raw server-sent events, so that the tests see the frames and not what the SDK makes of them.

import assert from "node:assert/strict";

export class EventReader {
  #reader;
  #decoder = new TextDecoder();
  #buffer = "";
  #abort = new AbortController();

  /** Opens a channel's stream and expects it to be one. */
  static async open(context, path, { headers = {}, token } = {}) {
    const events = new EventReader();
    const signal = events.#abort.signal;
    events.response = await context.http("GET", path, { headers: { Accept: "text/event-stream", ...headers }, token, signal });
    assert.equal(events.response.status, 200, path);
    events.#reader = events.response.body.getReader();
    return events;
  }

  /** The next event as `{event, id, data}`, or undefined at the clean end. Throws when the connection breaks. */
  async next() {
    for (;;) {
      const end = this.#buffer.indexOf("\n\n");
      if (end !== -1) {
        const frame = this.#buffer.slice(0, end);
        this.#buffer = this.#buffer.slice(end + 2);
        const event = parse(frame);
        if (event) return event;
        continue;
      }
      const { done, value } = await this.#reader.read();
      if (done) {
        assert.equal(this.#buffer, "", "the stream ended inside a frame");
        return undefined;
      }
      this.#buffer += this.#decoder.decode(value, { stream: true });
    }
  }

  /** The next event that is not a ping. */
  async nextBut() {
    for (;;) {
      const event = await this.next();
      if (event?.event !== "ping") return event;
    }
  }

  /** Records of the next batches until there are at least `count`. */
  async records(count) {
    const records = [];
    while (records.length < count) {
      const event = await this.nextBut();
      assert.equal(event?.event, "batch", `after ${records.length} of ${count} records came ${JSON.stringify(event)}`);
      records.push(...JSON.parse(event.data).records);
    }
    return records;
  }

  /** Reads to the end. Answers the events and `clean`: whether the body ended as HTTP says it should. */
  async rest() {
    const events = [];
    try {
      for (;;) {
        const event = await this.next();
        if (!event) return { events, clean: true };
        events.push(event);
      }
    } catch (error) {
      if (error instanceof assert.AssertionError) throw error;
      return { events, clean: false };
    }
  }

  close() {
    this.#abort.abort();
  }
}

/** Comments alone make no event. */
function parse(frame) {
  const event = {};
  for (const line of frame.split("\n")) {
    if (line.startsWith(":")) continue;
    const colon = line.indexOf(":");
    const field = colon === -1 ? line : line.slice(0, colon);
    const value = colon === -1 ? "" : line.slice(colon + 1).replace(/^ /, "");
    event[field] = field === "data" && "data" in event ? `${event.data}\n${value}` : value;
  }
  return Object.keys(event).length > 0 ? event : undefined;
}

/** What one record counts towards limits and the `id:` of its batch. */
export function metered(record) {
  const headers = record.headers ?? [];
  const text = (value) => Buffer.byteLength(value ?? "");
  return headers.reduce((sum, [name, value]) => sum + 2 + text(name) + text(value), 8) + text(record.body);
}
