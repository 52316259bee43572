// A browser, and pages that are watched: what they say to the console and whom they ask is part of every test.

import assert from "node:assert/strict";

import { chromium } from "playwright-core";

const CHROMIUM = process.env.CHROMIUM ?? "/usr/bin/chromium";

export function launch() {
  // Without a sandbox of its own: tests may run as root, and open only pages of ours.
  return chromium.launch({ executablePath: CHROMIUM, args: ["--no-sandbox", "--disable-gpu"] });
}

/** A page in a profile of its own, as a newcomer has. */
export class Page {
  /** Console messages worth reading, and exceptions. */
  complaints = [];
  /** Every URL that was asked for. */
  requests = [];

  static async open(browser, options = {}) {
    const watched = new Page();
    const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, ...options });
    const page = await context.newPage();
    page.on("console", (message) => {
      if (["error", "warning"].includes(message.type())) watched.complaints.push(message.text());
    });
    page.on("pageerror", (error) => watched.complaints.push(String(error)));
    page.on("request", (request) => watched.requests.push(request.url()));
    page.on("websocket", (socket) => watched.requests.push(socket.url()));
    watched.page = page;
    return watched;
  }

  /** Nothing was complained about but what is `expected`, and nobody but the server was asked. */
  assertClean(server, ...expected) {
    const surprising = this.complaints.filter((text) => !expected.some((pattern) => pattern.test(text)));
    assert.deepEqual(surprising, [], "the console");
    const { host } = new URL(server.baseUrl);
    const elsewhere = this.requests.map((url) => new URL(url)).filter((url) => url.protocol !== "data:" && url.host !== host);
    assert.deepEqual(elsewhere.map(String), [], "requests to others");
  }

  close() {
    return this.page.context().close();
  }
}
