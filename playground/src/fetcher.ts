// What the editor runs: queries and mutations over HTTP, subscriptions over the WebSocket.

import type { Fetcher, FetcherParams, FetcherReturnType } from "@graphiql/toolkit";
import { post, type Operation } from "./http";
import { start, type Observer } from "./live";
import { operationOf } from "./resume";
import { tokenRefused } from "./token";

export const NO_TOKEN = "No token yet: paste the secret key, which sessiond prints when it first starts, at the top of the page.";

const SHOW_EVERY_MS = 100;

let tab = "";
let attached: { tab: string; detach(): void } | undefined;

/** Says which tab of the editor is shown. A subscription whose tab is hidden goes on in the live log alone. */
export function showsTab(id: string): void {
  tab = id;
  if (attached && attached.tab !== id) attached.detach();
}

export function fetcherFor(token: string): Fetcher {
  const run = async ({ query, variables, operationName }: FetcherParams) => {
    if (!token) return { errors: [{ message: NO_TOKEN }] };
    const request: Operation = { query, variables: variables as Record<string, unknown>, operationName };
    if (operationOf(request)?.operation === "subscription") return subscription(token, request);
    const { status, body, message } = await post(token, request);
    if (status === 401) tokenRefused(token, message);
    return body ?? { errors: [{ message }] };
  };
  // What GraphiQL takes is wider than its type says: a promise of any of its answers.
  return (params) => run(params) as FetcherReturnType;
}

function subscription(token: string, request: Operation) {
  return {
    subscribe(observer: Observer) {
      const mine = { tab, detach };
      let shown = true;
      let latest: Parameters<Observer["next"]>[0] | undefined;
      let timer: ReturnType<typeof setTimeout> | undefined;
      // The pane shows one event and is slow to change; the log has them all.
      function show() {
        timer = undefined;
        if (shown && latest) observer.next(latest);
        latest = undefined;
      }
      function close(end: () => void) {
        clearTimeout(timer);
        show();
        if (shown) end();
        shown = false;
      }
      function detach() {
        if (attached === mine) attached = undefined;
        close(() => observer.complete());
      }
      attached = mine;
      const end = start(token, request, {
        next(result) {
          latest = result;
          timer ??= setTimeout(show, SHOW_EVERY_MS);
        },
        error: (cause) => close(() => observer.error(cause)),
        complete: () => close(() => observer.complete()),
      });
      return {
        unsubscribe() {
          shown = false;
          clearTimeout(timer);
          if (attached === mine) attached = undefined;
          // The editor unsubscribes both when it is told to stop and, just before it shows another tab, by itself.
          setTimeout(() => tab === mine.tab && end());
        },
      };
    },
  };
}
