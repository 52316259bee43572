//! The S2 wire for direct writers: a part of the records API of S2 (s2.dev), served on every engine, so that close,
//! expiry and scopes hold for them too.
//!
//! The SDK asks `PUT /realtime/v1/sessions/{session}/{io}` (`initialize`) for a token of ours and this endpoint, and
//! then writes here with S2's own client. Start at `append`: one batch, or a duplex session (`session`).

mod append;
mod batch;
mod coding;
mod error;
mod format;
pub mod initialize;
mod read;
mod reader;
mod session;
mod target;

pub use append::append;
pub(super) use error::{unallowed, unrouted};
pub use read::{check_tail, read};

pub(crate) use append::__path_append;
pub(crate) use read::{__path_check_tail, __path_read};

/// The only basin. S2's clients want its name to be 8 to 48 of `a-z`, `0-9` and `-`.
pub const BASIN: &str = "sessiond";
/// Largest body of one batch, in JSON or protobuf, as S2 has it.
const BODY_MAX: usize = 2 << 20;
/// Media type of the framed sessions.
const S2S: &str = "s2s/proto";
const PROTOBUF: &str = "application/protobuf";
