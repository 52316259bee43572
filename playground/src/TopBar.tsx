// Name, token, theme.

import { useGraphiQL, useGraphiQLActions } from "@graphiql/react";
import { useEffect, useState } from "react";
import { useStore } from "./store";
import { setToken, token, type Token } from "./token";

const WHERE = "sessiond prints its secret key when it first starts, and how to show it at later starts. `sessiond keys create` makes another, `sessiond token` a public one.";
const KEPT = "Kept in this browser tab only (sessionStorage), and sent to this server only.";
const TYPING_PAUSE_MS = 400;

export function TopBar() {
  return (
    <header className="top-bar">
      <h1>
        <img src="./favicon.svg" alt="" width="22" height="22" /> sessiond <span>playground</span>
      </h1>
      <TokenField />
      <nav>
        <a href="../openapi.json" target="_blank" rel="noreferrer">
          REST API
        </a>
        <ThemeButton />
      </nav>
    </header>
  );
}

function TokenField() {
  const state = useStore(token);
  const [text, setText] = useState(state.value);
  useEffect(() => setText(state.value), [state.value]);
  useEffect(() => {
    if (text.trim() === token.get().value) return;
    const timer = setTimeout(() => void setToken(text.trim()), TYPING_PAUSE_MS);
    return () => clearTimeout(timer);
  }, [text]);
  return (
    <form
      className="token"
      onSubmit={(event) => {
        event.preventDefault();
        void setToken(text.trim());
      }}
    >
      <label htmlFor="token">Token</label>
      <input
        id="token"
        type="password"
        autoComplete="off"
        spellCheck={false}
        placeholder="tr_dev_… or a public token"
        title={KEPT}
        value={text}
        onChange={(event) => setText(event.target.value)}
        autoFocus={state.status === "missing"}
      />
      <output className={`token-status ${state.status}`} htmlFor="token" aria-live="polite" title={words(state)}>
        {words(state)}
      </output>
    </form>
  );
}

function words({ status, detail }: Token): string {
  switch (status) {
    case "missing":
      return WHERE;
    case "checking":
      return "Asking the server…";
    case "accepted":
      return `✓ ${detail}`;
    case "refused":
      return `Refused: ${detail}. ${WHERE}`;
    case "unreachable":
      return `${detail}. Press Enter to try again.`;
  }
}

const THEMES = { system: "◐", light: "☀", dark: "☾" } as const;

function ThemeButton() {
  const theme = useGraphiQL((state) => state.theme) ?? "system";
  const { setTheme } = useGraphiQLActions();
  // GraphiQL asks the system once: until a theme is chosen, its editors would stay in the one that was there first.
  useEffect(() => {
    if (theme !== "system") return;
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const follow = () => setTheme(null);
    dark.addEventListener("change", follow);
    return () => dark.removeEventListener("change", follow);
  }, [theme, setTheme]);
  const next = theme === "system" ? "dark" : theme === "dark" ? "light" : null;
  return (
    <button type="button" className="theme" title={`Theme: ${theme}`} aria-label={`Theme: ${theme}`} onClick={() => setTheme(next)}>
      {THEMES[theme]}
    </button>
  );
}
