//! S2's open server, with the flags of its own binary. It takes no heed of tokens.

use anyhow::anyhow;
use clap::Parser;
use s2_lite::server::LiteArgs;
use tracing_subscriber::EnvFilter;

/// The flags of s2-lite.
#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    lite: LiteArgs,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_env_filter(EnvFilter::from_default_env()).init();
    // An error means that one is installed, which will do.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    s2_lite::server::run(Args::parse().lite).await.map_err(|error| anyhow!("{error:#}"))
}
