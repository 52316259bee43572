//! A network that breaks: a TCP proxy that cuts its connections at random bytes.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Cuts every connection after some bytes, both ways counted. Every other time the server does not hear of it: its side
/// stays open, so that what it has received still goes on.
pub struct FlakyProxy {
    /// Base URL for clients.
    pub url: String,
    cuts: Arc<AtomicUsize>,
    accepting: JoinHandle<()>,
}

impl FlakyProxy {
    /// In front of the server at a base URL. The same seed cuts at the same bytes.
    pub async fn before(url: &str, seed: u64, bytes: Range<u64>) -> Self {
        let server = url.strip_prefix("http://").expect("a plain URL").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let own = format!("http://{}", listener.local_addr().expect("an address"));
        let cuts = Arc::new(AtomicUsize::new(0));
        let counted = cuts.clone();
        let accepting = tokio::spawn(async move {
            let kept = Arc::new(Mutex::new(Vec::new()));
            let mut random = seed | 1;
            while let Ok((client, _)) = listener.accept().await {
                // Xorshift: no more is needed, and it is the same everywhere.
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let budget = bytes.start + random % (bytes.end - bytes.start);
                let (server, kept, cuts) = (server.clone(), kept.clone(), counted.clone());
                let lingers = random & (1 << 40) != 0;
                tokio::spawn(async move {
                    let Ok(upstream) = TcpStream::connect(server).await else { return };
                    let upstream = forward(client, upstream, budget).await;
                    cuts.fetch_add(1, Ordering::Relaxed);
                    if lingers {
                        kept.lock().expect("no panic while held").push(upstream);
                    }
                });
            }
        });
        Self { url: own, cuts, accepting }
    }

    /// Connections that are over.
    pub fn cuts(&self) -> usize {
        self.cuts.load(Ordering::Relaxed)
    }
}

impl Drop for FlakyProxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Copies both ways until the budget is spent or a side ends; gives the server's side back.
async fn forward(mut client: TcpStream, mut upstream: TcpStream, mut budget: u64) -> TcpStream {
    let (mut up, mut down) = ([0; 4096], [0; 4096]);
    while budget > 0 {
        let (read, to, buffer) = tokio::select! {
            read = client.read(&mut up) => (read, &mut upstream, &up),
            read = upstream.read(&mut down) => (read, &mut client, &down),
        };
        let length = read.unwrap_or(0);
        let length = length.min(usize::try_from(budget).unwrap_or(length));
        if length == 0 || to.write_all(&buffer[..length]).await.is_err() {
            break;
        }
        budget -= length as u64;
    }
    upstream
}

/// A network that a test cuts and heals.
pub struct Wire {
    /// `host:port` for clients.
    pub address: String,
    /// True while nothing gets through.
    cut: watch::Sender<bool>,
    accepting: JoinHandle<()>,
}

impl Wire {
    /// To the server at `host:port`.
    pub async fn to(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let (cut, is_cut) = watch::channel(false);
        let server = server.to_owned();
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (server, mut is_cut) = (server.clone(), is_cut.clone());
                tokio::spawn(async move {
                    let carry = async {
                        let mut upstream = TcpStream::connect(server).await?;
                        let mut client = client;
                        copy_bidirectional(&mut client, &mut upstream).await
                    };
                    tokio::select! {
                        _ = carry => {}
                        _ = is_cut.wait_for(|cut| *cut) => {}
                    }
                });
            }
        });
        Self { address, cut, accepting }
    }

    /// Ends every connection, and every new one at once.
    pub fn cut(&self) {
        self.cut.send_replace(true);
    }

    /// Lets new connections through.
    pub fn heal(&self) {
        self.cut.send_replace(false);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}
