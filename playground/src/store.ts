// A value that components can watch.

import { useSyncExternalStore } from "react";

export interface Store<T> {
  get(): T;
  set(change: Partial<T>): void;
  watch(listener: () => void): () => void;
}

export function createStore<T extends object>(initial: T): Store<T> {
  let value = initial;
  const listeners = new Set<() => void>();
  return {
    get: () => value,
    set(change) {
      value = { ...value, ...change };
      listeners.forEach((listener) => listener());
    },
    watch(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}

export function useStore<T>(store: Store<T>): T {
  return useSyncExternalStore(store.watch, store.get);
}

/** Remembers for this browser tab only; a browser that forbids it forgets. */
export const tabStorage = {
  get(key: string): string | null {
    try {
      return sessionStorage.getItem(`sessiond.${key}`);
    } catch {
      return null;
    }
  },
  set(key: string, value: string | null): void {
    try {
      if (value) sessionStorage.setItem(`sessiond.${key}`, value);
      else sessionStorage.removeItem(`sessiond.${key}`);
    } catch {
      // Then it lives as long as the page.
    }
  },
};
