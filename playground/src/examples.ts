// What a newcomer tries, in this order.

import type { Channel } from "./resume";

export interface Example {
  /** Also the name of the operation, by which its tab is found again. */
  name: string;
  hint: string;
  query: string;
  variables(session: string, cursor: string | null): Record<string, unknown>;
}

/** The channel that the examples write and follow. */
export function exampleChannel(externalId: string): Channel {
  return { by: { externalId }, io: "OUT" };
}

const FOLLOWED = `records { seqNum timestamp data text }
    endCursor
    caughtUp
    closed { at reason status }`;

/** What the first tab shows. */
export const WELCOME = `# Paste the key that sessiond printed when it
# started into the field above. Then click the
# examples, from left to right.
#
# Ctrl-Space completes, Ctrl-Enter runs.

query Viewer {
  viewer {
    tokenKind
    scopes
    expiresAt
    environmentId
  }
}
`;

export const EXAMPLES: Example[] = [
  {
    name: "Create",
    hint: "A session; again: the same one.",
    query: `mutation Create($input: CreateSessionInput!) {
  createSession(input: $input) {
    created
    session { id sessionId externalId status createdAt }
    userErrors { code path message }
  }
}`,
    variables: (externalId) => ({
      input: { externalId, type: "chat", taskIdentifier: "demo", tags: ["playground"] },
    }),
  },
  {
    name: "Append",
    hint: "A record on its .out, kept for good.",
    query: `mutation Append($input: AppendRecordsInput!) {
  appendRecords(input: $input) {
    records { seqNum timestamp data }
    tail { seqNum }
    userErrors { code path message }
  }
}`,
    variables: (externalId) => ({
      input: { by: { externalId }, io: "OUT", records: [{ data: { text: "hello" } }] },
    }),
  },
  {
    name: "Follow",
    hint: "All records, then live. Append meanwhile!",
    query: `subscription Follow($externalId: String!) {
  channelRecords(
    by: {externalId: $externalId}
    io: OUT
  ) {
    ${FOLLOWED}
  }
}`,
    variables: (externalId) => ({ externalId }),
  },
  {
    name: "Resume",
    hint: "Only what is newer than what you saw.",
    query: `subscription Resume($externalId: String!, $after: Cursor) {
  channelRecords(
    by: {externalId: $externalId}
    io: OUT
    after: $after
  ) {
    ${FOLLOWED}
  }
}`,
    variables: (externalId, after) => ({ externalId, after }),
  },
  {
    name: "List",
    hint: "The newest sessions and their tails.",
    query: `query List($filter: SessionFilter) {
  sessions(filter: $filter, first: 10) {
    totalCount
    nodes {
      externalId
      status
      tags
      createdAt
      out { tail { seqNum timestamp } }
    }
    pageInfo { hasNextPage endCursor }
  }
}`,
    variables: () => ({ filter: { tags: { any: ["playground"] } } }),
  },
  {
    name: "Close",
    hint: "For ever: followers end, appends fail.",
    query: `mutation Close($input: CloseSessionInput!) {
  closeSession(input: $input) {
    session { externalId status closedAt closedReason }
    userErrors { code path message }
  }
}`,
    variables: (externalId) => ({ input: { by: { externalId }, reason: "done" } }),
  },
];
