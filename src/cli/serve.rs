//! `sessiond serve`.

use std::io::Write;
use std::sync::Arc;

use clap::Args;
use secrecy::ExposeSecret;

use super::Common;
use crate::domain::SystemClock;
use crate::server::{RootKey, Server, prepare_process};
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
    config.tell_without_effect();
    prepare_process()?;
    let [stop, hurry] = shutdown::signalled()?;
    let data = config.data.display().to_string();
    let server = Server::start(config, Arc::new(SystemClock)).await?;
    let key = KeyText::new(server.root_key(), &common.invocation());
    let banner = banner(&server.base_url()?, &key, &data);
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(banner.as_bytes())?;
    stdout.flush()?;
    drop(stdout);
    server.run(stop, hurry).await
}

/// What the banner says of the root key. The secret itself is in it only if this start has made it.
struct KeyText {
    /// The key, or where it is.
    line: String,
    /// What sets `KEY` for the examples.
    set: String,
    /// The bearer of the examples.
    bearer: String,
}

impl KeyText {
    fn new(key: &RootKey, invocation: &str) -> Self {
        let (line, set) = match key {
            RootKey::Made(key) => {
                let secret = key.secret.expose_secret();
                let line = format!(
                    "{secret}\n              shown only now; `{invocation} keys show {}` shows it again",
                    key.key.id
                );
                return Self { line, set: String::new(), bearer: secret.to_owned() };
            }
            RootKey::Stored(key) if !key.given => {
                let show = format!("{invocation} keys show {}", key.id);
                (format!("shown by `{show}`"), format!("KEY=$({show})"))
            }
            RootKey::Stored(key) | RootKey::Given(key) => (
                format!("as given in SESSIOND_SECRET_KEY (secret_key); its id is {}", key.id),
                "KEY=$SESSIOND_SECRET_KEY".to_owned(),
            ),
        };
        Self { line, set: format!("  {set}\n"), bearer: "$KEY".to_owned() }
    }
}

fn banner(url: &str, key: &KeyText, data: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let KeyText { line, set, bearer } = key;
    format!(
        r#"sessiond {version} is ready

  base URL    {url}
  secret key  {line}
  playground  {url}/playground
  data        {data}

Create a session, send to it, follow it:

{set}  curl -s {url}/api/v1/sessions -H "Authorization: Bearer {bearer}" -H "Content-Type: application/json" -d '{{"type":"chat","externalId":"hello","taskIdentifier":"demo"}}'
  curl -s {url}/realtime/v1/sessions/hello/in/append -H "Authorization: Bearer {bearer}" -d '{{"text":"hi"}}'
  curl -sN {url}/realtime/v1/sessions/hello/in -H "Authorization: Bearer {bearer}"

"#
    )
}
