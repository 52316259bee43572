// The live log: what the running subscription brought, newest first, and a line to write to the same channel.

import { useState, type FormEvent } from "react";
import { post } from "./http";
import { clear, live, stop, type Live, type Phase } from "./live";
import { useStore } from "./store";
import { token } from "./token";

const PHASES: Record<Phase, string> = {
  idle: "",
  connecting: "connecting…",
  replaying: "reading what is stored…",
  live: "live",
  reconnecting: "connection lost, reconnecting…",
  ended: "ended",
  stopped: "stopped",
  failed: "failed",
};

export function LiveLog() {
  const state = useStore(live);
  const { phase, detail, title, events, records, cursor, rows, channel } = state;
  if (phase === "idle") return null;
  const running = ["connecting", "replaying", "live", "reconnecting"].includes(phase);
  const counts = channel ? [count(records, "record"), cursor && `last ${cursor}`] : [count(events, "event")];
  return (
    <section className="live-log" aria-label="Live log">
      <header>
        <span className={`phase ${phase}`} role="status">
          {PHASES[phase]}
        </span>
        <b>{title}</b>
        <span className="counts">{counts.filter(Boolean).join(" · ")}</span>
        <span className="detail" title={detail}>{detail}</span>
        {running ? (
          <button type="button" onClick={() => stop()}>
            Stop
          </button>
        ) : (
          <button type="button" onClick={clear}>
            Clear
          </button>
        )}
      </header>
      {running && channel && <Append state={state} />}
      <ol>
        {rows.map(({ key, kind, label, time, text }) => (
          <li key={key} className={kind}>
            <span>{label}</span>
            <time>{time}</time>
            <code>{text}</code>
          </li>
        ))}
      </ol>
    </section>
  );
}

function count(n: number, noun: string): string {
  return `${n} ${noun}${n === 1 ? "" : "s"}`;
}

const APPEND = `mutation AppendLine($input: AppendRecordsInput!) {
  appendRecords(input: $input) { userErrors { message } }
}`;

function Append({ state: { channel } }: { state: Live }) {
  const [text, setText] = useState("");
  const [fault, setFault] = useState("");
  const append = async (event: FormEvent) => {
    event.preventDefault();
    const input = { ...channel, records: [asRecord(text)] };
    const { body, message } = await post(token.get().value, { query: APPEND, variables: { input } });
    const payload = body?.data?.appendRecords as { userErrors: { message: string }[] } | undefined;
    setFault(payload ? (payload.userErrors[0]?.message ?? "") : message);
    if (payload && payload.userErrors.length === 0) setText("");
  };
  return (
    <form onSubmit={(event) => void append(event)}>
      <input
        aria-label="Record to append"
        placeholder={`append to .${channel?.io.toLowerCase()}: JSON or text, then Enter`}
        value={text}
        onChange={(event) => setText(event.target.value)}
      />
      <button type="submit" disabled={!text}>
        Append
      </button>
      {fault && <span role="alert">{fault}</span>}
    </form>
  );
}

function asRecord(line: string): { data: unknown } | { text: string } {
  try {
    return { data: JSON.parse(line) };
  } catch {
    return { text: line };
  }
}
