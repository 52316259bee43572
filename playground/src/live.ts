// The subscription that runs, and the log of what it brought. It belongs to the page, not to a tab of the editor:
// switching to another tab to append does not end it.

import type { ExecutionResult } from "graphql";
import { followingOf, lastCursor, type Channel, type Following } from "./resume";
import type { Operation } from "./http";
import { explain, isRefusal, openSocket, type Socket } from "./socket";
import { createStore } from "./store";
import { tokenRefused } from "./token";

export type Phase = "idle" | "connecting" | "replaying" | "live" | "reconnecting" | "ended" | "stopped" | "failed";

export interface Row {
  key: number;
  kind: "record" | "event" | "note" | "error";
  label: string;
  time: string;
  text: string;
}

export interface Live {
  phase: Phase;
  detail: string;
  title: string;
  channel?: Channel;
  events: number;
  records: number;
  cursor: string | null;
  /** Newest first. */
  rows: Row[];
}

/** What an operation's tab is told. */
export interface Observer {
  next(result: ExecutionResult): void;
  error(cause: unknown): void;
  complete(): void;
}

const MOST_ROWS = 200;
const BLIND = "without endCursor in the query, going on would repeat records";
const NOTHING: Live = { phase: "idle", detail: "", title: "", events: 0, records: 0, cursor: null, rows: [] };

export const live = createStore<Live>(NOTHING);

interface Run {
  token: string;
  following?: Following;
  /** Came records whose place we cannot tell? Then going on would repeat them. */
  blind: boolean;
  observer: Observer;
  end?: () => void;
}

let run: Run | undefined;
let socket: (Socket & { token: string; open: boolean }) | undefined;
let rowKey = 0;

/** Starts a subscription in place of the one that runs. Answers what stops it, if it still runs by then. */
export function start(token: string, request: Operation, observer: Observer): () => void {
  stop("another subscription was started");
  const { client } = socketFor(token);
  const following = followingOf(request);
  const mine: Run = { token, following, blind: false, observer };
  run = mine;
  live.set({ ...NOTHING, title: titleOf(request, following), channel: following?.channel, phase: "connecting" });
  if (socket?.open) connection(true);
  // graphql-ws sends this object again when it reconnects, so what changes in it is what is resumed.
  const payload = { query: request.query, variables: request.variables, operationName: request.operationName };
  mine.end = client.subscribe(payload, {
    next: (result) => {
      if (run !== mine) return;
      const event = result.data?.[following?.responseKey ?? ""] as ChannelEvent | undefined;
      if (following && event) {
        note(mine, following, event);
        const { cursor } = live.get();
        if (cursor) Object.assign(payload, following.after(cursor));
      } else {
        add(row("event", result.errors ? "errors" : `event ${live.get().events + 1}`, result.data ?? result));
        live.set({ phase: "live" });
      }
      live.set({ events: live.get().events + 1 });
      observer.next(result as ExecutionResult);
    },
    error: (cause) => finish(mine, "failed", mine.blind ? `${explain(cause)}; ${BLIND}` : explain(cause), cause),
    complete: () => finish(mine, "ended", live.get().detail || "the server completed it"),
  });
  return () => {
    if (run === mine) stop();
  };
}

/** Ends what runs, if anything does. */
export function stop(detail = ""): void {
  if (run) finish(run, "stopped", detail);
}

/** Another token stands for another caller: its subscriptions need a connection of their own. */
export function tokenChanged(token: string): void {
  if (!socket || socket.token === token) return;
  stop("the token was changed");
  socket.close();
  socket = undefined;
}

export function clear(): void {
  live.set({ rows: [] });
}

function finish(mine: Run, phase: Phase, detail: string, cause?: unknown): void {
  if (run !== mine) return;
  run = undefined;
  mine.end?.();
  live.set({ phase, detail });
  if (isRefusal(cause)) tokenRefused(mine.token, cause.reason);
  if (cause) {
    add(row("error", "error", detail));
    mine.observer.error(new Error(detail));
  } else mine.observer.complete();
}

function socketFor(token: string): Socket {
  if (socket?.token !== token) {
    socket?.close();
    const changed = (open: boolean) => {
      if (socket !== mine) return;
      mine.open = open;
      connection(open);
    };
    const mine = { token, open: false, ...openSocket(token, changed, () => !run?.blind) };
    socket = mine;
  }
  return socket;
}

function connection(open: boolean): void {
  if (!run) return;
  if (open) live.set({ phase: run.following ? "replaying" : "live", detail: "" });
  else if (live.get().phase !== "connecting") {
    const { cursor } = live.get();
    live.set({ phase: "reconnecting", detail: run.following && cursor ? `to go on after ${cursor}` : "" });
  }
}

interface ChannelEvent {
  records?: Partial<ChannelRecord>[];
  endCursor?: string | null;
  caughtUp?: boolean;
  closed?: { reason?: string | null; status?: string } | null;
}

interface ChannelRecord {
  seqNum: string;
  cursor: string;
  timestamp: string;
  data: unknown;
  text: string | null;
  control: string | null;
}

function note(mine: Run, following: Following, event: ChannelEvent): void {
  const { records = [], closed } = event;
  add(
    ...records.slice(-MOST_ROWS).map((record) => {
      const { seqNum, timestamp, data, text, control } = record;
      return row("record", seqNum ? `#${seqNum}` : "record", control ?? data ?? text ?? record, timestamp);
    }),
  );
  const last = records.at(-1);
  const cursor = event.endCursor ?? last?.cursor ?? last?.seqNum;
  if (cursor) lastCursor.set(following.channel, cursor);
  else if (last || !event.records) mine.blind = !("endCursor" in event);
  if (event.caughtUp && live.get().phase !== "live") {
    add(row("note", "live", "caught up; what follows is new"));
    live.set({ phase: "live", detail: "" });
  }
  if (closed) {
    const detail = [`the session is ${closed.status?.toLowerCase() ?? "closed"}`, closed.reason].filter(Boolean).join(": ");
    add(row("note", "end", detail));
    live.set({ detail });
  }
  live.set({ records: live.get().records + records.length, cursor: cursor ?? live.get().cursor });
}

function row(kind: Row["kind"], label: string, content: unknown, timestamp?: string): Row {
  const text = typeof content === "string" ? content : JSON.stringify(content);
  const time = timestamp ? new Date(timestamp) : new Date();
  const millis = String(time.getMilliseconds()).padStart(3, "0");
  return { key: rowKey++, kind, label, time: `${time.toLocaleTimeString("en-GB")}.${millis}`, text };
}

/** Puts rows, given in the order in which they came, on top. */
function add(...rows: Row[]): void {
  if (rows.length > 0) live.set({ rows: [...rows.reverse(), ...live.get().rows].slice(0, MOST_ROWS) });
}

function titleOf(request: Operation, following: Following | undefined): string {
  if (!following) return request.operationName ?? "subscription";
  const { by, io, channel } = following.channel;
  const session = Object.values(by ?? {})[0] ?? "?";
  return `${session} ${channel ? `· ${channel} ` : ""}.${io?.toLowerCase()}`;
}
