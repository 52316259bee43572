"""Serves ClickHouse's own HTTP interface from its library: `serve.py LIBRARY FOLDER [PORT]`.

The library is `clickhouse local` with listeners. It listens for as long as its query runs, so that query reads from a
pipe that we hold. Prints `READY http=PORT` once it answers, and ends with SIGTERM or with its standard input, so that no
engine outlives the test that started it.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
import urllib.request

# More than a test needs, and less than makes the machine swap: a query that wants more fails, and not its neighbours.
MEMORY = 4 << 30


class Result(ctypes.Structure):
    """The library's `local_result_v2`."""

    _fields_ = [
        ("buffer", ctypes.c_char_p),
        ("length", ctypes.c_size_t),
        ("vector", ctypes.c_void_p),
        ("elapsed", ctypes.c_double),
        ("rows_read", ctypes.c_uint64),
        ("bytes_read", ctypes.c_uint64),
        ("error", ctypes.c_char_p),
    ]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main():
    library, folder = sys.argv[1:3]
    port = int(sys.argv[3]) if len(sys.argv) > 3 else free_port()
    endless, held = os.pipe()
    stop = {signal.SIGTERM, signal.SIGINT}
    # Blocked here, and so in every thread that the library starts: the main thread never returns to Python.
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)

    ending = threading.Lock()

    def end_with(event):
        event()
        # Once: the number of a closed pipe is soon another file's. Never released, because nothing comes after it.
        if ending.acquire(blocking=False):
            os.close(held)

    def read_to_end():
        while os.read(sys.stdin.fileno(), 4096):
            pass

    def announce():
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                time.sleep(0.02)
        print(f"READY http={port}", flush=True)

    for work in (lambda: end_with(lambda: signal.sigwait(stop)), lambda: end_with(read_to_end), announce):
        threading.Thread(target=work, daemon=True).start()

    query = f"SYSTEM START LISTEN HTTP; SELECT count() FROM file('/proc/self/fd/{endless}', 'LineAsString') FORMAT Null"
    arguments = [
        "clickhouse",
        f"--path={folder}",
        f"--http_port={port}",
        "--listen_host=127.0.0.1",
        f"--query={query}",
        "--",
        f"--max_server_memory_usage={MEMORY}",
    ]
    serve = ctypes.CDLL(library).query_stable_v2
    serve.restype = ctypes.POINTER(Result)
    ended = serve(len(arguments), (ctypes.c_char_p * len(arguments))(*(argument.encode() for argument in arguments)))
    if ended and ended.contents.error:
        sys.exit(ended.contents.error.decode(errors="replace"))


main()
