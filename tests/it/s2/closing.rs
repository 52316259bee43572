//! No byte gets into a session once its close has returned, whichever door it comes through.
//!
//! Writers hammer sessions through every door while these are closed. A try is one record; each record says who wrote it and
//! how often he had tried before, so that what is stored can be held against what was answered.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use reqwest::{Client, Method};
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::harness::Socket;
use crate::harness::engine::Engine;
use crate::harness::s2::{Heard, Stream, Wire, batch, frame};
use crate::harness::server::KEY;

/// Tries of one test, of which there are four for each engine; `SESSIOND_TEST_TRIES` asks for more.
const TRIES: usize = 6_250;
/// Sessions that are hammered at once, and closed one after another.
const AT_ONCE: usize = 8;
/// Records that are acknowledged in a session before it is closed.
const WARM: usize = 60;
/// Tries of each writer after the close.
const LATE: usize = 64;
/// Batches that a writer of frames has on their way, and records in one.
const WINDOW: usize = 8;
const RECORDS: usize = 8;
/// Tries of one batch that is not a session's.
const UNARY_RECORDS: usize = 4;

/// A door, and the channel that is written through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Door {
    AppendIn,
    AppendOut,
    GraphQlHttp,
    GraphQlSocket,
    UnaryJson,
    UnaryProto,
    Frames,
}

impl Door {
    const ALL: [Self; 7] = [
        Self::AppendIn,
        Self::AppendOut,
        Self::GraphQlHttp,
        Self::GraphQlSocket,
        Self::UnaryJson,
        Self::UnaryProto,
        Self::Frames,
    ];

    fn io(self) -> &'static str {
        match self {
            Self::AppendIn | Self::GraphQlHttp | Self::UnaryJson => "in",
            Self::AppendOut | Self::GraphQlSocket | Self::UnaryProto | Self::Frames => "out",
        }
    }
}

/// One session under fire.
struct Target {
    name: String,
    url: String,
    http: Client,
    streams: HashMap<&'static str, Stream>,
    acked: AtomicUsize,
    warm: Notify,
    /// Set before the close is asked for, and after it has been answered.
    closing: AtomicBool,
    closed: AtomicBool,
    tries: AtomicUsize,
}

/// What the writers of one session were told.
#[derive(Default)]
struct Told {
    acked: HashSet<String>,
    /// Tried after the close had been answered.
    late: HashSet<String>,
    refused: HashSet<String>,
}

impl Told {
    fn add(&mut self, other: Self) {
        self.acked.extend(other.acked);
        self.late.extend(other.late);
        self.refused.extend(other.refused);
    }
}

impl Target {
    async fn prepare(url: &str, name: &str) -> Arc<Self> {
        let wire = Wire::new(url);
        wire.create(name).await;
        let streams = [("in", wire.open(name, "in").await), ("out", wire.open(name, "out").await)];
        Arc::new(Self {
            name: name.to_owned(),
            url: url.to_owned(),
            http: Client::new(),
            streams: streams.into(),
            acked: AtomicUsize::new(0),
            warm: Notify::new(),
            closing: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            tries: AtomicUsize::new(0),
        })
    }

    /// A new body for each record of a batch.
    fn bodies(&self, door: Door, count: usize, told: &mut Told) -> Vec<String> {
        let first = self.tries.fetch_add(count, Ordering::Relaxed);
        let bodies: Vec<_> = (first..first + count).map(|number| format!("{door:?}-{number}")).collect();
        if self.closed.load(Ordering::SeqCst) {
            told.late.extend(bodies.iter().cloned());
        }
        bodies
    }

    /// `None`: the server does not know itself, because S2 did not answer in time.
    fn answered(&self, taken: Option<bool>, bodies: Vec<String>, told: &mut Told) {
        let Some(taken) = taken else { return };
        if taken {
            let before = self.acked.fetch_add(bodies.len(), Ordering::Relaxed);
            if before < WARM && before + bodies.len() >= WARM {
                self.warm.notify_one();
            }
            told.acked.extend(bodies);
        } else {
            assert!(self.closing.load(Ordering::SeqCst), "refused before the close: {bodies:?}");
            told.refused.extend(bodies);
        }
    }

    /// Writes through one door until `enough` tries were refused after the close.
    async fn hammer(self: Arc<Self>, door: Door, enough: usize) -> Told {
        let mut told = Told::default();
        match door {
            Door::GraphQlSocket => self.over_socket(enough, &mut told).await,
            Door::Frames => self.in_frames(enough, &mut told).await,
            _ => {
                while told.late.len() < enough {
                    let count = match door {
                        Door::AppendIn | Door::AppendOut => 1,
                        _ => UNARY_RECORDS,
                    };
                    let bodies = self.bodies(door, count, &mut told);
                    let taken = self.once(door, &bodies).await;
                    self.answered(taken, bodies, &mut told);
                }
            }
        }
        told
    }

    async fn once(&self, door: Door, bodies: &[String]) -> Option<bool> {
        let stream = &self.streams[door.io()];
        let records: Vec<_> = bodies.iter().map(|body| json!({"body": body})).collect();
        let status = match door {
            Door::AppendIn | Door::AppendOut => {
                let url = format!("{}/realtime/v1/sessions/{}/{}/append", self.url, self.name, door.io());
                let request = self.http.post(url).bearer_auth(KEY).body(bodies[0].clone());
                request.send().await.expect("an answer").status().as_u16()
            }
            Door::GraphQlHttp => {
                let request = self.http.post(format!("{}/graphql", self.url)).bearer_auth(KEY);
                let answer = request.json(&self.mutation(door, bodies)).send().await.expect("an answer");
                return taken(&answer.json().await.expect("JSON"));
            }
            Door::UnaryJson => {
                let request = stream.request(Method::POST, "").json(&json!({"records": records}));
                request.send().await.expect("an answer").status().as_u16()
            }
            _ => stream
                .append_proto(&batch(bodies))
                .await
                .map_or_else(|refused| refused.status.as_u16(), |_| 200),
        };
        let refusal = if door == Door::AppendOut { 400 } else { 409 };
        match status {
            200 => Some(true),
            503 => None,
            status => {
                assert_eq!(status, refusal, "{door:?}");
                Some(false)
            }
        }
    }

    fn mutation(&self, door: Door, bodies: &[String]) -> Value {
        let records: Vec<_> = bodies.iter().map(|body| json!({"text": body})).collect();
        let input =
            json!({"by": {"externalId": self.name}, "io": door.io().to_uppercase(), "records": records});
        json!({
            "query": "mutation($input: AppendRecordsInput!) { appendRecords(input: $input) { repeated userErrors { code } } }",
            "variables": {"input": input}
        })
    }

    /// Several mutations under way on one socket.
    async fn over_socket(&self, enough: usize, told: &mut Told) {
        let mut socket = Socket::open(&format!("{}/graphql", self.url), &[]).await.expect("a socket");
        socket.init(Some(KEY)).await;
        let (mut open, mut number) = (HashMap::new(), 0);
        while told.late.len() < enough || !open.is_empty() {
            while told.late.len() < enough && open.len() < WINDOW {
                let bodies = self.bodies(Door::GraphQlSocket, UNARY_RECORDS, told);
                let payload = self.mutation(Door::GraphQlSocket, &bodies);
                socket.say(json!({"type": "subscribe", "id": number.to_string(), "payload": payload})).await;
                open.insert(number.to_string(), bodies);
                number += 1;
            }
            let message = socket.hear().await;
            if message["type"] == "next" {
                let bodies = open.remove(message["id"].as_str().expect("an id")).expect("one of ours");
                self.answered(taken(&message["payload"]), bodies, told);
            }
        }
    }

    /// A pipelined session, and after its end whatever still can be sent into it, and new ones.
    async fn in_frames(&self, enough: usize, told: &mut Told) {
        let stream = &self.streams["out"];
        while told.late.len() < enough {
            let Ok(mut writer) = stream.session().await else {
                // Refused at the door: that is a try as well.
                let bodies = self.bodies(Door::Frames, RECORDS, told);
                self.answered(Some(false), bodies, told);
                continue;
            };
            let mut open = std::collections::VecDeque::new();
            let refused = loop {
                while open.len() < WINDOW {
                    let bodies = self.bodies(Door::Frames, RECORDS, told);
                    let sent = writer.send_raw(frame(&batch(&bodies))).await;
                    open.push_back(bodies);
                    if !sent {
                        break;
                    }
                }
                match writer.heard().await {
                    Heard::Message(_) => {
                        self.answered(Some(true), open.pop_front().expect("one is open"), told);
                    }
                    Heard::Terminal(status, body) => {
                        let code = body["code"].as_str().expect("a code");
                        assert!(
                            matches!((status, code), (409, "session_closed") | (503, "unavailable")),
                            "{body}"
                        );
                        let last = self.bodies(Door::Frames, RECORDS, told);
                        writer.send_raw(frame(&batch(&last))).await;
                        open.push_back(last);
                        break (status == 409).then_some(false);
                    }
                    other => panic!("a session ended without a word: {other:?}"),
                }
            };
            open.into_iter().for_each(|bodies| self.answered(refused, bodies, told));
        }
    }

    async fn close(&self) {
        self.warm.notified().await;
        self.closing.store(true, Ordering::SeqCst);
        let close = self.http.post(format!("{}/api/v1/sessions/{}/close", self.url, self.name));
        let answer = close.bearer_auth(KEY).json(&json!({})).send().await.expect("an answer");
        assert_eq!(answer.status().as_u16(), 200);
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Texts stored in a channel, through all of the ways in which a door may wrap them.
    async fn stored(&self, io: &str) -> Vec<String> {
        let text = |record: Value| {
            let body = record["body"].as_str().expect("a body").to_owned();
            serde_json::from_str::<Value>(&body)
                .ok()
                .and_then(|it| it["data"].as_str().map(str::to_owned))
                .unwrap_or(body)
        };
        self.streams[io].stored().await.into_iter().map(text).collect()
    }
}

/// Whether a mutation was taken; refused it may be only because of the close.
fn taken(answer: &Value) -> Option<bool> {
    if answer["errors"][0]["extensions"]["code"] == "UNAVAILABLE" {
        return None;
    }
    let payload = &answer["data"]["appendRecords"];
    match payload["userErrors"].as_array().map(Vec::as_slice) {
        Some([]) => Some(true),
        Some([error]) if error["code"] == "SESSION_CLOSED" => Some(false),
        _ => panic!("{answer}"),
    }
}

async fn nothing_gets_in(engine: Engine) {
    let wanted = std::env::var("SESSIOND_TEST_TRIES").map_or(TRIES, |tries| tries.parse().expect("a number"));
    let server = engine.start().await;
    let (mut tries, mut acknowledged, mut late, mut session) = (0, 0, 0, 0);
    while tries < wanted {
        let names = (session..session + AT_ONCE).map(|number| format!("s{number}"));
        session += AT_ONCE;
        let rounds: Vec<_> = names.map(|name| attack(&server.url, name)).collect();
        for (tried, told) in futures_util::future::join_all(rounds).await {
            tries += tried;
            acknowledged += told.acked.len();
            late += told.late.len();
        }
    }
    let name = engine.name;
    eprintln!("{name}: {tries} tries on {session} sessions, {acknowledged} taken, {late} after the close");
    assert!(late > wanted / 10 && acknowledged > wanted / 100);
}

macro_rules! nothing_gets_into_a_session_that_is_closed_through_any_door {
    ($($part:ident)+) => {
        $(mod $part {
            use super::{nothing_gets_in, Engine};

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn nothing_gets_into_a_session_that_is_closed_through_any_door_on_the_log() {
                nothing_gets_in(Engine::log()).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn nothing_gets_into_a_session_that_is_closed_through_any_door_on_s2() {
                nothing_gets_in(Engine::s2()).await;
            }
        })+
    };
}
nothing_gets_into_a_session_that_is_closed_through_any_door!(one two three four);

/// Hammers one session through every door, closes it meanwhile, and looks at what is stored.
async fn attack(url: &str, name: String) -> (usize, Told) {
    let target = Target::prepare(url, &name).await;
    let writers: Vec<_> =
        Door::ALL.map(|door| tokio::spawn(target.clone().hammer(door, LATE))).into_iter().collect();
    target.close().await;
    // What stands there now is all that ever will.
    let at_close = [target.stored("in").await, target.stored("out").await].concat();
    let mut told = Told::default();
    for writer in writers {
        told.add(writer.await.expect("a writer"));
    }
    let stored = [target.stored("in").await, target.stored("out").await].concat();
    assert_eq!(stored, at_close, "{name}: something was stored after the close had returned");
    let distinct: HashSet<_> = stored.iter().cloned().collect();
    assert_eq!(distinct.len(), stored.len(), "{name}: something was stored twice");
    for body in &told.acked {
        assert!(distinct.contains(body), "{name}: {body} was acknowledged and is not there");
    }
    for (kind, tried) in [("tried after the close", &told.late), ("refused", &told.refused)] {
        let offences: Vec<_> = tried.intersection(&distinct).collect();
        assert!(offences.is_empty(), "{name}: {kind} and stored: {offences:?}");
    }
    (target.tries.load(Ordering::Relaxed), told)
}
