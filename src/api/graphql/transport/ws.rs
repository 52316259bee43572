//! GraphQL over WebSocket.
//!
//! One task serves one socket and everything that is subscribed over it. It takes the next answer only when the last
//! one has been handed to the socket, so a slow client holds no queue: its followers fall back to the stored log.

use std::any::Any;
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{FromRequestParts, Request};
use axum::response::{IntoResponse, Response};
use futures_util::SinkExt;
use futures_util::future::{AbortHandle, BoxFuture, FutureExt, pending};
use futures_util::stream::{self, Abortable, BoxStream, SelectAll, StreamExt};
use http::StatusCode;
use http::header::{ORIGIN, SEC_WEBSOCKET_PROTOCOL};
use serde_json::{Map, Value};
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::http::credentials;
use super::messages::{ACK, ClientMessage, Close, ID_MAX, PROTOCOL, Subscribe, complete, message, pong};
use crate::api::App;
use crate::api::cors;
use crate::api::error::Failure;
use crate::api::graphql::engine::{ANSWER_MAX, Answer, Asked, Credentials};
use crate::api::graphql::error::{Fault, protocol};
use crate::api::graphql::reply::{self, Text};
use crate::api::rate_limit::Counted;
use crate::api::received;
use crate::api::trace::RequestId;
use crate::domain::send_budget::Reservation;
use crate::domain::{ConnectionBudget, Cut, Error};
use crate::telemetry::Door;

/// Largest message of a client.
const MESSAGE_MAX: usize = 1_048_576;
/// Largest message of a client that has not shown credentials, with what is sent beside it.
const STRANGER_MESSAGE_MAX: usize = 128 * 1024;
/// The library's own 128 KiB would be most of an idle connection.
const READ_BUFFER: usize = 4096;
/// How much is collected before it is written.
const WRITE_BUFFER: usize = 16 * 1024;
/// Answers handed to the socket before it is flushed and the client is listened to.
const BURST: usize = 64;
/// How long a closing connection may take.
const FAREWELL: Duration = Duration::from_secs(2);
/// Bytes that one byte of an id takes in JSON.
const ESCAPED_MAX: usize = 6;
/// Room for what a message says besides its id and its payload, and for the frame around it.
const FRAME: usize = 256;

/// Takes a connection over.
pub(super) async fn upgrade(app: App, id: RequestId, request: Request) -> Response {
    let (mut parts, _) = request.into_parts();
    let allowed = cors::allowed_origin(app.config.allowed_origins.as_deref(), &parts.headers);
    if parts.headers.contains_key(ORIGIN) && allowed.is_none() {
        return protocol(StatusCode::FORBIDDEN, "unauthorized", "pages of this origin may not connect")
            .into_response();
    }
    let credentials = match credentials(&app, &parts.headers, &parts.extensions).await {
        Ok(credentials) => credentials,
        Err(failure) => return failure.into_response(),
    };
    let Some(budget) = parts.extensions.get::<ConnectionBudget>().cloned() else {
        return Failure::from(Error::internal("a request without a budget")).into_response();
    };
    // Whom operations are counted with until a token is shown.
    let stranger = app.stranger(&parts.headers, &parts.extensions);
    if credentials.is_none()
        && let Err(error) = app.admit_stranger(stranger)
    {
        return Failure::from(error).into_response();
    }
    // What the connection holds until it ends: its place under the cap, its count in the metrics.
    let held = parts.extensions.remove::<Arc<dyn Any + Send + Sync>>();
    let offered =
        parts.headers.get(SEC_WEBSOCKET_PROTOCOL).and_then(|value| value.to_str().ok()?.split(',').next());
    let offered = offered.and_then(|first| first.trim().parse().ok());
    let Ok(upgrade) = WebSocketUpgrade::from_request_parts(&mut parts, &()).await else {
        return Failure::bad_request("this is not the handshake of a WebSocket").into_response();
    };
    let mut upgrade = upgrade
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(WRITE_BUFFER)
        // Room for the largest message behind a buffer that is about to be written: less would cut healthy clients.
        .max_write_buffer_size(WRITE_BUFFER + ANSWER_MAX + ID_MAX * ESCAPED_MAX + FRAME)
        // Up to twice the limit is read, so that the refusal has a code; beyond it the connection just ends.
        .max_message_size(2 * MESSAGE_MAX)
        .max_frame_size(2 * MESSAGE_MAX)
        .protocols([PROTOCOL]);
    let spoken = upgrade.selected_protocol().is_some();
    if let (false, Some(offered)) = (spoken, offered) {
        // A browser tells its page a close code only if it got a protocol that it had asked for.
        upgrade.set_selected_protocol(offered);
    }
    upgrade.on_upgrade(move |socket| async move {
        let tasks = app.shutdown.clone();
        tasks.spawn("websocket", async move {
            let _held = held;
            let _open = app.metrics.websocket();
            let mut connection = Connection::new(app, id, socket, credentials, stranger, budget.clone());
            connection.allow();
            let serving = async {
                match connection.serve(spoken).await {
                    Ended::Unwritable => {}
                    Ended::ByClient => connection.end(None).await,
                    Ended::ByUs(close) => connection.end(Some(close)).await,
                }
            };
            tokio::select! {
                () = serving => {}
                // Others need the room of what this client does not read.
                () = budget.cut() => {}
            }
        });
    })
}

/// An answer of one of the operations, or the end of it.
type Tagged = (Arc<str>, Option<Answer>);

/// An operation that is to begin.
struct Start {
    id: String,
    /// Or what in it cannot be read.
    payload: Result<Subscribe, Failure>,
    /// The room that it takes as it was read.
    received: Option<Arc<Reservation>>,
}

/// Why a connection is over.
enum Ended {
    /// The client has closed it, or is gone.
    ByClient,
    /// The client is told why.
    ByUs(Close),
    /// Nothing can be written to it any more.
    Unwritable,
}

impl From<Close> for Ended {
    fn from(close: Close) -> Self {
        Self::ByUs(close)
    }
}

struct Connection {
    app: App,
    id: RequestId,
    socket: WebSocket,
    credentials: Option<Credentials>,
    budget: ConnectionBudget,
    /// Whom it is counted with without credentials.
    stranger: Counted,
    acknowledged: bool,
    /// What the client wants to begin, and the room that this waits for. Nothing more is read from it meanwhile.
    waiting: Option<(Start, BoxFuture<'static, Reservation>)>,
    answers: SelectAll<Abortable<BoxStream<'static, Tagged>>>,
    running: HashMap<Arc<str>, AbortHandle>,
    /// Completes when the credentials end or the server stops.
    cut: Pin<Box<dyn Future<Output = Cut> + Send>>,
    /// When to look for signs of life; before the acknowledgement, when to give up.
    beat: Pin<Box<Sleep>>,
    pinged: bool,
}

impl Connection {
    fn new(
        app: App,
        id: RequestId,
        socket: WebSocket,
        credentials: Option<Credentials>,
        stranger: Counted,
        budget: ConnectionBudget,
    ) -> Self {
        let cut = app.sessions.until_cut(credentials.as_ref().map(|shown| shown.caller.as_ref()));
        let beat = Box::pin(sleep(app.graphql.config().init_timeout));
        Self {
            app,
            id,
            socket,
            credentials,
            budget,
            stranger,
            acknowledged: false,
            waiting: None,
            answers: SelectAll::new(),
            running: HashMap::new(),
            cut: Box::pin(cut),
            beat,
            pinged: false,
        }
    }

    /// Serves until the client goes or has to go.
    async fn serve(&mut self, is_spoken: bool) -> Ended {
        if !is_spoken {
            return Close::wrong_protocol().into();
        }
        loop {
            // Not biased: a channel that never pauses must not keep the client from being heard.
            let step = tokio::select! {
                cut = &mut self.cut => Err(closed_by(cut).into()),
                Some(answer) = self.answers.next(), if !self.answers.is_empty() => self.deliver(answer).await,
                (start, room) = begin(&mut self.waiting) => self.subscribe(start, room).await,
                message = self.socket.recv(), if self.waiting.is_none() => match message {
                    Some(Ok(Message::Close(_))) | None => Err(Ended::ByClient),
                    Some(Err(_)) if self.budget.is_spent() => Err(self.spent().into()),
                    Some(Err(_)) => Err(Close::broken().into()),
                    Some(Ok(message)) => self.take(message).await,
                },
                () = &mut self.beat => self.look_for_life().await,
            };
            if let Err(ended) = step {
                return ended;
            }
        }
    }

    async fn end(mut self, close: Option<Close>) {
        let farewell = async {
            if let Some(close) = close {
                // A client that is gone cannot be told.
                let _ = self.socket.send(Message::Close(Some(close.frame()))).await;
            }
            // Also what answers a close of the client's; whoever does not close the other half is not waited for.
            while let Some(Ok(_)) = self.socket.recv().await {}
        };
        let _ = tokio::time::timeout(FAREWELL, farewell).await;
    }

    /// Hands an answer and those that are ready behind it to the socket.
    async fn deliver(&mut self, first: Tagged) -> Result<(), Ended> {
        let mut next = Some(first);
        // Kept until the socket has them.
        let mut rooms = Vec::new();
        for left in (0..BURST).rev() {
            let Some((id, answer)) = next.take() else { break };
            let text = match answer {
                Some(Answer::Next(Text { json, room })) => {
                    rooms.extend(room);
                    message("next", &id, &json)
                }
                Some(Answer::Failed(faults)) => {
                    self.forget(&id);
                    self.failed(&id, &faults)?
                }
                Some(Answer::Stopping) => return Err(Close::going_away().into()),
                None => {
                    self.forget(&id);
                    complete(&id)
                }
            };
            let is_large = text.len() > WRITE_BUFFER;
            self.socket.feed(Message::Text(text.into())).await.map_err(|error| unwritable(&error))?;
            // Behind a large one nothing more is collected.
            if is_large {
                break;
            }
            if left > 0 {
                next = self.answers.next().now_or_never().flatten();
            }
        }
        self.socket.flush().await.map_err(|error| unwritable(&error))
    }

    /// The refusal of an operation. Credentials that ended under it end the connection.
    fn failed(&self, id: &str, faults: &[Fault]) -> Result<String, Close> {
        let caller = self.credentials.as_ref().map(|shown| &shown.caller);
        if let Some(Err(error)) = caller.map(|caller| caller.require_current(self.app.clock.now())) {
            return Err(Close::forbidden(&error.detail()));
        }
        Ok(message("error", id, &reply::errors(faults, &self.id).unwrap_or_default()))
    }

    async fn send(&mut self, text: String) -> Result<(), Ended> {
        self.socket.send(Message::Text(text.into())).await.map_err(|error| unwritable(&error))
    }

    async fn take(&mut self, message: Message) -> Result<(), Ended> {
        self.pinged = false;
        let text = match message {
            Message::Text(text) if text.len() > MESSAGE_MAX => {
                return Err(Close::too_large(MESSAGE_MAX).into());
            }
            Message::Text(text) => {
                // Not for a ping, which may come between the parts of a message.
                self.allow();
                text
            }
            Message::Binary(_) => return Err(Close::invalid("messages are text").into()),
            Message::Ping(payload) | Message::Pong(payload) => {
                // With the head of its frame, and the mask.
                self.budget.give_back(payload.len() + 6);
                return Ok(());
            }
            Message::Close(_) => return Ok(()),
        };
        let received = received::weigh(&self.budget, text.as_bytes()).map_err(|_| Close::busy())?;
        let received = received.map(Arc::new);
        match ClientMessage::parse(&text)? {
            ClientMessage::ConnectionInit { payload } => self.init(payload.unwrap_or_default()).await,
            ClientMessage::Ping { payload } => self.send(pong(payload)).await,
            ClientMessage::Pong => Ok(()),
            ClientMessage::Subscribe { .. } if !self.acknowledged => Err(Close::unauthorized().into()),
            ClientMessage::Subscribe { id, payload } => {
                let start = Start { id, payload, received };
                self.waiting = Some((start, self.app.graphql.room(&self.budget).boxed()));
                Ok(())
            }
            ClientMessage::Complete { id } => {
                self.forget(&id);
                Ok(())
            }
        }
    }

    /// Accepts the connection. A token in the payload wins over the one of the handshake.
    async fn init(&mut self, payload: Map<String, Value>) -> Result<(), Ended> {
        if self.acknowledged {
            return Err(Close::too_many_inits().into());
        }
        if let Some(bearer) = bearer(&payload)? {
            let caller = self.app.auth.authenticate(bearer).await;
            let caller = caller.map_err(|error| Close::forbidden(&Failure::from(error).message))?;
            self.cut = Box::pin(self.app.sessions.until_cut(Some(&caller)));
            self.credentials = Some(Credentials::new(&self.app, caller, bearer));
            self.allow();
        }
        self.acknowledged = true;
        self.rest();
        self.send(ACK.to_owned()).await
    }

    /// Lets the client send its next message, which is a small one until it has shown credentials: the library
    /// collects a message before we see any of it.
    fn allow(&self) {
        // What is too large is read as well, so that the refusal has a code.
        let large = if self.credentials.is_some() { 2 * MESSAGE_MAX + STRANGER_MESSAGE_MAX } else { 0 };
        self.budget.allow(STRANGER_MESSAGE_MAX, large);
    }

    /// Why a message cannot be read to its end.
    fn spent(&self) -> Close {
        if self.credentials.is_some() { Close::busy() } else { Close::too_large(STRANGER_MESSAGE_MAX) }
    }

    async fn subscribe(&mut self, start: Start, room: Reservation) -> Result<(), Ended> {
        let Start { id, payload, received } = start;
        let id = id.as_str();
        if self.running.contains_key(id) {
            return Err(Close::duplicate(id).into());
        }
        let most = self.app.graphql.config().max_subscriptions;
        if self.running.len() >= most {
            let reason = format!("a connection may have {most} operations under way");
            let failure = protocol(StatusCode::TOO_MANY_REQUESTS, "limit_exceeded", reason);
            return self.refuse(id, failure.into()).await;
        }
        if self.credentials.is_none()
            && let Err(error) = self.app.admit_stranger(self.stranger)
        {
            return self.refuse(id, error.into()).await;
        }
        let payload = match payload {
            Ok(payload) => payload,
            Err(failure) => return self.refuse(id, failure.into()).await,
        };
        let asked = Asked {
            credentials: self.credentials.clone(),
            id: self.id.clone(),
            may_change: true,
            door: Door::Websocket,
            budget: self.budget.clone(),
            _received: received,
        };
        match self.app.graphql.prepare(&self.app, payload.into_request(), asked) {
            Err(fault) => self.refuse(id, fault).await,
            Ok(prepared) => {
                let id: Arc<str> = id.into();
                let (handle, registration) = AbortHandle::new_pair();
                let tagged = tagged(id.clone(), self.app.graphql.answers(prepared, room));
                self.answers.push(Abortable::new(tagged, registration));
                self.running.insert(id, handle);
                Ok(())
            }
        }
    }

    async fn refuse(&mut self, id: &str, fault: Fault) -> Result<(), Ended> {
        let faults = [fault];
        reply::log(&faults, &self.id);
        let text = self.failed(id, &faults)?;
        self.send(text).await
    }

    fn forget(&mut self, id: &str) {
        if let Some(running) = self.running.remove(id) {
            running.abort();
        }
    }

    /// The protocol's own pings are the client's to send; the transport's are answered by every browser.
    async fn look_for_life(&mut self) -> Result<(), Ended> {
        if !self.acknowledged {
            return Err(Close::init_timeout().into());
        }
        if self.waiting.is_some() {
            // Its signs of life are not read.
            self.rest();
            return Ok(());
        }
        if self.pinged {
            return Err(Close::dead().into());
        }
        self.pinged = true;
        self.rest();
        self.socket.send(Message::Ping(Default::default())).await.map_err(|error| unwritable(&error))
    }

    fn rest(&mut self) {
        self.beat = Box::pin(sleep_until(Instant::now() + self.app.graphql.config().ping_interval));
    }
}

/// What is to begin, once it has room. Cancel safe.
async fn begin(waiting: &mut Option<(Start, BoxFuture<'static, Reservation>)>) -> (Start, Reservation) {
    let Some((_, room)) = waiting else { return pending().await };
    let room = room.await;
    match waiting.take() {
        Some((start, _)) => (start, room),
        None => pending().await,
    }
}

/// The answers of an operation, each with its id, and its end. A failure is an end of its own.
fn tagged(id: Arc<str>, answers: BoxStream<'static, Answer>) -> BoxStream<'static, Tagged> {
    stream::unfold((answers, id, false), |(mut answers, id, ended)| async move {
        if ended {
            return None;
        }
        let answer = answers.next().await;
        let ended = !matches!(answer, Some(Answer::Next(_)));
        Some(((id.clone(), answer), (answers, id, ended)))
    })
    .boxed()
}

/// The end of a connection at the first write that fails: the library would go on to collect what it cannot write.
fn unwritable(error: &axum::Error) -> Ended {
    tracing::debug!(error = error as &dyn std::error::Error, "a WebSocket cannot be written to");
    Ended::Unwritable
}

fn closed_by(cut: Cut) -> Close {
    match cut {
        Cut::Stopping => Close::going_away(),
        Cut::Credentials(error) => Close::forbidden(&error.detail()),
    }
}

/// The token in the payload of an init: `authorization`, in any case, with or without the scheme.
fn bearer(payload: &Map<String, Value>) -> Result<Option<&str>, Close> {
    let Some((_, value)) = payload.iter().find(|(name, _)| name.eq_ignore_ascii_case("authorization")) else {
        return Ok(None);
    };
    let text = match value {
        Value::Null => return Ok(None),
        Value::String(text) => text.trim(),
        _ => return Err(Close::forbidden("authorization must be a string")),
    };
    let bearer = match text.split_once(' ') {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("bearer") => rest.trim(),
        Some(_) => return Err(Close::forbidden("Invalid or Missing API key")),
        None => text,
    };
    Ok((!bearer.is_empty()).then_some(bearer))
}
