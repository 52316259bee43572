//! Subscriptions over `multipart/mixed`, as Apollo's clients and routers speak it:
//! <https://www.apollographql.com/docs/graphos/routing/operations/subscriptions/multipart-protocol>.

use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};
use http::header::{CONTENT_TYPE, HeaderValue};

use super::sse::{cut, framed, streaming};
use crate::api::graphql::engine::Answer;
use crate::api::graphql::reply::{self, Text};
use crate::api::trace::RequestId;
use crate::domain::send_budget::Reserved;

/// The protocol asks for a heartbeat in every silence of five seconds.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// What stands between two parts, and ahead of the first.
const DELIMITER: &str = "\r\n--graphql";
/// What makes the delimiter behind the last part the end.
const END: Bytes = Bytes::from_static(b"--\r\n");

/// The answers as parts.
pub(super) fn response(answers: BoxStream<'static, Answer>, id: RequestId) -> Response {
    let frame = move |answer| match answer {
        Some(Answer::Next(Text { json, room })) => {
            let part = part(&format!("{{\"payload\":{json}}}"));
            Ok((Text::holding(room, part), false))
        }
        Some(Answer::Failed(faults)) => {
            let errors = reply::errors(&faults, &id).unwrap_or_default();
            let mut last = part(&format!("{{\"payload\":{{\"errors\":{errors}}}}}")).to_vec();
            last.extend_from_slice(&END);
            Ok((Bytes::from(last), true))
        }
        Some(Answer::Stopping) => Err(cut()),
        None => Ok((END, true)),
    };
    let parts = framed(answers, HEARTBEAT, part("{}"), frame);
    let delimited = stream::once(async { Ok(Bytes::from_static(DELIMITER.as_bytes())) }).chain(parts);
    let mut response = Response::new(Body::from_stream(delimited));
    response.extensions_mut().insert(Reserved);
    let headers = response.headers_mut();
    let kind = "multipart/mixed;boundary=\"graphql\";subscriptionSpec=\"1.0\"";
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    streaming(headers);
    response
}

/// A part, and the delimiter right behind it: Apollo Client shows a part only when it has seen that.
fn part(json: &str) -> Bytes {
    Bytes::from(format!("\r\ncontent-type: application/json\r\n\r\n{json}{DELIMITER}"))
}
