//! From a request to its result: everything that the four transports have in common.

use std::collections::HashMap;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use async_graphql::parser::parse_query;
use async_graphql::parser::types::{
    BaseType, DocumentOperations, ExecutableDocument, FragmentDefinition, OperationDefinition, OperationType,
    Selection, SelectionSet, VariableDefinition,
};
use async_graphql::{Name, Positioned, Request, Response, ServerError, Value, Variables};
use futures_util::stream::{self, BoxStream, StreamExt};
use http::StatusCode;
use tokio::task::JoinError;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use super::cost::Cost;
use super::error::{Fault, protocol};
use super::events::{ChannelFeed, Handover};
use super::guard::{self, Limits, Measure};
use super::inputs::Inputs;
use super::introspection::{self, Introspections};
use super::persisted::{Lookup, PersistedQueries};
use super::reply::{Reply, Text};
use super::schema::{self, Schema};
use crate::api::App;
use crate::api::answers::{Answers, FIRST_BYTES};
use crate::api::error::Failure;
use crate::api::own_task::in_own_task;
use crate::api::rate_limit::{Counted, Exceeded};
use crate::api::trace::RequestId;
use crate::config::GraphqlConfig;
use crate::domain::send_budget::Reservation;
use crate::domain::{Caller, ConnectionBudget, Error};
use crate::telemetry::Door;

/// Root fields that ask for the schema.
const SCHEMA: [&str; 2] = ["__schema", "__type"];
/// Root fields that do not count against the rate limit: an append, like the append route, and what is no request.
const UNLIMITED: [&str; 2] = ["appendRecords", "__typename"];

/// Largest answer in bytes. A record has 1 MiB, a page of them 4 MiB, and JSON may make six bytes of one.
pub(super) const ANSWER_MAX: usize = 32 << 20;

type Fragments = HashMap<Name, Positioned<FragmentDefinition>>;

/// Who asks, and what they showed.
#[derive(Clone, Debug)]
pub(super) struct Credentials {
    pub caller: Arc<Caller>,
    /// Whom the rate limit counts it with.
    counted: Counted,
}

impl Credentials {
    pub fn new(app: &App, caller: Arc<Caller>, bearer: &str) -> Self {
        let counted = app.rate_limiter.counted(&caller, bearer);
        Self { caller, counted }
    }
}

/// One request's surroundings.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    /// `None`: nobody, who may look at the schema and nothing else.
    pub credentials: Option<Credentials>,
    pub id: RequestId,
    /// False over GET.
    pub may_change: bool,
    /// For the count of followers.
    pub door: Door,
    /// Of the connection that gets the answer.
    pub budget: ConnectionBudget,
    /// The room that the request takes for as long as it lives; none for a small one.
    pub _received: Option<Arc<Reservation>>,
}

/// A request that may be executed.
pub(super) struct Prepared {
    work: Work,
    kind: OperationType,
    asked: Asked,
}

/// What is left to be done for a request.
enum Work {
    /// Nothing: this is the answer.
    Answered(Arc<str>),
    /// To be executed, and the answer to be kept under a key if it has one.
    Execute { request: Box<Request>, cost: Arc<Cost>, keep: Option<introspection::Key> },
}

impl Prepared {
    /// Whether it is to be answered once, or for as long as it is followed.
    pub fn is_subscription(&self) -> bool {
        self.kind == OperationType::Subscription
    }
}

/// What a subscription yields. The end of the stream is the end of the subscription.
#[derive(Debug)]
pub(super) enum Answer {
    /// An execution result.
    Next(Text),
    /// Nothing comes after it.
    Failed(Vec<Fault>),
    /// The server stops; the client should come back. Nothing comes after it.
    Stopping,
}

/// The executor with its limits.
pub struct Engine {
    schema: Schema,
    persisted: PersistedQueries,
    config: GraphqlConfig,
    limits: Limits,
    /// The limits of whoever shows no credentials.
    strangers: Limits,
    inputs: Inputs,
    turns: Answers,
    introspected: Introspections,
}

impl Engine {
    /// An executor over the whole schema.
    pub fn new(config: GraphqlConfig, turns: Answers) -> Self {
        let persisted = PersistedQueries::new();
        let schema = schema::build(&config);
        let inputs = Inputs::of(&schema.sdl());
        Self {
            schema,
            persisted,
            config,
            limits: Limits::default(),
            strangers: Limits::of_strangers(),
            inputs,
            turns,
            introspected: Introspections::new(),
        }
    }

    pub(super) fn config(&self) -> &GraphqlConfig {
        &self.config
    }

    /// Reads a request and decides whether it may be executed.
    pub(super) fn prepare(&self, app: &App, mut request: Request, asked: Asked) -> Result<Prepared, Fault> {
        let persisted = self.persisted.look_up(&mut request)?;
        if request.query.is_empty() {
            return Err(Failure::bad_request("the request has no query").into());
        }
        let key = introspection::Key::of(&request);
        if let Some(answer) = key.as_ref().and_then(|key| self.introspected.get(key)) {
            require_current(app, &asked)?;
            if let Lookup::Offered(offer) = persisted {
                self.persisted.keep(offer, &request.query);
            }
            return Ok(Prepared { work: Work::Answered(answer), kind: OperationType::Query, asked });
        }
        let limits = if asked.credentials.is_some() { &self.limits } else { &self.strangers };
        guard::scan(&request.query, limits).map_err(|refusal| too_large(&refusal))?;
        let mut document = parse_query(&request.query).map_err(Fault::unparsable)?;
        let name = request.operation_name.as_deref();
        let measure = guard::measure(&document, name, limits).map_err(|refusal| too_large(&refusal))?;
        admit(app, &measure, &asked)?;
        let kind = measure.operation;
        let keep = key.filter(|_| kind == OperationType::Query && measure.is_introspection_only());
        check_copies(&measure, &request.variables)?;
        if !self.config.introspection && measure.root_fields.iter().any(|field| SCHEMA.contains(field)) {
            let message = "this server does not answer introspection";
            return Err(protocol(StatusCode::BAD_REQUEST, "graphql_validation_failed", message).into());
        }
        let operation = guard::choose(&document.operations, name).map_err(|refusal| too_large(&refusal))?;
        require_variables(&operation.node, &request.variables)?;
        self.inputs.check(&operation.node, &document.fragments, &request.variables)?;
        spell_out(&operation.node, &mut request.variables);
        if let Lookup::Offered(offer) = persisted {
            self.persisted.keep(offer, &request.query);
        }
        unwrap_root_fields(&mut document);
        let cost = Arc::<Cost>::default();
        request.set_parsed_query(document);
        let mut request =
            request.data(app.clone()).data(cost.clone()).data(asked.door).data(asked.budget.clone());
        if let Some(Credentials { caller, .. }) = &asked.credentials {
            request = request.data(schema::session_loader(app, caller)).data(caller.clone());
        }
        let work = Work::Execute { request: Box::new(request), cost, keep };
        Ok(Prepared { work, kind, asked })
    }

    /// Room to begin an operation in: for its answer, as far as the size of that is known before.
    pub(super) fn room(
        &self,
        budget: &ConnectionBudget,
    ) -> impl Future<Output = Reservation> + Send + 'static {
        let budget = budget.clone();
        async move { budget.reserve(FIRST_BYTES).await.at_work() }
    }

    /// Executes a query or a mutation, whose answer gets room behind the first `taken` bytes of `room`.
    pub(super) async fn execute(&self, prepared: Prepared, room: &mut Reservation, taken: usize) -> Reply {
        let Prepared { work, kind, asked } = prepared;
        let (request, cost, keep) = match work {
            Work::Answered(answer) => {
                room.grow(taken + answer.len()).await;
                return Reply::answered(answer.to_string());
            }
            Work::Execute { request, cost, keep } => (request, cost, keep),
        };
        let limit = self.config.request_timeout;
        let _turn = match kind {
            OperationType::Query => self.turns.turn().await,
            OperationType::Mutation | OperationType::Subscription => None,
        };
        let reply = match tokio::time::timeout(limit, self.schema.execute(*request)).await {
            Ok(response) => Reply::new(response, &asked.id, cost.points()),
            Err(_) => {
                let message = format!("the operation did not finish within {} seconds", limit.as_secs());
                let refusal = protocol(StatusCode::SERVICE_UNAVAILABLE, "request_timeout", message);
                return Reply::refusal(refusal, &asked.id);
            }
        };
        if taken + reply.json.len() > ANSWER_MAX {
            return Reply::refusal(answer_too_large(), &asked.id);
        }
        if let Some(key) = keep.filter(|_| reply.is_whole) {
            self.introspected.keep(key, &reply.json);
        }
        room.grow(taken + reply.json.len()).await;
        reply
    }

    /// Executes any operation as a stream of answers, which begins in `room`. A mutation begins when it is polled, anything
    /// else at once.
    pub(super) fn answers(
        self: &Arc<Self>,
        prepared: Prepared,
        room: Reservation,
    ) -> BoxStream<'static, Answer> {
        let id = prepared.asked.id.clone();
        caught(self.answering(prepared, room), id)
    }

    fn answering(self: &Arc<Self>, prepared: Prepared, mut room: Reservation) -> BoxStream<'static, Answer> {
        let this = self.clone();
        // Tasks of their own: whoever polls the answers may wait for its client for long, and a query has a turn, a subscription
        // that begins a place in a pool, that others wait for.
        if prepared.is_subscription() {
            let begin = async move { this.subscribe(prepared, room).await };
            let begun = AbortOnDropHandle::new(tokio::spawn(begin.in_current_span()));
            let failed = |cut| stream::iter([failed(&cut)]).boxed();
            stream::once(async move { begun.await.unwrap_or_else(failed) }).flatten().boxed()
        } else {
            let is_query = prepared.kind == OperationType::Query;
            let execution = async move {
                let reply = this.execute(prepared, &mut room, 0).await;
                Answer::of(reply, Some(Arc::new(room)))
            };
            if !is_query {
                return stream::once(execution).boxed();
            }
            let executed = AbortOnDropHandle::new(tokio::spawn(execution.in_current_span()));
            stream::once(async move { executed.await.unwrap_or_else(|cut| failed(&cut)) }).boxed()
        }
    }

    async fn subscribe(&self, prepared: Prepared, room: Reservation) -> BoxStream<'static, Answer> {
        let Prepared { work, asked, .. } = prepared;
        // Only a query has its answer already.
        let Work::Execute { request, cost, .. } = work else { return stream::empty().boxed() };
        let handover = Arc::new(Handover::new(room));
        let mut responses = self.schema.execute_stream((*request).data(handover.clone()));
        // The resolver of a channel hands over what it has prepared and yields nothing itself.
        let Some(first) = responses.next().await else {
            return match handover.take() {
                Some(feed) => answers_of(feed, asked.id),
                None => stream::empty().boxed(),
            };
        };
        let responses = stream::iter([first]).chain(responses);
        let Asked { id, _received: received, .. } = asked;
        let answers = responses.map(move |response| {
            // What a large request takes lives as long as what answers it.
            let _kept = &received;
            answer(response, &id, cost.points())
        });
        in_own_task(until_failed(answers)).boxed()
    }
}

impl Answer {
    /// The answer of an operation that has only one.
    fn of(reply: Reply, room: Option<Arc<Reservation>>) -> Self {
        match reply.refused {
            Some(faults) => Self::Failed(faults),
            None => Self::Next(Text { json: reply.json, room }),
        }
    }
}

/// What an operation answers whose task has panicked.
fn failed(cut: &JoinError) -> Answer {
    Answer::Failed(vec![Error::interrupted(cut).into()])
}

/// Ends an operation that panics, and it alone: its connection carries others.
fn caught(answers: BoxStream<'static, Answer>, id: RequestId) -> BoxStream<'static, Answer> {
    let answers = AssertUnwindSafe(answers).catch_unwind();
    let told = move |_| {
        let faults = vec![Fault::from(Error::internal("the operation has panicked"))];
        super::reply::log(&faults, &id);
        Answer::Failed(faults)
    };
    answers.map(move |answer| answer.unwrap_or_else(&told)).boxed()
}

fn answer(response: Response, id: &RequestId, cost: usize) -> Answer {
    if response.errors.iter().any(|error| error.source::<schema::Stopping>().is_some()) {
        return Answer::Stopping;
    }
    // What the events come from fails in the root field; a field within one of them fails alone.
    let in_event = |error: &ServerError| error.path.len() > 1;
    if response.is_err() && response.data == Value::Null && !response.errors.iter().any(in_event) {
        let faults: Vec<Fault> = response.errors.into_iter().map(Fault::from).collect();
        super::reply::log(&faults, id);
        return Answer::Failed(faults);
    }
    // What the records of a channel take, the channel's events keep until the next one is asked for.
    Answer::of(Reply::new(response, id, cost), None)
}

fn answers_of(feed: ChannelFeed, id: RequestId) -> BoxStream<'static, Answer> {
    let answers = stream::unfold((feed, id), |(mut feed, id)| async move {
        let answer = match feed.next().await? {
            Ok(Some(text)) if text.json.len() > ANSWER_MAX => Answer::Failed(vec![answer_too_large().into()]),
            Ok(Some(text)) => Answer::Next(text),
            Ok(None) => Answer::Stopping,
            Err(error) => {
                let faults = vec![Fault::from(error)];
                super::reply::log(&faults, &id);
                Answer::Failed(faults)
            }
        };
        Some((answer, (feed, id)))
    });
    until_failed(answers)
}

/// Ends after the first answer that nothing may follow.
fn until_failed(answers: impl stream::Stream<Item = Answer> + Send + 'static) -> BoxStream<'static, Answer> {
    let ended = |ended: &mut bool, answer: Answer| {
        let before = *ended;
        *ended |= !matches!(answer, Answer::Next(_));
        std::future::ready((!before).then_some(answer))
    };
    answers.scan(false, ended).boxed()
}

/// Credentials may have ended since they were shown.
fn require_current(app: &App, asked: &Asked) -> Result<(), Failure> {
    let caller = asked.credentials.as_ref().map(|shown| &shown.caller);
    Ok(caller.map_or(Ok(()), |caller| caller.require_current(app.clock.now()))?)
}

/// What is asked of anybody before anything is executed.
fn admit(app: &App, measure: &Measure<'_>, asked: &Asked) -> Result<(), Failure> {
    if measure.operation == OperationType::Mutation && !asked.may_change {
        let message = "mutations must be sent with POST";
        return Err(protocol(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message).allowing("POST"));
    }
    if asked.credentials.is_none() && measure.is_introspection_only() {
        return Ok(());
    }
    let Some(Credentials { counted, .. }) = &asked.credentials else {
        return Err(Error::Unauthenticated("Invalid or Missing API key").into());
    };
    require_current(app, asked)?;
    if measure.operation == OperationType::Subscription {
        return Ok(());
    }
    let cost = rate_cost(measure);
    app.rate_limiter.check(*counted, cost, app.clock.as_ref()).map_err(|exceeded| match exceeded {
        Exceeded::Rate(limit) => Error::RateLimited(limit).into(),
        Exceeded::Burst(limit) => {
            let message = format!(
                "the operation has {cost} root fields that count against the rate limit of {limit} at once"
            );
            protocol(StatusCode::BAD_REQUEST, "query_too_large", message)
        }
    })
}

/// How many requests an operation is: each root field would be one over REST. Subscriptions, like every stream, are none.
fn rate_cost(measure: &Measure<'_>) -> u32 {
    let counted = measure.root_fields.iter().filter(|field| !UNLIMITED.contains(field)).count();
    u32::try_from(counted).unwrap_or(u32::MAX)
}

/// The validator copies a variable's whole value wherever it is named.
fn check_copies(measure: &Measure<'_>, variables: &Variables) -> Result<(), Failure> {
    const FEW: usize = 50;
    const COPIED_MAX: usize = 50 * 1024 * 1024;
    // A body of 1 MiB cannot exceed the limit in few places.
    if measure.variable_uses <= FEW {
        return Ok(());
    }
    let bytes = serde_json::to_vec(variables).map_or(0, |text| text.len());
    if bytes.saturating_mul(measure.variable_uses) > COPIED_MAX {
        let message = format!("variables of {bytes} bytes are named {} times", measure.variable_uses);
        return Err(protocol(StatusCode::BAD_REQUEST, "query_too_large", message));
    }
    Ok(())
}

/// Refuses before anything is executed; the executor would miss a variable only where it meets it.
fn require_variables(operation: &OperationDefinition, given: &Variables) -> Result<(), Fault> {
    for definition in &operation.variable_definitions {
        let VariableDefinition { name, var_type, default_value, .. } = &definition.node;
        let absent = given.get(&name.node).is_none_or(|value| *value == Value::Null);
        if absent && !var_type.node.nullable && default_value.is_none() {
            let message = format!("the variable ${} of type {} has no value", name.node, var_type.node);
            return Err(Fault::invalid(message, definition.pos));
        }
    }
    Ok(())
}

/// A variable for an `Int` that has no value gets a null, which means the same to every argument of ours: the cost of a
/// page is computed from its arguments, and there the executor takes a variable without a value for a fault.
fn spell_out(operation: &OperationDefinition, given: &mut Variables) {
    for definition in &operation.variable_definitions {
        let VariableDefinition { name, var_type, default_value, .. } = &definition.node;
        let is_int = matches!(&var_type.node.base, BaseType::Named(name) if name == "Int");
        if is_int && var_type.node.nullable && default_value.is_none() && !given.contains_key(&name.node) {
            given.insert(name.node.clone(), Value::Null);
        }
    }
}

fn answer_too_large() -> Failure {
    let message = format!("the answer has more than {ANSWER_MAX} bytes: ask for fewer records or fields");
    protocol(StatusCode::BAD_REQUEST, "query_too_complex", message)
}

fn too_large(refusal: &guard::Refusal) -> Fault {
    protocol(StatusCode::BAD_REQUEST, refusal.word(), refusal.to_string()).into()
}

/// Repeats the root field of a subscription that stands in a fragment where the executor looks for it. The
/// fragment stays, because a fragment that nobody uses is no valid document.
fn unwrap_root_field(operation: &mut OperationDefinition, fragments: &Fragments) {
    fn find(set: &SelectionSet, fragments: &Fragments) -> Option<Positioned<Selection>> {
        set.items.iter().find_map(|item| match &item.node {
            Selection::Field(_) => Some(item.clone()),
            Selection::InlineFragment(inline) => find(&inline.node.selection_set.node, fragments),
            Selection::FragmentSpread(spread) => {
                let fragment = fragments.get(&spread.node.fragment_name.node)?;
                find(&fragment.node.selection_set.node, fragments)
            }
        })
    }
    let set = &mut operation.selection_set.node;
    let direct = set.items.iter().any(|item| matches!(item.node, Selection::Field(_)));
    if operation.ty == OperationType::Subscription && !direct {
        let field = find(set, fragments);
        set.items.extend(field);
    }
}

fn unwrap_root_fields(document: &mut ExecutableDocument) {
    let ExecutableDocument { operations, fragments } = document;
    match operations {
        DocumentOperations::Single(operation) => unwrap_root_field(&mut operation.node, fragments),
        DocumentOperations::Multiple(operations) => {
            for operation in operations.values_mut() {
                unwrap_root_field(&mut operation.node, fragments);
            }
        }
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("config", &self.config).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_operation_that_panics_ends_with_an_error_of_ours() {
        let answers = stream::iter(0..3).map(|number| {
            assert!(number == 0, "on purpose");
            Answer::Next(Text { json: "{}".into(), room: None })
        });
        let id = RequestId(http::HeaderValue::from_static("of-the-test"));
        let answers: Vec<_> = caught(answers.boxed(), id).collect().await;
        let [Answer::Next(_), Answer::Failed(faults)] = &answers[..] else {
            panic!("{} answers", answers.len())
        };
        let [fault] = &faults[..] else { panic!("{} faults", faults.len()) };
        assert_eq!(fault.failure.code, "internal");
    }
}
