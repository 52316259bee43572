//! A server that speaks S3 over a folder, whose subfolders are its buckets.

use std::path::PathBuf;

use anyhow::anyhow;
use clap::Parser;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use s3s_fs::FileSystem;
use tokio::net::TcpListener;
use tracing_subscriber::EnvFilter;

/// Where to listen, and who may come in.
#[derive(Debug, Parser)]
struct Args {
    /// The port on the loopback address
    #[arg(long)]
    port: u16,
    /// The only key id that may sign requests
    #[arg(long)]
    access_key: String,
    /// Its secret
    #[arg(long)]
    secret_key: String,
    /// The folder of the buckets
    root: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_env_filter(EnvFilter::from_default_env()).init();
    let args = Args::parse();
    let files = FileSystem::new(args.root).map_err(|error| anyhow!("cannot open the folder: {error:?}"))?;
    let mut service = S3ServiceBuilder::new(files);
    service.set_auth(SimpleAuth::from_single(args.access_key, args.secret_key));
    let service = service.build();
    let listener = TcpListener::bind(("127.0.0.1", args.port)).await?;
    loop {
        let (socket, _) = listener.accept().await?;
        let service = service.clone();
        tokio::spawn(async move {
            let server = auto::Builder::new(TokioExecutor::new());
            // A client that goes away is no news.
            let _ = server.serve_connection(TokioIo::new(socket), service).await;
        });
    }
}
