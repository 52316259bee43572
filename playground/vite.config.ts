// How the page is bundled. build.rs runs this in a copy of the folder; `npm run build` does the same in place.

import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import { defineConfig, type Plugin } from "vite";

/** Puts a `.gz` beside every file of the bundle: the server keeps only those. */
function gzip(): Plugin {
  let dir = "";
  return {
    name: "gzip",
    apply: "build",
    configResolved: (config) => {
      dir = config.build.outDir;
    },
    closeBundle: () => {
      for (const entry of readdirSync(dir, { recursive: true, withFileTypes: true })) {
        const file = join(entry.parentPath, entry.name);
        if (entry.isFile() && !file.endsWith(".gz")) writeFileSync(`${file}.gz`, gzipSync(readFileSync(file), { level: 9 }));
      }
    },
  };
}

export default defineConfig({
  // Relative, so that the page works below any path.
  base: "./",
  plugins: [gzip()],
  // Hundreds of warnings that "use client" means nothing in a bundle; it does not.
  logLevel: "error",
  // What is bundled asks for its licences to be passed on.
  build: { target: "es2022", emptyOutDir: true, license: { fileName: "licenses.md" } },
  // `npx vite` serves the page alone; the API is a server that is running already.
  server: { proxy: { "/graphql": { target: process.env.SESSIOND_URL ?? "http://127.0.0.1:3030", ws: true } } },
});
