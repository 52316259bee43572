// The operations of documents.graphql by name, each with the fragments it needs and nothing else.

import { readFileSync } from "node:fs";
import { parse, print, separateOperations } from "graphql";

const operations = separateOperations(parse(readFileSync(new URL("../documents.graphql", import.meta.url), "utf8")));

/** As clients that parse take it. */
export function document(name) {
  const found = operations[name];
  if (!found) throw new Error(`documents.graphql has no operation ${name}`);
  return found;
}

/** As it goes over the wire. */
export function text(name) {
  return print(document(name));
}
