// Starts, restarts and stops the real binary. Knows nothing of what the tests ask of it.

import { execFile, spawn } from "node:child_process";
import { randomUUID } from "node:crypto";
import { EventEmitter, once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { PassThrough } from "node:stream";
import { setTimeout as delay } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

export const SECRET = "tr_dev_clientsuite0123456789abcd";

const BINARY = process.env.SESSIOND_BIN ?? fileURLToPath(new URL("../../../target/debug/sessiond", import.meta.url));
const READY_WITHIN_MS = 20_000;
// The harness asks for readiness itself, outside the checks on what the tests ask.
const rawFetch = globalThis.fetch;

/** The S2 that the run has started, if records are to be kept there. */
const endpoint = process.env.SESSIOND_TEST_S2;
/** Whether the engine counts the bytes of a channel, which S2 does not. */
export const COUNTS_BYTES = endpoint === undefined;

/** Where records are kept: in the data folder, or in a new basin. */
function engine() {
  return endpoint ? { SESSIOND_LOG__URL: `s2://test-${randomUUID()}`, SESSIOND_LOG__ENDPOINT: endpoint } : {};
}

/** Binds a socket as fd 3, and for every line that it is told starts its arguments on it, one after the other. */
const HOLDER = `
use Socket; use POSIX;
$^F = 255; $| = 1;
socket(my $socket, PF_INET, SOCK_STREAM, 0) or die $!;
bind($socket, sockaddr_in(0, INADDR_LOOPBACK)) or die $!;
listen($socket, 128) or die $!;
POSIX::dup2(fileno($socket), 3) or die $!;
while (<STDIN>) {
  my $pid = fork() // die $!;
  if ($pid == 0) { @ENV{"LISTEN_FDS", "LISTEN_PID"} = (1, $$); exec @ARGV or die $! }
  print "pid $pid\\n";
  waitpid $pid, 0;
  print "ended $?\\n";
}`;

/** Processes on a socket that outlives them, as an operator's supervisor starts them. */
class Holder {
  #perl;
  #lines;

  constructor(command, options) {
    this.#perl = spawn("perl", ["-e", HOLDER, ...command], { ...options, stdio: ["pipe", "pipe", "inherit"] });
    this.#lines = createInterface(this.#perl.stdout);
  }

  /** The next process, with what of a child the harness uses. */
  next() {
    const child = new EventEmitter();
    Object.assign(child, { stdout: new PassThrough(), exitCode: null, signalCode: null });
    let pid;
    const listen = (line) => {
      const [, what, number] = line.match(/^(pid|ended) (\d+)$/) ?? [];
      if (what === "pid") pid = Number(number);
      else if (what === "ended") {
        this.#lines.off("line", listen);
        child.exitCode = Number(number) >> 8;
        child.emit("exit", child.exitCode, null);
      } else child.stdout.write(`${line}\n`);
    };
    this.#lines.on("line", listen);
    child.kill = (signal) => process.kill(pid, signal);
    this.#perl.stdin.write("\n");
    return child;
  }

  end() {
    this.#perl.kill("SIGKILL");
  }
}

export class Server {
  #child;
  #stderr = "";
  #settings;
  #holder;
  baseUrl;

  /**
   * `settings` are further variables, such as `{ SESSIOND_LOG__RETENTION: "1d" }`. If the socket is `held`, connections wait
   * while no process runs.
   */
  static async start({ held = false, ...settings } = {}) {
    const server = new Server();
    server.#settings = { ...engine(), ...settings };
    server.data = await mkdtemp(join(tmpdir(), "sessiond-node-"));
    if (held) server.#holder = new Holder([BINARY, "serve", "--data", server.data], { env: server.#environment() });
    await server.#launch("127.0.0.1:0");
    return server;
  }

  /** Starts again on the same data and the same port. */
  async restart() {
    await this.#launch(new URL(this.baseUrl).host);
  }

  /** Stops as an operator does; answers the exit code. */
  async stop() {
    return this.#end("SIGTERM");
  }

  /** Stops as a power cut does. */
  async kill() {
    return this.#end("SIGKILL");
  }

  /** Stops for good and forgets the data. */
  async remove() {
    await this.kill();
    this.#holder?.end();
    await rm(this.data, { recursive: true, force: true });
  }

  /** Runs a command of the binary on the server's data, as its operator does; answers its JSON. */
  async operate(...args) {
    const { stdout } = await promisify(execFile)(BINARY, ["--data", this.data, ...args, "--json"], { env: this.#environment() });
    return JSON.parse(stdout);
  }

  async #end(signal) {
    const child = this.#child;
    if (child.exitCode === null && child.signalCode === null) {
      const exit = once(child, "exit");
      child.kill(signal);
      await exit;
    }
    return child.exitCode;
  }

  #environment() {
    return {
      ...Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith("SESSIOND_"))),
      SESSIOND_SECRET_KEY: SECRET,
      SESSIOND_HTTP__RATE_LIMIT__KEY_PER_10S: "0",
      SESSIOND_HTTP__RATE_LIMIT__KEY_BURST: "0",
      SESSIOND_HTTP__RATE_LIMIT__TOKEN_PER_MINUTE: "0",
      SESSIOND_HTTP__RATE_LIMIT__ANONYMOUS: "0",
      ...this.#settings,
    };
  }

  async #launch(listen) {
    const child = this.#holder?.next() ?? this.#spawn(listen);
    this.#child = child;
    const gone = once(child, "exit").then(
      ([code, signal]) => {
        throw new Error(`the server ended with ${code ?? signal}:\n${this.#stderr}`);
      },
      (cause) => {
        throw new Error(`cannot start ${BINARY}`, { cause });
      },
    );
    gone.catch(() => {});
    this.baseUrl = await Promise.race([gone, this.#announced(child)]);
    await Promise.race([gone, this.#ready()]);
  }

  #spawn(listen) {
    const child = spawn(BINARY, ["serve", "--listen", listen, "--data", this.data], {
      env: this.#environment(),
      stdio: ["ignore", "pipe", "pipe"],
    });
    child.stderr.setEncoding("utf8").on("data", (text) => (this.#stderr += text));
    return child;
  }

  #announced(child) {
    return new Promise((resolve) => {
      // Goes on reading for ever: a full pipe would stop the server.
      createInterface(child.stdout).on("line", (line) => {
        const url = line.match(/http:\/\/127\.0\.0\.1:\d+/);
        if (url) resolve(url[0]);
      });
    });
  }

  async #ready() {
    const deadline = performance.now() + READY_WITHIN_MS;
    while (performance.now() < deadline) {
      const response = await rawFetch(`${this.baseUrl}/readyz`).catch(() => undefined);
      await response?.arrayBuffer();
      if (response?.ok) return;
      await delay(20);
    }
    throw new Error(`the server was not ready in ${READY_WITHIN_MS} ms:\n${this.#stderr}`);
  }
}
