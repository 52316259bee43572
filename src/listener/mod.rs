//! One listener for HTTP/1.1 and prior-knowledge HTTP/2, with a cap on connections and a limit on every wait.
//!
//! Knows nothing of routes: it serves whatever router it is given.

mod handshake;
mod outgoing;
mod stall;
mod streams;
mod tls;

use std::any::Any;
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{env, io};

use anyhow::{Context, ensure};
use axum::Router;
use axum::extract::ConnectInfo;
use http::header::UPGRADE;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use listenfd::ListenFd;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::config::HttpConfig;
use crate::domain::{Background, ConnectionBudget, SendBudget};
use crate::shutdown::Shutdown;
use crate::telemetry::Metrics;
use handshake::Handshake;
use outgoing::Outgoing;
use stall::{StallGuard, Traffic};
use streams::Streams;

/// What a client that speaks HTTP/2 without asking sends first (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Largest head of a request, and largest read of a body at once.
const READ_BUFFER_MAX: usize = 64 * 1024;
/// Streams that one HTTP/2 connection may have open.
const STREAMS_MAX: u32 = 1000;
/// What a client may send ahead on one of them: a whole batch of a direct writer.
const STREAM_WINDOW: u32 = 1 << 20;
/// And on all of them together.
const CONNECTION_WINDOW: u32 = 2 << 20;
/// Longest pause between two looks at a socket that has sent part of the preface.
const PREFACE_PAUSE_MAX: Duration = Duration::from_millis(250);
/// This part of what may wait for clients is what it costs besides its bytes: tasks, heads, what the allocator rounds up.
const OVERHEAD_PART: usize = 8;
/// Bytes that the kernel keeps of a connection beyond what the peer has room for.
const UNSENT_MAX: u32 = 128 * 1024;
/// How long an HTTP/2 client without a stream may be silent after it was told to go. One that lives answers in a round trip,
/// and the connection ends of itself.
const FAREWELL_UNHEARD: Duration = Duration::from_millis(500);
/// As long for one that may still have to read the end of an answer.
const FAREWELL_HEARD: Duration = Duration::from_secs(3);
/// How long to wait before accepting again when the process is out of files or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The socket that whoever started the process listens on, by `LISTEN_FDS` (sd_listen_fds(3)): while no process runs, clients
/// wait in the kernel and are not refused.
fn given() -> anyhow::Result<Option<TcpListener>> {
    let count = env::var("LISTEN_FDS").unwrap_or_default();
    // The crate takes what is no number for nothing, and the socket of whoever has set it would wait for ever.
    let is_number = count.is_empty() || count.parse::<u16>().is_ok();
    ensure!(is_number, "LISTEN_FDS is {count:?}, which is no number of sockets");
    let mut sockets = ListenFd::from_env();
    ensure!(sockets.len() <= 1, "LISTEN_FDS names {} sockets; one is served", sockets.len());
    let Some(socket) = sockets.take_tcp_listener(0).context("LISTEN_FDS names no TCP socket")? else {
        return Ok(None);
    };
    ensure!(SockRef::from(&socket).is_listener()?, "LISTEN_FDS names a TCP socket that does not listen");
    socket.set_nonblocking(true)?;
    Ok(Some(TcpListener::from_std(socket)?))
}

/// A bound listener.
pub struct Listener {
    socket: TcpListener,
    tls: Option<TlsAcceptor>,
    permits: Arc<Semaphore>,
    budget: Arc<SendBudget>,
    config: HttpConfig,
    metrics: Arc<Metrics>,
}

impl Listener {
    /// Takes the socket that the process was given, or binds the configured address. Of blobs, `downloads` are sent at once.
    ///
    /// # Errors
    /// If the address is taken, what was given is no listening TCP socket, or a TLS file cannot be used.
    pub async fn bind(config: HttpConfig, downloads: usize, metrics: Arc<Metrics>) -> anyhow::Result<Self> {
        let tls = tls::acceptor(&config.tls)?;
        let socket = match given()? {
            Some(socket) => socket,
            None => TcpListener::bind(config.listen)
                .await
                .with_context(|| format!("cannot listen on {}", config.listen))?,
        };
        let permits = Arc::new(Semaphore::new(config.max_connections.min(Semaphore::MAX_PERMITS)));
        let budget = SendBudget::new(config.send_buffer - config.send_buffer / OVERHEAD_PART, downloads);
        Ok(Self { socket, tls, permits, budget, config, metrics })
    }

    /// The address in use.
    ///
    /// # Errors
    /// If the socket has none.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// `http` or `https`.
    pub fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    /// Serves until `shutdown` drains.
    pub async fn serve(self, router: Router, shutdown: Shutdown) {
        let stop = shutdown.draining().clone();
        while let Some(accepted) = stop.run_until_cancelled(self.accept()).await {
            let (socket, peer, permit) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let connection = Connection {
                router: router.clone(),
                peer,
                tls: self.tls.clone(),
                header_timeout: self.config.header_timeout,
                write_timeout: self.config.write_timeout,
                // A token of its own: a shared one would be a lock that every poll of every connection takes.
                draining: stop.child_token(),
                budget: self.budget.connection(),
                held: Arc::new((permit, self.metrics.connection())),
                heard: Arc::default(),
                switching: Arc::default(),
                background: shutdown.background().clone(),
            };
            shutdown.spawn("connection", connection.serve(socket));
        }
    }

    async fn accept(&self) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
        let permit = self.permits.clone().acquire_owned().await.map_err(io::Error::other)?;
        let (socket, peer) = self.socket.accept().await?;
        socket.set_nodelay(true)?;
        // What the peer's window has no room for waits here, where it is counted, and not in the kernel. A kernel that
        // does not know the option keeps more.
        let _ = SockRef::from(&socket).set_tcp_notsent_lowat(UNSENT_MAX);
        Ok((socket, peer, permit))
    }
}

struct Connection {
    router: Router,
    /// Whom requests come from; each gets it as an extension.
    peer: SocketAddr,
    tls: Option<TlsAcceptor>,
    header_timeout: Duration,
    write_timeout: Duration,
    draining: CancellationToken,
    budget: ConnectionBudget,
    /// Counted for as long as it lives, and as whoever takes it over lives: an upgrade gets this as an extension.
    held: Arc<dyn Any + Send + Sync>,
    /// Set by the first request.
    heard: Arc<AtomicBool>,
    /// Set by an answer that ends HTTP.
    switching: Arc<AtomicBool>,
    background: Arc<Background>,
}

impl Connection {
    /// Every end of a connection is the peer's own business, so none is an error of ours.
    async fn serve(self, socket: TcpStream) {
        match &self.tls {
            None => match self.unless_draining(speaks_http2(&socket)).await {
                Some(Ok(true)) => self.serve_http2(socket).await,
                Some(Ok(false)) => self.serve_http1(socket).await,
                Some(Err(_)) | None => {}
            },
            Some(tls) => Box::pin(self.serve_tls(tls, socket)).await,
        }
    }

    async fn serve_tls(&self, tls: &TlsAcceptor, socket: TcpStream) {
        let Some(Ok(socket)) = self.unless_draining(tls.accept(socket)).await else { return };
        if socket.get_ref().1.alpn_protocol() == Some(tls::H2) {
            // hyper waits for the preface without end, and nothing can be peeked at below TLS.
            let unheard = async {
                sleep(self.header_timeout).await;
                if self.heard.load(Ordering::Relaxed) {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = self.serve_http2(socket) => {}
                () = unheard => {}
            }
        } else {
            self.serve_http1(socket).await;
        }
    }

    /// What comes before anything is under way, so that a stop need not wait for it. `None` if it takes too long.
    async fn unless_draining<T>(&self, greeting: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            greeted = timeout(self.header_timeout, greeting) => greeted.ok(),
            () = self.draining.cancelled() => None,
        }
    }

    async fn serve_http1<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(&self, socket: S) {
        // hyper ends a connection between two requests, but goes on waiting for the first one.
        let unheard = async {
            if self.heard.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
        };
        drive(self.http1(socket), &self.draining, unheard, &self.budget).await;
    }

    async fn serve_http2<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(&self, socket: S) {
        let streams = Streams::new(self.write_timeout, self.background.clone());
        let silent = async {
            let heard = self.heard.load(Ordering::Relaxed);
            streams.silent(if heard { FAREWELL_HEARD } else { FAREWELL_UNHEARD }).await;
        };
        drive(self.http2(socket, &streams), &self.draining, silent, &self.budget).await;
    }

    fn service(&self) -> impl Handler {
        let (router, held, heard) = (self.router.clone(), self.held.clone(), self.heard.clone());
        let (budget, switching) = (self.budget.clone(), self.switching.clone());
        let peer = self.peer;
        service_fn(move |mut request: Request<Incoming>| {
            heard.store(true, Ordering::Relaxed);
            request.extensions_mut().insert(ConnectInfo(peer));
            let upgrade = request.headers().contains_key(UPGRADE).then(|| switching.clone());
            if upgrade.is_some() {
                request.extensions_mut().insert(held.clone());
            }
            let budget = budget.request();
            request.extensions_mut().insert(budget.clone());
            let answer = router.clone().oneshot(request);
            async move {
                outgoing::begin(&budget);
                let answer = answer.await?;
                if let (Some(switching), StatusCode::SWITCHING_PROTOCOLS) = (upgrade, answer.status()) {
                    switching.store(true, Ordering::Relaxed);
                }
                Ok(outgoing::within(budget, answer))
            }
        })
    }

    /// Built outside the task, which would keep room for what only passes through it.
    fn http1<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        &self,
        socket: S,
    ) -> Pin<Box<impl Graceful>> {
        let traffic = Traffic::Taken(self.budget.clone(), Handshake::new(self.switching.clone()));
        let io = TokioIo::new(StallGuard::new(socket, self.write_timeout, traffic));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.header_timeout)
            .max_buf_size(READ_BUFFER_MAX)
            .serve_connection(io, self.service())
            .with_upgrades();
        Box::pin(connection)
    }

    fn http2<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        &self,
        socket: S,
        streams: &Streams,
    ) -> Pin<Box<impl Graceful>> {
        // Frames that carry no answer, such as those that answer pings, are no progress: the streams say what they gave out.
        let traffic = Traffic::Streams(self.budget.clone(), streams.moved());
        let io = TokioIo::new(StallGuard::new(socket, self.write_timeout, traffic));
        let connection = http2::Builder::new(streams.clone())
            .timer(TokioTimer::new())
            .keep_alive_interval(self.header_timeout)
            .keep_alive_timeout(self.header_timeout)
            .max_concurrent_streams(STREAMS_MAX)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .serve_connection(io, self.service());
        Box::pin(connection)
    }
}

/// What answers requests.
trait Handler:
    Service<Request<Incoming>, Response = Response<Outgoing>, Error = Infallible, Future: Send> + Send + 'static
{
}

impl<S> Handler for S where
    S: Service<Request<Incoming>, Response = Response<Outgoing>, Error = Infallible, Future: Send>
        + Send
        + 'static
{
}

/// A connection that can be asked to end after what is under way. hyper-util has such a trait, but not for
/// connections that may be upgraded.
trait Graceful: Future<Output = hyper::Result<()>> + Send {
    /// Asks.
    fn graceful_shutdown(self: Pin<&mut Self>);
}

impl<I, S> Graceful for http1::UpgradeableConnection<I, S>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    S: Handler,
{
    fn graceful_shutdown(self: Pin<&mut Self>) {
        Self::graceful_shutdown(self);
    }
}

impl<I, S> Graceful for http2::Connection<I, S, Streams>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    S: Handler,
{
    fn graceful_shutdown(self: Pin<&mut Self>) {
        Self::graceful_shutdown(self);
    }
}

/// Serves a connection to its end; once the server stops, to the end of what is under way: `nothing_left`, which is asked
/// from then on, completes when nothing is. It is dropped when others need the room of what it does not take.
async fn drive<C: Graceful>(
    mut connection: Pin<Box<C>>,
    draining: &CancellationToken,
    nothing_left: impl Future<Output = ()>,
    budget: &ConnectionBudget,
) {
    let ended = tokio::select! {
        biased;
        ended = connection.as_mut() => ended,
        () = budget.cut() => return,
        () = draining.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                biased;
                ended = connection => ended,
                () = nothing_left => return,
                () = budget.cut() => return,
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error = &error as &dyn std::error::Error, "connection ended early");
    }
}

/// Looks at the first bytes without taking them.
async fn speaks_http2(socket: &TcpStream) -> io::Result<bool> {
    let mut seen = [0; PREFACE.len()];
    let mut pause = Duration::from_millis(5);
    loop {
        let len = socket.peek(&mut seen).await?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if seen[..len] != PREFACE[..len] {
            return Ok(false);
        }
        if len == PREFACE.len() {
            return Ok(true);
        }
        // Part of the preface: the socket stays readable, so only time can tell.
        sleep(pause).await;
        pause = (pause * 2).min(PREFACE_PAUSE_MAX);
    }
}
