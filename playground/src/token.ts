// The token: kept, tried, and what the server thinks of it.

import { post } from "./http";
import { createStore, tabStorage } from "./store";

export interface Token {
  value: string;
  status: "missing" | "checking" | "accepted" | "refused" | "unreachable";
  /** What it may do, or why it was refused. */
  detail: string;
  /** Whose sessions it reaches. */
  environment: string;
}

const KEY = "token";
const WHO = "query Viewer { viewer { environmentId tokenKind scopes expiresAt } }";
const KINDS: Record<string, string> = {
  ROOT_KEY: "root key",
  SCOPED_KEY: "scoped key",
  PUBLIC_TOKEN: "public token",
};

export const token = createStore<Token>({ value: "", status: "missing", detail: "", environment: "" });

/** Takes another token and asks the server about it. */
export async function setToken(value: string): Promise<void> {
  tabStorage.set(KEY, value);
  if (!value) return token.set({ value, status: "missing", detail: "" });
  token.set({ value, status: "checking", detail: "" });
  const answer = await post(value, { query: WHO });
  if (token.get().value !== value) return;
  const viewer = answer.body?.data?.viewer as Viewer | undefined;
  if (viewer) return token.set({ status: "accepted", detail: describe(viewer), environment: viewer.environmentId });
  const away = answer.status === 0 || answer.status >= 500;
  token.set({ status: away ? "unreachable" : "refused", detail: answer.message });
}

/** The server no longer takes the token, as an operation found. */
export function tokenRefused(value: string, detail: string): void {
  if (token.get().value === value) token.set({ status: "refused", detail });
}

/** The token that this browser tab had before it was reloaded. */
export function restoreToken(): void {
  void setToken(tabStorage.get(KEY) ?? "");
}

interface Viewer {
  environmentId: string;
  tokenKind: string;
  scopes: string[] | null;
  expiresAt: string | null;
}

function describe({ tokenKind, scopes, expiresAt }: Viewer): string {
  const parts = [KINDS[tokenKind] ?? tokenKind, scopes ? scopes.join(", ") : "may do everything"];
  if (expiresAt) parts.push(`until ${new Date(expiresAt).toLocaleTimeString()}`);
  return parts.join(" · ");
}
