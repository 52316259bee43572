//! The one-way rule: which room of `src/` may name which, and which crates. Reads the source text, so it needs no dependency and
//! holds for code that does not compile on this machine too.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Who may name whom. A room that is missing here fails the test: a new room is a decision.
const MAY_NAME: &[(&str, &[&str])] = &[
    ("lib", &[]),
    ("main", &["cli"]),
    ("cli", &["api", "auth", "config", "domain", "replication", "server", "shutdown", "store", "telemetry"]),
    (
        "server",
        &["api", "auth", "config", "domain", "listener", "replication", "shutdown", "store", "telemetry"],
    ),
    ("api", &["auth", "config", "domain", "shutdown", "telemetry"]),
    ("listener", &["config", "domain", "shutdown", "telemetry"]),
    ("auth", &["config", "domain", "telemetry"]),
    ("replication", &["config", "domain", "store", "telemetry"]),
    ("store", &["domain"]),
    ("telemetry", &["config", "domain"]),
    ("config", &["domain"]),
    ("shutdown", &["domain"]),
    ("domain", &[]),
];

/// Crates that only these rooms may name. The core, which is a crate itself, depends on none of them.
const CRATE_ROOMS: &[(&str, &[&str])] = &[
    ("axum", &["api", "listener", "telemetry"]),
    ("utoipa", &["api"]),
    ("utoipa_axum", &["api"]),
    ("async_graphql", &["api"]),
    ("async_graphql_axum", &["api"]),
    ("flate2", &["api"]),
    ("zstd", &["api"]),
    ("sea_orm", &["store"]),
    ("sqlx", &["store"]),
    ("entity", &["store"]),
    ("migration", &["store"]),
    ("fjall", &["store"]),
    ("object_store", &["store"]),
    ("s2_sdk", &["store"]),
    ("s2_api", &["store", "api"]),
    ("s2_common", &["store", "api"]),
    ("clickhouse", &["store"]),
    ("jsonwebtoken", &["auth"]),
    ("pgwire_replication", &["replication"]),
    ("reqwest", &["cli"]),
    ("figment", &["config"]),
    ("clap", &["cli", "main"]),
    ("indicatif", &["cli"]),
    ("listenfd", &["listener"]),
    ("tikv_jemallocator", &["main"]),
    // Everyone else says `crate::domain` and `crate::store`, which the rule above sees.
    ("sessiond_domain", &["store"]),
    ("sessiond_store", &[]),
];

/// Adapters, which never name each other.
const ADAPTERS: &[&str] = &[
    "blob",
    "metadata",
    "channel::log",
    "channel::s2",
    "index::sql",
    "index::clickhouse",
    "index::fallback",
];
/// The SQL index reads the tables that the SQL metadata store writes, through its connections.
const SHARED_ADAPTERS: &[(&str, &str)] = &[("index::sql", "metadata")];

#[test]
fn no_room_names_another_against_the_one_way_rule() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut offences = Vec::new();
    // The stores are a crate, and a room all the same.
    for (src, room) in [("src", ""), ("store/src", "store")] {
        let src = root.join(src);
        let mut files = Vec::new();
        collect(&src, &mut files);
        assert!(files.len() > 20, "found only {} files below {}", files.len(), src.display());
        for file in files {
            let module = module_path(&Path::new(room).join(file.strip_prefix(&src).expect("below src")));
            offences.extend(self::offences(&module, &fs::read_to_string(&file).expect("readable")));
        }
    }
    assert!(offences.is_empty(), "\n{}\n", offences.join("\n"));
}

#[test]
fn the_core_depends_on_no_transport_and_no_database() {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("domain/Cargo.toml");
    let manifest = fs::read_to_string(manifest).expect("readable");
    let names: Vec<_> = manifest.lines().filter_map(|line| line.split(['.', ' ']).next()).collect();
    assert!(names.contains(&"tokio"), "the list of dependencies is not understood: {names:?}");
    for (name, _) in CRATE_ROOMS.iter().chain(&[("sessiond", &[][..])]) {
        let dashed = name.replace('_', "-");
        assert!(!names.iter().any(|found| found == name || *found == dashed), "the core depends on {name}");
    }
}

/// A panic ends the task that it happens in, and no more: `Background` and the front ends count on it.
#[test]
fn no_profile_makes_a_panic_end_the_process() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for file in ["Cargo.toml", ".cargo/config.toml"] {
        let text = fs::read_to_string(root.join(file)).expect("readable");
        let setting = |line: &str| !line.starts_with('#') && line.contains("panic") && line.contains("abort");
        assert!(!text.lines().map(str::trim).any(setting), "{file}");
    }
}

#[test]
fn an_offending_line_is_found_in_every_spelling() {
    for (file, line) in [
        ("config/http.rs", "use crate::store::metadata::SqlMetadata;"),
        ("config/http.rs", "use super::super::api::ApiState;"),
        ("config/store/mod.rs", "use crate::{\n    domain::Error,\n    telemetry::Metrics,\n};"),
        ("config/port.rs", "fn row() -> sea_orm::Value { todo() }"),
        ("api/rest/sessions.rs", "let row = crate::store::metadata::open();"),
        ("api/rest/sessions.rs", "use super::super::super::store;"),
        ("store/metadata.rs", "use sessiond::auth::Auth;"),
        ("store/metadata.rs", "use crate::channel::log::LogChannels;"),
        ("store/channel/log/mod.rs", "use super::s2::S2Channels;"),
        ("auth/mod.rs", "use crate::api::ApiState;"),
        ("config/mod.rs", "use crate::telemetry::Metrics;"),
        ("api/rest/mod.rs", "use jsonwebtoken::Header;"),
        ("main.rs", "use sessiond::store::metadata;"),
        ("api/rest/sessions.rs", "let row = sessiond_store::metadata::open();"),
        ("listener/mod.rs", "use sessiond_domain::Error;"),
        ("cellar.rs", "// a room nobody decided on"),
    ] {
        assert!(!offences(&module_path(Path::new(file)), line).is_empty(), "{file}: {line}");
    }
}

#[test]
fn an_allowed_line_is_left_alone() {
    for (file, line) in [
        ("config/http.rs", "use crate::domain::error::Error; // never crate::api"),
        ("config/http.rs", "//! [`crate::api`] translates for us."),
        ("config/store/mod.rs", "use super::super::domain_like::x; use super::store;"),
        ("api/rest/sessions.rs", "use crate::{auth::Auth, domain::{Error, Sessions}, api::error};"),
        ("store/index/sql.rs", "use crate::metadata::SqlMetadata; use sessiond_domain::Error;"),
        ("store/channel/log/writer.rs", "use super::keys; use crate::channel::log::tail;"),
        ("main.rs", "match sessiond::cli::run(sessiond::cli::Cli::parse()) {}"),
    ] {
        assert_eq!(offences(&module_path(Path::new(file)), line), Vec::<String>::new(), "{file}: {line}");
    }
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// `store/channel/log/mod.rs` is `store::channel::log`, and `store/lib.rs` is `store`.
fn module_path(file: &Path) -> Vec<String> {
    let mut path: Vec<String> =
        file.with_extension("").iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if path.last().is_some_and(|last| last == "mod") || path == ["store", "lib"] {
        path.pop();
    }
    path
}

fn offences(module: &[String], text: &str) -> Vec<String> {
    let here = module.join("::");
    let room = module[0].as_str();
    let Some((_, allowed)) = MAY_NAME.iter().find(|(name, _)| *name == room) else {
        return vec![format!("{here}: the one-way rule does not know the room {room:?}")];
    };
    let code: String =
        text.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n");
    let mut found = BTreeSet::new();
    for path in named_paths(module, &code) {
        let other = path[0].as_str();
        let known = MAY_NAME.iter().any(|(name, _)| *name == other);
        if known && other != room && !allowed.contains(&other) {
            found.insert(format!("{here} names {}", path.join("::")));
        }
        if let (Some(ours), Some(theirs)) = (adapter(module), adapter(&path))
            && ours != theirs
            && !SHARED_ADAPTERS.contains(&(ours, theirs))
        {
            found.insert(format!("{here} names its sibling adapter {}", path.join("::")));
        }
    }
    for (name, rooms) in CRATE_ROOMS {
        if !rooms.contains(&room) && !["server", "lib"].contains(&room) && words(&code, name).next().is_some()
        {
            found.insert(format!("{here} names the crate {name}"));
        }
    }
    found.into_iter().collect()
}

fn adapter(path: &[String]) -> Option<&'static str> {
    let inside = path.strip_prefix(&["store".to_owned()])?.join("::");
    let is = |name: &&str| inside == **name || inside.starts_with(&format!("{name}::"));
    ADAPTERS.iter().copied().find(|name| is(name))
}

/// Every path that the code spells from the root of the crate, or from a parent module.
fn named_paths(module: &[String], code: &str) -> Vec<Vec<String>> {
    let mut paths = Vec::new();
    // The root of the crate of the stores is their room.
    let own: &[String] = if module[0] == "store" { &module[..1] } else { &[] };
    words(code, "crate").for_each(|rest| expand(own, rest, &mut paths));
    words(code, "sessiond").for_each(|rest| expand(&[], rest, &mut paths));
    for mut rest in words(code, "super") {
        let mut depth = 1;
        while let Some(further) = rest.strip_prefix("super::") {
            (rest, depth) = (further, depth + 1);
        }
        // Inline test modules are one level deeper than their file, so a chain may reach above the root.
        let base = &module[..module.len().saturating_sub(depth)];
        expand(base, rest, &mut paths);
    }
    paths
}

/// What follows each `name::` in the code that is not the tail of a longer word or path.
fn words<'a>(code: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    let needle = format!("{name}::");
    code.match_indices(&needle)
        .filter(|(at, _)| !code[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':'))
        .map(|(at, found)| &code[at + found.len()..])
        .collect::<Vec<_>>()
        .into_iter()
}

/// Reads `a::b`, or each branch of `{a::b, c}`, below `base`.
fn expand(base: &[String], rest: &str, paths: &mut Vec<Vec<String>>) {
    let rest = rest.trim_start();
    if let Some(group) = rest.strip_prefix('{') {
        let mut depth = 0usize;
        let mut start = 0;
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth > 0 => depth -= 1,
                '}' => return expand(base, &group[start..at], paths),
                ',' if depth == 0 => {
                    expand(base, &group[start..at], paths);
                    start = at + 1;
                }
                _ => {}
            }
        }
        return;
    }
    let word: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    if word.is_empty() {
        return;
    }
    let path = [base, std::slice::from_ref(&word)].concat();
    match rest[word.len()..].strip_prefix("::") {
        Some(further) if further.starts_with(|c: char| c.is_alphabetic() || c == '_' || c == '{') => {
            expand(&path, further, paths);
        }
        _ => paths.push(path),
    }
}
