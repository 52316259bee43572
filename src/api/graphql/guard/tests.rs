//! Everything that crashed the executor or kept it busy, and the exact edge of every limit.

use std::thread;

use async_graphql::parser::types::{ExecutableDocument, OperationType};
use async_graphql::parser::{self, parse_query};
use proptest::prelude::*;

use super::*;

/// The query of graphql-js 16 with every option on: what `GraphiQL` and code generators send.
const INTROSPECTION: &str = r"
query IntrospectionQuery {
  __schema {
    description
    queryType { name kind } mutationType { name kind } subscriptionType { name kind }
    types { ...FullType }
    directives { name description isRepeatable locations args(includeDeprecated: true) { ...InputValue } }
  }
}
fragment FullType on __Type {
  kind name description specifiedByURL isOneOf
  fields(includeDeprecated: true) {
    name description args(includeDeprecated: true) { ...InputValue } type { ...TypeRef }
    isDeprecated deprecationReason
  }
  inputFields(includeDeprecated: true) { ...InputValue }
  interfaces { ...TypeRef }
  enumValues(includeDeprecated: true) { name description isDeprecated deprecationReason }
  possibleTypes { ...TypeRef }
}
fragment InputValue on __InputValue {
  name description type { ...TypeRef } defaultValue isDeprecated deprecationReason
}
fragment TypeRef on __Type {
  kind name ofType { kind name ofType { kind name ofType { kind name ofType { kind name ofType {
    kind name ofType { kind name ofType { kind name ofType { kind name ofType { kind name } } } } } } } } }
}";

fn scanned(text: &str) -> Result<(), Refusal> {
    scan(text, &Limits::default())
}

/// Scans, parses and measures as a request would be; panics where the document does not get as far as `measure`.
fn measured(text: &str) -> Result<Measure<'static>, Refusal> {
    measured_as(text, None, &Limits::default())
}

fn measured_as(text: &str, name: Option<&str>, limits: &Limits) -> Result<Measure<'static>, Refusal> {
    scan(text, limits).expect("the text is within its limits");
    let document = Box::leak(Box::new(parse_query(text).expect("the text parses")));
    measure(document, name, limits)
}

/// The quantity that was too much.
fn excess<T: fmt::Debug>(outcome: Result<T, Refusal>) -> Quantity {
    match outcome {
        Err(Refusal::TooMuch { what, .. }) => what,
        other => panic!("not refused for being too much: {other:?}"),
    }
}

/// Parses in half the stack of a tokio worker. An overflow would abort the whole test run.
fn parse_on_a_small_stack(text: String) -> parser::Result<ExecutableDocument> {
    let thread = thread::Builder::new().stack_size(1 << 20).spawn(move || parse_query(text));
    thread.expect("a thread starts").join().expect("the parser does not panic")
}

fn nested(before: &str, open: &str, core: &str, close: &str, after: &str, depth: usize) -> String {
    format!("{before}{}{core}{}{after}", open.repeat(depth), close.repeat(depth))
}

/// What opens and closes one level, and the brackets of that level: the ways to nest that the grammar has.
fn deep(depth: usize) -> Vec<String> {
    vec![
        nested("{a(x:", "[", "1", "]", ")}", depth - 2),
        nested("{a(x:", "{x:", "1", "}", ")}", depth - 2),
        nested("{a(x:", "[{x:", "1", "}]", ")}", depth / 2 - 1),
        nested("{a@d(x:", "[", "1", "]", ")}", depth - 2),
        nested("query($v:", "[", "Int", "]", "){a}", depth - 1),
        nested("query($v:", "[", "Int!", "]!", "){a}", depth - 1),
        nested("query($v:Int=", "[", "1", "]", "){a}", depth - 1),
        nested("query($v:Int=", "{x:", "1", "}", "){a}", depth - 1),
        nested("{", "a{", "a", "}", "}", depth - 1),
        nested("{", "...{", "a", "}", "}", depth - 1),
        nested("{", "...on Query@d{", "a", "}", "}", depth - 1),
        nested("{", "a{...{", "a(x:[{x:1}])", "}}", "}", depth / 2 - 3),
    ]
}

#[test]
fn the_deepest_texts_that_pass_parse_on_a_small_stack() {
    for text in deep(Limits::default().nesting) {
        assert_eq!(scanned(&text), Ok(()), "{text}");
        let parsed = parse_on_a_small_stack(text.clone());
        assert!(parsed.is_ok(), "{text}: {parsed:?}");
    }
}

#[test]
fn the_deepest_texts_that_pass_may_end_anywhere() {
    for text in deep(Limits::default().nesting) {
        for length in (0..text.len()).step_by(17) {
            let cut = &text[..length];
            assert_eq!(scanned(cut), Ok(()), "{cut}");
            assert!(parse_on_a_small_stack(cut.to_owned()).is_err(), "{cut}");
        }
    }
}

#[test]
fn texts_that_crashed_the_process_are_refused() {
    for text in deep(3_000) {
        assert_eq!(excess(scanned(&text)), Quantity::Nesting);
        assert_eq!(excess(scanned(&text[..text.len() / 2])), Quantity::Nesting);
    }
}

#[test]
fn many_deep_values_parse_on_a_small_stack() {
    let item = nested("", "[", "", "]", "", 60);
    for text in [format!("{{a(x:[{}])}}", item.repeat(120)), format!("{{{}}}", "a{...{b}}".repeat(1_000))] {
        assert_eq!(scanned(&text), Ok(()));
        assert!(parse_on_a_small_stack(text).is_ok());
    }
}

/// The parser scans the rest of the text anew at each of these quotes: 96 KB took it 10 s in a release build.
#[test]
fn block_strings_that_never_end_are_refused() {
    let soup = r#"\\"""""#.repeat(16_000);
    assert_eq!(scanned(&format!("{{a(x:[\"\"\"{soup}")), Err(Refusal::UnterminatedString));
}

#[test]
fn strings_that_do_not_end_are_refused() {
    for text in
        [r#"""#, r#""\"#, r#""\""#, "\"\n\"", "\"\r\"", r#"""""#, r#"""""""#, r#""""\""""#, r#""""a"""""#]
    {
        assert_eq!(scanned(text), Err(Refusal::UnterminatedString), "{text}");
    }
    for text in [r#""""#, r#""\\""#, r#""\"""#, r#""""""""#, r#""""\"""""""#, "\"\"\"\n\r\"\"\""] {
        assert_eq!(scanned(text), Ok(()), "{text}");
    }
}

#[test]
fn brackets_in_strings_and_comments_do_not_nest() {
    let open = "([{".repeat(100);
    for text in [
        format!("{{a(x:\"{open}\\\"{open}\")}}"),
        format!("{{a(x:\"\"\"{open}\"{open}\n\\\"\"\"{open}\"\"\")}}"),
        format!("{{a#{open}\"\"\"\n}}"),
        format!("{{a#{open}\"\r}}"),
        format!("#{open}"),
    ] {
        assert_eq!(scanned(&text), Ok(()), "{text}");
    }
    assert_eq!(excess(scanned(&format!("#\n{open}"))), Quantity::Nesting);
    assert_eq!(excess(scanned(&format!("#\r{open}"))), Quantity::Nesting);
    assert_eq!(excess(scanned(&format!("\"#\"{open}"))), Quantity::Nesting);
}

#[test]
fn the_limits_of_the_text_hold_at_their_edge() {
    let limits = Limits { text_bytes: 20, word_bytes: 4, tokens: 6, nesting: 2, ..Limits::default() };
    for text in
        ["{ a ... [ - }", "abcd 12.3 , \u{feff}", "a,,,,,,,,,,,,,,,,,,b", "{[]}([", "\"a b c d e f g\""]
    {
        assert_eq!(scan(text, &limits), Ok(()), "{text}");
    }
    assert_eq!(excess(scan("a,,,,,,,,,,,,,,,,,,,b", &limits)), Quantity::TextBytes);
    assert_eq!(excess(scan("abcde", &limits)), Quantity::WordBytes);
    assert_eq!(excess(scan("12.34", &limits)), Quantity::WordBytes);
    assert_eq!(excess(scan("a b c d e f g", &limits)), Quantity::Tokens);
    assert_eq!(excess(scan("é é é é", &limits)), Quantity::Tokens);
    assert_eq!(excess(scan("[}({[", &limits)), Quantity::Nesting);
}

#[test]
fn the_standard_introspection_query_passes() {
    let measure = measured(INTROSPECTION).expect("it passes");
    assert!(measure.is_introspection_only());
    assert_eq!((measure.depth, measure.root_fields), (15, vec!["__schema"]));
    assert!(measure.selections < 300, "{}", measure.selections);
}

#[test]
fn introspection_does_not_multiply() {
    let twice = measured("{__schema{types{fields{type{fields{name}}}}}}");
    assert_eq!(excess(twice), Quantity::IntrospectionLists);
    let by_fragment =
        measured("{__type(name:\"A\"){...T}} fragment T on __Type{fields{type{interfaces{name}}}}");
    assert_eq!(excess(by_fragment), Quantity::IntrospectionLists);
    let wide = measured(&format!("{{__schema{{types{{fields{{{}}}}}}}}}", "name ".repeat(500)));
    assert_eq!(excess(wide), Quantity::Introspection);
    assert!(measured("{a{fields{interfaces{fields{b}}}}}").is_ok());
}

/// `{...f0}`, where each of `n` fragments spreads the next one twice.
fn doubling(n: usize) -> String {
    let fragments = (0..n).map(|i| format!("fragment f{i} on Query{{...f{0} ...f{0}}}", i + 1));
    format!("{{...f0}}{}fragment f{n} on Query{{a}}", fragments.collect::<String>())
}

#[test]
fn doubling_fragments_are_counted_without_expanding_them() {
    assert_eq!(measured(&doubling(3)).map(|measure| measure.selections), Ok(1 + 2 + 4 + 8 + 8));
    for n in 18..=31 {
        let refusal = measured(&doubling(n));
        assert_eq!(excess(refusal), Quantity::Selections, "{n}");
    }
}

#[test]
fn the_selections_of_a_bomb_saturate() {
    let limits = Limits { layers: 300, ..Limits::default() };
    let refusal = measured_as(&doubling(200), None, &limits).expect_err("it is a bomb");
    assert!(matches!(refusal, Refusal::TooMuch { what: Quantity::Selections, .. }), "{refusal}");
}

#[test]
fn a_bomb_is_refused_though_no_operation_uses_it() {
    let unused = format!("query{{b}}{}", &doubling(20)["{...f0}".len()..]);
    assert_eq!(excess(measured(&unused)), Quantity::Selections);
    let other = format!("query a{{b}} query b{}", doubling(20));
    assert_eq!(excess(measured_as(&other, Some("a"), &Limits::default())), Quantity::Selections);
}

#[test]
fn a_long_chain_of_fragments_is_refused_on_a_small_stack() {
    let chain =
        (0..1_500).map(|i| format!("fragment f{i} on Q{{...f{}}}", i + 1)).collect::<Vec<_>>().concat();
    for operation in ["{a}", "{...f0}"] {
        let text = format!("{operation}{chain}");
        let thread = thread::Builder::new().stack_size(1 << 20).spawn(move || excess(measured(&text)));
        assert_eq!(thread.expect("a thread starts").join().expect("no panic"), Quantity::Layers);
    }
}

#[test]
fn fragment_cycles_are_refused_used_or_not() {
    for text in [
        "{...f} fragment f on Q{...f}",
        "{a} fragment f on Q{a{...f}}",
        "{...f} fragment f on Q{...g} fragment g on Q{a{...{...f}}}",
    ] {
        assert!(matches!(measured(text), Err(Refusal::FragmentCycle(_))), "{text}");
    }
    assert!(measured("{...f ...g} fragment f on Q{...g} fragment g on Q{a}").is_ok());
}

#[test]
fn unknown_fragments_are_left_to_validation() {
    assert_eq!(measured("{...nothing}").map(|measure| measure.selections), Ok(1));
}

#[test]
fn the_limits_of_the_document_hold_at_their_edge() {
    use Quantity::{Aliases, Depth, Directives, Layers, MergeSteps, RootFields, Selections, VariableUses};
    let limits = Limits {
        selections: 9,
        depth: 3,
        layers: 4,
        aliases: 2,
        directives: 2,
        variable_uses: 2,
        root_fields: 4,
        merge_steps: 30,
        ..Limits::default()
    };
    for (passes, what, fails) in [
        ("{a{b c d e f g h i}}", Selections, "{a{b c d e f g h i j}}"),
        ("{...f a{b c}} fragment f on Q{a b{c d}}", Selections, "{...f ...f} fragment f on Q{a b{c d}}"),
        ("query{a{b c d e}}query B{a{b c d}}", Selections, "query{a{b c d e}}query B{a{b c d e}}"),
        ("{a{b{c}}}", Depth, "{a{b{c{__typename d}}}}"),
        ("{a{...f}} fragment f on Q{b{__typename}}", Depth, "{a{b{...f}}} fragment f on Q{c{d}}"),
        ("{...{...{...{...{a}}}}}", Layers, "{...{...{...{...{...{a}}}}}}"),
        ("{...{...f}} fragment f on Q{...{...{a}}}", Layers, "{...{...f}} fragment f on Q{...{...{...{a}}}}"),
        ("{x:a y:b}", Aliases, "{x:a y:b{z:a}}"),
        ("{x:a ...f} fragment f on Q{y:a}", Aliases, "{x:a ...f ...f} fragment f on Q{y:a}"),
        ("{a@d@d}", Directives, "{a@d@d@d}"),
        ("{...@d@d{a}}", Directives, "{...@d@d@d{a}}"),
        ("query@d@d{a}", Directives, "query@d@d@d{a}"),
        ("query($v:I@d@d){a}", Directives, "query($v:I@d@d@d){a}"),
        ("{...f@d@d} fragment f on Q{a}", Directives, "{...f@d@d@d} fragment f on Q{a}"),
        ("{a} fragment f on Q@d@d{a}", Directives, "{a} fragment f on Q@d@d@d{a}"),
        ("{a(x:[$v{y:$v}])}", VariableUses, "{a(x:[$v{y:$v}],z:$v)}"),
        ("{a(x:$v)@d(x:$v)}", VariableUses, "{...f ...f ...f} fragment f on Q@d{a@d(x:$v)}"),
        ("{a a a a}", RootFields, "{a a a ...{a a}}"),
        ("{a(x:1,y:1)a(x:1,y:[1])}", MergeSteps, "{...{a(x:[1,1,1,1,1,1,1,1,1,1]) a a}}"),
    ] {
        let passes = passes.replacen("query{", "query A{", 1);
        let fails = fails.replacen("query{", "query A{", 1);
        let name = passes.starts_with("query A").then_some("A");
        assert!(
            measured_as(&passes, name, &limits).is_ok(),
            "{passes}: {:?}",
            measured_as(&passes, name, &limits)
        );
        let refusal = measured_as(&fails, name, &limits).expect_err(&fails);
        assert_eq!(excess(Err::<(), _>(refusal)), what, "{fails}");
    }
}

/// Without the limit, validation reports an error for each argument of the first field at each of the others.
#[test]
fn fields_that_conflict_do_not_multiply_errors() {
    let arguments = (0..2_000).map(|i| format!("x{i}:1 ")).collect::<Vec<_>>().concat();
    let wide = format!("{{b({arguments}){}}}", "b ".repeat(40));
    let deep = nested("{b(x:1 y:1)", "...{", &"b ".repeat(700), "}", "}", 30);
    let spread =
        format!("fragment f on Q{{{}}}query{{{}}}", "b(x:1 y:1 z:1)b ".repeat(20), "a{...f}".repeat(100));
    let limits = Limits { root_fields: 1_000, ..Limits::default() };
    for text in [wide, deep, spread] {
        assert_eq!(excess(measured_as(&text, None, &limits)), Quantity::MergeSteps);
    }
}

#[test]
fn a_refusal_names_the_limit_and_the_value() {
    let refusal = measured("{a{b{c{d{e{f{g{h{i{j{k{l{m{n{o{p{q}}}}}}}}}}}}}}}}}").expect_err("17 levels");
    assert_eq!(refusal.to_string(), "The document has 17 levels of fields; at most 16 are allowed.");
    let refusal = scanned(&"[".repeat(65)).expect_err("65 levels");
    assert_eq!(refusal.to_string(), "The document has more than 64 nested brackets.");
}

#[test]
fn the_operation_is_chosen_by_name() {
    let limits = Limits::default();
    let both = "query A{a} mutation B{b c}";
    assert_eq!(measured(both), Err(Refusal::OperationNameRequired));
    let chosen = measured_as(both, Some("B"), &limits).expect("it exists");
    assert_eq!((chosen.operation, chosen.root_fields), (OperationType::Mutation, vec!["b", "c"]));
    assert_eq!(measured_as(both, Some("C"), &limits), Err(Refusal::UnknownOperation("C".to_owned())));
    assert_eq!(measured_as("{a}", Some("A"), &limits), Err(Refusal::UnknownOperation("A".to_owned())));
    assert!(measured("query A{a}").is_ok());
}

#[test]
fn a_subscription_has_exactly_one_root_field() {
    for text in ["subscription{a{b c}}", "subscription{x:a}", "subscription{...{...f}} fragment f on S{a}"] {
        assert_eq!(measured(text).map(|measure| measure.root_fields), Ok(vec!["a"]), "{text}");
    }
    for (text, actual) in [
        ("subscription{a b}", 2),
        ("subscription{a a}", 2),
        ("subscription{__typename}", 0),
        ("subscription{a ...f} fragment f on S{x:a}", 2),
        ("subscription{...nothing}", 0),
    ] {
        assert_eq!(measured(text), Err(Refusal::SubscriptionRoots { actual }), "{text}");
    }
}

#[test]
fn a_mutation_that_would_be_carried_out_twice_is_refused() {
    for text in ["mutation{a a}", "mutation{a ...F} fragment F on Mutation{a}", "mutation{x:a x:b}"] {
        assert!(matches!(measured(text), Err(Refusal::RepeatedMutation(_))), "{text}");
    }
    assert!(measured("mutation{a b:a}").is_ok());
}

#[test]
fn root_fields_are_found_through_fragments_and_named_each_time() {
    let measure =
        measured("{x:a ...f ...{a b}} fragment f on Q{c b ...g} fragment g on Q{a{d}}").expect("it passes");
    assert_eq!(measure.root_fields, ["a", "c", "b", "a", "a", "b"]);
    assert!(!measure.is_introspection_only());
    assert!(
        measured("{__typename ...{x:__type(name:\"A\"){name}}}").expect("it passes").is_introspection_only()
    );
}

/// Pieces that a lexer must tell apart, with what each does to the nesting.
fn piece() -> impl Strategy<Value = (String, i8)> {
    let inside = "[\\[\\](){}#a é]{0,6}";
    prop_oneof![
        4 => prop::sample::select(vec!["[", "(", "{"]).prop_map(|open| (open.to_owned(), 1)),
        2 => prop::sample::select(vec!["]", ")", "}"]).prop_map(|close| (close.to_owned(), -1)),
        1 => prop::sample::select(vec!["...", "!", "é", "\\", "-1.5e+3", ",", "\u{feff}"]).prop_map(|word| (word.to_owned(), 0)),
        2 => inside.prop_map(|text| (format!("\"{text}\\\"{text}\\\\\""), 0)),
        2 => inside.prop_map(|text| (format!("\"\"\"{text}\n\"\\\"\"\"{text}\\\"\"\"\"\"\""), 0)),
        2 => (inside, prop::sample::select(vec!["\n", "\r", "\r\n"]))
            .prop_map(|(text, end)| (format!("#\"{text}\"\"\"{end}"), 0)),
    ]
}

proptest! {
    #[test]
    fn scan_takes_any_text(text in any::<String>()) {
        let _ = scanned(&text);
    }

    #[test]
    fn scan_takes_any_quotes(text in "[\"\\\\#\n\r a\\[é]{0,40}") {
        let _ = scanned(&text);
    }

    #[test]
    fn nesting_is_that_of_the_brackets_outside_strings_and_comments(pieces in prop::collection::vec(piece(), 0..60)) {
        let text = pieces.iter().map(|(text, _)| text.as_str()).collect::<Vec<_>>().join(" ");
        let heights = pieces.iter().scan(0_usize, |open, (_, step)| {
            *open = open.saturating_add_signed((*step).into());
            Some(*open)
        });
        let deepest = heights.max().unwrap_or(0);
        let at = |nesting| scan(&text, &Limits { nesting, ..Limits::default() });
        prop_assert_eq!(at(deepest), Ok(()));
        if deepest > 0 {
            prop_assert_eq!(excess(at(deepest - 1)), Quantity::Nesting);
        }
    }
}
