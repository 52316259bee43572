// The examples: a click opens one in a tab of its own and runs it.

import { useGraphiQL, useGraphiQLActions } from "@graphiql/react";
import { parse, type OperationDefinitionNode } from "graphql";
import { useState } from "react";
import { exampleChannel, EXAMPLES, type Example } from "./examples";
import { live } from "./live";
import { lastCursor } from "./resume";
import { tabStorage, useStore } from "./store";
import { token } from "./token";

const SESSION = "session";

export function Examples() {
  const [session, setSession] = useState(tabStorage.get(SESSION) ?? "hello");
  const open = useOpen();
  const { status } = useStore(token);
  // A new record moves the place to resume from.
  useStore(live);
  const cursor = lastCursor.get(exampleChannel(session));
  return (
    <section className="examples" aria-label="Examples">
      <label title="The external id that the examples use. A closed session stays closed: take another name to begin anew.">
        Session
        <input
          value={session}
          spellCheck={false}
          onChange={(event) => {
            setSession(event.target.value);
            tabStorage.set(SESSION, event.target.value);
          }}
        />
      </label>
      {EXAMPLES.map((example, index) => (
        <button
          type="button"
          key={example.name}
          disabled={status !== "accepted" || !session}
          onClick={() => void open(example, example.variables(session, cursor))}
        >
          <b>
            {index + 1} {example.name}
          </b>
          <small>{example.name === "Resume" && cursor ? `Only what is newer than record ${cursor}.` : example.hint}</small>
        </button>
      ))}
    </section>
  );
}

function useOpen() {
  const actions = useGraphiQLActions();
  const { queryEditor, variableEditor, tabs, activeTabIndex } = useGraphiQL(({ queryEditor, variableEditor, tabs, activeTabIndex }) => ({
    queryEditor,
    variableEditor,
    tabs,
    activeTabIndex,
  }));
  return async ({ name, query }: Example, variables: Record<string, unknown>) => {
    if (!queryEditor || !variableEditor) return;
    const at = tabs.findIndex((tab) => tab.title === name);
    actions.stop();
    if (at === -1) actions.addTab();
    else if (at !== activeTabIndex) actions.changeTab(at);
    queryEditor.setValue(query);
    variableEditor.setValue(JSON.stringify(variables, null, 2));
    // The editor finds these by itself, but only after a pause.
    const documentAST = parse(query);
    const operations = documentAST.definitions as OperationDefinitionNode[];
    actions.setOperationFacts({ documentAST, operationName: name, operations });
    actions.updateActiveTabValues({ query, variables: variableEditor.getValue(), operationName: name });
    // Lets what was stopped end before another operation takes its place.
    await new Promise((resolve) => setTimeout(resolve));
    actions.run();
  };
}
