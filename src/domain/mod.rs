//! The core: what a session, a channel and a record are, and every rule about them.
//!
//! Knows no transport, no database, no token format. Start reading at [`Sessions`].

pub mod access;
pub mod blob;
pub mod channel;
pub mod clock;
pub mod envelope;
pub mod error;
pub mod follow;
pub mod id;
pub mod lifeline;
pub mod list;
pub mod port;
pub mod record;
pub mod session;
mod sessions;
pub mod tenant;
pub mod timer;
pub mod transcript;
pub mod watch;

pub use access::{Action, Caller, CallerKind, Resource, Scopes};
pub use blob::{Blob, BlobInfo, BlobKey, Blobs, ByteStream};
pub use channel::{ChannelAddress, ChannelKey, ChannelName, Direction};
pub use clock::{Clock, SystemClock, TestClock, Timestamp};
pub use error::{Code, Error, Result, Violation};
pub use follow::{Follow, FollowEvent};
pub use id::{EnvironmentId, ExternalId, KeyId, RunId, SessionId, SessionRef};
pub use lifeline::Cut;
pub use list::{Cursor, Filter, Page, PageRequest, StatusSet, TagQuery};
pub use port::{ChannelStore, ListIndex, MetadataStore};
pub use record::{AppendAck, AppendInput, NewRecord, Position, ReadStart, Record, RecordBatch, SeqNum};
pub use session::{Closure, NewSession, Session, SessionPatch, Status};
pub use sessions::{
    Appended, Appender, Backends, CreateSession, Created, DirectBatch, FollowOptions, Sessions,
    SessionsConfig, WriterEnd, WriterEvent,
};
pub use watch::{Watch, WatchEvent};
