//! What a document may be, decided before async-graphql sees it.
//!
//! The parser descends with the nesting of what it reads, and 3 KB of brackets overflow its stack, which aborts the
//! process; no option of its limits that. And it walks a fragment anew at every spread, so fragments that spread the
//! next one twice take time and memory that double with each. [`scan`] looks at the text without descending,
//! [`measure`] at the document without walking anything twice.

use std::collections::HashMap;
use std::fmt;

use async_graphql::parser::types::{
    Directive, ExecutableDocument, FragmentDefinition, OperationDefinition, OperationType, Selection,
    SelectionSet,
};
use async_graphql::{Name, Positioned};

/// The limits on a document. They keep the process alive, so they are no settings.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Bytes of text.
    pub bytes: usize,
    /// Brackets inside brackets, of any kind.
    pub nesting: usize,
    /// Names, numbers, strings and punctuation.
    pub tokens: usize,
    /// Selections with every fragment put in where it is spread, in all operations together.
    pub selections: usize,
    /// Fields inside fields. The introspection that code generators send needs 15.
    pub depth: usize,
    /// Aliases, with every fragment put in.
    pub aliases: usize,
    /// Directives in one place.
    pub directives: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: 100_000,
            nesting: 64,
            tokens: 15_000,
            selections: 5000,
            depth: 16,
            aliases: 100,
            directives: 10,
        }
    }
}

/// Why a document is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// More of something than there may be.
    TooMuch { what: &'static str, limit: usize },
    /// Nothing that could be executed.
    Invalid(String),
}

impl Refusal {
    /// The code, in lower case.
    pub fn word(&self) -> &'static str {
        match self {
            Self::TooMuch { .. } => "query_too_large",
            Self::Invalid(_) => "graphql_validation_failed",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMuch { what, limit } => {
                write!(f, "the document has too many {what}; the limit is {limit}")
            }
            Self::Invalid(reason) => f.write_str(reason),
        }
    }
}

fn within(what: &'static str, count: usize, limit: usize) -> Result<(), Refusal> {
    if count > limit { Err(Refusal::TooMuch { what, limit }) } else { Ok(()) }
}

/// Counts bytes, tokens and nesting without parsing.
///
/// # Errors
/// [`Refusal::TooMuch`].
pub(super) fn scan(text: &str, limits: &Limits) -> Result<(), Refusal> {
    within("bytes", text.len(), limits.bytes)?;
    let mut rest = text.as_bytes();
    let (mut tokens, mut nesting) = (0, 0_usize);
    while let [first, after @ ..] = rest {
        rest = match first {
            b' ' | b'\t' | b'\n' | b'\r' | b',' => {
                rest = after;
                continue;
            }
            b'#' => {
                rest = skip_while(after, |byte| !matches!(byte, b'\n' | b'\r'));
                continue;
            }
            b'(' | b'[' | b'{' => {
                nesting += 1;
                within("brackets inside brackets", nesting, limits.nesting)?;
                after
            }
            b')' | b']' | b'}' => {
                nesting = nesting.saturating_sub(1);
                after
            }
            b'"' => skip_string(after),
            byte if is_word(*byte) => skip_while(after, is_word),
            _ => after,
        };
        tokens += 1;
        within("tokens", tokens, limits.tokens)?;
    }
    Ok(())
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80
}

fn skip_while(mut rest: &[u8], skip: impl Fn(u8) -> bool) -> &[u8] {
    while let [first, after @ ..] = rest
        && skip(*first)
    {
        rest = after;
    }
    rest
}

/// Goes past a string or block string whose first quote has been taken. One that does not end goes to the end of its
/// line, or of the text.
fn skip_string(rest: &[u8]) -> &[u8] {
    if let [b'"', b'"', block @ ..] = rest {
        return skip_block(block);
    }
    let mut rest = rest;
    loop {
        rest = match rest {
            [b'\\', _, after @ ..] => after,
            [b'"', after @ ..] => return after,
            [] | [b'\n' | b'\r', ..] => return rest,
            [_, after @ ..] => after,
        };
    }
}

fn skip_block(mut rest: &[u8]) -> &[u8] {
    loop {
        rest = match rest {
            [b'\\', b'"', b'"', b'"', after @ ..] => after,
            [b'"', b'"', b'"', after @ ..] => return after,
            [_, after @ ..] => after,
            [] => return rest,
        };
    }
}

/// What a document is about.
#[derive(Debug)]
pub(super) struct Measure {
    /// What the operation does.
    pub kind: OperationType,
    /// Names of its root fields, fragments put in.
    pub root_fields: Vec<String>,
    /// True if it asks for the schema and nothing else.
    pub is_introspection: bool,
}

/// Measures every operation and fragment of a document, and picks the operation to execute.
///
/// # Errors
/// [`Refusal`]; also if there is no such operation, or a subscription with other than one root field.
pub(super) fn measure(
    document: &ExecutableDocument,
    operation_name: Option<&str>,
    limits: &Limits,
) -> Result<Measure, Refusal> {
    let mut ruler = Ruler { fragments: &document.fragments, limits, measured: HashMap::new() };
    let mut sum = Size::default();
    for name in document.fragments.keys() {
        ruler.fragment(name, 0)?;
    }
    for (_, operation) in document.operations.iter() {
        ruler.directives(&operation.node.directives)?;
        for variable in &operation.node.variable_definitions {
            ruler.directives(&variable.node.directives)?;
        }
        sum.add(ruler.selections(&operation.node.selection_set.node, 0)?);
        ruler.check(&sum)?;
    }
    let operation = pick(document, operation_name)?;
    let mut root_fields = Vec::new();
    ruler.root_fields(&operation.selection_set.node, &mut root_fields);
    if operation.ty == OperationType::Subscription {
        let introspects = root_fields.iter().any(|field| field.starts_with("__"));
        if root_fields.len() != 1 || introspects {
            let reason = "a subscription must have exactly one root field, and no introspection";
            return Err(Refusal::Invalid(reason.to_owned()));
        }
    }
    let is_schema = |field: &String| matches!(field.as_str(), "__schema" | "__type" | "__typename");
    Ok(Measure { kind: operation.ty, is_introspection: root_fields.iter().all(is_schema), root_fields })
}

fn pick<'a>(
    document: &'a ExecutableDocument,
    name: Option<&str>,
) -> Result<&'a OperationDefinition, Refusal> {
    let mut operations = document.operations.iter();
    let found = match name {
        Some(name) => operations.find(|(known, _)| known.is_some_and(|known| known.as_str() == name)),
        None => match (operations.next(), operations.next()) {
            (Some(_), Some(_)) => {
                return Err(Refusal::Invalid(
                    "operationName is required: the document has several operations".to_owned(),
                ));
            }
            (only, _) => only,
        },
    };
    match (found, name) {
        (Some((_, operation)), _) => Ok(&operation.node),
        (None, Some(name)) => Err(Refusal::Invalid(format!("the document has no operation named {name:?}"))),
        (None, None) => Err(Refusal::Invalid("the document has no operation".to_owned())),
    }
}

/// How large something is with every fragment put in; counts stop at their type's largest number.
#[derive(Clone, Copy, Debug, Default)]
struct Size {
    selections: usize,
    aliases: usize,
    /// Fields inside fields.
    depth: usize,
    /// Selection sets inside selection sets, fragments included: how deep a walk descends.
    height: usize,
}

impl Size {
    fn add(&mut self, other: Self) {
        self.selections = self.selections.saturating_add(other.selections);
        self.aliases = self.aliases.saturating_add(other.aliases);
        self.depth = self.depth.max(other.depth);
        self.height = self.height.max(other.height);
    }
}

struct Ruler<'a> {
    fragments: &'a HashMap<Name, Positioned<FragmentDefinition>>,
    limits: &'a Limits,
    /// `None` while a fragment is being measured.
    measured: HashMap<&'a Name, Option<Size>>,
}

impl<'a> Ruler<'a> {
    fn check(&self, size: &Size) -> Result<(), Refusal> {
        within("selections", size.selections, self.limits.selections)?;
        within("aliases", size.aliases, self.limits.aliases)?;
        within("fields inside fields", size.depth, self.limits.depth)
    }

    /// `above` is how deep the walk is already; it is what bounds the descent.
    fn selections(&mut self, set: &'a SelectionSet, above: usize) -> Result<Size, Refusal> {
        within("selections inside selections", above, self.limits.nesting)?;
        let mut size = Size::default();
        for item in &set.items {
            size.add(self.selection(&item.node, above + 1)?);
            self.check(&size)?;
        }
        size.height += 1;
        Ok(size)
    }

    fn selection(&mut self, item: &'a Selection, above: usize) -> Result<Size, Refusal> {
        match item {
            Selection::Field(field) => {
                self.directives(&field.node.directives)?;
                let mut size = self.selections(&field.node.selection_set.node, above)?;
                size.selections += 1;
                size.aliases += usize::from(field.node.alias.is_some());
                size.depth += 1;
                Ok(size)
            }
            Selection::InlineFragment(inline) => {
                self.directives(&inline.node.directives)?;
                let mut size = self.selections(&inline.node.selection_set.node, above)?;
                size.selections += 1;
                Ok(size)
            }
            Selection::FragmentSpread(spread) => {
                self.directives(&spread.node.directives)?;
                let mut size = self.fragment(&spread.node.fragment_name.node, above)?;
                size.selections += 1;
                within("selections inside selections", above + size.height, self.limits.nesting)?;
                Ok(size)
            }
        }
    }

    /// Unknown fragments have no size; the validator refuses them.
    fn fragment(&mut self, name: &Name, above: usize) -> Result<Size, Refusal> {
        let Some((name, fragment)) = self.fragments.get_key_value(name) else { return Ok(Size::default()) };
        match self.measured.insert(name, None) {
            Some(Some(size)) => {
                self.measured.insert(name, Some(size));
                return Ok(size);
            }
            Some(None) => return Err(Refusal::Invalid(format!("the fragment {name:?} contains itself"))),
            None => {}
        }
        self.directives(&fragment.node.directives)?;
        let size = self.selections(&fragment.node.selection_set.node, above)?;
        self.measured.insert(name, Some(size));
        Ok(size)
    }

    fn directives(&self, directives: &[Positioned<Directive>]) -> Result<(), Refusal> {
        within("directives in one place", directives.len(), self.limits.directives)
    }

    /// Ends, because the document has been measured.
    fn root_fields(&self, set: &SelectionSet, into: &mut Vec<String>) {
        for item in &set.items {
            match &item.node {
                Selection::Field(field) => into.push(field.node.name.node.to_string()),
                Selection::InlineFragment(inline) => self.root_fields(&inline.node.selection_set.node, into),
                Selection::FragmentSpread(spread) => {
                    if let Some(fragment) = self.fragments.get(&spread.node.fragment_name.node) {
                        self.root_fields(&fragment.node.selection_set.node, into);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use async_graphql::parser::parse_query;
    use proptest::prelude::*;

    use super::*;

    const LIMITS: fn() -> Limits = Limits::default;

    /// Parses and measures where the parser has less stack than it has on a worker.
    fn on_a_small_stack(text: String) -> bool {
        let run = move || {
            if scan(&text, &LIMITS()).is_err() {
                return false;
            }
            let Ok(document) = parse_query(&text) else { return false };
            measure(&document, None, &LIMITS()).is_ok()
        };
        let thread = std::thread::Builder::new().stack_size(1024 * 1024).spawn(run).expect("a thread");
        thread.join().expect("no overflow")
    }

    fn nested(open: &str, inner: &str, close: &str, depth: usize) -> String {
        format!("{}{inner}{}", open.repeat(depth), close.repeat(depth))
    }

    #[test]
    fn documents_that_nest_too_deep_are_refused_before_the_parser_and_those_at_the_limit_do_not_overflow_it()
    {
        type Make = fn(usize) -> String;
        let documents: [(&str, Make); 7] = [
            ("lists", |n| format!("{{node(id:{}){{id}}}}", nested("[", "", "]", n))),
            ("objects", |n| format!("{{node(id:{}){{id}}}}", nested("{a:", "1", "}", n))),
            ("types", |n| format!("query($a:{}){{a}}", nested("[", "Int", "]", n))),
            ("defaults", |n| format!("query($a:Int={}){{a}}", nested("[", "1", "]", n))),
            ("selections", |n| nested("{a", "", "}", n)),
            ("inline fragments", |n| format!("{{{}}}", nested("...{", "a", "}", n))),
            ("unclosed", |n| format!("{{a(b:{}", "[".repeat(n))),
        ];
        for (what, make) in documents {
            for depth in [1500, 15_000] {
                assert!(scan(&make(depth), &LIMITS()).is_err(), "{what} {depth}");
            }
            for depth in [55, 60, 61, 62, 63, 64] {
                on_a_small_stack(make(depth));
            }
        }
    }

    #[test]
    fn doubling_fragments_are_refused_at_once() {
        for n in [18, 24, 31, 60, 200] {
            let mut text = "{...f0}".to_owned();
            for i in 0..n {
                text.push_str(&format!(" fragment f{i} on Query{{...f{0} ...f{0}}}", i + 1));
            }
            text.push_str(&format!(" fragment f{n} on Query{{__typename}}"));
            assert!(!on_a_small_stack(text), "{n}");
        }
    }

    #[test]
    fn a_chain_or_a_cycle_of_fragments_does_not_descend_for_ever() {
        for n in [10, 1000] {
            let mut text = "{...f0}".to_owned();
            for i in 0..n {
                text.push_str(&format!(" fragment f{i} on Query{{...f{}}}", i + 1));
            }
            let chain = format!("{text} fragment f{n} on Query{{__typename}}");
            assert_eq!(on_a_small_stack(chain), n == 10);
            let cycle = format!("{text} fragment f{n} on Query{{...f0}}");
            assert!(!on_a_small_stack(cycle));
        }
    }

    #[test]
    fn every_limit_holds_exactly_at_its_edge() {
        type Make = fn(usize) -> String;
        let limits = LIMITS();
        let documents: [(usize, Make); 6] = [
            (limits.bytes, |n| format!("{{a}}{}", " ".repeat(n - 3))),
            (limits.tokens, |n| format!("{{a(b:[{}])}}", "1 ".repeat(n - 9))),
            (limits.selections, |n| format!("{{{}}}", "a ".repeat(n))),
            (limits.depth, |n| nested("{a", "", "}", n)),
            (limits.aliases, |n| format!("{{{}}}", "a:b ".repeat(n))),
            (limits.directives, |n| format!("{{a {}}}", "@b ".repeat(n))),
        ];
        for (limit, make) in documents {
            assert!(on_a_small_stack(make(limit)), "{}", &make(limit)[..40]);
            assert!(!on_a_small_stack(make(limit + 1)), "{}", &make(limit)[..40]);
        }
    }

    #[test]
    fn brackets_in_strings_and_comments_do_not_count() {
        let deep = "[".repeat(200);
        for text in [
            format!("{{a(b:\"{deep}\")}}"),
            format!("{{a(b:\"\\\"{deep}\")}}"),
            format!("{{a(b:\"\"\"{deep} \\\"\"\" {deep}\n{deep}\"\"\")}}"),
            format!("# {deep}\n{{a}}"),
            format!("# \"{deep}\r{{a}}"),
        ] {
            assert_eq!(scan(&text, &LIMITS()), Ok(()), "{text}");
        }
        // A string that does not end, ends with its line: what follows must count.
        assert!(scan(&format!("{{a(b:\"\n{deep}"), &LIMITS()).is_err());
        assert!(scan(&format!("{{a(b:\"\"{deep}"), &LIMITS()).is_err());
    }

    #[test]
    fn the_operation_is_the_one_that_is_named_and_a_subscription_has_one_root_field() {
        let pick = |text: &str, name| measure(&parse_query(text).expect("parses"), name, &LIMITS());
        let two = "query A{a} mutation B{b ...F} fragment F on Mutation{c}";
        assert_eq!(pick(two, Some("B")).expect("B").root_fields, ["b", "c"]);
        assert_eq!(pick(two, Some("A")).expect("A").kind, OperationType::Query);
        for (text, name) in [
            (two, None),
            (two, Some("C")),
            ("subscription{a b}", None),
            ("subscription{__typename}", None),
            ("subscription{...F ...F} fragment F on Subscription{a}", None),
        ] {
            assert!(matches!(pick(text, name), Err(Refusal::Invalid(_))), "{text}");
        }
        assert!(pick("{__schema{types{name}} __typename}", None).expect("fits").is_introspection);
        assert!(!pick("{__typename a}", None).expect("fits").is_introspection);
        assert!(pick("subscription{... {a}}", None).is_ok());
    }

    proptest! {
        #[test]
        fn no_text_makes_the_scan_panic(text in "(\\PC|[\"\\\\#\\[\\]{}()\n\r]){0,200}") {
            let _ = scan(&text, &LIMITS());
        }

        #[test]
        fn whatever_passes_can_be_parsed_on_a_small_stack(parts in prop::collection::vec(
            prop::sample::select(vec!["{", "}", "[", "]", "(", ")", "a", ":", "$a", "\"", "\"\"\"", "...", "@a", "!", "=", "#", "\n", "on", "query", "\\"]), 0..400))
        {
            on_a_small_stack(parts.join(" "));
            on_a_small_stack(parts.concat());
        }
    }
}
