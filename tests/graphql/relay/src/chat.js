// What a small Relay application asks for. Only relay-compiler reads this file: the test runs what it makes of it.

import { graphql } from "relay-runtime";

graphql`
  query chatListQuery($filter: SessionFilter, $count: Int!, $cursor: String) {
    ...chatList @arguments(filter: $filter, count: $count, cursor: $cursor)
  }
`;

graphql`
  fragment chatList on Query
  @argumentDefinitions(filter: { type: "SessionFilter" }, count: { type: "Int!" }, cursor: { type: "String" })
  @refetchable(queryName: "chatListPageQuery") {
    sessions(filter: $filter, first: $count, after: $cursor) @connection(key: "chatList_sessions", filters: ["filter"]) {
      edges {
        node {
          id
          ...chatRow
        }
      }
      totalCount
    }
  }
`;

graphql`
  fragment chatRow on Session @refetchable(queryName: "chatRowRefetchQuery") {
    sessionId
    status
    closedReason
    metadata
  }
`;

graphql`
  query chatSessionQuery($by: SessionBy!, $count: Int!, $cursor: String) {
    session(by: $by) {
      id
      ...chatRow
      out {
        id
        ...chatRecords @arguments(count: $count, cursor: $cursor)
      }
    }
  }
`;

graphql`
  fragment chatRecords on Channel
  @argumentDefinitions(count: { type: "Int!" }, cursor: { type: "String" })
  @refetchable(queryName: "chatRecordsPageQuery") {
    tail {
      seqNum
    }
    records(first: $count, after: $cursor) @connection(key: "chatRecords_records") {
      edges {
        cursor
        node {
          id
          seqNum
          data
        }
      }
    }
  }
`;

graphql`
  mutation chatAppendMutation($input: AppendRecordsInput!, $connections: [ID!]!) {
    appendRecords(input: $input) {
      records @appendNode(connections: $connections, edgeTypeName: "RecordEdge") {
        id
        seqNum
        data
      }
      channel {
        id
        tail {
          seqNum
        }
      }
      userErrors {
        code
        path
        message
      }
    }
  }
`;

graphql`
  mutation chatCreateMutation($input: CreateSessionInput!, $connections: [ID!]!) {
    createSession(input: $input) {
      session @prependNode(connections: $connections, edgeTypeName: "SessionEdge") {
        id
        ...chatRow
      }
      created
      userErrors {
        code
        path
        message
      }
    }
  }
`;

graphql`
  mutation chatCloseMutation($input: CloseSessionInput!) {
    closeSession(input: $input) {
      session {
        id
        ...chatRow
      }
      userErrors {
        code
      }
    }
  }
`;

graphql`
  subscription chatRecordsSubscription($by: SessionBy!, $after: Cursor, $connections: [ID!]!) {
    channelRecords(by: $by, io: OUT, after: $after) {
      records @appendNode(connections: $connections, edgeTypeName: "RecordEdge") {
        id
        seqNum
        data
      }
      endCursor
      caughtUp
      closed {
        reason
      }
    }
  }
`;

graphql`
  subscription chatSessionSubscription($by: SessionBy!) {
    sessionChanged(by: $by) {
      id
      ...chatRow
    }
  }
`;
