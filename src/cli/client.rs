//! `tail` and `send`: small clients of a running server, over its public wire.

use std::collections::VecDeque;
use std::io::Write;
use std::time::Duration;
use std::{fmt, io};

use anyhow::{Context, anyhow, bail};
use bytes::{Buf, BytesMut};
use clap::{Args, ValueEnum};
use reqwest::{RequestBuilder, Response, StatusCode, Url};
use secrecy::ExposeSecret;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Common;
use super::control::{EnvironmentArg, root_of};

/// How long a server may be silent. A stream never is for longer than fifteen seconds.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// Where the server is and how to get in.
#[derive(Debug, Args)]
struct ServerArgs {
    /// Base URL of the server
    #[arg(long, env = "SESSIOND_URL", default_value = "http://127.0.0.1:3030")]
    url: Url,
    /// Secret key or public token [default: SESSIOND_SECRET_KEY, else the root key in the data folder]
    #[arg(long, env = "SESSIOND_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// A side channel instead of the session's main one
    #[arg(long)]
    channel: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Io {
    In,
    Out,
}

/// `sessiond tail`
#[derive(Debug, Args)]
pub(super) struct TailArgs {
    /// Session id or external id
    session: String,
    /// Which way
    #[arg(default_value = "out")]
    io: Io,
    /// Resume after this sequence number instead of at the start
    #[arg(long, value_name = "SEQ", conflicts_with = "latest")]
    after: Option<u64>,
    /// Only what comes from now on
    #[arg(long)]
    latest: bool,
    /// Print whole records as JSON, one a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: ServerArgs,
}

/// `sessiond send`
#[derive(Debug, Args)]
pub(super) struct SendArgs {
    /// Session id or external id
    session: String,
    /// The body, as it is
    body: String,
    /// Which way; `out` needs a secret key
    #[arg(long, default_value = "in")]
    io: Io,
    /// Create the session first if there is none with this external id
    #[arg(long)]
    create: bool,
    /// Print the whole answer
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: ServerArgs,
}

impl Io {
    fn as_str(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::Out => "out",
        }
    }
}

struct Client {
    http: reqwest::Client,
    base: Url,
    token: String,
}

impl Client {
    async fn new(common: &Common, args: &ServerArgs) -> anyhow::Result<Self> {
        let token = match &args.token {
            Some(token) => token.clone(),
            None => local_key(common).await?,
        };
        Self::patient(SILENCE_MAX, args.url.clone(), token)
    }

    /// One that takes a server for gone once it has been silent for so long.
    fn patient(silence: Duration, base: Url, token: String) -> anyhow::Result<Self> {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let http = reqwest::Client::builder().read_timeout(silence).build()?;
        Ok(Self { http, base, token })
    }

    fn url(&self, segments: &[&str]) -> anyhow::Result<Url> {
        let mut url = self.base.clone();
        let Ok(mut path) = url.path_segments_mut() else { bail!("{} cannot be a base URL", self.base) };
        path.pop_if_empty().extend(segments);
        drop(path);
        Ok(url)
    }

    fn channel_url(
        &self,
        session: &str,
        args: &ServerArgs,
        io: Io,
        verb: Option<&str>,
    ) -> anyhow::Result<Url> {
        let mut segments = vec!["realtime", "v1", "sessions", session];
        if let Some(channel) = &args.channel {
            segments.extend(["channels", channel]);
        }
        segments.push(io.as_str());
        segments.extend(verb);
        self.url(&segments)
    }

    async fn send(&self, request: RequestBuilder) -> anyhow::Result<Response> {
        let response = request
            .bearer_auth(&self.token)
            .send()
            .await
            .with_context(|| format!("cannot reach the server at {}; is it running?", self.base))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = response.text().await.unwrap_or_default();
        let body: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
        let message = body["error"].as_str().unwrap_or(&text).to_owned();
        Err(Refused { status, message }.into())
    }
}

/// An answer that is none.
#[derive(Debug)]
struct Refused {
    status: StatusCode,
    message: String,
}

impl Refused {
    /// Whether another attempt may help.
    fn is_passing(&self) -> bool {
        self.status.is_server_error() || self.status == StatusCode::TOO_MANY_REQUESTS
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the server says {}: {}", self.status, self.message)
    }
}

impl std::error::Error for Refused {}

/// The configured secret key, or the one that a local server generated.
async fn local_key(common: &Common) -> anyhow::Result<String> {
    let config = common.load(None)?;
    if let Some(key) = &config.secret_key {
        return Ok(key.expose_secret().to_owned());
    }
    let control = common.control().await?;
    let environment = EnvironmentArg::OLDEST.find(&control).await?;
    let root = root_of(&control, &environment).await?;
    Ok(root.secret.expose_secret().to_owned())
}

pub(super) async fn send(common: &Common, args: SendArgs) -> anyhow::Result<()> {
    let client = Client::new(common, &args.server).await?;
    if args.create {
        let body = json!({"type": "chat", "taskIdentifier": "terminal", "externalId": args.session});
        let url = client.url(&["api", "v1", "sessions"])?;
        client.send(client.http.post(url).json(&body)).await?;
    }
    let url = client.channel_url(&args.session, &args.server, args.io, Some("append"))?;
    let part_id = uuid::Uuid::new_v4().to_string();
    let request = client.http.post(url).header("X-Part-Id", part_id).body(args.body);
    let answer: Value = client.send(request).await?.json().await?;
    if args.json {
        println!("{answer}");
    } else {
        println!("{}", answer["seq"]);
    }
    Ok(())
}

pub(super) async fn tail(common: &Common, args: TailArgs) -> anyhow::Result<()> {
    let client = Client::new(common, &args.server).await?;
    let mut tail = Tail::new(client, args)?;
    loop {
        match tail.follow().await? {
            Left::Idle => {}
            Left::Ended => {
                eprintln!("the session has ended");
                return Ok(());
            }
            Left::TokenExpired => bail!("the token has expired; go on with a new one{}", tail.place()),
            Left::Unheard => return Ok(()),
            Left::Lost(error) if !tail.followed => return Err(error),
            Left::Lost(error) => {
                eprintln!("{error:#}; going on{}", tail.place());
                tokio::time::sleep(tail.pauses.next()).await;
            }
        }
    }
}

/// A follower that knows how far it has come.
struct Tail {
    client: Client,
    url: Url,
    args: TailArgs,
    /// The record that is printed next; as the arguments say without it.
    next: Option<u64>,
    /// It has followed, so the way is right.
    followed: bool,
    /// Since it last did.
    pauses: Backoff,
}

/// Why a stream was left.
enum Left {
    /// There was no record for as long as a stream may wait, or the reason is none that ends a tail.
    Idle,
    /// The session is closed or has expired.
    Ended,
    /// The server wants another token.
    TokenExpired,
    /// Nobody reads what is printed any more.
    Unheard,
    /// The server or the way to it is gone, for now.
    Lost(anyhow::Error),
}

impl Tail {
    fn new(client: Client, args: TailArgs) -> anyhow::Result<Self> {
        let url = client.channel_url(&args.session, &args.server, args.io, None)?;
        let next = args.after.map(|last| last.saturating_add(1));
        Ok(Self { client, url, next, args, followed: false, pauses: Backoff::default() })
    }

    /// Where to go on, as an argument says it.
    fn place(&self) -> String {
        let last = self.next.and_then(|next| next.checked_sub(1));
        last.map_or_else(String::new, |last| format!(" --after {last}"))
    }

    /// Follows one stream to its end.
    async fn follow(&mut self) -> anyhow::Result<Left> {
        let mut request = self.client.http.get(self.url.clone()).header("Timeout-Seconds", "600");
        match self.next {
            Some(next) => {
                if let Some(last) = next.checked_sub(1) {
                    request = request.header("Last-Event-ID", last.to_string());
                }
            }
            None if self.args.latest => request = request.header("X-Trigger-Stream-Start", "latest"),
            None => {}
        }
        let response = match self.client.send(request).await {
            Ok(response) if response.status() == StatusCode::OK => response,
            Ok(response) => bail!("unexpected answer {}", response.status()),
            Err(error) if error.downcast_ref::<Refused>().is_none_or(Refused::is_passing) => {
                return Ok(Left::Lost(error));
            }
            Err(error) => return Err(error),
        };
        self.followed = true;
        self.pauses = Backoff::default();
        let ahead =
            response.headers().get("x-cursor-ahead").and_then(|tail| tail.to_str().ok()?.parse().ok());
        if let Some(tail) = ahead {
            eprintln!("the channel ends before{}; going on at record {tail}", self.place());
            self.next = Some(tail);
        }
        let mut events = Events { response, buffer: BytesMut::new(), ready: VecDeque::new() };
        loop {
            let event = match events.next().await {
                Ok(Some(event)) => event,
                Ok(None) => return Ok(Left::Lost(anyhow!("the stream ended without a reason"))),
                Err(error) => return Ok(Left::Lost(error)),
            };
            match event.name.as_str() {
                "batch" => {
                    let batch: Batch = serde_json::from_str(&event.data)?;
                    if !self.print(&batch)? {
                        return Ok(Left::Unheard);
                    }
                }
                // Where "latest" was.
                "ping" if self.next.is_none() => {
                    let Ping { tail } = serde_json::from_str(&event.data)?;
                    self.next = Some(tail.seq_num);
                }
                "end" => {
                    let End { reason } = serde_json::from_str(&event.data)?;
                    return Ok(match reason.as_str() {
                        "closed" | "expired" => Left::Ended,
                        "token_expired" => Left::TokenExpired,
                        _ => Left::Idle,
                    });
                }
                "error" => return Ok(Left::Lost(anyhow!("the stream ended: {}", event.data))),
                _ => {}
            }
        }
    }

    /// Prints records. False once nobody reads them.
    fn print(&mut self, batch: &Batch) -> io::Result<bool> {
        let mut out = io::stdout().lock();
        for record in &batch.records {
            match writeln!(out, "{}", record.line(self.args.json)) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(false),
                written => written?,
            }
            self.next = Some(record.seq_num.saturating_add(1));
        }
        Ok(true)
    }
}

/// Pauses between attempts: twice as long each time, up to a limit.
struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(Duration::from_millis(100))
    }
}

impl Backoff {
    fn next(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (2 * pause).min(Duration::from_secs(5));
        pause
    }
}

#[derive(Deserialize)]
struct Ping {
    tail: Place,
}

#[derive(Deserialize)]
struct Place {
    seq_num: u64,
}

#[derive(Deserialize)]
struct End {
    reason: String,
}

#[derive(Deserialize)]
struct Batch {
    records: Vec<Record>,
}

#[derive(Deserialize)]
struct Record {
    seq_num: u64,
    timestamp: i64,
    #[serde(default)]
    headers: Vec<(String, String)>,
    #[serde(default)]
    body: String,
}

impl Record {
    fn line(&self, whole: bool) -> String {
        if whole {
            let Self { seq_num, timestamp, headers, body } = self;
            return json!({"seqNum": seq_num, "timestamp": timestamp, "headers": headers, "body": body})
                .to_string();
        }
        let envelope: Value = serde_json::from_str(&self.body).unwrap_or(Value::Null);
        match &envelope["data"] {
            Value::Null => self.body.clone(),
            Value::String(text) => text.clone(),
            data => data.to_string(),
        }
    }
}

struct Event {
    name: String,
    data: String,
}

/// Server-sent events of a response body.
struct Events {
    response: Response,
    buffer: BytesMut,
    ready: VecDeque<Event>,
}

impl Events {
    async fn next(&mut self) -> anyhow::Result<Option<Event>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            let Some(chunk) = self.response.chunk().await.context("the stream broke")? else {
                return Ok(None);
            };
            self.buffer.extend_from_slice(&chunk);
            while let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
                let block = self.buffer.split_to(end);
                self.buffer.advance(2);
                self.ready.push_back(Event::parse(&String::from_utf8_lossy(&block)));
            }
        }
    }
}

impl Event {
    fn parse(block: &str) -> Self {
        let mut event = Self { name: String::new(), data: String::new() };
        for line in block.lines() {
            match line.split_once(':') {
                Some(("event", value)) => value.trim_start().clone_into(&mut event.name),
                Some(("data", value)) => event.data.push_str(value.trim_start()),
                _ => {}
            }
        }
        event
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_server_that_falls_silent_is_left_and_asked_again_for_what_follows() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let server = ServerArgs { url: url.parse().expect("a URL"), token: None, channel: None };
        let args =
            TailArgs { session: "s".to_owned(), io: Io::Out, after: None, latest: true, json: false, server };
        let silence = Duration::from_secs(1);
        let client = Client::patient(silence, args.server.url.clone(), String::new()).expect("a client");
        let mut tail = Tail::new(client, args).expect("a URL");
        // The head of a request; then the connection stays open, and no more is said on it.
        let answered = async |answer: &str| {
            let (mut socket, _) = listener.accept().await.expect("a connection");
            let mut asked = String::new();
            while !asked.contains("\r\n\r\n") {
                let mut bytes = [0; 1024];
                let length = socket.read(&mut bytes).await.expect("a request");
                asked.push_str(&String::from_utf8_lossy(&bytes[..length]).to_lowercase());
            }
            socket.write_all(answer.as_bytes()).await.expect("written");
            (asked, socket)
        };
        let answer = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n\
                      event: ping\ndata: {\"tail\":{\"seq_num\":7}}\n\n";
        let (left, (asked, _open)) = tokio::join!(tail.follow(), answered(answer));
        assert!(matches!(left, Ok(Left::Lost(_))), "it has waited for the silent server");
        assert!(asked.contains("x-trigger-stream-start: latest"), "{asked}");
        assert_eq!(tail.place(), " --after 6");
        let end = "HTTP/1.1 200 OK\r\n\r\nevent: end\ndata: {\"reason\":\"closed\"}\n\n";
        let (left, (asked, _open)) = tokio::join!(tail.follow(), answered(end));
        assert!(matches!(left, Ok(Left::Ended)), "it goes on");
        assert!(asked.contains("last-event-id: 6") && !asked.contains("stream-start"), "{asked}");
    }
}
