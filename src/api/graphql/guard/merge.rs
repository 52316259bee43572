//! What validation will spend on comparing fields that share a response key.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::convert::Infallible;

use async_graphql::parser::types::{
    ExecutableDocument, Field, FragmentDefinition, FragmentSpread, Selection, SelectionSet,
};
use async_graphql::{Name, Positioned, Value};

use super::{Limits, Quantity, Refusal};

/// The fragments of a document.
pub(super) type Fragments = HashMap<Name, Positioned<FragmentDefinition>>;

/// The value with `null` for each variable, and how many there were.
///
/// The detour through `into_const_with` is there because async-graphql does not export the type of a value that
/// may hold variables, so it can be neither named nor matched here.
pub(super) fn replace_variables(
    into_const: impl FnOnce(&mut dyn FnMut(Name) -> Result<Value, Infallible>) -> Result<Value, Infallible>,
) -> (Value, usize) {
    let mut uses = 0;
    let Ok(value) = into_const(&mut |_| {
        uses += 1;
        Ok(Value::Null)
    });
    (value, uses)
}

/// Retraces the steps of async-graphql's rule "overlapping fields can be merged" and counts them.
pub(super) struct Merge<'a> {
    document: &'a ExecutableDocument,
    fragments: &'a Fragments,
    limit: usize,
    steps: usize,
}

/// One selection set while it is being flattened.
#[derive(Default)]
struct Flat<'a> {
    /// The first field of each type condition and response key.
    fields: HashMap<(Option<&'a str>, &'a str), &'a Field>,
    spread: HashSet<&'a str>,
}

impl<'a> Merge<'a> {
    pub fn new(document: &'a ExecutableDocument, limits: &Limits) -> Self {
        Self { document, fragments: &document.fragments, limit: limits.merge_steps, steps: 0 }
    }

    /// Refuses once there are too many steps.
    pub fn run(mut self) -> Result<(), Refusal> {
        for fragment in self.fragments.values() {
            self.selection_set(&fragment.node.selection_set.node)?;
        }
        for (_, operation) in self.document.operations.iter() {
            self.selection_set(&operation.node.selection_set.node)?;
        }
        Ok(())
    }

    fn selection_set(&mut self, set: &'a SelectionSet) -> Result<(), Refusal> {
        self.flatten(&mut Flat::default(), None, set)?;
        for selection in &set.items {
            match &selection.node {
                Selection::Field(field) => self.selection_set(&field.node.selection_set.node)?,
                Selection::InlineFragment(inline) => self.selection_set(&inline.node.selection_set.node)?,
                Selection::FragmentSpread(_) => {}
            }
        }
        Ok(())
    }

    fn flatten(
        &mut self,
        flat: &mut Flat<'a>,
        on: Option<&'a str>,
        set: &'a SelectionSet,
    ) -> Result<(), Refusal> {
        for selection in &set.items {
            self.spend(1)?;
            match &selection.node {
                Selection::Field(field) => self.compare(flat, on, &field.node)?,
                Selection::InlineFragment(inline) => {
                    let on =
                        inline.node.type_condition.as_ref().map(|condition| condition.node.on.node.as_str());
                    self.flatten(flat, on, &inline.node.selection_set.node)?;
                }
                Selection::FragmentSpread(spread) => self.spread(flat, &spread.node)?,
            }
        }
        Ok(())
    }

    fn spread(&mut self, flat: &mut Flat<'a>, spread: &'a FragmentSpread) -> Result<(), Refusal> {
        let name = spread.fragment_name.node.as_str();
        match self.fragments.get(name) {
            Some(fragment) if flat.spread.insert(name) => {
                let on = fragment.node.type_condition.node.on.node.as_str();
                self.flatten(flat, Some(on), &fragment.node.selection_set.node)
            }
            _ => Ok(()),
        }
    }

    fn compare(&mut self, flat: &mut Flat<'a>, on: Option<&'a str>, field: &'a Field) -> Result<(), Refusal> {
        match flat.fields.entry((on, field.response_key().node.as_str())) {
            Entry::Vacant(first) => {
                first.insert(field);
                Ok(())
            }
            Entry::Occupied(first) => {
                let arguments = &first.get().arguments;
                self.spend(arguments.len() * field.arguments.len().max(1))?;
                for (_, value) in arguments {
                    self.spend(weight(
                        &replace_variables(|with| value.node.clone().into_const_with(with)).0,
                    ))?;
                }
                Ok(())
            }
        }
    }

    fn spend(&mut self, steps: usize) -> Result<(), Refusal> {
        self.steps = self.steps.saturating_add(steps);
        if self.steps <= self.limit {
            return Ok(());
        }
        Err(Refusal::TooMuch { what: Quantity::MergeSteps, limit: self.limit, actual: None })
    }
}

/// What it costs to compare a value with its equal; a string's bytes are compared many at a time.
fn weight(value: &Value) -> usize {
    match value {
        Value::List(items) => 1 + items.iter().map(weight).sum::<usize>(),
        Value::Object(fields) => 1 + fields.values().map(weight).sum::<usize>(),
        Value::String(text) => 1 + text.len() / 64,
        _ => 1,
    }
}
