// Takes docs/playground.png: `SESSIOND_BIN=... npm run screenshot`.

import { stat } from "node:fs/promises";
import { fileURLToPath } from "node:url";

import { Server } from "../node/lib/server.js";
import { launch, Page } from "./lib/browser.js";
import { append, Playground } from "./lib/playground.js";

const FILE = fileURLToPath(new URL("../../docs/playground.png", import.meta.url));
const SAID = [
  { role: "user", text: "What is a session?" },
  { role: "agent", text: "Two durable logs under one name: .in and .out." },
  { role: "agent", text: "Follow one, lose the connection, and go on where you were." },
];

const server = await Server.start();
const browser = await launch();
try {
  const { page } = await Page.open(browser, { viewport: { width: 1200, height: 640 } });
  const playground = await Playground.open(page, server);
  await playground.signIn();
  await playground.example("Create");
  await playground.response('"created": true');
  await append(server, "hello", SAID[0]);
  await playground.example("Follow");
  await playground.phase("live");
  for (const said of SAID.slice(1)) await append(server, "hello", said);
  await playground.record("#2");
  await playground.response('"seqNum": "2"');
  // Tooltips and the caret have no place in a picture.
  await page.locator(".live-log b").click();
  await page.screenshot({ path: FILE, caret: "hide", animations: "disabled" });
  console.log(`${FILE}: ${(await stat(FILE)).size} bytes`);
} finally {
  await browser.close();
  await server.remove();
}
