// Where in an operation the channel and the place in it stand, so that a follow can go on where it was.

import {
  getOperationAST,
  Kind,
  parse,
  print,
  valueFromASTUntyped,
  visit,
  type DocumentNode,
  type FieldNode,
  type OperationDefinitionNode,
} from "graphql";
import type { Operation } from "./http";
import { tabStorage } from "./store";
import { token } from "./token";

/** A channel as `channelRecords` and `appendRecords` name it. */
export interface Channel {
  by: Record<string, string>;
  io: string;
  channel?: string;
}

/** An operation that follows a channel. */
export interface Following {
  channel: Channel;
  /** Under which name an event stands in the answer. */
  responseKey: string;
  /** The same operation, giving only what comes after `cursor`. */
  after(cursor: string): Operation;
}

/** The operation that would run, if the text can be read. */
export function operationOf({ query, operationName }: Operation): OperationDefinitionNode | undefined {
  try {
    const document = parse(query);
    return getOperationAST(document, operationName) ?? getOperationAST(document) ?? undefined;
  } catch {
    return undefined;
  }
}

export function followingOf(request: Operation): Following | undefined {
  const operation = operationOf(request);
  const field = operation?.selectionSet.selections.find(
    (selection): selection is FieldNode => selection.kind === Kind.FIELD && selection.name.value === "channelRecords",
  );
  if (!field) return undefined;
  const { variables = {} } = request;
  const value = (name: string) => {
    const argument = field.arguments?.find((one) => one.name.value === name);
    return argument && valueFromASTUntyped(argument.value, variables);
  };
  const [by, io, channel] = [value("by"), value("io"), value("channel")] as [Channel["by"], string, string | undefined];
  return {
    channel: { by, io, ...(channel ? { channel } : {}) },
    responseKey: field.alias?.value ?? field.name.value,
    after: (cursor) => withAfter(request, field, cursor),
  };
}

function withAfter(request: Operation, field: FieldNode, cursor: string): Operation {
  const given = field.arguments?.find((argument) => argument.name.value === "after");
  if (given?.value.kind === Kind.VARIABLE) {
    return { ...request, variables: { ...request.variables, [given.value.name.value]: cursor } };
  }
  const after = {
    kind: Kind.ARGUMENT,
    name: { kind: Kind.NAME, value: "after" },
    value: { kind: Kind.STRING, value: cursor },
  } as const;
  const document: DocumentNode = visit(parse(request.query), {
    Field: (node) =>
      node.name.value === field.name.value && node.alias?.value === field.alias?.value
        ? { ...node, arguments: [...(node.arguments ?? []).filter((one) => one.name.value !== "after"), after] }
        : undefined,
  });
  return { ...request, query: print(document) };
}

/** The last place seen in a channel, which survives a reload of the page. */
export const lastCursor = {
  get: (channel: Channel) => tabStorage.get(cursorKey(channel)),
  set: (channel: Channel, cursor: string) => tabStorage.set(cursorKey(channel), cursor),
};

function cursorKey({ by, io, channel }: Channel): string {
  // Another server, or another tenant, has other records under the same name.
  return `cursor:${JSON.stringify([token.get().environment, by, io, channel ?? null])}`;
}
