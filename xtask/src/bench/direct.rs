//! Direct writes over the S2 wire: append sessions and single requests, on ours and on the open server of S2.

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bytes::{Bytes, BytesMut};
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use http::Request as Head;
use s2_api::v1::stream::proto::AppendAck;
use s2_api::v1::stream::s2s::{FrameDecoder, SessionMessage};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_util::codec::Decoder;

use super::load::{self, Answers, Measured};
use super::ours::{KEY, Ours};
use super::record::{self, Request};
use super::report::{Sample, Table};
use super::rows::{Bench, fresh, names};
use super::server::Server;
use super::stats::Latency;
use super::target::Target;

/// Batches that a session may have without an ack.
const WINDOW: usize = 256;
/// Sessions that share a connection.
const SESSIONS_A_CONNECTION: usize = 50;

/// A server of the S2 wire.
pub(crate) trait Wire {
    /// Its name in the tables.
    fn name(&self) -> &'static str;

    /// Installs what is missing, and answers the version.
    fn prepare(&self) -> anyhow::Result<String>;

    /// Starts a fresh one with its data in `home`.
    fn start(&self, home: &Path) -> anyhow::Result<Server>;

    /// Creates the streams.
    fn create(&self, server: &Server, streams: &[String]) -> anyhow::Result<()>;

    /// Where a stream takes appends.
    fn path(&self, stream: &str) -> String;

    /// What every request carries.
    fn headers(&self) -> Vec<(&'static str, String)>;
}

impl Wire for Ours {
    fn name(&self) -> &'static str {
        Target::name(self)
    }

    fn prepare(&self) -> anyhow::Result<String> {
        Ok(String::new())
    }

    fn start(&self, home: &Path) -> anyhow::Result<Server> {
        Target::start(self, home)
    }

    fn create(&self, server: &Server, streams: &[String]) -> anyhow::Result<()> {
        Target::create(self, server, streams)
    }

    fn path(&self, stream: &str) -> String {
        format!("/v1/streams/sessions%2F{stream}%2Fout/records")
    }

    fn headers(&self) -> Vec<(&'static str, String)> {
        vec![("authorization", format!("Bearer {KEY}"))]
    }
}

/// How a row writes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Way {
    /// One request at a time over HTTP/1.1, in protobuf.
    Unary,
    /// A session with so many batches in flight.
    Session(usize),
}

/// What the servers are compared by: a way, and on how many streams.
pub(crate) const DIRECT: [(Way, usize); 4] =
    [(Way::Unary, 1), (Way::Unary, 1000), (Way::Session(WINDOW), 1), (Way::Session(1), 1000)];

/// Name of a row.
pub(crate) fn direct(way: Way, streams: usize) -> String {
    let streams = format!("{streams} stream{}", if streams == 1 { "" } else { "s" });
    match way {
        Way::Unary => format!("unary, {streams}"),
        Way::Session(window) => format!("session, window {window}, {streams}"),
    }
}

impl Bench<'_> {
    /// Every round sees all servers.
    pub(crate) fn direct(&mut self, wires: &[Box<dyn Wire>]) -> anyhow::Result<()> {
        for _ in 0..self.rounds {
            for (way, count) in DIRECT {
                for wire in wires {
                    let server = wire.start(&fresh(&self.home, "server")?)?;
                    let streams = names("direct", count);
                    wire.create(&server, &streams)?;
                    let acks = match way {
                        Way::Unary => {
                            let requests = streams.iter().map(|stream| unary(wire.as_ref(), &server, stream));
                            self.runtime.block_on(load::answers(&server, requests.collect(), self.time))?
                        }
                        Way::Session(window) => {
                            let load = sessions(wire.as_ref(), &server, &streams, window, self.time);
                            self.runtime.block_on(load)?
                        }
                    };
                    self.samples.push(Sample {
                        table: Table::Direct,
                        row: direct(way, count),
                        server: wire.name().to_owned(),
                        values: acks.values(),
                    });
                }
            }
        }
        Ok(())
    }
}

/// The start of a batch of one record, up to the record's body, in protobuf.
fn batch_head() -> Vec<u8> {
    let body = [&[0x1a][..], &varint(record::LEN)].concat();
    [&[0x0a][..], &varint(body.len() + record::LEN), &body].concat()
}

fn varint(mut value: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

fn unary(wire: &dyn Wire, server: &Server, stream: &str) -> Request {
    let batch = batch_head();
    let length = (batch.len() + record::LEN).to_string();
    let own = wire.headers();
    let mut headers = vec![
        ("content-type", "application/protobuf"),
        ("accept", "application/protobuf"),
        ("content-length", length.as_str()),
    ];
    headers.extend(own.iter().map(|(name, value)| (*name, value.as_str())));
    let head = super::http::request(&format!("POST {}", wire.path(stream)), server.address, &headers);
    Request::new(&[head, batch].concat(), b"", super::http::answered)
}

/// One append session per stream, for `time` after warming up.
async fn sessions(
    wire: &dyn Wire,
    server: &Server,
    streams: &[String],
    window: usize,
    time: Duration,
) -> anyhow::Result<Answers> {
    let mut open = Vec::with_capacity(streams.len());
    for some in streams.chunks(SESSIONS_A_CONNECTION) {
        let mut connection = connect(server).await?;
        for stream in some {
            open.push(Session::open(&mut connection, wire, server, stream).await?);
        }
    }
    let (start, end) = load::warm_up(time);
    let mut tasks = JoinSet::new();
    for session in open {
        tasks.spawn(session.write(window, start, end));
    }
    load::measure(server, tasks, Measured { start, end, time }).await
}

async fn connect(server: &Server) -> anyhow::Result<SendRequest<Bytes>> {
    let stream = TcpStream::connect(server.address).await?;
    stream.set_nodelay(true)?;
    let (client, connection) = h2::client::Builder::new()
        .initial_window_size(1 << 20)
        .initial_connection_window_size(8 << 20)
        .handshake(stream)
        .await?;
    tokio::spawn(connection);
    Ok(client.ready().await?)
}

/// One append session.
struct Session {
    send: SendStream<Bytes>,
    acks: RecvStream,
    buffer: BytesMut,
    batch: Request,
}

impl Session {
    async fn open(
        client: &mut SendRequest<Bytes>,
        wire: &dyn Wire,
        server: &Server,
        stream: &str,
    ) -> anyhow::Result<Self> {
        let uri = format!("http://{}{}", server.address, wire.path(stream));
        let mut head =
            Head::post(uri).header("content-type", "s2s/proto").header("accept", "application/protobuf");
        for (name, value) in wire.headers() {
            head = head.header(name, value);
        }
        let (answer, send) = client.clone().ready().await?.send_request(head.body(())?, false)?;
        let answer = answer.await?;
        ensure!(answer.status() == 200, "the session was answered {}", answer.status());
        let payload = batch_head();
        let length = 1 + payload.len() + record::LEN;
        let frame = [&[0, (length >> 8) as u8, length as u8, 0][..], &payload].concat();
        let batch = Request::new(&frame, b"", |_| bail!("a frame has no answer of its own"));
        Ok(Self { send, acks: answer.into_body(), buffer: BytesMut::new(), batch })
    }

    async fn write(mut self, window: usize, start: Instant, end: Instant) -> anyhow::Result<Latency> {
        let (mut latency, mut sent) = (Latency::default(), VecDeque::with_capacity(window));
        let (mut number, mut acked) = (0_u64, 0_u64);
        while Instant::now() < end || !sent.is_empty() {
            while sent.len() < window && Instant::now() < end {
                sent.push_back(Instant::now());
                self.send.send_data(Bytes::copy_from_slice(self.batch.stamp(number)), false)?;
                number += 1;
            }
            let piece = self.acks.data().await.context("the server has ended a session")??;
            self.acks.flow_control().release_capacity(piece.len())?;
            self.buffer.extend_from_slice(&piece);
            while let Some(message) = FrameDecoder.decode(&mut self.buffer)? {
                let SessionMessage::Regular(data) = message else { bail!("refused: {message:?}") };
                let ack: AppendAck = data.try_into_proto()?;
                let start_of = ack.start.context("an ack without a start")?.seq_num;
                ensure!(start_of == acked, "record {acked} was answered with number {start_of}");
                acked += 1;
                let at = sent.pop_front().context("an ack for nothing")?;
                let now = Instant::now();
                if at >= start && now <= end {
                    latency.record(now - at);
                }
            }
        }
        ensure!(acked == number, "{number} sent, {acked} acknowledged");
        Ok(latency)
    }
}
