//! Reads server-sent events as they come.

use std::time::Duration;

use reqwest::{Response, StatusCode};
use serde_json::Value;

/// Longest wait for an event that a test expects; a failure, not a pace.
const PATIENCE: Duration = Duration::from_secs(20);

/// One event, as it stood on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SseEvent {
    /// `event:`; empty if there was none.
    pub name: String,
    /// `id:`.
    pub id: Option<String>,
    /// `data:`.
    pub data: String,
}

impl SseEvent {
    /// The data as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Sequence numbers and bodies of a batch.
    #[track_caller]
    pub fn records(&self) -> Vec<(u64, Value)> {
        let batch = self.json();
        let records = batch["records"].as_array().expect("records");
        records.iter().map(|record| (record["seq_num"].as_u64().expect("a number"), record.clone())).collect()
    }
}

/// How a body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The last chunk came.
    Clean,
    /// The connection broke.
    Broken,
}

/// A followed response.
#[derive(Debug)]
pub struct SseReader {
    /// The response, headers and all.
    pub response: Response,
    buffer: Vec<u8>,
    end: Option<End>,
}

impl SseReader {
    /// Reads a response.
    pub fn new(response: Response) -> Self {
        Self { response, buffer: Vec::new(), end: None }
    }

    /// Checks that it is a stream.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.response.status(), StatusCode::OK, "{:?}", self.response);
        self
    }

    /// The next event, or how the body ended.
    pub async fn next(&mut self) -> Result<SseEvent, End> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
                let block: Vec<u8> = self.buffer.drain(..end + 2).collect();
                return Ok(parse(std::str::from_utf8(&block).expect("UTF-8")));
            }
            if let Some(end) = self.end {
                return Err(end);
            }
            let chunk = tokio::time::timeout(PATIENCE, self.response.chunk()).await;
            match chunk.expect("something within the patience of a test") {
                Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk),
                Ok(None) => self.end = Some(End::Clean),
                Err(_) => self.end = Some(End::Broken),
            }
        }
    }

    /// The next event that is not a ping.
    pub async fn event(&mut self) -> Result<SseEvent, End> {
        loop {
            let event = self.next().await?;
            if event.name != "ping" {
                return Ok(event);
            }
        }
    }

    /// Reads batches until `count` records have come, checking that their numbers follow each other.
    pub async fn records(&mut self, count: usize) -> Vec<(u64, Value)> {
        let mut records: Vec<(u64, Value)> = Vec::new();
        while records.len() < count {
            let event = self.event().await.unwrap_or_else(|end| panic!("the stream ended: {end:?}"));
            assert_eq!(event.name, "batch", "{event:?}");
            records.extend(event.records());
        }
        assert!(records.windows(2).all(|pair| pair[0].0 + 1 == pair[1].0), "a gap or a repeat: {records:?}");
        records
    }

    /// Reads to the end and gives every event but pings.
    pub async fn rest(&mut self) -> (Vec<SseEvent>, End) {
        let mut events = Vec::new();
        loop {
            match self.event().await {
                Ok(event) => events.push(event),
                Err(end) => return (events, end),
            }
        }
    }
}

fn parse(block: &str) -> SseEvent {
    let mut event = SseEvent { name: String::new(), id: None, data: String::new() };
    for line in block.lines() {
        let Some((field, value)) = line.split_once(':') else { continue };
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut event.name),
            "id" => event.id = Some(value.to_owned()),
            "data" => event.data.push_str(value),
            _ => {}
        }
    }
    event
}
