//! Arguments that several fields take.

use async_graphql::{Enum, ID, InputObject, OneofObject};

use super::global_id::GlobalId;
use super::record::ChannelIo;
use super::scalar::DateTime;
use super::session::SessionStatus;
use crate::api::period::period;
use crate::domain::{
    ChannelAddress, ChannelName, Error, ExternalId, Filter, Result, SessionRef, StatusSet, Timestamp,
};

/// Which session: by exactly one of its ids.
#[derive(Clone, Debug, OneofObject)]
pub enum SessionBy {
    /// The opaque id of the `Node`.
    Id(ID),
    /// `session_...`
    SessionId(String),
    /// The caller's own id.
    ExternalId(String),
}

impl SessionBy {
    /// The address that the use cases know.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field, if no session could ever have this id.
    pub fn address(&self) -> Result<SessionRef> {
        match self {
            Self::Id(id) => match GlobalId::decode(id) {
                Some(GlobalId::Session(id)) => Ok(SessionRef::Id(id)),
                _ => Err(Error::invalid("id", "is not the id of a session")),
            },
            Self::SessionId(text) => match SessionRef::parse(text) {
                Ok(id @ SessionRef::Id(_)) => Ok(id),
                _ => Err(Error::invalid("sessionId", "is not a session id")),
            },
            Self::ExternalId(text) => ExternalId::parse(text).map(SessionRef::External),
        }
    }
}

/// Which channel of a session.
///
/// # Errors
/// [`Error::Invalid`] for a name that no channel can have.
pub(super) fn channel(io: ChannelIo, name: Option<&str>) -> Result<ChannelAddress> {
    Ok(ChannelAddress { direction: io.into(), name: name.map(ChannelName::parse).transpose()? })
}

/// Where a subscription without `after` begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
pub enum FollowStart {
    /// At the first record that is stored.
    Start,
    /// After everything that is stored.
    Latest,
}

/// Which sessions: every given field must match.
#[derive(Clone, Debug, Default, InputObject)]
pub struct SessionFilter {
    /// `type` is one of these; at most 100.
    types: Option<Vec<String>>,
    /// By tags.
    tags: Option<TagFilter>,
    /// `taskIdentifier` is one of these; at most 100.
    task_identifiers: Option<Vec<String>>,
    /// `externalId` is this.
    external_id: Option<String>,
    /// The status, as it is now, is one of these.
    statuses: Option<Vec<SessionStatus>>,
    /// By time of creation.
    created_at: Option<TimeFilter>,
}

/// Tags that a session must have.
#[derive(Clone, Debug, Default, InputObject)]
pub struct TagFilter {
    /// At least one of these; at most 100.
    any: Option<Vec<String>>,
    /// All of these; at most 100.
    all: Option<Vec<String>>,
}

/// A span of time.
#[derive(Clone, Debug, Default, InputObject)]
pub struct TimeFilter {
    /// At or after.
    from: Option<DateTime>,
    /// At or before.
    to: Option<DateTime>,
    /// Not longer ago than this: a number and one of `s`, `m`, `h`, `d`, `w`, such as `7d`.
    period: Option<String>,
}

impl TimeFilter {
    /// From when, and until when.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field.
    pub fn span(self, now: Timestamp) -> Result<(Option<Timestamp>, Option<Timestamp>)> {
        let since = self.period.map(|text| {
            let period = period(&text);
            period.map(|period| now.minus(period)).ok_or_else(|| {
                Error::invalid("createdAt.period", "must be a number and one of s, m, h, d, w")
            })
        });
        Ok((self.from.map(|from| from.0).max(since.transpose()?), self.to.map(|to| to.0)))
    }
}

impl SessionFilter {
    /// The filter that the use cases know.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field.
    pub fn read(self, now: Timestamp) -> Result<Filter> {
        let tags = self.tags.unwrap_or_default();
        let (created_from, created_to) = self.created_at.unwrap_or_default().span(now)?;
        let external_ids = self.external_id.map(|id| ExternalId::parse(&id)).transpose()?;
        let statuses = self.statuses.unwrap_or_default().into_iter().map(Into::into).collect();
        Filter {
            kinds: self.types.unwrap_or_default(),
            tags_any: tags.any.unwrap_or_default(),
            tags_all: tags.all.unwrap_or_default(),
            task_identifiers: self.task_identifiers.unwrap_or_default(),
            external_ids: external_ids.into_iter().collect(),
            statuses: StatusSet::new(statuses),
            created_from,
            created_to,
        }
        .checked()
    }
}
