// A program as users write it: every operation typed by codegen, on Apollo Client and on urql. It is compiled, not run;
// lines under @ts-expect-error prove that the types are types and not `any`.

import { ApolloClient, CombinedGraphQLErrors, HttpLink, InMemoryCache } from "@apollo/client";
import { GraphQLWsLink } from "@apollo/client/link/subscriptions";
import { Client, fetchExchange, subscriptionExchange } from "@urql/core";
import { createClient } from "graphql-ws";

import { type FragmentType, graphql, useFragment } from "./generated/index.js";
import {
  AppendRecordsDocument,
  ChannelIo,
  ChannelPageDocument,
  ChannelRecordsDocument,
  CreateSessionDocument,
  ErrorCode,
  ManySessionsDocument,
  NodeByIdDocument,
  OneSessionDocument,
  RecordFieldsFragmentDoc,
  SessionChangedDocument,
  SessionFieldsFragmentDoc,
  type SessionBy,
  SessionStatus,
} from "./generated/graphql.js";

/** Compiles only if both types are the same. */
type Same<A, B> = (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? true : false;
const same = <A, B>(_: Same<A, B>) => undefined;

// Exactly one of three: a union, not an object of optional fields.
const bySessionId: SessionBy = { sessionId: "session_1" };
const byExternalId: SessionBy = { externalId: "mine" };
// @ts-expect-error two at once
const byBoth: SessionBy = { sessionId: "session_1", externalId: "mine" };
// @ts-expect-error none
const byNone: SessionBy = {};

const Tail = graphql(`
  query Tail($by: SessionBy!) {
    session(by: $by) {
      sessionId
      expiresAt
      metadata
      out {
        sealed
        tail {
          seqNum
          timestamp
        }
      }
    }
  }
`);

const ws = createClient({ url: "ws://localhost:3030/graphql", connectionParams: { authorization: "Bearer key" } });
const apollo = new ApolloClient({ link: new HttpLink({ uri: "http://localhost:3030/graphql" }), cache: new InMemoryCache() });
const apolloWs = new ApolloClient({ link: new GraphQLWsLink(ws), cache: new InMemoryCache() });
const urql = new Client({
  url: "http://localhost:3030/graphql",
  preferGetMethod: false,
  exchanges: [
    fetchExchange,
    subscriptionExchange({
      forwardSubscription: ({ query = "", ...rest }) => ({
        subscribe: (sink) => ({ unsubscribe: ws.subscribe({ query, ...rest }, sink) }),
      }),
    }),
  ],
});

export async function overApollo(): Promise<string | undefined> {
  const { data: tail } = await apollo.query({ query: Tail, variables: { by: bySessionId } });
  const session = tail?.session;
  if (!session) return undefined;
  same<typeof session.sessionId, string>(true);
  same<typeof session.expiresAt, string | null>(true);
  same<typeof session.metadata, unknown>(true);
  same<typeof session.out.tail.seqNum, string>(true);
  same<typeof session.out.tail.timestamp, string | null>(true);
  // @ts-expect-error no such field was asked for
  void session.tags;
  // @ts-expect-error `by` is required
  await apollo.query({ query: Tail, variables: {} });
  // @ts-expect-error and has the type of the schema
  await apollo.query({ query: Tail, variables: { by: { sessionId: 1 } } });

  const made = await apollo.mutate({
    mutation: CreateSessionDocument,
    variables: { input: { type: "chat.agent", taskIdentifier: "assistant", metadata: { any: ["thing"] }, expiresAt: "2030-01-01T00:00:00Z" } },
  });
  const [problem] = made.data?.createSession.userErrors ?? [];
  if (problem?.code === ErrorCode.SessionClosed) return problem.path.join(".");
  if (CombinedGraphQLErrors.is(made.error)) return made.error.message;

  const page = await apollo.query({
    query: ManySessionsDocument,
    variables: { filter: { statuses: [SessionStatus.Active], tags: { any: ["a"] }, createdAt: { period: "7d" } }, first: 10 },
  });
  for (const { cursor, node } of page.data?.sessions.edges ?? []) {
    const fields = useFragment(SessionFieldsFragmentDoc, node);
    same<typeof cursor, string>(true);
    same<typeof fields.tags, Array<string>>(true);
  }

  apolloWs.subscribe({ query: ChannelRecordsDocument, variables: { by: byExternalId, io: ChannelIo.Out, after: "4", batch: 10 } }).subscribe({
    next: ({ data }) => {
      const event = data?.channelRecords;
      if (event?.closed) same<typeof event.closed.status, SessionStatus>(true);
      for (const record of event?.records ?? []) said(record);
    },
  });
  return session.sessionId;
}

function said(record: FragmentType<typeof RecordFieldsFragmentDoc>): unknown {
  const { data, text, seqNum, cursor } = useFragment(RecordFieldsFragmentDoc, record);
  same<typeof data, unknown>(true);
  same<typeof text, string | null>(true);
  same<typeof seqNum, string>(true);
  same<typeof cursor, string>(true);
  return data ?? text;
}

export async function overUrql(): Promise<void> {
  const { data, error } = await urql.query(OneSessionDocument, { by: byExternalId });
  if (error) throw error;
  const session = useFragment(SessionFieldsFragmentDoc, data?.session);
  same<NonNullable<typeof session>["status"], SessionStatus>(true);

  const appended = await urql.mutation(AppendRecordsDocument, {
    input: { by: bySessionId, io: ChannelIo.In, records: [{ data: { n: 1 } }, { text: "two", idempotencyKey: "k" }], expectedSeqNum: "7" },
  });
  same<NonNullable<typeof appended.data>["appendRecords"]["repeated"], boolean>(true);
  // @ts-expect-error a number is no UInt64
  urql.mutation(AppendRecordsDocument, { input: { by: bySessionId, io: ChannelIo.In, records: [], expectedSeqNum: 7 } });
  // @ts-expect-error no such direction
  urql.subscription(ChannelRecordsDocument, { by: bySessionId, io: "SIDEWAYS" });

  const node = (await urql.query(NodeByIdDocument, { id: "x" })).data?.node;
  // A union by __typename.
  if (node?.__typename === "Channel") same<typeof node.tail.seqNum, string>(true);
  if (node?.__typename === "Session") same<typeof node.externalId, string | null>(true);

  const page = await urql.query(ChannelPageDocument, { by: bySessionId, first: 2 });
  for (const { node: record } of page.data?.session?.out.records.edges ?? []) said(record);

  urql.subscription(SessionChangedDocument, { by: bySessionId }).subscribe((result) => {
    const row = useFragment(SessionFieldsFragmentDoc, result.data?.sessionChanged);
    same<NonNullable<typeof row>["closedAt"], string | null>(true);
  });
}

void [byBoth, byNone];
