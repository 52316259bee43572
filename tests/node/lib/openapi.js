// Holds every answer of the server to the server's own OpenAPI document. An answer that the document does not
// describe is a fault, as is one that differs from its description.

import addFormats from "ajv-formats";
import Ajv2020 from "ajv/dist/2020.js";

const rawFetch = globalThis.fetch;
const METHODS = ["get", "put", "post", "delete", "options", "head", "patch", "trace"];

export class Conformance {
  /** What was wrong since the last `take()`. */
  #faults = [];
  #paths;
  #document;
  #ajv = new Ajv2020({ strict: false, allErrors: true, validateSchema: true });

  static async load(baseUrl) {
    const response = await rawFetch(`${baseUrl}/openapi.json`);
    if (!response.ok) throw new Error(`GET /openapi.json answers ${response.status}`);
    return new Conformance(await response.json());
  }

  constructor(document) {
    if (!/^3\.1\./.test(document.openapi)) throw new Error(`the document is OpenAPI ${document.openapi}, not 3.1`);
    this.#document = document;
    addFormats(this.#ajv);
    this.#ajv.addSchema(document, "openapi", false, false);
    this.#paths = Object.entries(document.paths).map(([template, item]) => ({
      template,
      item,
      parts: template.split("/"),
    }));
  }

  take() {
    return this.#faults.splice(0);
  }

  /** Every `METHOD /path` that the document describes. */
  operations() {
    return this.#paths.flatMap(({ template, item }) =>
      METHODS.filter((method) => item[method]).map((method) => `${method.toUpperCase()} ${template}`),
    );
  }

  /** Checks one answer and leaves its body unread. Answers the operation that it belongs to. */
  async check(method, pathname, response) {
    const fault = (text) => this.#faults.push(`${method} ${pathname} -> ${response.status}: ${text}`);
    const path = this.#match(pathname);
    // S2's control plane is no route: the router says so for whatever its clients ask.
    if (!path && pathname.startsWith("/v1/") && response.status === 501) return undefined;
    if (!path) return void fault("the path is not documented");
    const operation = path.item[method.toLowerCase()];
    if (!operation) return void fault(`the method is not documented for ${path.template}`);
    const name = `${method} ${path.template}`;
    const described = this.#described(operation, response.status);
    if (!described) {
      fault(`the status is not documented for ${name}`);
      return name;
    }
    const type = (response.headers.get("content-type") ?? "").split(";")[0];
    const content = described.value.content?.[type];
    if (response.body === null || method === "HEAD") return name;
    if (!content && described.value.content?.["*/*"]) return name;
    if (!content) {
      const text = type === "text/event-stream" ? "..." : await response.clone().text();
      if (text !== "") fault(`a body of type "${type}" is not documented: ${text.slice(0, 200)}`);
    } else if (type.endsWith("json")) {
      await this.#validate(`${described.pointer}/content/${escaped(type)}/schema`, content.schema, response, fault);
    }
    return name;
  }

  async #validate(pointer, schema, response, fault) {
    if (!schema || Object.keys(schema).length === 0) return void fault("the schema says nothing");
    const text = await response.clone().text();
    let body;
    try {
      body = JSON.parse(text);
    } catch {
      return void fault(`the body is not JSON: ${text.slice(0, 200)}`);
    }
    const validate = this.#ajv.getSchema(`openapi#${pointer}`) ?? this.#ajv.compile({ $ref: `openapi#${pointer}` });
    if (!validate(body)) fault(`${this.#ajv.errorsText(validate.errors)} in ${text.slice(0, 500)}`);
  }

  #match(pathname) {
    const parts = pathname.split("/");
    const fits = this.#paths.filter(
      (path) => path.parts.length === parts.length && path.parts.every((part, i) => part === parts[i] || /^\{.+\}$/.test(part)),
    );
    const literal = (path) => path.parts.filter((part, i) => part === parts[i]).length;
    return fits.sort((a, b) => literal(b) - literal(a))[0];
  }

  #described(operation, status) {
    const [template, item] = Object.entries(this.#document.paths).find(([, item]) => METHODS.some((m) => item[m] === operation));
    const method = METHODS.find((m) => item[m] === operation);
    for (const key of [String(status), `${String(status)[0]}XX`, "default"]) {
      let value = operation.responses[key];
      let pointer = `/paths/${escaped(template)}/${method}/responses/${key}`;
      if (value?.$ref) {
        pointer = value.$ref.slice(1);
        value = pointer.split("/").slice(1).reduce((at, part) => at[part.replaceAll("~1", "/").replaceAll("~0", "~")], this.#document);
      }
      if (value) return { value, pointer };
    }
  }
}

function escaped(part) {
  return part.replaceAll("~", "~0").replaceAll("/", "~1");
}
