//! Tokens for direct writes: each opens exactly one channel to whoever asked for it, for no longer than they may write
//! there themselves.
//!
//! They are ours alone: another key, audience and type than public tokens, so neither passes as the other.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use data_encoding::BASE64URL_NOPAD;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, encode};
use serde::{Deserialize, Serialize};

use super::Auth;
use super::cache::{BearerHash, Footprint};
use crate::domain::{
    Action, Caller, CallerKind, ChannelAddress, ChannelName, Direction, EnvironmentId, Error, KeyId,
    Resource, Result, Scopes, SessionRef, Timestamp,
};

const ISSUER: &str = "sessiond";
const AUDIENCE: &str = "sessiond:direct";
const TYPE: &str = "direct+jwt";
const INVALID: Error = Error::Unauthenticated("the access token is invalid or has expired");

/// What a token for direct writes opens.
#[derive(Clone, Debug)]
pub struct Grant {
    /// Who writes: its scopes name this session alone.
    pub caller: Caller,
    /// The session, by its id if it existed when the token was made.
    pub session: SessionRef,
    /// The channel.
    pub channel: ChannelAddress,
}

impl Footprint for Grant {
    fn heap(&self) -> usize {
        let name = self.channel.name.as_ref().map_or(0, |name| name.as_str().len());
        self.caller.heap() + self.session.as_str().len() + name
    }
}

#[derive(Debug, Deserialize, Serialize)]
struct Claims {
    iss: String,
    aud: String,
    /// Seconds since the Unix epoch.
    exp: i64,
    /// The environment.
    sub: String,
    session: String,
    io: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    channel: Option<String>,
    scopes: Vec<String>,
    /// A secret key has asked: it may also trim, fence and write control records.
    #[serde(default)]
    private: bool,
    key: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    signed_with: Option<String>,
}

/// Looks at the form only: a token that says that it is one of these.
fn claims_to_be_direct(bearer: &str) -> bool {
    let header = bearer.split_once('.').map(|(header, _)| BASE64URL_NOPAD.decode(header.as_bytes()));
    let Some(Ok(header)) = header else { return false };
    serde_json::from_slice::<Header>(&header).is_ok_and(|header| header.typ.as_deref() == Some(TYPE))
}

impl Auth {
    /// A token that writes to one channel as `caller`, for `ttl` or for as long as the caller's own credentials. `address`
    /// is what the caller called the session.
    ///
    /// # Errors
    /// [`Error::Internal`].
    pub fn direct_token(
        &self,
        caller: &Caller,
        address: &SessionRef,
        session: &SessionRef,
        channel: &ChannelAddress,
        ttl: Duration,
    ) -> Result<String> {
        let end = self.clock.now().plus(ttl);
        let end = caller.expires_at.map_or(end, |own| own.min(end));
        let reads = |session: &SessionRef| caller.may(Action::Read, Resource::Session(session.as_str()));
        let may_read = reads(address) || reads(session);
        let actions = [Action::Write].into_iter().chain(may_read.then_some(Action::Read));
        let claims = Claims {
            iss: ISSUER.to_owned(),
            aud: AUDIENCE.to_owned(),
            exp: end.seconds(),
            sub: caller.environment.to_string(),
            session: session.to_string(),
            io: channel.direction.as_str().to_owned(),
            channel: channel.name.as_ref().map(|name| name.as_str().to_owned()),
            scopes: actions.map(|action| format!("{}:sessions:{session}", action.as_str())).collect(),
            private: caller.is_private(),
            key: caller.key.to_string(),
            signed_with: caller.signed_with.as_ref().map(KeyId::to_string),
        };
        let header = Header { typ: Some(TYPE.to_owned()), ..Header::new(Algorithm::HS256) };
        encode(&header, &claims, &EncodingKey::from_secret(self.vault.direct_key())).map_err(Error::internal)
    }

    /// What this bearer opens; `None` if it is none of these tokens.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`], [`Error::Unavailable`].
    pub async fn grant(&self, bearer: &str) -> Result<Option<Arc<Grant>>> {
        if bearer.len() > super::BEARER_MAX {
            return Ok(None);
        }
        let hash = BearerHash::of(bearer);
        if let Some(grant) = self.grants.get(&hash) {
            if grant.caller.require_current(self.clock.now()).is_ok() {
                return Ok(Some(grant));
            }
            self.grants.remove(&hash);
        }
        if !claims_to_be_direct(bearer) {
            return Ok(None);
        }
        loop {
            let before = self.sweeps.load(Ordering::Acquire);
            let grant = Arc::new(self.verify_grant(bearer).await?);
            self.grants.insert(hash, grant.clone());
            if self.sweeps.load(Ordering::Acquire) == before {
                return Ok(Some(grant));
            }
            self.grants.remove(&hash);
        }
    }

    async fn verify_grant(&self, bearer: &str) -> Result<Grant> {
        let claims = verify(bearer, self.vault.direct_key()).ok_or(INVALID)?;
        let now = self.clock.now();
        if claims.exp <= now.seconds() {
            return Err(INVALID);
        }
        let environment = EnvironmentId::from_stored(&claims.sub);
        let key = KeyId::from_stored(&claims.key);
        let signed_with = claims.signed_with.as_deref().map(KeyId::from_stored);
        let keys = self.store.keys(&environment).await?;
        let mut ends = vec![Some(Timestamp::from_millis(claims.exp.saturating_mul(1000)))];
        for id in [Some(&key), signed_with.as_ref()].into_iter().flatten() {
            let live = keys.iter().find(|key| key.id == *id && key.is_live(now)).ok_or(INVALID)?;
            ends.push(live.ends_at);
        }
        let scopes = Scopes::new(claims.scopes);
        let direction = Direction::parse(&claims.io).map_err(|_| INVALID)?;
        let name = claims.channel.as_deref().map(ChannelName::parse).transpose().map_err(|_| INVALID)?;
        Ok(Grant {
            session: SessionRef::parse(&claims.session).map_err(|_| INVALID)?,
            channel: ChannelAddress { direction, name },
            caller: Caller {
                revoked: match &signed_with {
                    Some(root) => self.leases.of(&environment, root, Some(&key)),
                    None => self.leases.of(&environment, &key, None),
                },
                environment,
                kind: match claims.private {
                    true => CallerKind::ScopedKey(scopes),
                    false => CallerKind::Public(scopes),
                },
                key,
                signed_with,
                expires_at: ends.into_iter().flatten().min(),
            },
        })
    }
}

/// Signature (HS256 and nothing else), type, issuer and audience.
fn verify(token: &str, key: &[u8]) -> Option<Claims> {
    let mut rules = Validation::new(Algorithm::HS256);
    rules.set_issuer(&[ISSUER]);
    rules.set_audience(&[AUDIENCE]);
    rules.set_required_spec_claims(&["iss", "aud", "exp"]);
    // Validity is judged by the server's own clock.
    rules.validate_exp = false;
    let token = decode::<Claims>(token, &DecodingKey::from_secret(key), &rules).ok()?;
    (token.header.typ.as_deref() == Some(TYPE)).then_some(token.claims)
}
