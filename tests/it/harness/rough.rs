//! A rough network: a TCP proxy that can be told to cut, delay, lose answers, or fall silent.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A free port that is still free when its server has been killed: below those that connections get, since one that asks for
/// a port nobody listens at may be given that very port, and be connected to itself.
pub fn steady_port() -> u16 {
    let random = uuid::Uuid::new_v4().as_u64_pair().0;
    (0..)
        .map(|attempt| 20_000 + u16::try_from((random + attempt) % 12_000).expect("small"))
        .find(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .expect("a free port")
}

/// What the network does, from now on, to every connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Weather {
    /// Everything goes through.
    Fine,
    /// Every piece waits a while.
    Slow,
    /// Of five connections one is cut, at some point: before the request, inside of it, or after it and before the answer.
    Cutting,
    /// Nothing goes through, and nobody is told.
    Silent,
}

/// A proxy on a port of its own.
pub struct RoughProxy {
    /// Where it listens.
    pub port: u16,
    weather: Arc<AtomicU8>,
}

impl RoughProxy {
    /// In front of a port of this machine.
    pub async fn before(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let own = listener.local_addr().expect("bound").port();
        let weather = Arc::new(AtomicU8::new(Weather::Fine as u8));
        let (shared, count) = (weather.clone(), Arc::new(AtomicU64::new(1)));
        tokio::spawn(async move {
            loop {
                // A client that is killed may be gone before it is let in.
                let Ok((client, _)) = listener.accept().await else { continue };
                let number = count.fetch_add(1, Ordering::Relaxed);
                let (weather, upstream) = (shared.clone(), TcpStream::connect(("127.0.0.1", port)));
                tokio::spawn(async move {
                    let Ok(upstream) = upstream.await else { return };
                    let _ = client.set_nodelay(true);
                    let _ = upstream.set_nodelay(true);
                    Box::pin(forward(client, upstream, &weather, number)).await;
                });
            }
        });
        Self { port: own, weather }
    }

    pub fn set(&self, weather: Weather) {
        self.weather.store(weather as u8, Ordering::Relaxed);
    }
}

async fn forward(client: TcpStream, upstream: TcpStream, weather: &AtomicU8, number: u64) {
    let (mut client_read, mut client_write) = client.into_split();
    let (mut upstream_read, mut upstream_write) = upstream.into_split();
    let (mut up, mut down) = ([0; 16384], [0; 16384]);
    // The same for each connection of a round, and different between them.
    let mut random = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    loop {
        let (read, upwards) = tokio::select! {
            read = client_read.read(&mut up) => (read, true),
            read = upstream_read.read(&mut down) => (read, false),
        };
        let length = read.unwrap_or(0);
        if length == 0 {
            return;
        }
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let is = |wanted: Weather| weather.load(Ordering::Relaxed) == wanted as u8;
        while is(Weather::Silent) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        if is(Weather::Slow) {
            tokio::time::sleep(Duration::from_millis(random % 200)).await;
        }
        let mut end = length;
        if is(Weather::Cutting) && random.is_multiple_of(10) {
            // What was sent may have arrived all the same.
            end = usize::try_from(random >> 32).unwrap_or(0) % (length + 1);
        }
        let sent = match upwards {
            true => upstream_write.write_all(&up[..end]).await,
            false => client_write.write_all(&down[..end]).await,
        };
        if sent.is_err() || end < length {
            return;
        }
    }
}
