// A chat in a page and the agent at its other end, of the SDK's and the AI SDK's own parts. The agent has no run engine:
// the test is its loop.

import { apiClientManager, sessionStreams } from "@trigger.dev/core/v3";
import { StandardSessionStreamManager } from "@trigger.dev/core/v3/workers";
import { sessions } from "@trigger.dev/sdk";
import { TriggerChatTransport } from "@trigger.dev/sdk/chat";
import { AbstractChat } from "ai";

import { sessionBody } from "./suite.js";

/** What a chat in a page keeps, without a page. */
class State {
  status = "ready";
  error = undefined;
  messages = [];
  pushMessage = (message) => void (this.messages = [...this.messages, message]);
  popMessage = () => void (this.messages = this.messages.slice(0, -1));
  replaceMessage = (index, message) => void (this.messages = this.messages.with(index, message));
  snapshot = (value) => structuredClone(value);
}

export class Chat extends AbstractChat {
  constructor(init) {
    super({ ...init, state: new State() });
  }

  /** The text of the last message. */
  get text() {
    return this.lastMessage?.parts.map((part) => part.text ?? "").join("");
  }
}

/** The SDK's transport on this server, and what it has told. */
export function transport(context, options = {}) {
  const told = { events: [], starts: 0, tokens: 0, answers: [] };
  const own = new TriggerChatTransport({
    task: "assistant",
    baseURL: context.url,
    startSession: async ({ chatId, taskId }) => {
      told.starts++;
      return sessions.start(sessionBody({ externalId: chatId, taskIdentifier: taskId }));
    },
    accessToken: async ({ chatId }) => {
      told.tokens++;
      return (await sessions.start(sessionBody({ externalId: chatId }))).publicAccessToken;
    },
    fetch: async (url, init, { endpoint }) => {
      const response = await fetch(url, init);
      told.answers.push({ endpoint, status: response.status, settled: response.headers.get("x-session-settled") });
      return response;
    },
    onEvent: (event) => told.events.push(event),
    ...options,
  });
  return Object.assign(own, { told });
}

/** What the SDK installs inside a run. */
let manager;

/** The agent's end of a session. */
export class Agent {
  constructor(context, chatId) {
    manager ??= new StandardSessionStreamManager(apiClientManager.clientOrThrow(), context.url);
    sessionStreams.setGlobalManager(manager);
    this.session = sessions.open(chatId);
  }

  /** The next thing that was sent. */
  async next() {
    return (await this.session.in.once({ timeoutMs: 15_000 }).unwrap()) ?? {};
  }

  /** Answers as a model would, word by word. `between(n)` runs ahead of each word. */
  async say(words, between = async () => {}) {
    await this.session.out
      .writer({
        execute: async ({ write, merge }) => {
          write({ type: "start" });
          write({ type: "text-start", id: "t" });
          for (const [n, delta] of words.entries()) {
            await between(n);
            merge(ReadableStream.from([{ type: "text-delta", id: "t", delta }]));
            await new Promise(setImmediate);
          }
          write({ type: "text-end", id: "t" });
          write({ type: "finish" });
        },
      })
      .waitUntilComplete();
  }

  /** Ends the turn that the last thing sent has begun. */
  async complete(headers = []) {
    const seq = this.session.in.lastDispatchedSeqNum();
    return this.session.out.writeControl("turn-complete", [["session-in-event-id", String(seq)], ...headers]);
  }
}
