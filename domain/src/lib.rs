//! The core: what a session, a channel and a record are, and every rule about them.
//!
//! Knows no transport, no database, no token format. Start reading at [`Sessions`].

pub mod access;
pub mod background;
mod backoff;
pub mod blob;
pub mod channel;
pub mod clock;
pub mod close;
pub mod envelope;
pub mod error;
pub mod follow;
pub mod id;
pub mod lifeline;
pub mod list;
pub mod port;
pub mod record;
pub mod run;
pub mod send_budget;
pub mod session;
mod sessions;
pub mod tenant;
pub mod timer;
pub mod transcript;
pub mod waitpoint;
pub mod watch;

pub use access::{Action, Caller, CallerKind, Resource, Scopes};
pub use background::{Background, Ticker};
pub use backoff::Backoff;
pub use blob::{Blob, BlobInfo, BlobKey, Blobs, ByteStream};
pub use channel::{ChannelAddress, ChannelKey, ChannelName, Direction};
pub use clock::{Clock, SystemClock, TestClock, Timestamp};
pub use close::Close;
pub use error::{Code, Error, Result, Violation};
pub use follow::{Follow, FollowEvent};
pub use id::{EnvironmentId, ExternalId, KeyId, RunId, SessionId, SessionRef, WaitpointId};
pub use lifeline::Cut;
pub use list::{Cursor, Filter, Page, PageRequest, StatusSet, TagQuery};
pub use port::{ChannelStore, Condition, ListIndex, MetadataStore, Waitpoints};
pub use record::{AppendAck, AppendInput, NewRecord, Position, ReadStart, Record, RecordBatch, SeqNum};
pub use run::{RunReason, SessionRun};
pub use send_budget::{ConnectionBudget, Delivery, SendBudget};
pub use session::{Closure, NewSession, Session, SessionPatch, Status};
pub use sessions::{
    Appended, Appender, Awaited, Backends, CreateSession, Created, DirectBatch, EndAndContinue,
    FollowOptions, Sessions, SessionsConfig, WriterEnd, WriterEvent,
};
pub use waitpoint::{Completion, NewWaitpoint, Outcome, WaitStatus, Waitpoint, WaitpointFilter};
pub use watch::{Watch, WatchEvent};
