"""`gql`, the GraphQL client of Python: subscriptions over its WebSocket transport, queries and mutations over HTTP."""

import asyncio
import unittest
import uuid
from contextlib import aclosing

from gql import Client, GraphQLRequest
from gql.transport.exceptions import TransportConnectionFailed, TransportQueryError
from gql.transport.httpx import HTTPXAsyncTransport
from gql.transport.websockets import WebsocketsTransport

from server import SECRET, WRONG_TOKEN, Server, bearer

FOLLOW = """subscription Follow($by: SessionBy!, $after: Cursor) {
  channelRecords(by: $by, io: OUT, after: $after) {
    records { seqNum data control } endCursor caughtUp closed { status reason }
  }
}"""
CREATE = """mutation Create($input: CreateSessionInput!) {
  createSession(input: $input) { session { sessionId externalId tags } created userErrors { code path } }
}"""
FIND = "query Find($id: String!) { session(by: { externalId: $id }) { sessionId status } viewer { tokenKind } }"


def setUpModule():
    global server
    server = Server()
    unittest.addModuleCleanup(server.remove)


def over_websocket(token=SECRET):
    subprotocols = [WebsocketsTransport.GRAPHQLWS_SUBPROTOCOL]
    transport = WebsocketsTransport(server.websocket, init_payload=bearer(token), subprotocols=subprotocols)
    return Client(transport=transport)


def over_http(token=SECRET, **options):
    return Client(transport=HTTPXAsyncTransport(server.graphql, headers=bearer(token)), **options)


def follow(over, session, **variables):
    """The events of `.out`. They are left where this is: the client waits ten seconds for any that are left only by its end."""
    return aclosing(over.subscribe(GraphQLRequest(FOLLOW, variable_values={"by": session, **variables})))


async def create(over, fields):
    """The payload of the mutation."""
    request = GraphQLRequest(CREATE, variable_values={"input": fields})
    return (await over.execute(request))["createSession"]


async def find(over, name):
    """What the query answers."""
    return await over.execute(GraphQLRequest(FIND, variable_values={"id": name}))


async def until(events, condition):
    """The data of all records up to the event that fulfils `condition`, and this event."""
    data = []
    async for result in events:
        event = result["channelRecords"]
        data += [record["data"] for record in event["records"] if record["control"] is None]
        if condition(event):
            return data, event
    raise AssertionError(f"the subscription ended after {data}")


async def refusal(over, session):
    """The codes with which a subscription is refused. `assertRaises` would end the task that receives for all of them, because
    it clears every frame that the error has come through."""
    try:
        async with follow(over, session) as events:
            raise AssertionError(f"it is answered with {await anext(events)}")
    except TransportQueryError as refused:
        return [error["extensions"]["code"] for error in refused.errors]


async def ask(call, *arguments):
    """A plain request beside the client, whose loop goes on meanwhile."""
    return await asyncio.to_thread(call, *arguments)


class Subscriptions(unittest.IsolatedAsyncioTestCase):
    async def test_a_subscription_gives_a_stored_record_then_a_live_one_and_the_end(self):
        session = await ask(server.session)
        await ask(server.append, session, {"stored": 1})
        async with over_websocket() as over, follow(over, session) as events:
            data, _ = await until(events, lambda event: event["caughtUp"])
            self.assertEqual(data, [{"stored": 1}])
            await ask(server.append, session, "live")
            data, _ = await until(events, lambda event: event["records"])
            self.assertEqual(data, ["live"])
            await ask(server.close, session, "done")
            data, last = await until(events, lambda event: event["closed"])
            self.assertEqual((data, last["closed"]), ([], {"status": "CLOSED", "reason": "done"}))
            self.assertEqual([event async for event in events], [])

    async def test_a_cursor_goes_on_exactly_behind_it_on_another_connection(self):
        session = await ask(server.session)
        await ask(server.append, session, 1, 2)
        async with over_websocket() as over, follow(over, session) as events:
            _, event = await until(events, lambda event: event["caughtUp"])
        await ask(server.append, session, 3)
        async with over_websocket() as over, follow(over, session, after=event["endCursor"]) as events:
            data, _ = await until(events, lambda event: event["caughtUp"])
        self.assertEqual(data, [3])

    async def test_one_connection_carries_several_operations_and_keeps_them_when_one_is_left(self):
        one, other = await ask(server.session), await ask(server.session)
        async with over_websocket() as over, follow(over, other) as kept:
            await until(kept, lambda event: event["caughtUp"])
            async with follow(over, one) as left:
                await until(left, lambda event: event["caughtUp"])
            await ask(server.append, other, "kept")
            data, _ = await until(kept, lambda event: event["records"])
            self.assertEqual(data, ["kept"])
            viewer = await over.execute(GraphQLRequest("{ viewer { tokenKind } }"))
            self.assertEqual(viewer, {"viewer": {"tokenKind": "ROOT_KEY"}})

    async def test_a_token_that_is_refused_shows_as_an_error_when_the_client_connects(self):
        with self.assertRaises(TransportConnectionFailed) as refused:
            async with over_websocket(WRONG_TOKEN):
                self.fail("it is connected")
        close = refused.exception.__cause__.rcvd
        self.assertEqual((close.code, close.reason), (4403, "Forbidden: Invalid API key"))

    async def test_a_token_for_another_session_is_refused_for_the_operation_alone(self):
        mine, other = await ask(server.session), await ask(server.session)
        token = await ask(server.public_token, f"read:sessions:{mine['sessionId']}")
        async with over_websocket(token) as over:
            self.assertEqual(await refusal(over, other), ["UNAUTHORIZED"])
            async with follow(over, mine) as events:
                data, _ = await until(events, lambda event: event["caughtUp"])
            self.assertEqual(data, [])


class Requests(unittest.IsolatedAsyncioTestCase):
    async def test_a_mutation_and_a_query_fit_the_schema_that_the_client_has_fetched(self):
        name = f"python-{uuid.uuid4()}"
        fields = {"type": "chat.agent", "taskIdentifier": "assistant", "externalId": name, "tags": ["a"]}
        async with over_http(fetch_schema_from_transport=True) as over:
            made = await create(over, fields)
            self.assertEqual((made["created"], made["userErrors"]), (True, []))
            self.assertEqual((made["session"]["externalId"], made["session"]["tags"]), (name, ["a"]))
            found = await find(over, name)
        session = {"sessionId": made["session"]["sessionId"], "status": "ACTIVE"}
        self.assertEqual(found, {"session": session, "viewer": {"tokenKind": "ROOT_KEY"}})

    async def test_a_mutation_that_breaks_a_rule_answers_what_has_to_be_mended(self):
        fields = {"type": "", "taskIdentifier": "assistant"}
        async with over_http() as over:
            made = await create(over, fields)
        self.assertEqual(made["userErrors"], [{"code": "VALIDATION_FAILED", "path": ["input", "type"]}])

    async def test_a_token_that_is_refused_shows_as_an_error_with_its_code(self):
        async with over_http(WRONG_TOKEN) as over:
            with self.assertRaises(TransportQueryError) as refused:
                await find(over, "any")
        self.assertEqual([error["extensions"]["code"] for error in refused.exception.errors], ["UNAUTHENTICATED"])
