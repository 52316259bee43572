// The playground as its user sees it.

import { SECRET } from "../../node/lib/server.js";

export class Playground {
  constructor(page) {
    this.page = page;
  }

  static async open(page, server) {
    await page.goto(`${server.baseUrl}/playground`);
    const playground = new Playground(page);
    await playground.ready();
    return playground;
  }

  /** The editor is there; the test's clicks would otherwise come too early. */
  async ready() {
    await this.page.locator(".graphiql-query-editor .view-line").first().waitFor();
  }

  async signIn(token = SECRET) {
    const tried = this.page.waitForResponse((response) => response.url().endsWith("/graphql"));
    await this.page.getByLabel("Token").fill(token);
    await tried;
    await this.accepted();
  }

  async accepted() {
    await this.page.locator(".token-status.accepted").waitFor();
  }

  get tokenStatus() {
    return this.page.locator(".token-status");
  }

  async example(name) {
    const examples = this.page.getByRole("region", { name: "Examples" });
    await examples.getByRole("button", { name: new RegExp(`^\\d ${name} `) }).click();
  }

  /** Resolves once the log is in this phase. */
  async phase(name) {
    await this.page.locator(`.live-log .phase.${name}`).waitFor();
  }

  /** Resolves once the log shows this record. */
  async record(label) {
    await this.page.locator(".live-log li.record", { hasText: label }).first().waitFor();
  }

  /** The labels of the records in the log, newest first. */
  async records() {
    return this.page.locator(".live-log li.record > span").allInnerTexts();
  }

  /** Follows a new session that has so many records. */
  async follow(server, records) {
    await this.example("Create");
    await this.response('"created": true');
    for (let n = 0; n < records; n++) await append(server, "hello", { n, text: "long enough to be broken in two where the log is narrow" });
    await this.example("Follow");
    await this.phase("live");
    await this.record(`"n":${records - 1},`);
  }

  /** How an element lies in the viewport: its edges, its outer and inner size, and how far it is scrolled. */
  box(selector) {
    return this.page.locator(selector).first().evaluate((node) => {
      const { left, top, right, bottom } = node.getBoundingClientRect();
      const { scrollWidth, scrollHeight, clientWidth, clientHeight, scrollTop } = node;
      return { left, top, right, bottom, scrollWidth, scrollHeight, clientWidth, clientHeight, scrollTop };
    });
  }

  /** Resolves once the response pane says this. */
  async response(text) {
    await this.page.locator(".result-window .view-lines", { hasText: text }).waitFor();
  }
}

/** Appends as another client does; answers the record's number. */
export async function append(server, session, body) {
  const response = await fetch(`${server.baseUrl}/realtime/v1/sessions/${session}/out/append`, {
    method: "POST",
    headers: { Authorization: `Bearer ${SECRET}` },
    body: JSON.stringify(body),
  });
  if (!response.ok) throw new Error(`append: ${response.status} ${await response.text()}`);
  return (await response.json()).seq;
}

/** A public token that may read one session, for so many seconds. */
export async function readerToken(server, session, seconds) {
  const query = "mutation ($input: CreatePublicTokenInput!) { createPublicToken(input: $input) { token } }";
  const response = await fetch(`${server.baseUrl}/graphql`, {
    method: "POST",
    headers: { Authorization: `Bearer ${SECRET}`, "Content-Type": "application/json" },
    body: JSON.stringify({ query, variables: { input: { scopes: [`read:sessions:${session}`], expiresIn: seconds } } }),
  });
  return (await response.json()).data.createPublicToken.token;
}
