//! Server-sent events, "distinct connections mode" of graphql-sse:
//! <https://github.com/enisdenjo/graphql-sse/blob/master/PROTOCOL.md>.

use std::io;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use tokio::time::{MissedTickBehavior, interval};

use crate::api::graphql::engine::Answer;
use crate::api::graphql::error::Fault;
use crate::api::graphql::reply::{self, Text};
use crate::api::trace::RequestId;
use crate::domain::send_budget::Reserved;

/// Silence after which a comment shows that the connection lives.
const KEEP_ALIVE: Duration = Duration::from_secs(12);
const COMMENT: Bytes = Bytes::from_static(b":\n\n");
const COMPLETE: Bytes = Bytes::from_static(b"event: complete\ndata:\n\n");

/// The answers as events.
pub(super) fn response(answers: BoxStream<'static, Answer>, id: RequestId) -> Response {
    let frame = move |answer| match answer {
        Some(Answer::Next(Text { json, room })) => Ok((Text::holding(room, next(&json)), false)),
        Some(Answer::Failed(faults)) => Ok((failed(&faults, &id), true)),
        Some(Answer::Stopping) => Err(cut()),
        None => Ok((COMPLETE, true)),
    };
    let mut response = Response::new(Body::from_stream(
        stream::iter([Ok(COMMENT)]).chain(framed(answers, KEEP_ALIVE, COMMENT, frame)),
    ));
    response.extensions_mut().insert(Reserved);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    streaming(headers);
    response
}

/// A refusal as the only result.
pub(super) fn refusal(fault: Fault, id: RequestId) -> Response {
    response(stream::iter([Answer::Failed(vec![fault])]).boxed(), id)
}

/// No intermediary may keep or collect what is sent piece by piece.
pub(super) fn streaming(headers: &mut http::HeaderMap) {
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, no-transform"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
}

/// The body of a stream of answers: every answer and the end, framed, and `beat` in every silence of `pause`. After a
/// frame that comes with `true` it is over.
pub(super) fn framed(
    answers: BoxStream<'static, Answer>,
    pause: Duration,
    beat: Bytes,
    frame: impl Fn(Option<Answer>) -> io::Result<(Bytes, bool)> + Send + 'static,
) -> BoxStream<'static, io::Result<Bytes>> {
    let mut silence = interval(pause);
    silence.set_missed_tick_behavior(MissedTickBehavior::Delay);
    silence.reset();
    stream::unfold(Some((answers, silence, frame)), move |state| {
        let beat = beat.clone();
        async move {
            let (mut answers, mut silence, frame) = state?;
            let answer = tokio::select! {
                biased;
                answer = answers.next() => answer,
                _ = silence.tick() => return Some((Ok(beat), Some((answers, silence, frame)))),
            };
            silence.reset();
            match frame(answer) {
                Ok((bytes, false)) => Some((Ok(bytes), Some((answers, silence, frame)))),
                Ok((bytes, true)) => Some((Ok(bytes), None)),
                Err(error) => Some((Err(error), None)),
            }
        }
    })
    .boxed()
}

/// The client shall come back: a clean end would tell it that there is nothing more.
pub(super) fn cut() -> io::Error {
    io::Error::other("the server is stopping")
}

fn next(json: &str) -> Bytes {
    // Payloads are shown as they were written, and their white space may hold line ends, which would end the field.
    let json = if json.contains(['\n', '\r']) { &json.replace(['\n', '\r'], " ") } else { json };
    Bytes::from(format!("event: next\ndata: {json}\n\n"))
}

fn failed(faults: &[Fault], id: &RequestId) -> Bytes {
    let errors = reply::errors(faults, id).unwrap_or_default();
    let mut events = next(&format!("{{\"errors\":{errors}}}")).to_vec();
    events.extend_from_slice(&COMPLETE);
    Bytes::from(events)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_end_in_the_white_space_of_a_payload_does_not_end_the_event() {
        assert_eq!(next("{\"a\":\r\n1}"), "event: next\ndata: {\"a\":  1}\n\n");
    }
}
