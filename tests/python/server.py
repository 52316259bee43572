"""Starts the real binary and asks it plain things. Knows nothing of the client under test."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

SECRET = "tr_dev_clientsuite0123456789abcd"
WRONG_TOKEN = "tr_dev_thiskeyopensnothing00000000"

BINARY = os.environ.get("SESSIOND_BIN", str(Path(__file__).parents[2] / "target/debug/sessiond"))
READY_WITHIN = 20

# Every client here honours these, and what is asked is on this machine.
for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
    del os.environ[name]


class Server:
    """A fresh server in a throw-away folder, on a port of its own."""

    def __init__(self, **settings):
        self.data = tempfile.mkdtemp(prefix="sessiond-python-")
        self.log = open(Path(self.data) / "stderr", "w+", encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SESSIOND_")}
        environment |= {"SESSIOND_SECRET_KEY": SECRET, **settings}
        self.child = subprocess.Popen(
            [BINARY, "serve", "--listen", "127.0.0.1:0", "--data", self.data],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        try:
            self.url = self._announced()
            self._ready()
        except BaseException:
            self.remove()
            raise

    @property
    def websocket(self):
        return self.url.replace("http", "ws", 1) + "/graphql"

    @property
    def graphql(self):
        return self.url + "/graphql"

    def remove(self):
        """Stops it for good and forgets its data."""
        self.child.kill()
        self.child.wait()
        self.child.stdout.close()
        self.log.close()
        shutil.rmtree(self.data)

    def mutate(self, field, fields):
        """Runs a mutation that must leave no user error; answers its payload."""
        kind = field[0].upper() + field[1:]
        query = f"mutation($input: {kind}Input!) {{ {field}(input: $input) {{ %s userErrors {{ message }} }} }}"
        selected = {"createSession": "session { sessionId }", "createPublicToken": "token"}.get(field, "")
        body = json.dumps({"query": query % selected, "variables": {"input": fields}}).encode()
        headers = {"Content-Type": "application/json", **bearer(SECRET)}
        with urllib.request.urlopen(urllib.request.Request(self.graphql, body, headers)) as response:
            result = json.load(response)
        payload = (result.get("data") or {}).get(field)
        if result.get("errors") or payload is None or payload["userErrors"]:
            raise AssertionError(f"{field}: {result}")
        return payload

    def session(self):
        """A new session; answers what names it in an input."""
        fields = {"type": "chat.agent", "taskIdentifier": "assistant", "externalId": f"python-{uuid.uuid4()}"}
        return {"sessionId": self.mutate("createSession", fields)["session"]["sessionId"]}

    def append(self, session, *values):
        """Appends to `.out` one record for each value."""
        records = [{"data": value} for value in values]
        self.mutate("appendRecords", {"by": session, "io": "OUT", "records": records})

    def close(self, session, reason):
        self.mutate("closeSession", {"by": session, "reason": reason})

    def public_token(self, *scopes):
        return self.mutate("createPublicToken", {"scopes": scopes})["token"]

    def _announced(self):
        for line in self.child.stdout:
            if url := re.search(r"http://127\.0\.0\.1:\d+", line):
                # Goes on reading for ever: a full pipe would stop the server.
                threading.Thread(target=self.child.stdout.read, daemon=True).start()
                return url[0]
        raise RuntimeError(f"the server ended with {self.child.wait()}:\n{self._said()}")

    def _ready(self):
        deadline = time.monotonic() + READY_WITHIN
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(self.url + "/readyz"):
                    return
            except urllib.error.URLError:
                time.sleep(0.02)
        raise RuntimeError(f"the server was not ready in {READY_WITHIN} s:\n{self._said()}")

    def _said(self):
        self.log.seek(0)
        return self.log.read()


def bearer(token):
    """What shows a token, in a header and in `connection_init` alike."""
    return {"authorization": f"Bearer {token}"}
