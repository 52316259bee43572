//! Appends of direct writers: one batch in JSON or protobuf, or a duplex session.

use std::time::Instant;

use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_TYPE, HeaderValue};
use prost::Message;
use s2_api::mime::{self, JsonOrProto};
use s2_api::v1::stream::{self as wire, proto};

use super::coding::Coding;
use super::session::Session;
use super::target::Target;
use super::{BODY_MAX, PROTOBUF, batch, error, format};
use crate::api::App;
use crate::api::error::Failure;
use crate::api::extract::{LimitedBody, require_plain};
use crate::api::trace::RequestId;
use crate::domain::record::AppendAck;
use crate::domain::{ConnectionBudget, Error, Position};
use crate::telemetry::Outcome;

/// Appends a batch, or with `s2s/proto` any number of them over one request: the S2 records API. Trim and fence
/// commands and control records take secret keys, `out` only their tokens.
#[utoipa::path(post, path = "/v1/streams/{stream}/records", tag = "s2", operation_id = "s2Append",
    params(("stream" = String, Path, description = "As initialize has named it"),
        ("Content-Encoding" = Option<String>, Header, description = "gzip or zstd, of a batch in JSON or protobuf")),
    request_body(content((Object = "application/json"), (Vec<u8> = "application/protobuf"), (Vec<u8> = "s2s/proto"))),
    responses((status = 200, description = "Durable",
            content((Object = "application/json"), (Vec<u8> = "application/protobuf"), (Vec<u8> = "s2s/proto"))),
        (status = 412, description = "A condition of the batch does not hold: what is there instead", body = Object)))]
pub async fn append(
    State(app): State<App>,
    Extension(id): Extension<RequestId>,
    Extension(budget): Extension<ConnectionBudget>,
    target: Target,
    mut request: Request,
) -> Result<Response, Failure> {
    let content_type = mime::content_type(request.headers());
    if content_type.as_ref().is_some_and(mime::is_s2s_proto) {
        require_plain(request.headers()).map_err(error::reshaped)?;
        return Ok(Session::open(&app, &target, request, id).await?.into_response());
    }
    let answer_in = mime::accept(request.headers()).as_ref().and_then(JsonOrProto::from_mime);
    let format = format::asked(request.headers())?;
    let coding = Coding::of(request.headers())?;
    let body = LimitedBody::<BODY_MAX>::read_encoded(&mut request, &app).await;
    let LimitedBody(mut body) = body.map_err(error::reshaped)?;
    let is_proto = matches!(content_type.as_ref().and_then(JsonOrProto::from_mime), Some(JsonOrProto::Proto));
    if let Some(coding) = coding {
        body = coding.decode(&body, &budget, if is_proto { "bad_proto" } else { "bad_json" })?;
    }
    let batch = if is_proto { batch::from_proto(body)? } else { batch::from_json(&body, format)? };
    let begin = Instant::now();
    let result = app.sessions.append_direct(&target.caller, &target.session, &target.channel, batch).await;
    app.metrics.append(target.channel.direction, outcome(&result), begin.elapsed());
    let ack = result.map_err(error::refusal)?;
    Ok(match answer_in {
        Some(JsonOrProto::Proto) => {
            let body = Body::from(proto_ack(&ack).encode_to_vec());
            ([(CONTENT_TYPE, HeaderValue::from_static(PROTOBUF))], body).into_response()
        }
        _ => axum::Json(json_ack(&ack)).into_response(),
    })
}

/// What came of an append, for the metrics.
pub(super) fn outcome(result: &Result<AppendAck, Error>) -> Outcome {
    match result {
        Ok(ack) if ack.repeated => Outcome::Repeated,
        Ok(_) => Outcome::Stored,
        Err(Error::Unavailable { .. } | Error::Internal(_)) => Outcome::Failed,
        Err(_) => Outcome::Refused,
    }
}

fn json_ack(ack: &AppendAck) -> wire::AppendAck {
    let [start, end, tail] = [ack.start, ack.end, ack.tail].map(json_position);
    wire::AppendAck { start, end, tail }
}

/// A place in JSON.
pub(super) fn json_position(Position { seq_num, timestamp }: Position) -> wire::StreamPosition {
    wire::StreamPosition { seq_num, timestamp: timestamp.millis().unsigned_abs() }
}

/// An ack in protobuf.
pub(super) fn proto_ack(ack: &AppendAck) -> proto::AppendAck {
    let [start, end, tail] = [ack.start, ack.end, ack.tail].map(|position| Some(proto_position(position)));
    proto::AppendAck { start, end, tail }
}

/// A place in protobuf.
pub(super) fn proto_position(Position { seq_num, timestamp }: Position) -> proto::StreamPosition {
    proto::StreamPosition { seq_num, timestamp: timestamp.millis().unsigned_abs() }
}
