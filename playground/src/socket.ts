// The WebSocket that carries subscriptions: one client for each token.

import { createClient, type Client } from "graphql-ws";
import { ENDPOINT } from "./http";

const PING_EVERY_MS = 10_000;
const PONG_WITHIN_MS = 5_000;
const LONGEST_WAIT_MS = 5_000;
/** Attempts on a socket that has never been open, after which something other than the network is wrong. */
const FIRST_ATTEMPTS = 4;

export interface Socket {
  client: Client;
  close(): void;
}

/** `changed` hears of every connect and disconnect; `mayRetry` is asked before each new attempt. */
export function openSocket(token: string, changed: (open: boolean) => void, mayRetry: () => boolean): Socket {
  let everOpen = false;
  let failures = 0;
  let pongTimer: number | undefined;
  const url = new URL(ENDPOINT);
  url.protocol = url.protocol.replace("http", "ws");
  const client = createClient({
    url: url.href,
    connectionParams: { authorization: `Bearer ${token}` },
    keepAlive: PING_EVERY_MS,
    connectionAckWaitTimeout: 10_000,
    retryAttempts: Infinity,
    retryWait: (tries) => delay(Math.min(250 * 2 ** tries, LONGEST_WAIT_MS) * (0.75 + Math.random() / 2)),
    shouldRetry: (cause) => {
      failures += 1;
      return !isRefusal(cause) && (everOpen || failures < FIRST_ATTEMPTS) && mayRetry();
    },
    on: {
      connected: () => {
        everOpen = true;
        changed(true);
      },
      closed: () => {
        clearTimeout(pongTimer);
        changed(false);
      },
      // A network that went away says nothing: an unanswered ping does.
      ping: (received) => {
        if (!received) pongTimer = window.setTimeout(() => client.terminate(), PONG_WITHIN_MS);
      },
      pong: (received) => {
        if (received) clearTimeout(pongTimer);
      },
    },
  });
  return { client, close: () => void client.dispose() };
}

/** Unauthorized or forbidden: trying again with the same token would change nothing. */
export function isRefusal(cause: unknown): cause is { code: number; reason: string } {
  return [4401, 4403].includes((cause as { code?: number } | null)?.code ?? 0);
}

/** Why a subscription ended, in words. */
export function explain(cause: unknown): string {
  if (Array.isArray(cause)) return cause.map((error: { message: string }) => error.message).join("; ");
  if (cause instanceof Error) return cause.message;
  const { code, reason } = cause as { code?: number; reason?: string };
  if (isRefusal(cause)) return `the server refused the token (${code} ${reason})`;
  return code ? `the connection was closed (${code} ${reason})` : "the connection could not be opened";
}

function delay(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
