//! A client of the S2 wire that hides nothing: single requests, and sessions of frames over prior-knowledge HTTP/2.

mod batch;

use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::stream;
use prost::Message;
use reqwest::{Body, Client, Method, RequestBuilder, Response};
use s2_api::v1::stream::proto::{AppendAck, AppendInput, ReadBatch};
use s2_api::v1::stream::s2s::{FrameDecoder, SessionMessage};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::codec::Decoder;

pub use batch::{batch, compressed, envelope, frame, raw_frame, record};

use super::server::{Answer, KEY};
use super::{SseReader, TestServer, openapi};

/// Longest wait for a frame that a test expects; a failure, not a pace.
const PATIENCE: Duration = Duration::from_secs(30);

/// The S2 wire of one server.
#[derive(Clone)]
pub struct Wire {
    url: String,
    http: Client,
    h2: Client,
}

impl Wire {
    /// Of the server at a base URL.
    pub fn new(url: &str) -> Self {
        Self::with(url, |builder| builder)
    }

    /// With a changed client for sessions.
    pub fn with(url: &str, change: impl FnOnce(reqwest::ClientBuilder) -> reqwest::ClientBuilder) -> Self {
        let h2 = change(Client::builder().http2_prior_knowledge()).build().expect("a client");
        Self { url: url.to_owned(), http: Client::new(), h2 }
    }

    /// The same server through connections of their own.
    pub fn again(&self) -> Self {
        Self::new(&self.url)
    }

    /// PUT initialize of a channel, such as `in` or `channels/side/in`.
    pub async fn initialize(&self, bearer: &str, session: &str, io: &str) -> Answer {
        let url = format!("{}/realtime/v1/sessions/{session}/{io}", self.url);
        self.send(self.http.put(url).bearer_auth(bearer)).await
    }

    /// Initializes a channel with the root key.
    pub async fn open(&self, session: &str, io: &str) -> Stream {
        self.open_as(KEY, session, io).await
    }

    /// Initializes a channel with some bearer.
    pub async fn open_as(&self, bearer: &str, session: &str, io: &str) -> Stream {
        let answer = self.initialize(bearer, session, io).await;
        answer.expect(202);
        let header = |name| answer.header(name).expect(name).to_owned();
        Stream { wire: self.clone(), token: header("x-s2-access-token"), name: header("x-s2-stream-name") }
    }

    /// Creates a session with the root key.
    pub async fn create(&self, external_id: &str) {
        let body = json!({"type": "chat", "taskIdentifier": "agent", "externalId": external_id});
        let request = self.http.post(format!("{}/api/v1/sessions", self.url)).bearer_auth(KEY);
        let answer = self.send(request.json(&body)).await;
        assert!(answer.status.is_success(), "{answer:?}");
    }

    /// Closes a session with the root key.
    pub async fn close(&self, session: &str) {
        let request = self.http.post(format!("{}/api/v1/sessions/{session}/close", self.url));
        self.send(request.bearer_auth(KEY).json(&json!({"reason": "done"}))).await.expect(200);
    }
}

impl TestServer {
    /// The S2 wire of this server.
    pub fn wire(&self) -> Wire {
        Wire::new(&self.url)
    }
}

/// One channel as a direct writer has it.
#[derive(Clone)]
pub struct Stream {
    /// The server.
    pub wire: Wire,
    /// What opens the channel.
    pub token: String,
    /// What it is called.
    pub name: String,
}

impl Stream {
    /// The same server and name under another token.
    pub fn with_token(&self, token: &str) -> Self {
        Self { token: token.to_owned(), ..self.clone() }
    }

    /// The same token at another server.
    pub fn at(&self, wire: &Wire) -> Self {
        Self { wire: wire.clone(), ..self.clone() }
    }

    fn records(&self, client: &Client, method: Method, query: &str) -> RequestBuilder {
        let name = percent_encoding::utf8_percent_encode(&self.name, percent_encoding::NON_ALPHANUMERIC);
        let url = format!("{}/v1/streams/{name}/records{query}", self.wire.url);
        client.request(method, url).bearer_auth(&self.token).header("s2-basin", "sessiond")
    }

    /// A request about the channel's records over HTTP/1.1; `query` may begin with `/tail`.
    pub fn request(&self, method: Method, query: &str) -> RequestBuilder {
        self.records(&self.wire.http, method, query)
    }

    /// Appends one batch in JSON.
    pub async fn append(&self, batch: &Value) -> Answer {
        self.wire.send(self.request(Method::POST, "").json(batch)).await
    }

    /// Appends one batch in protobuf; an ack comes back as one.
    pub async fn append_proto(&self, input: &AppendInput) -> Result<AppendAck, Answer> {
        let response = self.post_proto(input).send().await.expect("an answer");
        if response.status().is_success() {
            assert_eq!(response.headers()["content-type"], "application/protobuf");
            let body = response.bytes().await.expect("a whole body");
            return Ok(AppendAck::decode(body).expect("an ack"));
        }
        Err(whole(response).await)
    }

    /// As [`Stream::append_proto`], through a connection that may break.
    pub async fn try_append_proto(&self, input: &AppendInput) -> reqwest::Result<AppendAck> {
        let body = self.post_proto(input).send().await?.error_for_status().expect("taken").bytes().await?;
        Ok(AppendAck::decode(body).expect("an ack"))
    }

    fn post_proto(&self, input: &AppendInput) -> RequestBuilder {
        let request = self.request(Method::POST, "").header("content-type", "application/protobuf");
        request.header("accept", "application/protobuf").body(input.encode_to_vec())
    }

    /// Reads once in JSON.
    pub async fn read(&self, query: &str) -> Answer {
        self.wire.send(self.request(Method::GET, query)).await
    }

    /// Where the next record will stand.
    pub async fn tail(&self) -> u64 {
        let answer = self.read("/tail").await.expect(200);
        answer["tail"]["seq_num"].as_u64().expect("a number")
    }

    /// Every stored record but the one that tells of a close, in JSON.
    pub async fn stored(&self) -> Vec<Value> {
        let mut records: Vec<Value> = Vec::new();
        loop {
            let answer = self.read(&format!("?seq_num={}", records.len())).await;
            if answer.status.as_u16() == 416 {
                records.retain(|record| !tells_of_close(record));
                return records;
            }
            let batch = answer.expect(200);
            let more = batch["records"].as_array().expect("records");
            assert!(!more.is_empty(), "a read that is not at the tail finds something");
            for record in more {
                assert_eq!(record["seq_num"], records.len(), "a gap or a repeat");
                records.push(record.clone());
            }
        }
    }

    /// Bodies of every stored record.
    pub async fn bodies(&self) -> Vec<String> {
        let text = |record: &Value| record["body"].as_str().unwrap_or_default().to_owned();
        self.stored().await.iter().map(text).collect()
    }

    /// Reads on and on as server-sent events.
    pub async fn events(&self, query: &str, headers: &[(&'static str, &str)]) -> SseReader {
        let mut request = self.request(Method::GET, query).header("accept", "text/event-stream");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        SseReader::new(request.send().await.expect("an answer"))
    }

    /// Reads on and on as frames.
    pub async fn frames(&self, query: &str, encoding: &str) -> Result<FrameReader, Answer> {
        let request = self.records(&self.wire.h2, Method::GET, query).header("content-type", "s2s/proto");
        FrameReader::of(request.header("accept-encoding", encoding)).await.expect("an answer")
    }

    /// Begins an append session.
    pub async fn session(&self) -> Result<Writer, Answer> {
        self.session_with("").await
    }

    /// Begins an append session whose acks may be compressed.
    pub async fn session_with(&self, encoding: &str) -> Result<Writer, Answer> {
        self.attempt(encoding).await.expect("an answer")
    }

    /// As [`Stream::session_with`], through a connection that may break.
    pub async fn attempt(&self, encoding: &str) -> reqwest::Result<Result<Writer, Answer>> {
        let request = self.records(&self.wire.h2, Method::POST, "").header("accept-encoding", encoding);
        let (frames, sent) = mpsc::channel::<Bytes>(1);
        let body = stream::unfold(sent, |mut sent| async move {
            sent.recv().await.map(|frame| (Ok::<_, std::convert::Infallible>(frame), sent))
        });
        let request = request.header("content-type", "s2s/proto").header("accept", "application/protobuf");
        let answers = FrameReader::of(request.body(Body::wrap_stream(body))).await?;
        Ok(answers.map(|answers| Writer { frames: Some(frames), answers }))
    }
}

/// What comes back in a session.
#[derive(Clone, Debug, PartialEq)]
pub enum Heard<T> {
    /// A message.
    Message(T),
    /// The last frame: a status and a body.
    Terminal(u16, Value),
    /// The end, without a last word.
    End,
    /// The connection broke.
    Broken,
}

impl<T: std::fmt::Debug> Heard<T> {
    /// The message.
    #[track_caller]
    pub fn message(self) -> T {
        match self {
            Self::Message(message) => message,
            other => panic!("not a message: {other:?}"),
        }
    }

    /// Status and code of the last frame.
    #[track_caller]
    pub fn refusal(self) -> (u16, String) {
        match self {
            Self::Terminal(status, body) => (status, body["code"].as_str().unwrap_or_default().to_owned()),
            other => panic!("not a terminal frame: {other:?}"),
        }
    }
}

/// Frames as they come.
pub struct FrameReader {
    response: Response,
    buffer: BytesMut,
    over: bool,
    /// Compression of the frames that have come, by their flags.
    pub flags: Vec<u8>,
}

impl FrameReader {
    async fn of(request: RequestBuilder) -> reqwest::Result<Result<Self, Answer>> {
        let response = request.send().await?;
        if !response.status().is_success() {
            return Ok(Err(whole(response).await));
        }
        assert_eq!(response.headers()["content-type"], "s2s/proto");
        Ok(Ok(Self { response, buffer: BytesMut::new(), over: false, flags: Vec::new() }))
    }

    /// The next message. What follows a terminal frame is a fault.
    pub async fn next<T: Message + Default>(&mut self) -> Heard<T> {
        loop {
            if let Some(flag) = self.buffer.get(3).copied()
                && let Some(message) = FrameDecoder.decode(&mut self.buffer).expect("a frame")
            {
                assert!(!self.over, "a frame after the last");
                self.flags.push(flag);
                return match message {
                    SessionMessage::Regular(data) => {
                        Heard::Message(data.try_into_proto().expect("a message"))
                    }
                    SessionMessage::Terminal(end) => {
                        self.over = true;
                        Heard::Terminal(end.status, serde_json::from_str(&end.body).expect("JSON"))
                    }
                };
            }
            let chunk = tokio::time::timeout(PATIENCE, self.response.chunk()).await;
            match chunk.expect("something within the patience of a test") {
                Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk),
                Ok(None) => {
                    assert!(!self.buffer.has_remaining(), "half a frame");
                    return Heard::End;
                }
                Err(_) => return Heard::Broken,
            }
        }
    }

    /// The next batch of a read.
    pub async fn batch(&mut self) -> Heard<ReadBatch> {
        self.next().await
    }
}

/// An append session.
pub struct Writer {
    frames: Option<mpsc::Sender<Bytes>>,
    /// What comes back.
    pub answers: FrameReader,
}

impl Writer {
    /// Sends bytes as they are; false once the other side takes no more.
    pub async fn send_raw(&mut self, bytes: impl Into<Bytes>) -> bool {
        let frames = self.frames.as_ref().expect("not finished");
        frames.send(bytes.into()).await.is_ok()
    }

    /// Sends a batch.
    pub async fn send(&mut self, input: &AppendInput) -> bool {
        self.send_raw(frame(input)).await
    }

    /// Says that nothing more comes.
    pub fn finish(&mut self) {
        self.frames = None;
    }

    /// A sender of frames that works while answers are read.
    pub fn sender(&mut self) -> mpsc::Sender<Bytes> {
        self.frames.take().expect("not finished")
    }

    /// The next answer.
    pub async fn heard(&mut self) -> Heard<AppendAck> {
        self.answers.next().await
    }

    /// The number of the first record of the next ack.
    pub async fn ack(&mut self) -> u64 {
        self.heard().await.message().start.expect("a start").seq_num
    }

    /// Sends a batch of one record and waits for its place.
    pub async fn write(&mut self, body: &str) -> u64 {
        assert!(self.send(&batch(&[body])).await);
        self.ack().await
    }

    /// Reads to the end: how many acks came, and what came last.
    pub async fn rest(&mut self) -> (usize, Heard<AppendAck>) {
        let mut acks = 0;
        loop {
            match self.heard().await {
                Heard::Message(_) => acks += 1,
                end => return (acks, end),
            }
        }
    }
}

impl Wire {
    /// Sends a request, reads the whole answer and checks it against the server's own API document.
    pub async fn send(&self, request: RequestBuilder) -> Answer {
        let request = request.build().expect("a valid request");
        let (method, path) = (request.method().clone(), request.url().path().to_owned());
        let answer = whole(self.http.execute(request).await.expect("an answer")).await;
        openapi::check(&self.http, &self.url, &method, &path, &answer).await;
        answer
    }
}

async fn whole(response: Response) -> Answer {
    let (status, headers) = (response.status(), response.headers().clone());
    Answer { status, headers, text: response.text().await.expect("a whole body") }
}

/// The server's own last record of a closed main channel.
fn tells_of_close(record: &Value) -> bool {
    let text = record.to_string();
    text.contains("[\"trigger-control\",\"session-closed\"]") || text.contains("session-closed:session_")
}
