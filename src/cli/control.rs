//! The operator's commands: schema, environments, keys, tokens, settings. They work on the store itself, with or
//! without a running server, which notices a changed key within a second.

use std::time::Duration;

use anyhow::Context;
use clap::{Args, Subcommand};
use secrecy::ExposeSecret;
use serde_json::{Value, json};

use super::Common;
use super::output::{OutputArgs, table};
use crate::auth::Auth;
use crate::auth::keys::{NewEnvironment, RevealedKey};
use crate::domain::tenant::{Environment, EnvironmentKind, StoredKey};
use crate::domain::timer::Timers;
use crate::domain::{KeyId, MetadataStore, Scopes, Timestamp};
use crate::server::Control;

/// `sessiond environments ...`
#[derive(Debug, Subcommand)]
pub(super) enum EnvironmentsCommand {
    /// List environments, oldest first; the first one is the default of other commands
    List(OutputArgs),
    /// Create an environment with its first root key, and print the key
    Create {
        /// Slug of the environment: a-z, 0-9 and '-'
        slug: String,
        /// Slug of the organization
        #[arg(long, default_value = "default")]
        organization: String,
        /// Slug of the project
        #[arg(long, default_value = "default")]
        project: String,
        /// dev, stg, preview or prod; the second part of its keys
        #[arg(long, default_value = "prod", value_parser = parse_kind)]
        kind: EnvironmentKind,
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// `sessiond keys ...`
#[derive(Debug, Subcommand)]
pub(super) enum KeysCommand {
    /// List keys, newest first; secrets are not shown
    List {
        #[command(flatten)]
        environment: EnvironmentArg,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Print the secret of a stored key; one that was given as SESSIOND_SECRET_KEY is not shown
    Show {
        /// Id of the key, as `keys list` shows it
        id: String,
        #[command(flatten)]
        environment: EnvironmentArg,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Create a root key, or with --scope one that may do only that, and print its secret
    Create {
        #[command(flatten)]
        environment: EnvironmentArg,
        /// A name to recognise it by
        #[arg(long, default_value = "")]
        label: String,
        /// What the key may do, such as write:sessions; repeat for more
        #[arg(long = "scope", value_name = "SCOPE")]
        scopes: Vec<String>,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Replace a key by a new one with the same rights, and print the new secret
    Rotate {
        /// Id of the key, as `keys list` shows it
        id: String,
        /// How long the old key works on, such as 24h
        #[arg(long, default_value = "24h", value_parser = parse_duration)]
        grace: Duration,
        #[command(flatten)]
        environment: EnvironmentArg,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// End a key now; every stream that stands on it is cut within a second
    Revoke {
        /// Id of the key, as `keys list` shows it
        id: String,
        #[command(flatten)]
        environment: EnvironmentArg,
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// Which environment.
#[derive(Debug, Args)]
pub(super) struct EnvironmentArg {
    /// Slug or id of the environment [default: the oldest one]
    #[arg(long, value_name = "SLUG|ID")]
    environment: Option<String>,
}

/// `sessiond token`
#[derive(Debug, Args)]
pub(super) struct TokenArgs {
    /// What the token may do, such as read:sessions:chat-1; repeat for more
    #[arg(long = "scope", value_name = "SCOPE", required = true)]
    scopes: Vec<String>,
    /// How long it is valid, such as 15m
    #[arg(long, default_value = "15m", value_parser = parse_duration)]
    ttl: Duration,
    #[command(flatten)]
    environment: EnvironmentArg,
    #[command(flatten)]
    output: OutputArgs,
}

fn parse_kind(text: &str) -> Result<EnvironmentKind, String> {
    EnvironmentKind::parse(text).ok_or_else(|| "must be dev, stg, preview or prod".to_owned())
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let span: jiff::SignedDuration = text.parse().map_err(|error: jiff::Error| error.to_string())?;
    Duration::try_from(span).map_err(|_| "must not be negative".to_owned())
}

impl EnvironmentArg {
    /// The default of every command.
    pub(super) const OLDEST: Self = Self { environment: None };

    pub(super) async fn find(&self, control: &Control) -> anyhow::Result<Environment> {
        let environments = control.store.environments().await?;
        let Some(name) = &self.environment else {
            return environments
                .into_iter()
                .next()
                .context("there is no environment yet: start the server once, or create one");
        };
        let mut found = environments.into_iter().filter(|one| one.slug == *name || one.id.as_str() == name);
        let environment = found.next().with_context(|| format!("there is no environment {name:?}"))?;
        anyhow::ensure!(found.next().is_none(), "several projects have an environment {name:?}: give its id");
        Ok(environment)
    }
}

pub(super) async fn migrate(common: &Common, output: OutputArgs) -> anyhow::Result<()> {
    let config = common.load(None)?;
    std::fs::create_dir_all(&config.data)?;
    let applied = crate::store::metadata::migrate(&config.metadata_url()).await?.applied;
    output.print(&json!({ "applied": applied }), || match applied.as_slice() {
        [] => "the schema is up to date".to_owned(),
        names => format!("applied {}", names.join(", ")),
    });
    Ok(())
}

pub(super) fn config(common: &Common, output: OutputArgs) -> anyhow::Result<()> {
    let config = common.load(None)?;
    let text = toml::to_string_pretty(&config)?;
    output.print(&serde_json::to_value(&config)?, || text);
    Ok(())
}

pub(super) async fn environments(common: &Common, command: EnvironmentsCommand) -> anyhow::Result<()> {
    match command {
        EnvironmentsCommand::List(output) => {
            let control = common.control().await?;
            let environments = control.store.environments().await?;
            let json = environments.iter().map(environment_json).collect();
            output.print(&Value::Array(json), || {
                let row = |one: &Environment| {
                    let Environment { id, organization, project, slug, kind, .. } = one;
                    let names = [organization, project, slug].map(Clone::clone);
                    [vec![id.to_string()], names.to_vec(), vec![kind.as_str().to_owned()]].concat()
                };
                let rows: Vec<_> = environments.iter().map(row).collect();
                table(&["ID", "ORGANIZATION", "PROJECT", "SLUG", "KIND"], &rows)
            });
        }
        EnvironmentsCommand::Create { slug, organization, project, kind, output } => {
            let control = common.new_control().await?;
            let new = NewEnvironment { organization, project, slug, kind };
            let (environment, key) = control.keys().create_environment(new, None).await?;
            let mut json = environment_json(&environment);
            json["secretKey"] = key.secret.expose_secret().into();
            output.print(&json, || {
                format!("environment  {}\nsecret key   {}", environment.id, key.secret.expose_secret())
            });
        }
    }
    Ok(())
}

pub(super) async fn keys(common: &Common, command: KeysCommand) -> anyhow::Result<()> {
    let control = common.control().await?;
    let keys = control.keys();
    match command {
        KeysCommand::List { environment, output } => {
            let environment = environment.find(&control).await?;
            let keys = keys.list(&environment.id).await?;
            let now = control.clock.now();
            let json = keys.iter().map(|key| key_json(key, now)).collect();
            output.print(&Value::Array(json), || {
                let rows: Vec<_> = keys.iter().map(|key| key_row(key, now)).collect();
                table(&["ID", "LABEL", "SECRET", "SCOPES", "CREATED", "STATE"], &rows)
            });
        }
        KeysCommand::Show { id, environment, output } => {
            let environment = environment.find(&control).await?;
            let key = keys.find(&environment.id, &KeyId::from_stored(&id)).await?;
            let given = common.load(None)?.secret_key.is_some_and(|given| keys.is_secret_of(&key, &given));
            anyhow::ensure!(
                !given && !key.given,
                "{id} was given as SESSIOND_SECRET_KEY (secret_key): it is where you keep it, and is not shown here"
            );
            let key = keys.open(key)?;
            eprintln!("this secret opens all that its key may do: keep it out of logs, files and chats");
            let secret = key.secret.expose_secret();
            let mut json = key_json(&key.key, control.clock.now());
            json["secretKey"] = secret.into();
            output.print(&json, || secret.to_owned());
        }
        KeysCommand::Create { environment, label, scopes, output } => {
            let environment = environment.find(&control).await?;
            let scopes = (!scopes.is_empty()).then(|| Scopes::new(scopes));
            let key = keys.create(&environment, &label, scopes, None).await?;
            reveal(&key, output, control.clock.now());
        }
        KeysCommand::Rotate { id, grace, environment, output } => {
            let environment = environment.find(&control).await?;
            let key = keys.rotate(&environment, &KeyId::from_stored(&id), grace).await?;
            reveal(&key, output, control.clock.now());
        }
        KeysCommand::Revoke { id, environment, output } => {
            let environment = environment.find(&control).await?;
            let key = keys.revoke(&environment.id, &KeyId::from_stored(&id)).await?;
            output.print(&key_json(&key, control.clock.now()), || format!("revoked {id}"));
        }
    }
    Ok(())
}

pub(super) async fn token(common: &Common, args: TokenArgs) -> anyhow::Result<()> {
    let control = common.control().await?;
    let environment = args.environment.find(&control).await?;
    let root = root_of(&control, &environment).await?;
    let timers = Timers::new(control.clock.clone());
    let auth = Auth::new(control.store.clone(), control.vault.clone(), control.clock.clone(), timers);
    let caller = auth.authenticate(root.secret.expose_secret()).await?;
    let expires_at = control.clock.now().plus(args.ttl);
    let token = auth.mint(&caller, Scopes::new(args.scopes), expires_at).await?;
    let json = json!({ "token": token, "expiresAt": expires_at.to_string() });
    args.output.print(&json, || token.clone());
    Ok(())
}

/// The root key that signs for an environment.
pub(super) async fn root_of(control: &Control, environment: &Environment) -> anyhow::Result<RevealedKey> {
    let keys = control.keys();
    let root = keys.current_root(&environment.id).await?;
    Ok(keys.open(root.context("the environment has no root key: create one")?)?)
}

fn reveal(key: &RevealedKey, output: OutputArgs, now: Timestamp) {
    let secret = key.secret.expose_secret();
    let mut json = key_json(&key.key, now);
    json["secretKey"] = secret.into();
    output.print(&json, || format!("key         {}\nsecret key  {secret}", key.key.id));
}

fn environment_json(environment: &Environment) -> Value {
    json!({
        "id": environment.id.as_str(),
        "organization": environment.organization,
        "project": environment.project,
        "slug": environment.slug,
        "kind": environment.kind.as_str(),
        "createdAt": environment.created_at.to_string(),
    })
}

fn key_json(key: &StoredKey, now: Timestamp) -> Value {
    json!({
        "id": key.id.as_str(),
        "label": key.label,
        "hint": key.hint,
        "scopes": key.scopes.as_ref().map(Scopes::as_slice),
        "createdAt": key.created_at.to_string(),
        "endsAt": key.ends_at.map(|at| at.to_string()),
        "live": key.is_live(now),
    })
}

fn key_row(key: &StoredKey, now: Timestamp) -> Vec<String> {
    let state = match key.ends_at {
        None => "live".to_owned(),
        Some(at) if now < at => format!("live until {at}"),
        Some(at) => format!("ended {at}"),
    };
    let scopes = key.scopes.as_ref().map_or("everything".to_owned(), |scopes| scopes.as_slice().join(" "));
    vec![key.id.to_string(), key.label.clone(), key.hint.clone(), scopes, key.created_at.to_string(), state]
}
