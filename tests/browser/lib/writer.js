// Runs in a page: what a chat in a browser does with a public token and S2's client. Bundled by the test.

import { AppendInput, AppendRecord, RangeNotSatisfiableError, S2, S2Error } from "@s2-dev/streamstore";

const record = (data, id) => AppendRecord.string({ body: JSON.stringify({ data, id }) });

/** Asks for direct writes; answers the status and every header that the page may read. */
async function initialize({ url, session, token }, io) {
  const response = await fetch(`${url}/realtime/v1/sessions/${session}/${io}`, {
    method: "PUT",
    headers: { Authorization: `Bearer ${token}`, "Content-Type": "application/json", "x-trigger-client": "browser" },
  });
  return { status: response.status, headers: Object.fromEntries(response.headers), body: await response.json() };
}

function stream(headers) {
  const endpoint = headers["x-s2-endpoint"];
  const s2 = new S2({ accessToken: headers["x-s2-access-token"], endpoints: { account: endpoint, basin: endpoint } });
  return s2.basin(headers["x-s2-basin"]).stream(headers["x-s2-stream-name"]);
}

/** What came of it, as something that can leave the page. */
async function outcome(asking) {
  try {
    return { value: await asking };
  } catch (error) {
    return { name: error.constructor.name, isS2Error: error instanceof S2Error, status: error.status, code: error.code, message: error.message };
  }
}

export const initialized = (server, io) => outcome(initialize(server, io));

/** Writes to `.in` in every way, and reads it back in every way. */
export async function converse(server) {
  const { status, headers } = await initialize(server, "in");
  const input = stream(headers);
  const ack = await input.append(AppendInput.create([record("unary", "a"), record("again", "b")]));
  await input.append(AppendInput.create([AppendRecord.bytes({ body: new TextEncoder().encode('{"data":"bytes","id":"c"}') })]));
  const session = await input.appendSession();
  const tickets = [];
  for (let n = 0; n < 20; n++) tickets.push(await session.submit(AppendInput.create([record(n, `s${n}`)])));
  const acks = await Promise.all(tickets.map((ticket) => ticket.ack()));
  await session.close();
  const { tail } = await input.checkTail();
  const read = await input.read({ start: { from: { seqNum: 0 } } });
  const bytes = await input.read({ start: { from: { seqNum: 2 } }, stop: { limits: { count: 1 } } }, { as: "bytes" });
  const followed = [];
  const reader = (await input.readSession({ start: { from: { seqNum: 20 } } })).getReader();
  while (followed.length < 3) followed.push((await reader.read()).value.body);
  const live = reader.read();
  await input.append(AppendInput.create([record("live", "l")]));
  followed.push((await live).value.body);
  await reader.cancel();
  return {
    status,
    names: Object.keys(headers).filter((name) => name.startsWith("x-s2-")),
    start: ack.start.seqNum,
    acks: acks.map(({ start }) => start.seqNum),
    tail: tail.seqNum,
    read: read.records.map(({ body }) => JSON.parse(body).data),
    bytes: [...bytes.records[0].body],
    followed: followed.map((body) => JSON.parse(body).data),
  };
}

/** How each refusal looks to the page. `close` closes the session meanwhile. */
export async function refusals(server) {
  const { headers } = await initialize(server, "in");
  const input = stream(headers);
  const append = (stream, records, options) => stream.append(AppendInput.create(records, options));
  const results = {
    trim: await outcome(append(input, [AppendRecord.trim(1)])),
    control: await outcome(append(input, [AppendRecord.string({ body: "", headers: [["trigger-control", "turn-complete"]] })])),
    elsewhere: await outcome(append(stream({ ...headers, "x-s2-stream-name": "sessions/another/in" }), [record("x", "x")])),
    nonsense: await outcome(append(stream({ ...headers, "x-s2-access-token": "nonsense" }), [record("x", "x")])),
    displaced: await outcome(append(input, [record("x", "x")], { matchSeqNum: 9999 })),
    unwritten: await outcome(input.read({ start: { from: { seqNum: 9999 } } }).then(() => "read")),
  };
  results.unwritten.isItsOwn = results.unwritten.name === RangeNotSatisfiableError.name;
  await window.closeSession();
  const session = await input.appendSession();
  const ticket = await session.submit(AppendInput.create([record("late", "late")]));
  results.closed = await outcome(ticket.ack());
  return results;
}
