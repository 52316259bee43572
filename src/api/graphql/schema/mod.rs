//! The schema: resolvers that translate arguments in, call one use case and translate its result out.

mod channel;
mod global_id;
mod input;
mod mutation;
mod page;
mod query;
mod record;
mod run;
mod scalar;
mod session;
mod subscription;
mod user_error;
mod waitpoint;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_graphql::dataloader::{DataLoader, Loader};
use async_graphql::runtime::{Timer, TokioSpawner};
use async_graphql::{Context, Interface, SDLExportOptions};

use super::cost::CostLimit;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use crate::api::App;
use crate::config::GraphqlConfig;
use crate::domain::session::SharedSession;
use crate::domain::{Caller, ConsistencyToken, Error, SessionId};
pub(super) use channel::{ChannelClosed, ChannelEvent};
pub(super) use global_id::GlobalId;
pub(super) use record::RecordNode;
pub(super) use scalar::{Cursor, DateTime};
pub(super) use session::SessionStatus;

use channel::ChannelNode;
use session::SessionNode;
use waitpoint::WaitpointNode;

/// Everything that can be asked.
pub(super) type Schema = async_graphql::Schema<query::Query, mutation::Mutation, subscription::Subscription>;

/// Anything with an id of its own, so that a client can load it again. An `id` is opaque and means one thing for
/// ever.
#[derive(Interface)]
#[graphql(field(name = "id", ty = "async_graphql::ID", desc = "Opaque; for `node` and `nodes`."))]
pub(super) enum Node {
    Session(SessionNode),
    Channel(ChannelNode),
    Record(RecordNode),
    Waitpoint(WaitpointNode),
}

/// The schema with its limits.
pub(super) fn build(config: &GraphqlConfig) -> Schema {
    let builder = Schema::build(query::Query, mutation::Mutation, subscription::Subscription)
        .extension(CostLimit)
        .limit_recursive_depth(64);
    if config.introspection {
        builder.finish()
    } else {
        builder.disable_introspection().disable_suggestions().finish()
    }
}

/// The schema as text: what `schema.graphql` holds.
pub fn sdl() -> String {
    let schema = Schema::new(query::Query, mutation::Mutation, subscription::Subscription);
    let options = SDLExportOptions::new().include_specified_by().prefer_single_line_descriptions();
    schema.sdl_with_options(options.use_space_ident().indent_width(2))
}

/// Ends a subscription because the server stops.
#[derive(Debug)]
pub(super) struct Stopping;

impl fmt::Display for Stopping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the server is stopping")
    }
}

/// Loads the sessions that one request names one by one, all at once.
pub(super) struct SessionLoader {
    app: App,
    caller: Arc<Caller>,
}

/// The loader of one request.
pub(super) fn session_loader(app: &App, caller: &Arc<Caller>) -> DataLoader<SessionLoader> {
    let loader = SessionLoader { app: app.clone(), caller: caller.clone() };
    DataLoader::new(loader, TokioSpawner::current(), NextTurn)
}

/// Collects what is asked for until everybody who is ready has asked; waiting any longer gains nothing.
struct NextTurn;

impl Timer for NextTurn {
    fn delay(&self, _: Duration) -> BoxFuture<'static, ()> {
        tokio::task::yield_now().boxed()
    }
}

impl Loader<SessionId> for SessionLoader {
    type Value = SharedSession;
    type Error = Arc<Error>;

    async fn load(&self, ids: &[SessionId]) -> Result<HashMap<SessionId, SharedSession>, Arc<Error>> {
        let found = self.app.sessions.get_many(&self.caller, ids).await.map_err(Arc::new)?;
        Ok(ids.iter().cloned().zip(found).filter_map(|(id, session)| Some((id, session?))).collect())
    }
}

fn app<'a>(ctx: &Context<'a>) -> &'a App {
    ctx.data_unchecked()
}

/// Who asks. Only introspection gets this far without a caller, and it has no resolvers.
fn caller<'a>(ctx: &Context<'a>) -> Result<&'a Arc<Caller>, Error> {
    ctx.data_opt().ok_or(Error::Unauthenticated("Invalid or Missing API key"))
}

/// What lists must show.
fn token(ctx: &Context<'_>) -> Option<ConsistencyToken> {
    ctx.data_opt().copied()
}

/// The session with this id, if there is one that the caller may see.
async fn load_session(ctx: &Context<'_>, id: SessionId) -> async_graphql::Result<Option<SharedSession>> {
    caller(ctx)?;
    let loader: &DataLoader<SessionLoader> = ctx.data_unchecked();
    loader.load_one(id).await.map_err(|error| async_graphql::Error {
        message: error.to_string(),
        source: Some(error),
        extensions: None,
    })
}
