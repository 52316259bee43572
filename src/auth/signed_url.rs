//! Signed URLs: each opens the snapshot of one session to one method, to whoever holds it, for some minutes.
//!
//! Their tokens are ours alone: another key, audience and type than every other token, so none passes as another.

use std::time::Duration;

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, encode};
use serde::{Deserialize, Serialize};

use super::Auth;
use crate::domain::{Caller, EnvironmentId, Error, KeyId, Result, Session, SessionId};

const ISSUER: &str = "sessiond";
const AUDIENCE: &str = "sessiond:blob";
const TYPE: &str = "blob-url+jwt";
/// As a store of objects answers: 403, and no word about which part was wrong.
const INVALID: Error = Error::Denied("the URL is not valid for this method, or has expired");

/// What a URL may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum UrlMethod {
    /// GET and HEAD.
    Get,
    /// PUT.
    Put,
}

/// What a URL opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UrlGrant {
    /// The environment.
    pub environment: EnvironmentId,
    /// The session whose snapshot it is.
    pub session: SessionId,
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
    method: UrlMethod,
    /// The keys that whoever asked stands on.
    keys: Vec<String>,
}

impl Auth {
    /// The token of a URL that opens the snapshot of `session` to `method`, for `ttl` or for as long as the caller's own
    /// credentials. It ends when a key of theirs is revoked.
    ///
    /// # Errors
    /// [`Error::Internal`].
    pub fn url_token(
        &self,
        caller: &Caller,
        session: &Session,
        method: UrlMethod,
        ttl: Duration,
    ) -> Result<String> {
        let end = self.clock.now().plus(ttl);
        let end = caller.expires_at.map_or(end, |own| own.min(end));
        let keys = [Some(&caller.key), caller.signed_with.as_ref()];
        let claims = Claims {
            iss: ISSUER.to_owned(),
            aud: AUDIENCE.to_owned(),
            exp: end.seconds(),
            sub: session.environment.to_string(),
            session: session.id.to_string(),
            method,
            keys: keys.into_iter().flatten().map(KeyId::to_string).collect(),
        };
        let header = Header { typ: Some(TYPE.to_owned()), ..Header::new(Algorithm::HS256) };
        encode(&header, &claims, &EncodingKey::from_secret(self.vault.url_key())).map_err(Error::internal)
    }

    /// What the token of a URL opens to `method`. Asks the store whether its keys live.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::Unavailable`].
    pub async fn open_url(&self, token: &str, method: UrlMethod) -> Result<UrlGrant> {
        if token.len() > super::BEARER_MAX {
            return Err(INVALID);
        }
        let claims = verify(token, self.vault.url_key()).ok_or(INVALID)?;
        let now = self.clock.now();
        if claims.exp <= now.seconds() || claims.method != method || claims.keys.is_empty() {
            return Err(INVALID);
        }
        let environment = EnvironmentId::from_stored(&claims.sub);
        let keys = self.store.keys(&environment).await?;
        let lives = |id: &String| keys.iter().any(|key| key.id.as_str() == id && key.is_live(now));
        if !claims.keys.iter().all(lives) {
            return Err(INVALID);
        }
        Ok(UrlGrant { environment, session: SessionId::from_stored(&claims.session) })
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
