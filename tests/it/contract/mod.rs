//! One suite per port, run unchanged on every adapter.

mod blobs;
mod channels;
mod list;
mod metadata;
mod replicated;
mod waitpoints;

/// Runs every case on every adapter, each as a test of its own (`<adapter>::<case>`), and prints the product.
///
/// `$open` is an async function that gives a fresh, empty adapter; a case is an async function that takes it.
macro_rules! suite {
    ($port:literal: $adapters:tt, $cases:tt) => {
        $crate::contract::suite!(@each $adapters, $cases);

        #[test]
        fn prints_cases_x_adapters() {
            let (cases, adapters) = ($crate::contract::suite!(@count $cases), $crate::contract::suite!(@count $adapters));
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
    (@count [$($name:ident $(= $open:path)?),+ $(,)?]) => { [$(stringify!($name)),+].len() };
}
pub(crate) use suite;
