// Stands between direct writers and the server, outlives it, and can keep its answers to itself.

import { once } from "node:events";
import { connect, createServer } from "node:net";
import { setTimeout as delay } from "node:timers/promises";

/** Frames of the connection itself are smaller than any batch that the tests send, in bytes. */
const HOUSEKEEPING_MAX = 256;

export class Relay {
  #listener;
  #target;
  #pairs = new Set();
  /** Answers that were kept or lost since the last `hold` or `mute`. */
  withheld = 0;
  /** Answers that were passed on since the last `cut`. */
  passed = 0;

  static async start() {
    const relay = new Relay();
    relay.#listener = createServer((near) => void relay.#join(near));
    relay.#listener.listen(0, "127.0.0.1");
    await once(relay.#listener, "listening");
    relay.url = `http://127.0.0.1:${relay.#listener.address().port}`;
    return relay;
  }

  /** Where the server is. Connections wait until it is there. */
  aim(url) {
    this.#target = new URL(url);
  }

  /** What the server says on the connections of now is lost; what it is told is not. */
  mute() {
    this.withheld = 0;
    for (const pair of this.#pairs) pair.muted = true;
  }

  /** Keeps what the server says from now on. */
  hold() {
    this.withheld = 0;
    for (const pair of this.#pairs) pair.held = [];
  }

  /** Says what was held, and loses what the server answers to whatever is written after that. */
  letGo() {
    for (const pair of this.#pairs) {
      pair.mutesOnWrite = true;
      for (const bytes of pair.held.splice(0)) pair.near.write(bytes);
      pair.held = undefined;
    }
  }

  /** Breaks every connection. */
  cut() {
    this.passed = 0;
    for (const { near, far } of this.#pairs) [near, far].forEach((socket) => socket.resetAndDestroy());
  }

  close() {
    this.#listener.close();
    this.cut();
  }

  async #join(near) {
    near.on("error", () => {});
    const far = await this.#reach(near);
    if (!far) return;
    const pair = { near, far, muted: false, mutesOnWrite: false, held: undefined };
    this.#pairs.add(pair);
    const end = () => {
      this.#pairs.delete(pair);
      near.destroy();
      far.destroy();
    };
    for (const socket of [near, far]) socket.setNoDelay(true).on("error", end).on("close", end);
    near.on("data", (bytes) => {
      pair.muted ||= pair.mutesOnWrite && bytes.length > HOUSEKEEPING_MAX;
      far.write(bytes);
    });
    far.on("data", (bytes) => {
      if (!pair.held && !pair.muted) {
        this.passed += dataFrames(bytes);
        return void near.write(bytes);
      }
      pair.held?.push(bytes);
      this.withheld += dataFrames(bytes);
    });
  }

  async #reach(near) {
    while (!near.destroyed) {
      const far = connect({ host: this.#target.hostname, port: Number(this.#target.port) });
      try {
        await once(far, "connect");
        return far;
      } catch {
        await delay(20);
      }
    }
  }
}

/** How many of HTTP/2's DATA frames these bytes begin. The server writes small frames whole. */
function dataFrames(bytes) {
  let count = 0;
  for (let at = 0; at + 9 <= bytes.length; at += 9 + bytes.readUIntBE(at, 3)) count += Number(bytes[at + 3] === 0);
  return count;
}
