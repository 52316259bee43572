//! What can be changed. One input, one payload; what the request's author can mend comes back in `userErrors`.

use std::sync::Arc;
use std::time::Duration;

use async_graphql::{
    ComplexObject, Context, InputObject, MaybeUndefined, Object, Result, SimpleObject, Value,
};
use serde_json::Map;
use serde_json::value::RawValue;

use super::channel::ChannelNode;
use super::input::{SessionBy, channel};
use super::record::{ChannelIo, PositionNode, RecordNode};
use super::run::{self, EndAndContinueSessionInput, EndAndContinueSessionPayload};
use super::scalar::{DateTime, Json, UInt64};
use super::session::SessionNode;
use super::user_error::{UserError, outcome};
use super::waitpoint::{
    self, CompleteWaitpointInput, CompleteWaitpointPayload, CreateWaitpointInput, CreateWaitpointPayload,
};
use super::{app, caller};
use crate::api::rest::trigger;
use crate::domain::access::UNAUTHORIZED;
use crate::domain::envelope::{Content, NewPayload};
use crate::domain::record::PART_ID_MAX;
use crate::domain::{Appended, CreateSession, Error, NewSession, Scopes, SessionPatch};

/// Most bytes that metadata and trigger config may be together, as over REST.
const DOCUMENT_MAX: usize = 32_768;
/// Longest idempotency key of a create, in bytes.
const KEY_MAX: usize = 256;
/// Validity of a public token in seconds, unless asked otherwise, and at most: 30 days.
const TOKEN_SECONDS: i32 = 900;
const TOKEN_SECONDS_MAX: i32 = 2_592_000;

/// A session to be created.
#[derive(Debug, InputObject)]
pub struct CreateSessionInput {
    /// Your own id, 1 to 256 characters, not starting with `session_`. Creating it again finds the same session.
    external_id: Option<String>,
    /// What kind of session; 1 to 64 characters.
    #[graphql(name = "type")]
    kind: String,
    /// Which task (agent) serves it; 1 to 128 characters.
    task_identifier: String,
    /// Labels to filter by: at most 10, of 1 to 128 characters.
    tags: Option<Vec<String>>,
    /// Free-form: an object. At most 32,768 bytes as JSON, together with `triggerConfig`.
    metadata: Option<Json>,
    /// How runs of the task are to be started: an object. Kept and given back; there is no run engine.
    trigger_config: Option<Json>,
    /// From when on the session takes no more records; in the future.
    expires_at: Option<DateTime>,
    /// Makes a retry find the first attempt's session when there is no `externalId`; 1 to 256 bytes.
    idempotency_key: Option<String>,
    /// Given back in the payload.
    client_mutation_id: Option<String>,
}

/// What `createSession` answers.
#[derive(Debug, SimpleObject)]
pub struct CreateSessionPayload {
    /// The new session, or the one found.
    session: Option<SessionNode>,
    /// False if the session was there before.
    created: bool,
    /// Reads and writes this session, for an hour at most: for a browser.
    public_access_token: Option<String>,
    /// What has to be mended; empty on success.
    user_errors: Vec<UserError>,
    /// As given.
    client_mutation_id: Option<String>,
}

/// A change of a session. A field that is absent stays as it is.
#[derive(Debug, InputObject)]
pub struct UpdateSessionInput {
    /// Which session.
    by: SessionBy,
    /// Replaces all tags: at most 10, of 1 to 128 characters.
    tags: Option<Vec<String>>,
    /// Replaces the metadata, an object of at most 32,768 bytes as JSON; null clears it.
    metadata: MaybeUndefined<Json>,
    /// Replaces the external id; null clears it.
    external_id: MaybeUndefined<String>,
    /// Given back in the payload.
    client_mutation_id: Option<String>,
}

/// What `updateSession` answers.
#[derive(Debug, SimpleObject)]
pub struct UpdateSessionPayload {
    /// The session as it now is.
    session: Option<SessionNode>,
    /// What has to be mended; empty on success.
    user_errors: Vec<UserError>,
    /// As given.
    client_mutation_id: Option<String>,
}

/// A close.
#[derive(Debug, InputObject)]
pub struct CloseSessionInput {
    /// Which session.
    by: SessionBy,
    /// Why; at most 256 characters. Of several closes the first one counts.
    reason: Option<String>,
    /// Given back in the payload.
    client_mutation_id: Option<String>,
}

/// What `closeSession` answers.
#[derive(Debug, SimpleObject)]
pub struct CloseSessionPayload {
    /// The closed session.
    session: Option<SessionNode>,
    /// What has to be mended; empty on success.
    user_errors: Vec<UserError>,
    /// As given.
    client_mutation_id: Option<String>,
}

/// A record to be appended: exactly one of `data` and `text`.
#[derive(Debug, InputObject)]
pub struct RecordInput {
    /// The payload as a JSON value.
    data: MaybeUndefined<Json>,
    /// The payload as text.
    text: Option<String>,
    /// Appending the same record again with the same key stores nothing and answers the first one's place. 1 to 256
    /// bytes, unique in the channel.
    idempotency_key: Option<String>,
}

/// Records to be appended as one unit.
#[derive(Debug, InputObject)]
pub struct AppendRecordsInput {
    /// Which session.
    by: SessionBy,
    /// Which direction.
    io: ChannelIo,
    /// Name of a side channel; the main channel without it.
    channel: Option<String>,
    /// 1 to 1000 records, at most 1 MiB together. All are stored, in this order and without others in between, or none.
    records: Vec<RecordInput>,
    /// Store them only if the next record's sequence number is this.
    expected_seq_num: Option<UInt64>,
    /// Given back in the payload.
    client_mutation_id: Option<String>,
}

/// What `appendRecords` answers. The records are durable.
#[derive(Debug, SimpleObject)]
#[graphql(complex)]
pub struct AppendRecordsPayload {
    #[graphql(skip)]
    appended: Option<Appended>,
    /// The channel.
    channel: Option<ChannelNode>,
    /// The channel's tail after them.
    tail: Option<PositionNode>,
    /// True if every idempotency key was known, so that nothing was stored again.
    repeated: bool,
    /// What has to be mended; empty on success.
    user_errors: Vec<UserError>,
    /// As given.
    client_mutation_id: Option<String>,
}

#[ComplexObject]
impl AppendRecordsPayload {
    /// The records with their places, in the order in which they were given.
    async fn records(&self, ctx: &Context<'_>) -> Result<Vec<RecordNode>> {
        let (Some(appended), Some(channel)) = (&self.appended, &self.channel) else { return Ok(Vec::new()) };
        let records = app(ctx).sessions.appended(appended).await?;
        Ok(records.into_iter().map(|record| RecordNode { channel: channel.key.clone(), record }).collect())
    }
}

/// A trim.
#[derive(Debug, InputObject)]
pub struct TrimChannelInput {
    /// Which session.
    by: SessionBy,
    /// Which direction.
    io: ChannelIo,
    /// Name of a side channel; the main channel without it.
    channel: Option<String>,
    /// Forget every record below this sequence number; at most the tail's.
    before: UInt64,
    /// Given back in the payload.
    client_mutation_id: Option<String>,
}

/// What `trimChannel` answers.
#[derive(Debug, SimpleObject)]
pub struct TrimChannelPayload {
    /// The channel as it now is.
    channel: Option<ChannelNode>,
    /// What has to be mended; empty on success.
    user_errors: Vec<UserError>,
    /// As given.
    client_mutation_id: Option<String>,
}

/// A token for a browser.
#[derive(Debug, InputObject)]
pub struct CreatePublicTokenInput {
    /// What the token may do, such as `read:sessions:chat-1`: at least one, and nothing that you may not do yourself.
    scopes: Vec<String>,
    /// Validity in seconds: 1 to 2,592,000 (30 days), 900 by default. Never longer than your own credentials.
    #[graphql(default_with = "Some(TOKEN_SECONDS)")]
    expires_in: Option<i32>,
    /// Given back in the payload.
    client_mutation_id: Option<String>,
}

/// What `createPublicToken` answers.
#[derive(Debug, SimpleObject)]
pub struct CreatePublicTokenPayload {
    /// The token.
    token: Option<String>,
    /// When it ends.
    expires_at: Option<DateTime>,
    /// What has to be mended; empty on success.
    user_errors: Vec<UserError>,
    /// As given.
    client_mutation_id: Option<String>,
}

/// The root of all mutations.
pub struct Mutation;

/// The root of all mutations.
#[Object]
impl Mutation {
    /// Creates a session, or finds the one that has the same `externalId`.
    async fn create_session(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "The session.")] input: CreateSessionInput,
    ) -> Result<CreateSessionPayload> {
        let (app, caller) = (app(ctx), caller(ctx)?);
        let client_mutation_id = input.client_mutation_id.clone();
        let create = async { app.sessions.create(caller, input.read()?).await };
        let (created, user_errors) = settled(outcome(create.await)?);
        let token = match &created {
            Some(created) => Some(app.auth.session_token(caller, &created.session).await?),
            None => None,
        };
        Ok(CreateSessionPayload {
            created: created.as_ref().is_some_and(|created| !created.is_cached),
            session: created.map(|created| SessionNode(Arc::new(created.session))),
            public_access_token: token,
            user_errors,
            client_mutation_id,
        })
    }

    /// Changes a session; allowed on closed and expired ones too.
    async fn update_session(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "The change.")] input: UpdateSessionInput,
    ) -> Result<UpdateSessionPayload> {
        let UpdateSessionInput { by, tags, metadata, external_id, client_mutation_id } = input;
        let change = async {
            let metadata = match metadata {
                MaybeUndefined::Undefined => None,
                MaybeUndefined::Null => Some(None),
                MaybeUndefined::Value(json) => Some(Some(object("metadata", json)?)),
            };
            check_size(metadata.as_ref().and_then(Option::as_ref), None)?;
            let patch = SessionPatch::new(tags, metadata, external_id.as_opt_ref().map(|id| id.cloned()))?;
            app(ctx).sessions.update(caller(ctx)?, &by.address()?, patch).await
        };
        let (session, user_errors) = settled(outcome(change.await)?);
        let session = session.map(|session| SessionNode(Arc::new(session)));
        Ok(UpdateSessionPayload { session, user_errors, client_mutation_id })
    }

    /// Closes a session for ever: nothing can be appended to any of its channels afterwards, and followers end once
    /// they have everything; the last record of `in` and of `out` tells of it. Closing it again answers the first close.
    async fn close_session(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "The close.")] input: CloseSessionInput,
    ) -> Result<CloseSessionPayload> {
        let CloseSessionInput { by, reason, client_mutation_id } = input;
        let close = async { app(ctx).sessions.close(caller(ctx)?, &by.address()?, reason, None).await };
        let (session, user_errors) = settled(outcome(close.await)?);
        let session = session.map(|session| SessionNode(Arc::new(session)));
        Ok(CloseSessionPayload { session, user_errors, client_mutation_id })
    }

    /// Appends records as one unit. The answer means that they are durable.
    #[graphql(complexity = "child_complexity + 1")]
    async fn append_records(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "The records.")] input: AppendRecordsInput,
    ) -> Result<AppendRecordsPayload> {
        let AppendRecordsInput { by, io, channel: name, records, expected_seq_num, client_mutation_id } =
            input;
        let append = async {
            let address = channel(io, name.as_deref())?;
            let data = records.iter().map(RecordInput::json).collect::<Result<Vec<_>, Error>>()?;
            let payloads = records.iter().zip(&data).enumerate();
            let payloads = payloads.map(|(index, (record, data))| record.payload(index, data.as_deref()));
            let payloads = payloads.collect::<Result<Vec<_>, Error>>()?;
            let expected = expected_seq_num.map(|number| number.0);
            let sessions = &app(ctx).sessions;
            let appended =
                sessions.append_payloads(caller(ctx)?, &by.address()?, &address, &payloads, expected).await?;
            Ok((address, appended))
        };
        let (appended, user_errors) = settled(outcome(append.await)?);
        let (address, appended) = appended.unzip();
        let channel = appended
            .as_ref()
            .zip(address)
            .map(|(done, address)| ChannelNode::new(done.session.clone(), address));
        Ok(AppendRecordsPayload {
            channel,
            tail: appended.as_ref().map(|done| done.ack.tail.into()),
            repeated: appended.as_ref().is_some_and(|done| done.ack.repeated),
            appended,
            user_errors,
            client_mutation_id,
        })
    }

    /// Forgets the oldest records of a channel. Only for secret keys.
    async fn trim_channel(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "The trim.")] input: TrimChannelInput,
    ) -> Result<TrimChannelPayload> {
        let TrimChannelInput { by, io, channel: name, before, client_mutation_id } = input;
        let trim = async {
            let address = channel(io, name.as_deref())?;
            let sessions = &app(ctx).sessions;
            let session = sessions.trim(caller(ctx)?, &by.address()?, &address, before.0).await?;
            Ok(ChannelNode::new(session, address))
        };
        let (channel, user_errors) = settled(outcome(trim.await)?);
        Ok(TrimChannelPayload { channel, user_errors, client_mutation_id })
    }

    /// Ends a session's run and records the one that goes on in its place. Of several runs that try, the one that is
    /// current wins.
    async fn end_and_continue_session(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "The handover.")] input: EndAndContinueSessionInput,
    ) -> Result<EndAndContinueSessionPayload> {
        run::end_and_continue(ctx, input).await
    }

    /// Registers that a run waits for the next record of a channel. Only for secret keys.
    async fn create_waitpoint(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "The wait.")] input: CreateWaitpointInput,
    ) -> Result<CreateWaitpointPayload> {
        waitpoint::create(ctx, input).await
    }

    /// Answers a waitpoint: the data is appended to its channel and completes it. The same answer again changes nothing.
    async fn complete_waitpoint(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "The answer.")] input: CompleteWaitpointInput,
    ) -> Result<CompleteWaitpointPayload> {
        waitpoint::complete(ctx, input).await
    }

    /// Signs a public token. Only for secret keys.
    async fn create_public_token(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "The token.")] input: CreatePublicTokenInput,
    ) -> Result<CreatePublicTokenPayload> {
        let CreatePublicTokenInput { scopes, expires_in, client_mutation_id } = input;
        let (app, caller) = (app(ctx), caller(ctx)?);
        if !caller.is_private() {
            return Err(UNAUTHORIZED.into());
        }
        let mint = async {
            if scopes.is_empty() {
                return Err(Error::invalid("scopes", "must hold at least one scope"));
            }
            let expires_in = expires_in.unwrap_or(TOKEN_SECONDS);
            let seconds =
                u64::try_from(expires_in).ok().filter(|_| (1..=TOKEN_SECONDS_MAX).contains(&expires_in));
            let seconds = seconds
                .ok_or_else(|| Error::invalid("expiresIn", format!("must be 1 to {TOKEN_SECONDS_MAX}")))?;
            let end = app.clock.now().plus(Duration::from_secs(seconds));
            let end = caller.expires_at.map_or(end, |own| own.min(end));
            Ok((app.auth.mint(caller, Scopes::new(scopes), end).await?, end))
        };
        let (minted, user_errors) = settled(outcome(mint.await)?);
        let (token, expires_at) = minted.map(|(token, end)| (token, DateTime(end))).unzip();
        Ok(CreatePublicTokenPayload { token, expires_at, user_errors, client_mutation_id })
    }
}

impl CreateSessionInput {
    fn read(self) -> Result<CreateSession, Error> {
        let metadata = self.metadata.map(|json| object("metadata", json)).transpose()?;
        let config = self.trigger_config.map(|json| object("triggerConfig", json)).transpose()?;
        check_size(metadata.as_ref(), config.as_ref())?;
        let trigger_config = config.map(trigger::checked).transpose()?;
        if self.idempotency_key.as_ref().is_some_and(|key| !(1..=KEY_MAX).contains(&key.len())) {
            return Err(Error::invalid("idempotencyKey", format!("must be 1 to {KEY_MAX} bytes")));
        }
        let request_key = self.idempotency_key.filter(|_| self.external_id.is_none());
        let session = NewSession {
            external_id: self.external_id,
            kind: self.kind,
            task_identifier: self.task_identifier,
            tags: self.tags.unwrap_or_default(),
            metadata,
            trigger_config,
            expires_at: self.expires_at.map(|at| at.0),
        };
        Ok(CreateSession { session, request_key })
    }
}

impl RecordInput {
    /// `data` as JSON text; `None` where there is none.
    fn json(&self) -> Result<Option<Box<RawValue>>, Error> {
        let value = match &self.data {
            MaybeUndefined::Undefined => return Ok(None),
            MaybeUndefined::Null => &Value::Null,
            MaybeUndefined::Value(Json(value)) => value,
        };
        serde_json::value::to_raw_value(value).map(Some).map_err(Error::internal)
    }

    fn payload<'a>(&'a self, index: usize, data: Option<&'a RawValue>) -> Result<NewPayload<'a>, Error> {
        let content = match (data, &self.text) {
            (Some(value), None) => Content::Json(value),
            (None, Some(text)) => Content::Text(text),
            _ => return Err(Error::invalid(format!("records.{index}"), "must have either data or text")),
        };
        let part_id = self.idempotency_key.as_deref();
        if part_id.is_some_and(|id| !(1..=PART_ID_MAX).contains(&id.len())) {
            let field = format!("records.{index}.idempotencyKey");
            return Err(Error::invalid(field, format!("must be 1 to {PART_ID_MAX} bytes")));
        }
        Ok(NewPayload { content, part_id })
    }
}

fn object(field: &str, Json(value): Json) -> Result<Map<String, serde_json::Value>, Error> {
    match value {
        Value::Object(_) => match value.into_json() {
            Ok(serde_json::Value::Object(object)) => Ok(object),
            _ => Err(Error::invalid(field, "must hold JSON numbers only")),
        },
        _ => Err(Error::invalid(field, "must be an object")),
    }
}

fn check_size(
    metadata: Option<&Map<String, serde_json::Value>>,
    config: Option<&Map<String, serde_json::Value>>,
) -> Result<(), Error> {
    let size =
        |object: &Map<String, serde_json::Value>| serde_json::to_string(object).map_or(0, |text| text.len());
    let sum = metadata.map_or(0, size) + config.map_or(0, size);
    if sum > DOCUMENT_MAX {
        let field = if metadata.is_some() { "metadata" } else { "triggerConfig" };
        return Err(Error::invalid(field, format!("must be at most {DOCUMENT_MAX} bytes as JSON")));
    }
    Ok(())
}

fn settled<T>(outcome: Result<T, Vec<UserError>>) -> (Option<T>, Vec<UserError>) {
    match outcome {
        Ok(value) => (Some(value), Vec::new()),
        Err(user_errors) => (None, user_errors),
    }
}
