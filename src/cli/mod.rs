//! The command line: the server, the operator's commands, and two small clients of a running server.

mod client;
mod control;
mod index;
mod output;
mod replicate;
mod serve;

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, Parser, Subcommand};

use crate::config::{Config, Overrides};
use crate::domain::SystemClock;
use crate::server::{Control, keep_private};

/// Durable two-way sessions for agents and their users.
///
/// Without a command it serves: everything embedded, one folder, one port.
#[derive(Debug, Parser)]
#[command(name = "sessiond", version, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Option<Command>,
}

/// Flags that every command takes.
#[derive(Clone, Debug, Args)]
struct Common {
    /// A TOML file with settings; `sessiond config` shows them all
    #[arg(long, global = true, env = "SESSIOND_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder of the embedded stores [default: ./data]
    #[arg(long, global = true, value_name = "DIR")]
    data: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start the server
    Serve(serve::ServeArgs),
    /// Bring the metadata store's schema up to date
    Migrate(output::OutputArgs),
    /// List or create environments (tenants)
    #[command(subcommand)]
    Environments(control::EnvironmentsCommand),
    /// List, show, create, rotate or revoke secret keys
    #[command(subcommand)]
    Keys(control::KeysCommand),
    /// Copy sessions to where lists come from
    #[command(subcommand)]
    Index(index::IndexCommand),
    /// Keep ClickHouse up to date from Postgres, without a server beside
    Replicate(replicate::ReplicateArgs),
    /// Mint a public token for a browser
    Token(control::TokenArgs),
    /// Show the settings in force, secrets masked
    Config(output::OutputArgs),
    /// Print the GraphQL schema
    Schema,
    /// Follow a channel of a running server
    Tail(client::TailArgs),
    /// Append to a channel of a running server
    Send(client::SendArgs),
}

impl Common {
    fn load(&self, listen: Option<String>) -> anyhow::Result<Config> {
        let overrides = Overrides { file: self.config.clone(), data: self.data.clone(), listen };
        Ok(Config::load(&overrides)?)
    }

    /// The control plane of a store that is there.
    async fn control(&self) -> anyhow::Result<Control> {
        Control::open_existing(&self.load(None)?, Arc::new(SystemClock)).await
    }

    /// The control plane, made where there is none.
    async fn new_control(&self) -> anyhow::Result<Control> {
        Control::open(&self.load(None)?, Arc::new(SystemClock)).await
    }

    /// How this binary was called, up to the command, for a hint that can be pasted into the same shell.
    fn invocation(&self) -> String {
        let binary = std::env::args_os().next().unwrap_or_else(|| env!("CARGO_PKG_NAME").into());
        let mut words = vec![binary.to_string_lossy().into_owned()];
        for (flag, value) in [("--config", &self.config), ("--data", &self.data)] {
            if let Some(value) = value {
                words.extend([flag.to_owned(), value.display().to_string()]);
            }
        }
        words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
    }
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Runs one command to its end.
///
/// # Errors
/// Whatever a person at the terminal should read.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    keep_private();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(dispatch(cli))
}

async fn dispatch(cli: Cli) -> anyhow::Result<()> {
    let Cli { common, command } = cli;
    match command.unwrap_or_else(|| Command::Serve(serve::ServeArgs::default())) {
        Command::Serve(args) => serve::serve(&common, args).await,
        Command::Migrate(output) => control::migrate(&common, output).await,
        Command::Environments(command) => control::environments(&common, command).await,
        Command::Keys(command) => control::keys(&common, command).await,
        Command::Index(command) => index::run(&common, command).await,
        Command::Replicate(args) => replicate::replicate(&common, args).await,
        Command::Token(args) => control::token(&common, args).await,
        Command::Config(output) => control::config(&common, output),
        Command::Schema => {
            print!("{}", crate::api::graphql::sdl());
            Ok(())
        }
        Command::Tail(args) => client::tail(&common, args).await,
        Command::Send(args) => client::send(&common, args).await,
    }
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn a_word_is_quoted_only_where_a_shell_would_read_more_into_it() {
        for (word, text) in [
            ("./target/debug/sessiond", "./target/debug/sessiond"),
            ("", "''"),
            ("my data", "'my data'"),
            ("it's $HOME", r"'it'\''s $HOME'"),
        ] {
            assert_eq!(quoted(word), text);
        }
    }
}
