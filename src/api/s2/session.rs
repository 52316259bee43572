//! A duplex append session: frames of batches in, frames of acks out, in the same order.
//!
//! One task, which works on the next acks once they are asked for: it takes the next batch only while the writer has room, so neither a
//! fast writer nor a slow reader costs more than the batches on their way.

use std::collections::VecDeque;
use std::time::Instant;

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt, StreamExt, stream};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use http_body_util::BodyExt;
use s2_api::v1::stream::s2s::{CompressionAlgorithm, FrameDecoder, SessionMessage};
use tokio_util::codec::Decoder;

use super::append::{outcome, proto_ack};
use super::batch::BoundedInput;
use super::target::Target;
use super::{BODY_MAX, S2S, error};
use crate::api::App;
use crate::api::error::Failure;
use crate::api::own_task::in_own_task;
use crate::api::received::Received;
use crate::api::trace::RequestId;
use crate::domain::{Appender, ConnectionBudget, DirectBatch, Direction, Error, WriterEnd, WriterEvent};
use crate::telemetry::{Chain, GaugeGuard};

/// Bytes of acks that go out together.
const PIECE: usize = 8 << 10;

/// One session, before and while its acks are read.
pub(super) struct Session {
    app: App,
    appender: Appender,
    direction: Direction,
    frames: Frames,
    compression: CompressionAlgorithm,
    /// When each batch that has no ack yet was sent.
    sent: VecDeque<Instant>,
    /// The writer has said that it is done.
    finished: bool,
    /// Why no more batches are taken; told after the acks that are to come.
    ending: Option<Failure>,
    over: bool,
    id: RequestId,
    _guard: GaugeGuard,
}

impl Session {
    /// # Errors
    /// As [`Sessions::appender`](crate::domain::Sessions::appender).
    pub(super) async fn open(
        app: &App,
        target: &Target,
        request: Request,
        id: RequestId,
    ) -> Result<Self, Failure> {
        let budget = request.extensions().get::<ConnectionBudget>().cloned();
        let budget = budget.ok_or_else(|| Error::internal("a request without a budget"))?;
        let appender = app.sessions.appender(&target.caller, &target.session, &target.channel).await;
        Ok(Self {
            appender: appender.map_err(error::refusal)?,
            direction: target.channel.direction,
            compression: CompressionAlgorithm::from_accept_encoding(request.headers()),
            frames: Frames::new(request.into_body(), budget),
            sent: VecDeque::new(),
            finished: false,
            ending: None,
            over: false,
            id,
            _guard: app.metrics.append_session(),
            app: app.clone(),
        })
    }

    /// The next frames for the writer; `None` at the end.
    async fn next(&mut self) -> Option<Bytes> {
        let first = self.frame().await?;
        let Some(second) = self.ready() else { return Some(first) };
        // A commit answers many batches: one write for all of them.
        let mut frames = BytesMut::with_capacity(PIECE);
        frames.extend_from_slice(&first);
        frames.extend_from_slice(&second);
        while frames.len() < PIECE
            && let Some(frame) = self.ready()
        {
            frames.extend_from_slice(&frame);
        }
        Some(frames.freeze())
    }

    /// A frame that need not be waited for.
    fn ready(&mut self) -> Option<Bytes> {
        while !self.over && self.appender.in_flight() > 0 {
            let event = self.appender.next().now_or_never()?;
            if let Some(frame) = self.event(event) {
                return Some(frame);
            }
        }
        None
    }

    async fn frame(&mut self) -> Option<Bytes> {
        while !self.over {
            if self.appender.in_flight() == 0 {
                if let Some(failure) = self.ending.take() {
                    return Some(self.terminate(&failure));
                }
                if self.finished {
                    return None;
                }
            }
            let reads = !self.finished && self.ending.is_none();
            tokio::select! {
                biased;
                event = self.appender.next(), if reads || self.appender.in_flight() > 0 => {
                    if let Some(frame) = self.event(event) {
                        return Some(frame);
                    }
                }
                frame = self.frames.next(), if reads && self.appender.has_room() => {
                    self.take(frame).await;
                }
            }
        }
        None
    }

    fn event(&mut self, event: WriterEvent) -> Option<Bytes> {
        let result = match event {
            WriterEvent::Answer(result) => result,
            WriterEvent::Ended(end) => {
                self.ending.get_or_insert(match end {
                    WriterEnd::Refused(error) => error::refusal(error),
                    WriterEnd::Stopping => error::stopping(),
                });
                return None;
            }
        };
        if let Some(sent) = self.sent.pop_front() {
            self.app.metrics.append(self.direction, outcome(&result), sent.elapsed());
        }
        let frame = result.map_err(error::refusal).and_then(|ack| {
            let frame = SessionMessage::regular(self.compression, &proto_ack(&ack));
            frame.map_err(|fault| error::refusal(Error::internal(fault)))
        });
        // Whatever comes behind a refused batch has lost its place.
        Some(frame.map_or_else(|failure| self.terminate(&failure), |frame| frame.encode()))
    }

    async fn take(&mut self, frame: Option<Result<DirectBatch, Failure>>) {
        let sent = match frame {
            None => {
                self.finished = true;
                return;
            }
            Some(Err(failure)) => Err(failure),
            Some(Ok(batch)) => {
                let begin = Instant::now();
                let sent = self.appender.send(batch).await;
                sent.map(|()| self.sent.push_back(begin)).map_err(error::refusal)
            }
        };
        if let Err(failure) = sent {
            self.ending.get_or_insert(failure);
        }
    }

    fn terminate(&mut self, failure: &Failure) -> Bytes {
        self.over = true;
        if let Some(cause) = failure.cause() {
            tracing::error!(request.id = self.id.as_str(), error = %Chain(cause), "an append session has failed");
        }
        error::terminal(failure, self.id.as_str())
    }
}

impl IntoResponse for Session {
    fn into_response(self) -> Response {
        let frames = stream::unfold(self, |mut session| async move {
            let frame = session.next().await?;
            Some((Ok::<_, std::convert::Infallible>(frame), session))
        });
        let mut response = Response::new(Body::from_stream(in_own_task(frames.boxed())));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(S2S));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, no-transform"));
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        response
    }
}

/// The batches in a request's body.
struct Frames {
    body: Body,
    buffer: BytesMut,
    budget: ConnectionBudget,
    /// Of the frame that has begun.
    received: Received,
}

impl Frames {
    fn new(body: Body, budget: ConnectionBudget) -> Self {
        Self { body, buffer: BytesMut::new(), budget, received: Received::default() }
    }

    /// The next batch; `None` when the writer is done, or gone. Cancel safe.
    async fn next(&mut self) -> Option<Result<DirectBatch, Failure>> {
        loop {
            match FrameDecoder.decode(&mut self.buffer) {
                Ok(Some(message)) => {
                    self.received = Received::default();
                    return Some(batch(message));
                }
                Ok(None) => {}
                Err(fault) => return Some(Err(error::bad("bad_frame", fault.to_string()))),
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        if let Err(failure) = self.received.add(&self.budget, data.len(), BODY_MAX) {
                            return Some(Err(error::reshaped(failure)));
                        }
                        self.buffer.extend_from_slice(&data);
                    }
                }
                None if self.buffer.is_empty() => return None,
                None => {
                    self.buffer.clear();
                    return Some(Err(error::bad("bad_frame", "the last frame is not whole")));
                }
                Some(Err(_)) => return None,
            }
        }
    }
}

fn batch(message: SessionMessage) -> Result<DirectBatch, Failure> {
    match message {
        SessionMessage::Regular(data) => {
            let input = data.try_into_proto::<BoundedInput>();
            input.map(DirectBatch::from).map_err(|fault| error::bad("bad_proto", fault.to_string()))
        }
        SessionMessage::Terminal(_) => Err(error::bad("bad_frame", "a writer sends no terminal frame")),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::FutureExt;
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::batch::tests::{batches, check};
    use super::*;
    use crate::domain::SendBudget;
    use crate::domain::record::BATCH_RECORDS_MAX;

    /// Bytes in pieces that end at these places.
    fn frames(bytes: &[u8], cuts: &[prop::sample::Index]) -> Frames {
        let mut cuts: Vec<_> =
            cuts.iter().map(|cut| cut.index(bytes.len() + 1)).chain([0, bytes.len()]).collect();
        cuts.sort_unstable();
        let pieces: Vec<_> = cuts
            .windows(2)
            .map(|pair| Ok::<_, Infallible>(Bytes::copy_from_slice(&bytes[pair[0]..pair[1]])))
            .collect();
        Frames::new(Body::from_stream(stream::iter(pieces)), SendBudget::new(0, 1).connection())
    }

    /// Everything up to the end or the first refusal, as a session would take it.
    fn all(mut frames: Frames) -> (Vec<DirectBatch>, Option<Failure>) {
        let read = async {
            let mut batches = Vec::new();
            loop {
                match frames.next().await {
                    Some(Ok(batch)) => batches.push(batch),
                    Some(Err(failure)) => return (batches, Some(failure)),
                    None => return (batches, None),
                }
            }
        };
        FutureExt::now_or_never(read).expect("every piece is there")
    }

    fn algorithm() -> impl Strategy<Value = CompressionAlgorithm> {
        use CompressionAlgorithm::{Gzip, None, Zstd};
        prop_oneof![Just(None), Just(Gzip), Just(Zstd)]
    }

    proptest! {
        #[test]
        fn batches_come_through_however_their_frames_are_cut(
            inputs in vec((batches(), algorithm()), 0..5),
            cuts in vec(any::<prop::sample::Index>(), 0..20),
        ) {
            let frame = |(input, algorithm): &_| SessionMessage::regular(*algorithm, input).expect("fits").encode();
            let bytes = inputs.iter().map(frame).collect::<Vec<_>>().concat();
            let (read, refused) = all(frames(&bytes, &cuts));
            prop_assert!(refused.is_none() && read.len() == inputs.len());
            for (batch, (input, _)) in read.iter().zip(&inputs) {
                check(batch, input)?;
            }
        }

        #[test]
        fn any_bytes_are_batches_and_perhaps_a_refusal(
            bytes in vec(any::<u8>(), 0..300),
            cuts in vec(any::<prop::sample::Index>(), 0..20),
        ) {
            let (read, refused) = all(frames(&bytes, &cuts));
            prop_assert!(read.iter().all(|batch| batch.records.len() <= BATCH_RECORDS_MAX + 1));
            prop_assert!(refused.is_none_or(|refused| refused.status.as_u16() == 400));
        }

        #[test]
        fn a_payload_of_any_bytes_under_any_flags_is_a_batch_or_a_refusal(
            flags in any::<u8>(),
            payload in vec(any::<u8>(), 0..200),
            input in batches(),
            cuts in vec(any::<prop::sample::Index>(), 0..5),
        ) {
            let length = u32::try_from(payload.len() + 1).expect("three bytes").to_be_bytes();
            let good = SessionMessage::regular(CompressionAlgorithm::None, &input).expect("fits").encode();
            let bytes = [&good[..], &length[1..], &[flags], &payload].concat();
            let (read, refused) = all(frames(&bytes, &cuts));
            check(&read[0], &input)?;
            prop_assert_eq!(read.len() == 2, refused.is_none());
        }

        #[test]
        fn what_is_cut_short_is_refused_and_nothing_of_it_is_taken(
            input in batches(),
            keep in any::<prop::sample::Index>(),
            cuts in vec(any::<prop::sample::Index>(), 0..5),
        ) {
            let frame = SessionMessage::regular(CompressionAlgorithm::None, &input).expect("fits").encode();
            let keep = keep.index(frame.len());
            let (read, refused) = all(frames(&frame[..keep], &cuts));
            prop_assert!(read.is_empty());
            prop_assert_eq!(refused.is_some_and(|refused| refused.code == "bad_frame"), keep > 0);
        }
    }
}
