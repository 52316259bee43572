// A newcomer with a browser: from the key that the server prints to a live channel, and back after a reload.

import assert from "node:assert/strict";
import { after, afterEach, before, beforeEach, test } from "node:test";

import { Server } from "../node/lib/server.js";
import { launch, Page } from "./lib/browser.js";
import { append, Playground, readerToken } from "./lib/playground.js";

let browser, server, watched, page;

before(async () => {
  browser = await launch();
});

after(() => browser?.close());

// A server for each, because the examples all speak of the same session.
beforeEach(async () => {
  server = await Server.start();
  watched = await Page.open(browser);
  page = watched.page;
});

afterEach(async () => {
  await watched?.close();
  await server?.remove();
});

test("the examples lead from nothing to a live channel, and a reload goes on where it was", async () => {
  const playground = await Playground.open(page, server);
  assert.match(await playground.tokenStatus.innerText(), /prints its secret key when it first starts/);
  await playground.signIn();
  await playground.example("Create");
  await playground.response('"created": true');
  await playground.example("Append");
  await playground.response('"seqNum": "0"');
  await playground.example("Follow");
  await playground.phase("live");
  await playground.record("#0");

  // From elsewhere, and from another tab of the editor while the log goes on.
  assert.equal(await append(server, "hello", { from: "another client" }), 1);
  await playground.record("another client");
  await playground.example("Append");
  await playground.record("#2");
  await page.getByLabel("Record to append").fill('{"from": "the log"}');
  await page.keyboard.press("Enter");
  await playground.record("the log");
  assert.deepEqual(await playground.records(), ["#3", "#2", "#1", "#0"]);

  await page.reload();
  await playground.ready();
  await playground.accepted();
  await append(server, "hello", { while: "away" });
  await playground.example("Resume");
  await playground.phase("live");
  await playground.record("away");
  await append(server, "hello", { and: "now" });
  await playground.record("now");
  assert.deepEqual(await playground.records(), ["#5", "#4"]);

  await playground.example("List");
  await playground.response('"externalId": "hello"');
  await playground.example("Close");
  await playground.phase("ended");
  await playground.example("Append");
  await playground.response('"code": "SESSION_CLOSED"');
  watched.assertClean(server);
});

for (const end of ["kill", "stop"]) {
  test(`a follow goes on where it was when the server comes back after a ${end}`, async () => {
    const playground = await Playground.open(page, server);
    await playground.signIn();
    await playground.example("Create");
    await playground.response('"created": true');
    await playground.example("Follow");
    await playground.phase("live");
    for (const n of [0, 1]) await append(server, "hello", { n });
    await playground.record("#1");
    await server[end]();
    await playground.phase("reconnecting");
    await server.restart();
    await append(server, "hello", { n: 2 });
    await playground.record("#2");
    await playground.phase("live");
    assert.deepEqual(await playground.records(), ["#2", "#1", "#0"]);
    watched.assertClean(server, /^WebSocket connection to .* failed/);
  });
}

test("a token that the server refuses is said to be refused", async () => {
  const playground = await Playground.open(page, server);
  await page.getByLabel("Token").fill("tr_dev_notthekey");
  await page.locator(".token-status.refused").waitFor();
  assert.match(await playground.tokenStatus.innerText(), /^Refused: .+ prints its secret key/);
  assert.equal(await page.getByRole("button", { name: /^1 Create/ }).isDisabled(), true);
  await playground.signIn();
  assert.match(await playground.tokenStatus.innerText(), /root key/);
  watched.assertClean(server, /status of 401/);
});

test("a token that ends while something is followed is said to have ended", async () => {
  const playground = await Playground.open(page, server);
  await playground.signIn();
  await playground.example("Create");
  await playground.response('"created": true');
  await playground.signIn(await readerToken(server, "hello", 6));
  assert.match(await playground.tokenStatus.innerText(), /public token · read:sessions:hello · until/);
  await playground.example("Follow");
  await playground.phase("live");
  await playground.phase("failed");
  await page.locator(".token-status.refused").waitFor();
  assert.match(await playground.tokenStatus.innerText(), /expired/);
  watched.assertClean(server);
});

test("the token stays in the browser tab", async () => {
  const playground = await Playground.open(page, server);
  await playground.signIn();
  await playground.example("List");
  await playground.response('"totalCount": "0"');
  const kept = await page.evaluate(() => [JSON.stringify(localStorage), document.cookie, location.href].join());
  assert.doesNotMatch(kept, /tr_dev_/);
  watched.assertClean(server);
});

test("the explorer and the documentation show the schema", async () => {
  const playground = await Playground.open(page, server);
  await playground.signIn();
  await page.getByRole("button", { name: "Show GraphiQL Explorer" }).click();
  const explorer = page.locator(".graphiql-explorer-root");
  for (const field of ["sessions", "node", "viewer"]) await explorer.getByText(field, { exact: true }).first().waitFor();
  await page.getByRole("button", { name: "Show Documentation Explorer" }).click();
  await page.locator(".graphiql-doc-explorer").getByText("Subscription", { exact: true }).click();
  await page.locator(".graphiql-doc-explorer").getByText("channelRecords").first().waitFor();
  watched.assertClean(server);
});

test("the theme follows the system until it is chosen", async () => {
  const playground = await Playground.open(page, server);
  const background = () => page.locator(".page").evaluate((node) => getComputedStyle(node).backgroundColor);
  await page.emulateMedia({ colorScheme: "light" });
  const light = await background();
  await page.emulateMedia({ colorScheme: "dark" });
  const dark = await background();
  assert.notEqual(light, dark);
  const button = page.getByRole("button", { name: /^Theme/ });
  await button.click();
  await button.click();
  assert.equal(await button.getAttribute("title"), "Theme: light");
  assert.equal(await background(), light);
  await page.reload();
  await playground.ready();
  assert.equal(await background(), light);
  watched.assertClean(server);
});

test("a long log scrolls within its pane, at its newest record unless older ones are being read", async () => {
  const playground = await Playground.open(page, server);
  await playground.signIn();
  await playground.follow(server, 161);
  for (const whole of ["html", ".page"]) {
    const { scrollHeight, clientHeight } = await playground.box(whole);
    assert.equal(scrollHeight, clientHeight, `${whole} does not scroll`);
  }
  const list = await playground.box(".live-log ol");
  assert.ok(list.bottom <= 800 && list.clientHeight > 200, `${list.clientHeight} px that can be seen, to ${list.bottom}`);
  assert.ok(list.scrollHeight > 10 * list.clientHeight, `${list.scrollHeight} px that are scrolled`);

  await append(server, "hello", { at: "the top" });
  await playground.record("the top");
  assert.equal((await playground.box(".live-log ol")).scrollTop, 0);
  assert.ok((await playground.box(".live-log li.record")).top >= list.top, "the newest can be seen");

  await page.locator(".live-log ol").evaluate((node) => (node.scrollTop = 1000));
  const reading = page.locator(".live-log li.record", { hasText: '"n":130,' });
  const place = async () => (await reading.boundingBox()).y;
  const before = await place();
  for (const n of [162, 163, 164]) {
    await append(server, "hello", { n });
    await playground.record(`{"n":${n}}`);
  }
  assert.ok(Math.abs((await place()) - before) <= 1, `${before} became ${await place()}`);
  watched.assertClean(server);
});

test("on a narrow screen everything has its place", async () => {
  await page.setViewportSize({ width: 420, height: 800 });
  const playground = await Playground.open(page, server);
  const controls = ["h1", "#token", ".token-status", "nav a", "nav button"].map((name) => `.top-bar ${name}`);
  const assertRoom = async (state) => {
    for (const part of ["html", ".page", ".top-bar"]) {
      const { scrollWidth, clientWidth } = await playground.box(part);
      assert.equal(scrollWidth, clientWidth, `${state}: ${part} is not wider than the screen`);
    }
    const boxes = await Promise.all(controls.map((control) => playground.box(control)));
    boxes.forEach((a, at) => {
      const inside = a.left >= 0 && a.right <= 420 && a.right - a.left >= 20 && a.bottom - a.top >= 15;
      assert.ok(inside, `${state}: ${controls[at]} is at ${JSON.stringify(a)}`);
      const over = boxes.findIndex((b) => a !== b && a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom);
      assert.equal(over, -1, `${state}: ${controls[at]} lies on ${controls[over]}`);
    });
  };
  await assertRoom("without a token");
  await playground.signIn();
  await playground.follow(server, 161);
  await assertRoom("following");

  const [session, editors, response, log] = await Promise.all(
    ["#graphiql-session", ".graphiql-editors", ".graphiql-response", ".live-log ol"].map((part) => playground.box(part)),
  );
  assert.ok(editors.bottom <= response.top, "the response is below the editors");
  assert.ok(log.right <= 420 && log.bottom <= session.bottom && log.clientHeight > 100, JSON.stringify(log));
  assert.equal(log.scrollWidth, log.clientWidth, "the log");
  await page.getByRole("button", { name: "Stop", exact: true }).click();
  await playground.phase("stopped");
  watched.assertClean(server);
});

test("a theme that changes while the page is open changes all of it", async () => {
  await page.emulateMedia({ colorScheme: "light" });
  const playground = await Playground.open(page, server);
  await playground.signIn();
  await playground.follow(server, 1);
  const parts = {
    ".top-bar": "color",
    ".top-bar nav button": "backgroundColor",
    ".token-status": "color",
    "#token": "color",
    ".examples button": "borderColor",
    ".examples small": "color",
    ".live-log b": "color",
    ".live-log .phase": "color",
    ".live-log form input": "backgroundColor",
    ".live-log li.record": "borderTopColor",
    ".live-log li.record > span": "color",
    ".graphiql-query-editor .mtk1": "color",
    ".result-window .mtk1": "color",
    html: "colorScheme",
  };
  const colours = () =>
    page.evaluate(
      (parts) => Object.fromEntries(Object.entries(parts).map(([part, property]) => [part, getComputedStyle(document.querySelector(part))[property]])),
      parts,
    );
  // The pointer and the focus have colours of their own.
  const settled = async () => {
    await page.mouse.move(0, 0);
    await page.evaluate(() => new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn))));
    return colours();
  };
  const choose = async (theme) => {
    await page.getByRole("button", { name: "Open settings dialog" }).click();
    await page.getByRole("dialog").getByRole("button", { name: theme, exact: true }).click();
    await page.keyboard.press("Escape");
    await page.getByRole("dialog").waitFor({ state: "detached" });
  };
  // Colours change in steps, and GraphiQL's editors come, and change, after the rest.
  const become = async (check) => {
    for (const end = Date.now() + 10_000; ; ) {
      try {
        const seen = await settled();
        check(seen);
        return seen;
      } catch (error) {
        if (Date.now() > end) throw error;
      }
    }
  };
  const is = (expected) => (seen) => assert.deepEqual(seen, expected);
  // Twice the same: what was seen first may have been on its way.
  const rested = async (check) => become(is(await become(check)));
  const light = await rested(() => {});
  await page.emulateMedia({ colorScheme: "dark" });
  const dark = await rested((seen) => {
    const same = Object.keys(parts).filter((part) => light[part] === seen[part]);
    assert.deepEqual(same, ["html"], "which follows the system of itself");
  });
  await choose("Light");
  await become(is({ ...light, html: "light" }));
  await page.emulateMedia({ colorScheme: "light" });
  await choose("Dark");
  await become(is({ ...dark, html: "dark" }));
  await choose("System");
  await become(is(light));
  watched.assertClean(server);
});
