// The page: a bar with the token, the examples, GraphiQL, and the live log below its response.

import { explorerPlugin } from "@graphiql/plugin-explorer";
import { DOC_EXPLORER_PLUGIN, DocExplorerStore } from "@graphiql/plugin-doc-explorer";
import { HISTORY_PLUGIN, HistoryStore } from "@graphiql/plugin-history";
import { GraphiQLProvider, useGraphiQL } from "@graphiql/react";
import { GraphiQL, GraphiQLInterface } from "graphiql";
import { useEffect, useLayoutEffect, useMemo, type ComponentProps } from "react";
import { Examples } from "./Examples";
import { WELCOME } from "./examples";
import { fetcherFor, showsTab } from "./fetcher";
import { tokenChanged } from "./live";
import { LiveLog } from "./LiveLog";
import { useStore } from "./store";
import { restoreToken, token } from "./token";
import { TopBar } from "./TopBar";

const PLUGINS = [DOC_EXPLORER_PLUGIN, HISTORY_PLUGIN, explorerPlugin({ showAttribution: false })];
/** What the scalars look like in variables; unknown ones would be taken for strings. */
const SCALARS = {
  JSON: { type: ["object", "array", "string", "number", "boolean", "null"] },
  DateTime: { type: "string", format: "date-time" },
  UInt64: { type: "string", pattern: "^[0-9]+$" },
  Cursor: { type: "string", pattern: "^[0-9]+$" },
} satisfies ComponentProps<typeof GraphiQLProvider>["customScalarSchemas"];

export function App() {
  const { value, status } = useStore(token);
  // Asking for the schema without a token that works would only fail.
  const usable = status === "accepted" ? value : "";
  const fetcher = useMemo(() => fetcherFor(usable), [usable]);
  useEffect(restoreToken, []);
  useEffect(() => tokenChanged(value), [value]);
  return (
    <GraphiQLProvider
      fetcher={fetcher}
      schema={usable ? undefined : null}
      schemaDescription
      inputValueDeprecation
      plugins={PLUGINS}
      referencePlugin={DOC_EXPLORER_PLUGIN}
      defaultQuery={WELCOME}
      customScalarSchemas={SCALARS}
    >
      <HistoryStore>
        <DocExplorerStore>
          <TabWatch />
          {/* The class gives the bars the colours of GraphiQL. */}
          <div className="graphiql-container page">
            <TopBar />
            <Examples />
            <GraphiQLInterface isHeadersEditorEnabled={false} defaultEditorToolsVisibility="variables" showPersistHeadersSettings={false}>
              <GraphiQL.Logo>{null}</GraphiQL.Logo>
              <GraphiQL.Footer>
                <LiveLog />
              </GraphiQL.Footer>
            </GraphiQLInterface>
          </div>
        </DocExplorerStore>
      </HistoryStore>
    </GraphiQLProvider>
  );
}

function TabWatch() {
  const tab = useGraphiQL((state) => state.tabs[state.activeTabIndex]?.id ?? "");
  useLayoutEffect(() => showsTab(tab), [tab]);
  return null;
}
