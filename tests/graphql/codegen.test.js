// What tools make of the schema: is it valid, does the server show the same one, do generated types hold.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { readFile, rm } from "node:fs/promises";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

import { generate } from "@graphql-codegen/cli";
import {
  buildClientSchema,
  buildSchema,
  getIntrospectionQuery,
  lexicographicSortSchema,
  parse,
  printSchema,
  validate,
  validateSchema,
} from "graphql";

import { SCHEMA_FILE, suite } from "./lib/suite.js";

const context = suite();
const here = (path) => fileURLToPath(new URL(path, import.meta.url));
const sdl = () => readFile(SCHEMA_FILE, "utf8");
const sorted = (schema) => printSchema(lexicographicSortSchema(schema));

test("the schema file is valid", async () => {
  assert.deepEqual(validateSchema(buildSchema(await sdl())), []);
});

test("everything a client can name has a description", async () => {
  const schema = buildSchema(await sdl());
  const missing = [];
  const need = (it, name) => it.description?.trim() || missing.push(name);
  for (const type of Object.values(schema.getTypeMap())) {
    if (type.name.startsWith("__") || ["String", "Int", "Float", "Boolean", "ID"].includes(type.name)) continue;
    need(type, type.name);
    for (const value of type.getValues?.() ?? []) need(value, `${type.name}.${value.name}`);
    for (const field of Object.values(type.getFields?.() ?? {})) {
      need(field, `${type.name}.${field.name}`);
      for (const argument of field.args ?? []) need(argument, `${type.name}.${field.name}(${argument.name}:)`);
    }
  }
  assert.deepEqual(missing, []);
});

test("the server shows the schema of the file, to anyone", async () => {
  // Not the description of the schema as such: the library has one of its own, which the file does not show.
  const options = { specifiedByUrl: true, directiveIsRepeatable: true, inputValueDeprecation: true, oneOf: true };
  for (const token of [null, undefined]) {
    const { data, errors } = await context.post(getIntrospectionQuery(options), undefined, { token });
    assert.equal(errors, undefined);
    const shown = buildClientSchema(data);
    assert.deepEqual(validateSchema(shown), []);
    assert.equal(sorted(shown), sorted(buildSchema(await sdl())));
  }
});

test("every operation of this suite is valid", async () => {
  const documents = parse(await readFile(new URL("documents.graphql", import.meta.url), "utf8"));
  assert.deepEqual(validate(buildSchema(await sdl()), documents), []);
});

const PRESET = {
  preset: "client",
  documents: [here("documents.graphql"), here("typed/program.ts")],
  config: {
    strictScalars: true,
    useTypeImports: true,
    scalars: { DateTime: "string", JSON: "unknown", UInt64: "string", Cursor: "string" },
  },
};

/** Runs codegen; answers its files as `{ name: content }`. */
async function generated(schema, config = {}) {
  const files = await generate(
    { schema, silent: true, errorsOnly: true, generates: { [here("typed/generated/")]: { ...PRESET, ...config } } },
    false,
  );
  return Object.fromEntries(files.map(({ filename, content }) => [filename.split("/").at(-1), content]));
}

test("codegen makes the same of the file and of the server's answer", async () => {
  const fromFile = await generated(fileURLToPath(SCHEMA_FILE));
  // Without `oneOf` the tool does not ask for @oneOf, and makes an ordinary object of SessionBy.
  const fromServer = await generated([{ [context.url]: { oneOf: true } }]);
  assert.ok(fromFile["graphql.ts"].includes("ChannelRecordsDocument"));
  const lines = (files) => files["graphql.ts"].split("\n").sort();
  assert.deepEqual(lines(fromServer), lines(fromFile));
});

test("a strict TypeScript program on Apollo Client and urql compiles", async () => {
  await rm(here("typed/generated"), { recursive: true, force: true });
  await generate(
    {
      schema: fileURLToPath(SCHEMA_FILE),
      silent: true,
      errorsOnly: true,
      generates: { [here("typed/generated/")]: { ...PRESET, config: { ...PRESET.config, enumType: "native" } } },
    },
    true,
  );
  const tsc = here("node_modules/typescript/bin/tsc");
  const { stdout } = await promisify(execFile)(process.execPath, [tsc, "--strict", "--noEmit", "-p", here("typed")]).catch(
    ({ stdout, stderr, message }) => assert.fail(stdout + stderr || message),
  );
  assert.equal(stdout, "");
});
