//! Whose channel a request is for: the name of a stream, and the token that opens it.

use axum::extract::{FromRequestParts, Path};
use http::HeaderMap;
use http::request::Parts;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::{BASIN, error};
use crate::api::App;
use crate::api::error::Failure;
use crate::api::extract::bearer;
use crate::domain::{Caller, ChannelAddress, ChannelName, Direction, Error, SessionRef};

/// Longest name of a stream, in bytes (S2's limit).
const NAME_MAX: usize = 512;
/// Stands for a session whose name does not fit: its token says which one is meant.
const UNNAMED: &str = "~";
/// What a name spells as `%XX`. The rest is what session ids are made of, and what paths leave alone.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'_').remove(b'-').remove(b'.');

/// With it S2 encrypts what it stores.
const ENCRYPTION_KEY: &str = "s2-encryption-key";

const NO_STREAM: Error = Error::NotFound("stream");

/// A caller and the channel that it names.
#[derive(Debug)]
pub struct Target {
    /// Who asks.
    pub caller: Caller,
    /// The session.
    pub session: SessionRef,
    /// Its channel.
    pub channel: ChannelAddress,
}

/// The name of a channel's stream: `sessions/{session}/{io}`, or `sessions/{session}/channels/{name}/{io}`.
pub(super) fn stream_name(session: &SessionRef, channel: &ChannelAddress) -> String {
    let name = |session: &str| match &channel.name {
        None => format!("sessions/{session}/{}", channel.direction.as_str()),
        Some(name) => format!("sessions/{session}/channels/{}/{}", name.as_str(), channel.direction.as_str()),
    };
    let full = name(&utf8_percent_encode(session.as_str(), ESCAPED).to_string());
    if full.len() <= NAME_MAX { full } else { name(UNNAMED) }
}

/// What a stream's name means.
fn parse_name(name: &str) -> Option<(SessionRef, ChannelAddress)> {
    let parts: Vec<_> = name.split('/').collect();
    let (session, channel, io) = match parts[..] {
        ["sessions", session, io] => (session, None, io),
        ["sessions", session, "channels", channel, io] => (session, Some(channel), io),
        _ => return None,
    };
    let session = percent_decode_str(session).decode_utf8().ok()?;
    let name = channel.map(ChannelName::parse).transpose().ok()?;
    let channel = ChannelAddress { direction: Direction::parse(io).ok()?, name };
    Some((SessionRef::parse(&session).ok()?, channel))
}

impl FromRequestParts<App> for Target {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        let name = Path::<String>::from_request_parts(parts, &()).await;
        let Path(name) = name.map_err(|_| error::bad("bad_path", "the name of the stream is not UTF-8"))?;
        let target = Self::find(app, &parts.headers, &name).await;
        let target = target
            .map_err(|error| error::refusal(app.refuse_stranger(&parts.headers, &parts.extensions, error)))?;
        basin(&parts.headers)?;
        if parts.headers.contains_key(ENCRYPTION_KEY) {
            let message = "s2-encryption-key cannot be honoured: records are stored as they are sent, so encrypt them before";
            return Err(error::bad("bad_header", message));
        }
        Ok(target)
    }
}

impl Target {
    /// A token for direct writes opens the one channel that it was made for; any other credentials open what the name
    /// says, as far as they reach.
    async fn find(app: &App, headers: &HeaderMap, name: &str) -> Result<Self, Error> {
        let bearer =
            bearer(headers).map_err(|_| Error::Unauthenticated("missing or malformed access token"))?;
        if let Some(grant) = app.auth.grant(bearer).await? {
            if stream_name(&grant.session, &grant.channel) != name {
                return Err(Error::Denied("the access token is for another stream"));
            }
            let (caller, session, channel) =
                (grant.caller.clone(), grant.session.clone(), grant.channel.clone());
            return Ok(Self { caller, session, channel });
        }
        let caller = app.auth.authenticate(bearer).await?;
        let (session, channel) = parse_name(name).ok_or(NO_STREAM)?;
        Ok(Self { caller: Caller::clone(&caller), session, channel })
    }
}

fn basin(headers: &HeaderMap) -> Result<(), Failure> {
    match headers.get("s2-basin") {
        Some(name) if name != BASIN => {
            let status = http::StatusCode::NOT_FOUND;
            Err(error::reshaped(Failure::new(
                status,
                "basin_not_found",
                format!("the only basin is {BASIN}"),
            )))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_spells_one_channel() {
        for (session, name, io, spelled) in [
            ("session_abc", None, Direction::Out, "sessions/session_abc/out"),
            ("a/b %", None, Direction::In, "sessions/a%2Fb%20%25/in"),
            ("s", Some("side.1"), Direction::In, "sessions/s/channels/side.1/in"),
        ] {
            let session = SessionRef::parse(session).expect("an address");
            let name = name.map(|name| ChannelName::parse(name).expect("a name"));
            let channel = ChannelAddress { direction: io, name };
            assert_eq!(stream_name(&session, &channel), spelled);
            assert_eq!(parse_name(spelled), Some((session, channel)));
        }
        for name in [
            "",
            "sessions",
            "sessions/s",
            "sessions/s/up",
            "sessions//in",
            "sessions/s/channels//in",
            "sessions/s/channels/a/b/in",
        ] {
            assert_eq!(parse_name(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn names_are_printable_and_fit_and_come_back(external in "\\PC{1,256}") {
            let Ok(session) = SessionRef::parse(&external) else { return Ok(()) };
            let channel = ChannelAddress::main(Direction::In);
            let name = stream_name(&session, &channel);
            prop_assert!(name.len() <= NAME_MAX && name.bytes().all(|b| b.is_ascii_graphic()));
            if !name.contains(UNNAMED) {
                prop_assert_eq!(parse_name(&name), Some((session, channel)));
            }
        }
    }
}
