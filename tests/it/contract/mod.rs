//! One suite per port, run unchanged on every adapter.

mod blobs;
mod channels;
mod list;
mod metadata;
mod waitpoints;

/// Every adapter in `store/`, and the names under which the suites open it: one for each backend that it speaks to.
const ADAPTERS: &[(&str, &str, &[&str])] = &[
    ("MetadataStore", "SqlMetadata", &["sqlite", "postgres"]),
    ("Waitpoints", "SqlMetadata", &["sqlite", "postgres"]),
    ("ListIndex", "SqlIndex", &["sqlite", "postgres"]),
    ("ListIndex", "ClickHouseIndex", &["clickhouse"]),
    ("ListIndex", "FallbackIndex", &["fallback"]),
    ("ChannelStore", "LogChannels", &["log"]),
    ("ChannelStore", "S2Channels", &["s2"]),
    ("Blobs", "ObjectBlobs", &["folder", "s3"]),
];

/// The names under which the suite of a port must open its adapters, in their order.
fn names_of(port: &str) -> Vec<&'static str> {
    ADAPTERS.iter().filter(|(of, ..)| *of == port).flat_map(|(.., names)| *names).copied().collect()
}

#[test]
fn every_adapter_is_held_to_a_contract() {
    fn collect(folder: &std::path::Path, found: &mut Vec<(String, String)>) {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                collect(&path, found);
                continue;
            }
            for line in std::fs::read_to_string(&path).expect("text").lines() {
                let implemented = line.strip_prefix("impl ").and_then(|rest| rest.split_once(" for "));
                let Some((port, adapter)) = implemented else { continue };
                if ADAPTERS.iter().any(|(known, ..)| *known == port) {
                    found.push((port.to_owned(), adapter.trim_end_matches([' ', '{', '}']).to_owned()));
                }
            }
        }
    }
    let mut found = Vec::new();
    collect(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("store/src"), &mut found);
    found.sort();
    let mut known: Vec<_> =
        ADAPTERS.iter().map(|(port, adapter, _)| ((*port).to_owned(), (*adapter).to_owned())).collect();
    known.sort();
    assert_eq!(found, known, "an adapter without a contract, or a contract without an adapter");
}

/// Runs every case on every adapter, each as a test of its own (`<adapter>::<case>`), and prints the product.
///
/// `$open` is an async function that gives a fresh, empty adapter; a case is an async function that takes it.
macro_rules! suite {
    ($port:literal: $adapters:tt, $cases:tt) => {
        $crate::contract::suite!(@each $adapters, $cases);

        #[test]
        fn every_adapter_runs_every_case() {
            let (cases, names) = ($crate::contract::suite!(@names $cases), $crate::contract::suite!(@names $adapters));
            assert_eq!(&names[..], $crate::contract::names_of($port));
            let (cases, adapters) = (cases.len(), names.len());
            // Past the runner's capture, which would swallow what a passing test prints.
            let line = format!("contract of {}: {cases} cases x {adapters} adapters\n", $port);
            std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).expect("printed");
        }
    };
    (@each [$($adapter:ident = $open:path),+ $(,)?], $cases:tt) => {
        $($crate::contract::suite!(@adapter $adapter, $open, $cases);)+
    };
    (@adapter $adapter:ident, $open:path, [$($case:ident),+ $(,)?]) => {
        mod $adapter {
            use super::*;

            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                super::$case($open().await).await;
            })+
        }
    };
    (@names [$($name:ident $(= $open:path)?),+ $(,)?]) => { [$(stringify!($name)),+] };
}
pub(crate) use suite;
