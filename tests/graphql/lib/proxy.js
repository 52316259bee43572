// A TCP proxy in front of the server whose connections a test may cut at any byte, or hold.

import { once } from "node:events";
import { connect, createServer } from "node:net";

export class Proxy {
  #listener;
  #pairs = new Set();
  /** Connections ever made, and those cut by `drop`. */
  made = 0;
  cut = 0;

  static async to(url) {
    const proxy = new Proxy();
    const { hostname, port } = new URL(url);
    proxy.#listener = createServer((near) => proxy.#join(near, connect({ host: hostname, port: Number(port) })));
    proxy.#listener.listen(0, "127.0.0.1");
    await once(proxy.#listener, "listening");
    return proxy;
  }

  /** `url` as a client behind this proxy names it. */
  through(url) {
    const there = new URL(url);
    there.host = `127.0.0.1:${this.#listener.address().port}`;
    return there.href;
  }

  #join(near, far) {
    const pair = [near, far];
    this.made += 1;
    this.#pairs.add(pair);
    const end = () => {
      this.#pairs.delete(pair);
      near.destroy();
      far.destroy();
    };
    near.pipe(far);
    far.pipe(near);
    for (const socket of pair) socket.setNoDelay(true).on("error", end).on("close", end);
  }

  get open() {
    return this.#pairs.size;
  }

  /** Cuts one connection, chosen by `pick(n)` in 0..n, with a reset. Answers whether there was one. */
  drop(pick) {
    const pair = [...this.#pairs][pick(this.#pairs.size)];
    if (!pair) return false;
    this.cut += 1;
    for (const socket of pair) socket.resetAndDestroy();
    return true;
  }

  /** What clients send no longer reaches the server, nor the other way round, while nothing is closed. */
  freeze() {
    for (const [near, far] of this.#pairs) {
      near.unpipe(far);
      far.unpipe(near);
    }
  }

  close() {
    this.#listener.close();
    for (const pair of this.#pairs) for (const socket of pair) socket.destroy();
  }
}
