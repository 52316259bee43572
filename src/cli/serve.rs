//! `sessiond serve`.

use std::io::Write;
use std::sync::Arc;

use clap::Args;
use secrecy::ExposeSecret;

use super::Common;
use crate::domain::SystemClock;
use crate::server::{Server, prepare_process};
use crate::shutdown;
use crate::telemetry;

/// Flags of `serve`.
#[derive(Debug, Default, Args)]
pub(super) struct ServeArgs {
    /// Address and port; port 0 takes a free one [default: 127.0.0.1:3030]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
}

pub(super) async fn serve(common: &Common, args: ServeArgs) -> anyhow::Result<()> {
    let config = common.load(args.listen)?;
    telemetry::start_logging(&config.telemetry)?;
    config.tell_ignored();
    prepare_process()?;
    let stop = shutdown::signalled()?;
    let data = config.data.display().to_string();
    let server = Server::start(config, Arc::new(SystemClock)).await?;
    let banner = banner(&server.base_url()?, server.secret_key().expose_secret(), &data);
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(banner.as_bytes())?;
    stdout.flush()?;
    drop(stdout);
    server.run(stop).await
}

fn banner(url: &str, key: &str, data: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    format!(
        r#"sessiond {version} is ready

  base URL    {url}
  secret key  {key}
  playground  {url}/playground
  data        {data}

Create a session, send to it, follow it:

  curl -s {url}/api/v1/sessions -H "Authorization: Bearer {key}" -H "Content-Type: application/json" -d '{{"type":"chat","externalId":"hello","taskIdentifier":"demo"}}'
  curl -s {url}/realtime/v1/sessions/hello/in/append -H "Authorization: Bearer {key}" -d '{{"text":"hi"}}'
  curl -sN {url}/realtime/v1/sessions/hello/in -H "Authorization: Bearer {key}"

"#
    )
}
