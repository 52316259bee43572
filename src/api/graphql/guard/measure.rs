//! Measures a parsed document without walking anything twice.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use async_graphql::Positioned;
use async_graphql::parser::types::{
    Directive, DocumentOperations, ExecutableDocument, Field, OperationDefinition, OperationType, Selection,
    SelectionSet,
};

use super::merge::{Fragments, Merge, replace_variables};
use super::{Limits, Quantity, Refusal, at_most};

/// What a document that passed asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Measure<'a> {
    /// The type of the operation that will run.
    pub operation: OperationType,
    /// Its selections, with fragments written out.
    pub selections: usize,
    /// Fields within fields, as `limit_depth` counts them.
    pub depth: usize,
    /// Places that name a variable. Multiplied by the size of the variables, this is what validation copies.
    pub variable_uses: usize,
    /// Names, not aliases, of its root fields in order of appearance, each as often as it is resolved, whatever `@skip`
    /// would say.
    pub root_fields: Vec<&'a str>,
}

impl Measure<'_> {
    /// Whether the operation asks only for the schema.
    pub fn is_introspection_only(&self) -> bool {
        self.root_fields.iter().all(|name| matches!(*name, "__schema" | "__type" | "__typename"))
    }
}

/// Checks the parsed `document` against `limits` and says what the operation that will run asks for.
///
/// Every operation and fragment must pass, used or not, because validation walks all of them. Takes time linear
/// in the text plus the limits: a fragment is measured once, however often it is spread. Expects a document whose text
/// passed [`scan`], which bounds the recursion here.
///
/// # Errors
/// Any [`Refusal`] that is not about text.
pub fn measure<'a>(
    document: &'a ExecutableDocument,
    operation_name: Option<&str>,
    limits: &Limits,
) -> Result<Measure<'a>, Refusal> {
    let chosen = choose(&document.operations, operation_name)?;
    let mut gauge = Gauge { fragments: &document.fragments, limits, measured: HashMap::new() };
    let mut total = Tally::default();
    let mut of_chosen = Tally::default();
    for (_, operation) in document.operations.iter() {
        let tally = gauge.operation(&operation.node)?;
        total.add(tally);
        if std::ptr::eq(operation, chosen) {
            of_chosen = tally;
        }
    }
    total.check(limits)?;
    for name in document.fragments.keys() {
        gauge.fragment(name, 0)?;
    }
    Merge::new(document, limits).run()?;
    let root_fields = root_fields(document, &chosen.node, limits)?;
    Ok(Measure {
        operation: chosen.node.ty,
        selections: of_chosen.selections,
        depth: of_chosen.depth,
        variable_uses: of_chosen.variable_uses,
        root_fields,
    })
}

/// The operation that will run.
///
/// # Errors
/// [`Refusal::OperationNameRequired`], [`Refusal::UnknownOperation`].
pub fn choose<'a>(
    operations: &'a DocumentOperations,
    name: Option<&str>,
) -> Result<&'a Positioned<OperationDefinition>, Refusal> {
    match (operations, name) {
        (DocumentOperations::Single(operation), None) => Ok(operation),
        (DocumentOperations::Multiple(operations), None) if operations.len() == 1 => {
            operations.values().next().ok_or(Refusal::OperationNameRequired)
        }
        (DocumentOperations::Multiple(_), None) => Err(Refusal::OperationNameRequired),
        (DocumentOperations::Multiple(operations), Some(name)) if operations.contains_key(name) => {
            Ok(&operations[name])
        }
        (_, Some(name)) => Err(Refusal::UnknownOperation(name.to_owned())),
    }
}

/// Counts of one selection set with its fragments written out. Saturating, as fragments can double them.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    selections: usize,
    aliases: usize,
    variable_uses: usize,
    depth: usize,
    layers: usize,
    /// Nested fields whose names are those of the schema's wide lists, wherever they stand.
    lists: usize,
    introspection: usize,
    introspection_lists: usize,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.selections = self.selections.saturating_add(other.selections);
        self.aliases = self.aliases.saturating_add(other.aliases);
        self.variable_uses = self.variable_uses.saturating_add(other.variable_uses);
        self.depth = self.depth.max(other.depth);
        self.layers = self.layers.max(other.layers);
        self.lists = self.lists.max(other.lists);
        self.introspection = self.introspection.saturating_add(other.introspection);
        self.introspection_lists = self.introspection_lists.max(other.introspection_lists);
    }

    /// The same, seen from one layer further out.
    fn under(mut self) -> Self {
        self.layers += 1;
        self
    }

    fn check(&self, limits: &Limits) -> Result<(), Refusal> {
        at_most(Quantity::Selections, limits.selections, self.selections)?;
        at_most(Quantity::Depth, limits.depth, self.depth)?;
        at_most(Quantity::Layers, limits.layers, self.layers)?;
        at_most(Quantity::Aliases, limits.aliases, self.aliases)?;
        at_most(Quantity::VariableUses, limits.variable_uses, self.variable_uses)?;
        at_most(Quantity::Introspection, limits.introspection, self.introspection)?;
        at_most(Quantity::IntrospectionLists, limits.introspection_lists, self.introspection_lists)
    }
}

/// Tallies selection sets, each fragment once.
struct Gauge<'a> {
    fragments: &'a Fragments,
    limits: &'a Limits,
    /// `None` while the fragment is being measured: to meet it again then is a cycle.
    measured: HashMap<&'a str, Option<Tally>>,
}

impl<'a> Gauge<'a> {
    fn operation(&mut self, operation: &'a OperationDefinition) -> Result<Tally, Refusal> {
        let mut uses = self.directives(&operation.directives)?;
        for variable in &operation.variable_definitions {
            uses += self.directives(&variable.node.directives)?;
        }
        let mut tally = self.selection_set(&operation.selection_set.node, 0)?;
        tally.variable_uses = tally.variable_uses.saturating_add(uses);
        tally.check(self.limits)?;
        Ok(tally)
    }

    fn fragment(&mut self, name: &'a str, layer: usize) -> Result<Tally, Refusal> {
        let Some(fragment) = self.fragments.get(name) else {
            return Ok(Tally::default());
        };
        match self.measured.entry(name) {
            Entry::Occupied(met) => return met.get().ok_or_else(|| Refusal::FragmentCycle(name.to_owned())),
            Entry::Vacant(new) => new.insert(None),
        };
        self.directives(&fragment.node.directives)?;
        let tally = self.selection_set(&fragment.node.selection_set.node, layer)?;
        tally.check(self.limits)?;
        self.measured.insert(name, Some(tally));
        Ok(tally)
    }

    /// `layer` is how deep this walk is already; the bound on it is also what bounds the recursion.
    fn selection_set(&mut self, set: &'a SelectionSet, layer: usize) -> Result<Tally, Refusal> {
        at_most(Quantity::Layers, self.limits.layers, layer)?;
        let mut tally = Tally::default();
        for selection in &set.items {
            tally.add(self.selection(&selection.node, layer)?);
        }
        Ok(tally)
    }

    fn selection(&mut self, selection: &'a Selection, layer: usize) -> Result<Tally, Refusal> {
        let mut uses = self.directives(selection.directives())?;
        let mut tally = match selection {
            Selection::Field(field) => {
                for (_, value) in &field.node.arguments {
                    uses += replace_variables(|with| value.node.clone().into_const_with(with)).1;
                }
                self.field(&field.node, layer)?
            }
            Selection::FragmentSpread(spread) => {
                self.fragment(&spread.node.fragment_name.node, layer + 1)?.under()
            }
            Selection::InlineFragment(inline) => {
                self.selection_set(&inline.node.selection_set.node, layer + 1)?.under()
            }
        };
        tally.selections = tally.selections.saturating_add(1);
        tally.variable_uses = tally.variable_uses.saturating_add(uses);
        Ok(tally)
    }

    fn field(&mut self, field: &'a Field, layer: usize) -> Result<Tally, Refusal> {
        let mut tally = match &field.selection_set.node {
            set if set.items.is_empty() => Tally::default(),
            set => self.selection_set(set, layer + 1)?.under(),
        };
        tally.aliases = tally.aliases.saturating_add(usize::from(field.alias.is_some()));
        tally.depth += usize::from(field.name.node != "__typename");
        match field.name.node.as_str() {
            "__schema" | "__type" => {
                tally.introspection = tally.selections;
                tally.introspection_lists = tally.lists;
            }
            "fields" | "inputFields" | "interfaces" | "possibleTypes" => tally.lists += 1,
            _ => {}
        }
        Ok(tally)
    }

    fn directives(&self, directives: &[Positioned<Directive>]) -> Result<usize, Refusal> {
        at_most(Quantity::Directives, self.limits.directives, directives.len())?;
        let arguments = directives.iter().flat_map(|directive| &directive.node.arguments);
        Ok(arguments
            .map(|(_, value)| replace_variables(|with| value.node.clone().into_const_with(with)).1)
            .sum())
    }
}

/// The root fields of `operation`. Expects that its selections are within their limit.
fn root_fields<'a>(
    document: &'a ExecutableDocument,
    operation: &'a OperationDefinition,
    limits: &Limits,
) -> Result<Vec<&'a str>, Refusal> {
    let mut fields = Vec::new();
    collect_roots(&document.fragments, &operation.selection_set.node, &mut fields);
    at_most(Quantity::RootFields, limits.root_fields, fields.len())?;
    if operation.ty == OperationType::Mutation {
        let mut keys = HashSet::new();
        if let Some(field) = fields.iter().find(|field| !keys.insert(field.response_key().node.as_str())) {
            return Err(Refusal::RepeatedMutation(field.response_key().node.to_string()));
        }
    }
    let names: Vec<_> = fields.into_iter().map(|field| field.name.node.as_str()).collect();
    // async-graphql opens one stream per occurrence, so even equal fields count.
    if operation.ty == OperationType::Subscription && (names.len() != 1 || names.contains(&"__typename")) {
        let actual = names.iter().filter(|name| **name != "__typename").count();
        return Err(Refusal::SubscriptionRoots { actual });
    }
    Ok(names)
}

fn collect_roots<'a>(fragments: &'a Fragments, set: &'a SelectionSet, found: &mut Vec<&'a Field>) {
    for selection in &set.items {
        match &selection.node {
            Selection::Field(field) => found.push(&field.node),
            Selection::InlineFragment(inline) => {
                collect_roots(fragments, &inline.node.selection_set.node, found);
            }
            Selection::FragmentSpread(spread) => {
                if let Some(fragment) = fragments.get(&spread.node.fragment_name.node) {
                    collect_roots(fragments, &fragment.node.selection_set.node, found);
                }
            }
        }
    }
}
