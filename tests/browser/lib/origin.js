// Sites of other origins than the server's, each with one empty page.

import { once } from "node:events";
import { createServer } from "node:http";

export class Origin {
  /** `scripts` are further files, by path. */
  static async start(scripts = {}) {
    const origin = new Origin();
    origin.http = createServer(({ url }, response) => {
      const script = scripts[url];
      if (script !== undefined) return void response.writeHead(200, { "Content-Type": "text/javascript" }).end(script);
      response.writeHead(200, { "Content-Type": "text/html" }).end("<!doctype html><title>elsewhere</title>");
    });
    origin.http.listen(0, "127.0.0.1");
    await once(origin.http, "listening");
    origin.url = `http://127.0.0.1:${origin.http.address().port}`;
    return origin;
  }

  stop() {
    this.http.closeAllConnections();
    this.http.close();
  }
}
