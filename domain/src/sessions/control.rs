//! The control plane: sessions themselves, their lists, and their changes.

use std::future::Future;
use std::sync::Arc;

use futures_util::FutureExt;
use tracing::instrument;

use super::{CreateSession, Created, Sessions, detached};
use crate::access::{Action, Caller, Resource, Verdict};
use crate::close::Close;
use crate::error::{Error, Result};
use crate::id::{RunId, SessionId, SessionRef};
use crate::lifeline::{Cut, Lifeline};
use crate::list::{Filter, Page, PageRequest, TagQuery};
use crate::session::{Closure, Session, SessionPatch, SharedSession, check_reason};
use crate::watch::{self, Watch};

impl Sessions {
    /// Creates a session, or finds the one with the same external id. A found one gets the new trigger config
    /// and nothing else.
    ///
    /// # Errors
    /// [`Error::Denied`] also if the session found is out of the caller's reach; [`Error::Conflict`] if it is
    /// closed or expired; [`Error::Invalid`].
    #[instrument(skip_all, name = "create")]
    pub async fn create(self: &Arc<Self>, caller: &Caller, create: CreateSession) -> Result<Created> {
        let task = create.session.task_identifier.clone();
        caller.require_any(Action::Write, &[Resource::Task(&task), Resource::Sessions])?;
        let now = self.clock.now();
        let trigger_config = create.session.trigger_config.clone();
        let session = create.session.into_session(caller.environment.clone(), now)?;
        let this = self.clone();
        let insert = async move {
            let inserted = this.store.create_session(session, create.request_key.as_deref()).await?;
            if inserted.created {
                this.rows.changed(&[&inserted.session]);
            } else {
                this.rows.found(&inserted.session);
            }
            Ok(inserted)
        };
        let inserted = detached(insert).await?;
        if inserted.created {
            return Ok(Created { session: inserted.session, is_cached: false });
        }
        let found = inserted.session;
        let external = found.external_id.as_ref().map_or(found.id.as_str(), |id| id.as_str());
        caller.require_any(
            Action::Write,
            &[
                Resource::Task(&found.task_identifier),
                Resource::Sessions,
                Resource::Session(external),
                Resource::Session(found.id.as_str()),
            ],
        )?;
        found.require_active(now).map_err(|error| match error {
            Error::Closed { .. } => reuse_conflict("closed"),
            Error::Expired { .. } => reuse_conflict("expired"),
            other => other,
        })?;
        let session = match trigger_config {
            Some(config) if found.trigger_config.as_ref() != Some(&config) => {
                let patch = SessionPatch { trigger_config: Some(config), ..SessionPatch::default() };
                self.apply(&found, patch).await?
            }
            _ => found,
        };
        Ok(Created { session, is_cached: true })
    }

    /// The session at an address.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::NotFound`].
    #[instrument(skip_all, name = "get", fields(session.id = %address))]
    pub async fn get(&self, caller: &Caller, address: &SessionRef) -> Result<SharedSession> {
        self.find(caller, address).await?.ok_or(Error::NotFound("session"))
    }

    /// The session at an address; `None` when there is none.
    ///
    /// # Errors
    /// [`Error::Denied`].
    #[instrument(skip_all, name = "get", fields(session.id = %address))]
    pub async fn find(&self, caller: &Caller, address: &SessionRef) -> Result<Option<SharedSession>> {
        self.present(caller, Action::Read, address).await
    }

    /// The sessions with these ids, in the same order; `None` for one that does not exist or that the caller may not
    /// see. At most one query.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    #[instrument(skip_all, name = "get_many")]
    pub async fn get_many(&self, caller: &Caller, ids: &[SessionId]) -> Result<Vec<Option<SharedSession>>> {
        let address = |id: &SessionId| SessionRef::Id(id.clone());
        let asked = ids.iter().filter(|id| caller.judge(Action::Read, &address(id)) != Verdict::Denied);
        let found = self.rows.find_many(&caller.environment, asked).await?;
        let may_see = |session: &&SharedSession| {
            Self::judged(caller, Action::Read, &address(&session.id), Some(session)).is_ok()
        };
        Ok(ids.iter().map(|id| found.get(id).filter(may_see).cloned()).collect())
    }

    /// A session as it changes; an external id that no session has yet is waited for.
    ///
    /// # Errors
    /// As [`Sessions::bounds`].
    #[instrument(skip_all, name = "watch", fields(session.id = %address))]
    pub async fn watch(self: &Arc<Self>, caller: &Caller, address: &SessionRef) -> Result<Watch> {
        // First, so that no change falls between the look at the row and the feed.
        let changes = self.rows.changes();
        let session = self.row_optional(caller, address).await?;
        let (this, environment, address) = (self.clone(), caller.environment.clone(), address.clone());
        let rereader = self.clone();
        let arrival = async move {
            match (session, address) {
                (Some(session), _) => Ok(session),
                (None, SessionRef::External(external)) => this.rows.wait_for(&environment, &external).await,
                (None, SessionRef::Id(_)) => Err(Error::NotFound("session")),
            }
        };
        let environment = caller.environment.clone();
        let reread = move |id: SessionId| {
            let (this, environment) = (rereader.clone(), environment.clone());
            async move { this.rows.current(&environment, &SessionRef::Id(id)).await }.boxed()
        };
        let scope = watch::Scope::One { arrival: Some(arrival.boxed()), reread: Arc::new(reread) };
        Ok(Watch::new(changes, Lifeline::new(Some(caller), self.bounds.clone()), scope))
    }

    /// Every session that is created or changed from now on and matches `filter` then. That a session expires is no
    /// change, and neither is that it matches no longer.
    ///
    /// # Errors
    /// As [`Sessions::list`].
    pub fn watch_list(&self, caller: &Caller, filter: Filter) -> Result<Watch> {
        let filter = may_list(caller, filter)?;
        let scope = watch::Scope::List { environment: caller.environment.clone(), filter };
        Ok(Watch::new(self.rows.changes(), Lifeline::new(Some(caller), self.bounds.clone()), scope))
    }

    /// Completes when the credentials of a caller end, or the server stops; without a caller only then.
    pub fn until_cut(&self, caller: Option<&Caller>) -> impl Future<Output = Cut> + Send + use<> {
        Lifeline::new(caller, self.bounds.clone()).ended()
    }

    /// Changes a session. Allowed on closed and expired ones.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::NotFound`], [`Error::Conflict`] for an external id that is taken.
    #[instrument(skip_all, name = "update", fields(session.id = %address))]
    pub async fn update(
        self: &Arc<Self>,
        caller: &Caller,
        address: &SessionRef,
        patch: SessionPatch,
    ) -> Result<Session> {
        let session = self.require(caller, Action::Admin, address).await?;
        self.apply(&session, patch).await
    }

    /// Closes a session for ever. Of several closes the first wins, and every one answers its row. The main channels end
    /// with a record each that says so; none is added to `.out` for a close by the session's current run, which has
    /// written its own.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::NotFound`], [`Error::Invalid`] for a reason that is too long.
    #[instrument(skip_all, name = "close", fields(session.id = %address))]
    pub async fn close(
        self: &Arc<Self>,
        caller: &Caller,
        address: &SessionRef,
        reason: Option<String>,
        calling_run: Option<&RunId>,
    ) -> Result<Session> {
        check_reason(reason.as_deref())?;
        let session = self.require(caller, Action::Admin, address).await?;
        if session.closed.is_some() {
            return Ok(Session::clone(&session));
        }
        let told = calling_run == Some(&session.current_run_id);
        let this = self.clone();
        detached(async move {
            let closure = Closure { at: this.clock.now(), reason };
            let closure = this.channels.seal(&session.id, Close { closure, told }).await?;
            this.complete_close(&session, &closure).await
        })
        .await
    }

    /// A page of sessions.
    ///
    /// # Errors
    /// [`Error::Denied`]; [`Error::Invalid`] for a filter that is too large.
    #[instrument(skip_all, name = "list")]
    pub async fn list(&self, caller: &Caller, filter: Filter, page: &PageRequest) -> Result<Page> {
        let filter = may_list(caller, filter)?;
        self.index.list(&caller.environment, &filter, page, self.clock.now()).await
    }

    /// How many sessions match.
    ///
    /// # Errors
    /// As [`Sessions::list`].
    #[instrument(skip_all, name = "count")]
    pub async fn count(&self, caller: &Caller, filter: Filter) -> Result<u64> {
        let filter = may_list(caller, filter)?;
        self.index.count(&caller.environment, &filter, self.clock.now()).await
    }

    /// The tags in use.
    ///
    /// # Errors
    /// [`Error::Denied`].
    #[instrument(skip_all, name = "tags")]
    pub async fn tags(&self, caller: &Caller, query: &TagQuery) -> Result<Vec<String>> {
        caller.require_any(Action::Read, &[Resource::Sessions, Resource::Tasks])?;
        self.index.tags(&caller.environment, query).await
    }

    async fn apply(self: &Arc<Self>, session: &Session, patch: SessionPatch) -> Result<Session> {
        let (this, session) = (self.clone(), session.clone());
        detached(async move {
            let now = this.clock.now();
            let updated = this.store.update_session(&session.environment, &session.id, patch, now).await?;
            let updated = updated.ok_or(Error::NotFound("session"))?;
            this.rows.changed(&[&session, &updated]);
            Ok(updated)
        })
        .await
    }
}

/// What the create of a closed or expired session answers.
fn reuse_conflict(state: &str) -> Error {
    Error::Conflict(format!("Session is {state}; use a different externalId to create a new session"))
}

fn may_list(caller: &Caller, filter: Filter) -> Result<Filter> {
    let collections = [Resource::Sessions, Resource::Tasks];
    let tasks = &filter.task_identifiers;
    let by_task =
        !tasks.is_empty() && tasks.iter().all(|task| caller.may(Action::Read, Resource::Task(task)));
    if !by_task {
        caller.require_any(Action::Read, &collections)?;
    }
    filter.checked()
}
