//! A client of `graphql-transport-ws` that can also misbehave.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use http::HeaderName;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

/// The subprotocol.
pub const PROTOCOL: &str = "graphql-transport-ws";
/// Longest wait for a frame that a test expects; a failure, not a pace.
const PATIENCE: Duration = Duration::from_secs(20);

/// An open connection.
#[derive(Debug)]
pub struct Socket {
    /// The subprotocol that the server chose.
    pub protocol: Option<String>,
    stream: WebSocketStream<MaybeTlsStream<TcpStream>>,
}

impl Socket {
    /// Connects with our subprotocol and these headers; the status if it is refused.
    pub async fn open(url: &str, headers: &[(&str, &str)]) -> Result<Self, u16> {
        Self::offering(url, Some(PROTOCOL), headers).await
    }

    /// Connects over a stream of one's own.
    pub async fn over(stream: TcpStream, url: &str) -> Self {
        let mut request = url.replacen("http", "ws", 1).into_client_request().expect("a request");
        request.headers_mut().insert("sec-websocket-protocol", PROTOCOL.parse().expect("a value"));
        let opened = tokio_tungstenite::client_async(request, MaybeTlsStream::Plain(stream)).await;
        Self { protocol: Some(PROTOCOL.to_owned()), stream: opened.expect("a handshake").0 }
    }

    /// Connects with any offer of subprotocols.
    pub async fn offering(url: &str, offer: Option<&str>, headers: &[(&str, &str)]) -> Result<Self, u16> {
        let mut request = url.replacen("http", "ws", 1).into_client_request().expect("a request");
        let offer = offer.map(|offer| ("sec-websocket-protocol", offer));
        for (name, value) in headers.iter().copied().chain(offer) {
            let name: HeaderName = name.parse().expect("a header");
            request.headers_mut().insert(name, value.parse().expect("a value"));
        }
        match tokio_tungstenite::connect_async(request).await {
            Ok((stream, response)) => {
                let protocol = response.headers().get("sec-websocket-protocol");
                let protocol = protocol.map(|value| value.to_str().expect("text").to_owned());
                Ok(Self { protocol, stream })
            }
            Err(Error::Http(response)) => Err(response.status().as_u16()),
            Err(error) => panic!("{error}"),
        }
    }

    /// Says `connection_init` with a bearer or without and waits until it is accepted.
    pub async fn init(&mut self, bearer: Option<&str>) {
        let payload = bearer.map(|bearer| json!({"authorization": format!("Bearer {bearer}")}));
        self.say(json!({"type": "connection_init", "payload": payload})).await;
        assert_eq!(self.hear().await, json!({"type": "connection_ack"}));
    }

    /// Sends a frame. The server may have closed before.
    pub async fn send(&mut self, frame: Message) {
        let _ = self.stream.send(frame).await;
    }

    /// Sends bytes that need not be a frame.
    pub async fn send_raw(&mut self, bytes: &[u8]) {
        let _ = self.stream.get_mut().write_all(bytes).await;
    }

    /// Sends a message.
    pub async fn say(&mut self, message: Value) {
        self.send(Message::text(message.to_string())).await;
    }

    /// Begins an operation.
    pub async fn subscribe(&mut self, id: &str, query: &str, variables: Value) {
        let payload = json!({"query": query, "variables": variables});
        self.say(json!({"type": "subscribe", "id": id, "payload": payload})).await;
    }

    /// Ends an operation.
    pub async fn complete(&mut self, id: &str) {
        self.say(json!({"type": "complete", "id": id})).await;
    }

    /// The next frame; `None` once the connection has ended.
    pub async fn frame(&mut self) -> Option<Message> {
        patient(self.stream.next()).await?.ok()
    }

    /// The next message.
    pub async fn hear(&mut self) -> Value {
        let message = async {
            loop {
                match self.stream.next().await {
                    Some(Ok(Message::Text(text))) => return serde_json::from_str(&text).expect("JSON"),
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    other => panic!("no message but {other:?}"),
                }
            }
        };
        patient(message).await
    }

    /// The result of the operation that speaks next, which must be this one.
    pub async fn result(&mut self, id: &str) -> Value {
        let mut message = self.hear().await;
        assert_eq!((&message["id"], &message["type"]), (&json!(id), &json!("next")), "{message}");
        message["payload"].take()
    }

    /// The only field of the data of the next result of an operation.
    pub async fn event(&mut self, id: &str) -> Value {
        let mut result = self.result(id).await;
        assert!(result.get("errors").is_none(), "{result}");
        let Value::Object(data) = result["data"].take() else { panic!("no data: {result}") };
        data.into_iter().next().expect("a field").1
    }

    /// Checks that the operation ends now.
    pub async fn completed(&mut self, id: &str) {
        assert_eq!(self.hear().await, json!({"type": "complete", "id": id}));
    }

    /// Checks that the operation is refused now, and gives the errors.
    pub async fn refused(&mut self, id: &str) -> Value {
        let mut message = self.hear().await;
        assert_eq!((&message["id"], &message["type"]), (&json!(id), &json!("error")), "{message}");
        assert!(message["payload"].as_array().is_some_and(|errors| !errors.is_empty()), "{message}");
        message["payload"].take()
    }

    /// Checks that everything said before has been taken and that nothing is answered to it any more.
    pub async fn silent(&mut self) {
        self.say(json!({"type": "ping", "payload": {"are": "you there"}})).await;
        assert_eq!(self.hear().await, json!({"type": "pong", "payload": {"are": "you there"}}));
    }

    /// Reads to the end and gives the code and the reason of the close.
    pub async fn closed(&mut self) -> (u16, String) {
        let end = async {
            let mut closed = None;
            while let Some(Ok(frame)) = self.stream.next().await {
                if let Message::Close(frame) = frame {
                    closed = frame.map(|frame| (frame.code.into(), frame.reason.to_string()));
                }
            }
            closed
        };
        patient(end).await.expect("a close with a code")
    }
}

/// Pings of the server do not count as what is waited for.
#[track_caller]
fn patient<T>(expected: impl Future<Output = T>) -> impl Future<Output = T> {
    let caller = std::panic::Location::caller();
    async move {
        let timely = tokio::time::timeout(PATIENCE, expected).await;
        timely.unwrap_or_else(|_| panic!("{caller}: nothing within the patience of a test"))
    }
}
