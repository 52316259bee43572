//! Values where input objects belong, judged before anything is executed. The executor's own rule looks into objects only,
//! and would meet whatever else stands there in the middle of a mutation.

use std::collections::HashMap;

use async_graphql::parser::parse_schema;
use async_graphql::parser::types::{
    BaseType, Field, FragmentDefinition, InputValueDefinition, OperationDefinition, OperationType, Selection,
    SelectionSet, Type, TypeKind, TypeSystemDefinition,
};
use async_graphql::{Name, Pos, Positioned, Value, Variables};

use super::error::Fault;

type Types = HashMap<Name, Type>;

/// The input objects of a schema, and the arguments of its root fields. No other field takes an input object.
#[derive(Debug, Default)]
pub(super) struct Inputs {
    objects: HashMap<Name, Types>,
    arguments: HashMap<(&'static str, Name), Types>,
}

/// The names of the root types.
fn root(kind: OperationType) -> &'static str {
    match kind {
        OperationType::Query => "Query",
        OperationType::Mutation => "Mutation",
        OperationType::Subscription => "Subscription",
    }
}

fn types(definitions: Vec<Positioned<InputValueDefinition>>) -> Types {
    definitions.into_iter().map(|definition| (definition.node.name.node, definition.node.ty.node)).collect()
}

impl Inputs {
    /// Those of a schema that was printed.
    pub(super) fn of(sdl: &str) -> Self {
        let mut inputs = Self::default();
        let definitions = parse_schema(sdl).map(|document| document.definitions).unwrap_or_default();
        for definition in definitions {
            let TypeSystemDefinition::Type(definition) = definition else { continue };
            let name = definition.node.name.node;
            match definition.node.kind {
                TypeKind::InputObject(object) => drop(inputs.objects.insert(name, types(object.fields))),
                TypeKind::Object(object) => {
                    let kinds = [OperationType::Query, OperationType::Mutation, OperationType::Subscription];
                    let Some(root) = kinds.map(root).into_iter().find(|root| name == *root) else { continue };
                    for field in object.fields {
                        inputs.arguments.insert((root, field.node.name.node), types(field.node.arguments));
                    }
                }
                _ => {}
            }
        }
        inputs
    }

    /// Refuses whatever is no object where one belongs: in variables, in their defaults, and written into the document.
    pub(super) fn check(
        &self,
        operation: &OperationDefinition,
        fragments: &HashMap<Name, Positioned<FragmentDefinition>>,
        given: &Variables,
    ) -> Result<(), Fault> {
        for definition in &operation.variable_definitions {
            let default = definition.node.default_value.as_ref().map(|value| &value.node);
            let value = given.get(&definition.node.name.node);
            for value in [value, default].into_iter().flatten() {
                self.fits(&definition.node.var_type.node, value, definition.pos)?;
            }
        }
        self.check_set(root(operation.ty), &operation.selection_set.node, fragments)
    }

    /// Fragments end: the guard has refused those that meet themselves.
    fn check_set(
        &self,
        root: &'static str,
        set: &SelectionSet,
        fragments: &HashMap<Name, Positioned<FragmentDefinition>>,
    ) -> Result<(), Fault> {
        for item in &set.items {
            match &item.node {
                Selection::Field(field) => self.check_field(root, &field.node)?,
                Selection::InlineFragment(inline) => {
                    self.check_set(root, &inline.node.selection_set.node, fragments)?;
                }
                Selection::FragmentSpread(spread) => {
                    if let Some(fragment) = fragments.get(&spread.node.fragment_name.node) {
                        self.check_set(root, &fragment.node.selection_set.node, fragments)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn check_field(&self, root: &'static str, field: &Field) -> Result<(), Fault> {
        let Some(types) = self.arguments.get(&(root, field.name.node.clone())) else { return Ok(()) };
        for (name, value) in &field.arguments {
            // A variable was judged where it was given; here it stands for anything.
            let known = value.node.clone().into_const_with(|_| Ok::<_, ()>(Value::Null));
            if let (Some(kind), Ok(known)) = (types.get(&name.node), known) {
                self.fits(kind, &known, value.pos)?;
            }
        }
        Ok(())
    }

    fn fits(&self, kind: &Type, value: &Value, at: Pos) -> Result<(), Fault> {
        match (&kind.base, value) {
            (_, Value::Null) => Ok(()),
            (BaseType::List(inner), Value::List(items)) => {
                items.iter().try_for_each(|item| self.fits(inner, item, at))
            }
            // One value stands for a list of it.
            (BaseType::List(inner), value) => self.fits(inner, value, at),
            (BaseType::Named(name), value) => match (self.objects.get(name), value) {
                (None, _) => Ok(()),
                (Some(fields), Value::Object(object)) => object.iter().try_for_each(|(name, value)| {
                    fields.get(name).map_or(Ok(()), |kind| self.fits(kind, value, at))
                }),
                (Some(_), _) => Err(Fault::invalid(format!("expected an object of type {name}"), at)),
            },
        }
    }
}
