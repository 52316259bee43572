// One operation over HTTP.

import type { ExecutionResult } from "graphql";

/** The page lives one level below the API, wherever both are mounted. */
export const ENDPOINT = new URL("../graphql", document.baseURI);

export interface Operation {
  query: string;
  variables?: Record<string, unknown>;
  operationName?: string | null;
}

export interface Answer {
  /** 0 when there was none. */
  status: number;
  body?: ExecutionResult<Record<string, unknown>>;
  /** The first fault, in words. */
  message: string;
}

export async function post(token: string, { query, variables, operationName }: Operation): Promise<Answer> {
  try {
    const response = await fetch(ENDPOINT, {
      method: "POST",
      headers: {
        Accept: "application/graphql-response+json, application/json;q=0.9",
        "Content-Type": "application/json",
        Authorization: `Bearer ${token}`,
      },
      body: JSON.stringify({ query, variables, operationName }),
      credentials: "omit",
      cache: "no-store",
    });
    const { status } = response;
    const text = await response.text();
    const body = parsed(text);
    const message = body?.errors?.[0]?.message ?? body?.error ?? (text.slice(0, 500) || `HTTP ${status}`);
    return { status, body: body?.data || body?.errors ? body : undefined, message };
  } catch (error) {
    return { status: 0, message: `The server did not answer: ${(error as Error).message}` };
  }
}

function parsed(text: string): (ExecutionResult<Record<string, unknown>> & { error?: string }) | undefined {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
