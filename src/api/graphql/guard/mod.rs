//! Stands in front of async-graphql and refuses documents that would hurt it: text that overflows the stack of
//! its parser, fragments that double its work, fields that multiply its validation errors.
//!
//! [`scan`] comes before the parser, [`measure`] between the parser and validation. Pure: it knows no schema,
//! no transport and no error type but its own.

mod measure;
mod merge;

use std::fmt;

pub use measure::{Measure, choose, measure};

/// The most that a document may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of text.
    pub text_bytes: usize,
    /// Bytes of one name or number. Validation repeats names in its errors, so a long one multiplies.
    pub word_bytes: usize,
    /// Lexical tokens, not counting commas and comments.
    pub tokens: usize,
    /// Open `(`, `[` and `{` at one point of the text, together.
    pub nesting: usize,
    /// Selections of all operations, with every fragment written out where it is spread.
    pub selections: usize,
    /// Fields within fields, as async-graphql's `limit_depth` counts them.
    pub depth: usize,
    /// Selection sets and spreads within each other, as its `limit_recursive_depth` counts them.
    pub layers: usize,
    /// Aliased fields of all operations, with fragments written out.
    pub aliases: usize,
    /// Directives on any one field, spread, fragment, variable or operation.
    pub directives: usize,
    /// Places of all operations that name a variable, with fragments written out. Validation and execution copy
    /// the variable's whole value at each.
    pub variable_uses: usize,
    /// Selections below `__schema` and `__type` of all operations, with fragments written out. The standard
    /// introspection query with every option on has 240.
    pub introspection: usize,
    /// The lists `fields`, `inputFields`, `interfaces` and `possibleTypes` within each other below `__schema` or
    /// `__type`. Each level multiplies the answer by the width of the schema; standard introspection needs one.
    pub introspection_lists: usize,
    /// Root fields of the operation that will run, with fragments written out. async-graphql resolves a repeated field
    /// once per occurrence, a mutation too, before it merges the answers.
    pub root_fields: usize,
    /// Steps that validation needs to compare the fields that share a response key. It flattens every selection
    /// set anew and reports each pair of arguments that differ, so both grow with the square of the text.
    pub merge_steps: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            text_bytes: 100_000,
            word_bytes: 128,
            tokens: 15_000,
            nesting: 64,
            selections: 5_000,
            depth: 16,
            layers: 32,
            aliases: 30,
            directives: 10,
            variable_uses: 500,
            introspection: 500,
            introspection_lists: 1,
            root_fields: 50,
            merge_steps: 20_000,
        }
    }
}

impl Limits {
    /// For whoever shows no credentials, and so may ask for nothing but the schema: several times what that takes.
    pub fn of_strangers() -> Self {
        Self { text_bytes: 16_384, tokens: 2_000, ..Self::default() }
    }
}

/// What one of the [`Limits`] counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Quantity {
    TextBytes,
    WordBytes,
    Tokens,
    Nesting,
    Selections,
    Depth,
    Layers,
    Aliases,
    Directives,
    VariableUses,
    Introspection,
    IntrospectionLists,
    RootFields,
    MergeSteps,
}

impl Quantity {
    fn noun(self) -> &'static str {
        match self {
            Self::TextBytes => "bytes of text",
            Self::WordBytes => "bytes in one name or number",
            Self::Tokens => "tokens",
            Self::Nesting => "nested brackets",
            Self::Selections => "selections with fragments written out",
            Self::Depth => "levels of fields",
            Self::Layers => "levels of selection sets and fragment spreads",
            Self::Aliases => "aliases with fragments written out",
            Self::Directives => "directives in one place",
            Self::VariableUses => "uses of variables with fragments written out",
            Self::Introspection => "selections below __schema and __type with fragments written out",
            Self::IntrospectionLists => "lists of the schema within each other",
            Self::RootFields => "root fields with fragments written out",
            Self::MergeSteps => "steps to compare fields of the same response key",
        }
    }
}

/// Why a document is not executed. The message shown to the client is its `Display`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// `actual` is missing where counting stopped at the limit.
    TooMuch { what: Quantity, limit: usize, actual: Option<usize> },
    /// A string or block string that does not end; the parser would try its rest again and again.
    UnterminatedString,
    /// This fragment spreads itself, perhaps through others.
    FragmentCycle(String),
    /// A subscription needs exactly one root field, and `__typename` is none.
    SubscriptionRoots { actual: usize },
    /// Several operations and no name to choose by.
    OperationNameRequired,
    /// No operation has this name.
    UnknownOperation(String),
    /// A mutation has this root field twice under one name; the executor would carry it out twice and answer once.
    RepeatedMutation(String),
}

impl Refusal {
    /// The code, in lower case.
    pub fn word(&self) -> &'static str {
        match self {
            Self::TooMuch { .. } => "query_too_large",
            Self::UnterminatedString => "graphql_parse_failed",
            Self::FragmentCycle(_)
            | Self::SubscriptionRoots { .. }
            | Self::OperationNameRequired
            | Self::UnknownOperation(_)
            | Self::RepeatedMutation(_) => "graphql_validation_failed",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMuch { what, limit, actual: Some(actual) } => {
                write!(f, "The document has {actual} {}; at most {limit} are allowed.", what.noun())
            }
            Self::TooMuch { what, limit, actual: None } => {
                write!(f, "The document has more than {limit} {}.", what.noun())
            }
            Self::UnterminatedString => f.write_str("Unterminated string."),
            Self::FragmentCycle(name) => write!(f, "Fragment \"{name}\" spreads itself."),
            Self::SubscriptionRoots { actual } => {
                write!(
                    f,
                    "A subscription must have exactly one root field, not __typename; this one has {actual}."
                )
            }
            Self::OperationNameRequired => {
                f.write_str("operationName is required because the document has several operations.")
            }
            Self::UnknownOperation(name) => write!(f, "Unknown operation named \"{name}\"."),
            Self::RepeatedMutation(key) => {
                write!(
                    f,
                    "The mutation has the root field \"{key}\" more than once; give each an alias of its own."
                )
            }
        }
    }
}

fn at_most(what: Quantity, limit: usize, actual: usize) -> Result<(), Refusal> {
    if actual <= limit {
        return Ok(());
    }
    Err(Refusal::TooMuch { what, limit, actual: Some(actual) })
}

/// Checks the raw text in one pass, without allocating.
///
/// What passes parses in linear time and in far less than 1 MiB of stack, even in a debug build. It may still be
/// wrong: brackets need not match, and bytes outside the grammar count as one token each. The parser stops at the
/// first such fault, so nothing behind it matters.
///
/// # Errors
/// [`Refusal::TooMuch`] or [`Refusal::UnterminatedString`].
pub fn scan(text: &str, limits: &Limits) -> Result<(), Refusal> {
    at_most(Quantity::TextBytes, limits.text_bytes, text.len())?;
    let bytes = text.as_bytes();
    let (mut at, mut tokens, mut nesting) = (0, 0_usize, 0_usize);
    while let Some(&first) = bytes.get(at) {
        let (length, is_token) = lexeme(&bytes[at..])?;
        at += length;
        tokens += usize::from(is_token);
        match first {
            b'(' | b'[' | b'{' => nesting += 1,
            b')' | b']' | b'}' => nesting = nesting.saturating_sub(1),
            b'"' => {}
            _ if is_token => at_most(Quantity::WordBytes, limits.word_bytes, length)?,
            _ => {}
        }
        if nesting > limits.nesting {
            return Err(Refusal::TooMuch { what: Quantity::Nesting, limit: limits.nesting, actual: None });
        }
        if tokens > limits.tokens {
            return Err(Refusal::TooMuch { what: Quantity::Tokens, limit: limits.tokens, actual: None });
        }
    }
    Ok(())
}

/// The length of what `rest`, which is not empty, starts with, and whether that is a token.
fn lexeme(rest: &[u8]) -> Result<(usize, bool), Refusal> {
    let run = |keep: fn(u8) -> bool| rest.iter().position(|byte| !keep(*byte)).unwrap_or(rest.len());
    Ok(match rest {
        [b' ' | b',' | b'\t' | b'\r' | b'\n', ..] => (1, false),
        [0xEF, 0xBB, 0xBF, ..] => (3, false),
        [b'#', ..] => (run(|byte| !matches!(byte, b'\r' | b'\n')), false),
        [b'"', b'"', b'"', body @ ..] => (3 + block_string(body)?, true),
        [b'"', body @ ..] => (1 + string(body)?, true),
        [b'.', b'.', b'.', ..] => (3, true),
        [b'0'..=b'9' | b'-', ..] => (run(is_in_number), true),
        [b'A'..=b'Z' | b'a'..=b'z' | b'_', ..] => (run(is_in_name), true),
        _ => (1, true),
    })
}

fn is_in_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn is_in_number(byte: u8) -> bool {
    is_in_name(byte) || matches!(byte, b'.' | b'+' | b'-')
}

/// The length of `body` up to and with the quote that ends it.
fn string(body: &[u8]) -> Result<usize, Refusal> {
    let mut at = 0;
    loop {
        match body.get(at) {
            Some(b'"') => return Ok(at + 1),
            Some(b'\\') => at += 2,
            None | Some(b'\r' | b'\n') => return Err(Refusal::UnterminatedString),
            Some(_) => at += 1,
        }
    }
}

/// The length of `body` up to and with the three quotes that end it.
fn block_string(body: &[u8]) -> Result<usize, Refusal> {
    let mut at = 0;
    loop {
        match &body[at..] {
            [b'"', b'"', b'"', ..] => return Ok(at + 3),
            [b'\\', b'"', b'"', b'"', ..] => at += 4,
            [_, ..] => at += 1,
            [] => return Err(Refusal::UnterminatedString),
        }
    }
}

#[cfg(test)]
mod tests;
