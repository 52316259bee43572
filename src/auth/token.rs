//! Public tokens: JWTs that clients sign themselves with an environment's root key, or that we sign for them.
//!
//! Issuer, audience, claims and algorithm are what the published SDK signs (wire contract, section 3).

use data_encoding::BASE64URL_NOPAD;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, encode};
use serde::{Deserialize, Serialize};

use crate::domain::{EnvironmentId, Error, KeyId, Result, Scopes, Timestamp};

const ISSUER: &str = "https://id.trigger.dev";
const AUDIENCE: &str = "https://api.trigger.dev";

/// The claims of a public token.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Claims {
    /// Environment id.
    pub sub: String,
    /// What makes a token a public one.
    #[serde(rename = "pub")]
    pub public: bool,
    /// Absent means that nothing is allowed.
    #[serde(default)]
    pub scopes: Vec<String>,
    /// End of validity, in seconds since the Unix epoch.
    pub exp: f64,
    /// Start of validity, if not at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbf: Option<f64>,
    /// The scoped key that asked us for this token; it ends with that key.
    #[serde(rename = "key", default, skip_serializing_if = "Option::is_none")]
    pub minted_by: Option<String>,
}

#[derive(Serialize)]
struct Signed<'a> {
    iss: &'a str,
    aud: &'a str,
    iat: i64,
    exp: i64,
    sub: &'a str,
    #[serde(rename = "pub")]
    public: bool,
    scopes: &'a [String],
    #[serde(rename = "key", skip_serializing_if = "Option::is_none")]
    minted_by: Option<&'a str>,
}

/// What a bearer says of itself, before anything is verified.
pub enum Bearer {
    /// Claims to be a public token, of this environment if it names one.
    Public(Option<EnvironmentId>),
    /// Anything else: a secret key, or nothing that we know.
    Secret,
}

#[derive(Deserialize)]
struct Unverified {
    #[serde(rename = "pub", default)]
    public: serde_json::Value,
    #[serde(default)]
    sub: Option<String>,
}

impl Bearer {
    /// Looks at the form only: three parts, and a payload that says `pub: true`.
    pub fn of(text: &str) -> Self {
        let parts: Vec<_> = text.splitn(4, '.').collect();
        let [_, payload, _] = parts[..] else { return Self::Secret };
        let payload = BASE64URL_NOPAD.decode(payload.as_bytes()).ok();
        match payload.and_then(|bytes| serde_json::from_slice::<Unverified>(&bytes).ok()) {
            Some(claims) if claims.public == true => Self::Public(
                claims.sub.filter(|sub| !sub.is_empty()).map(|sub| EnvironmentId::from_stored(&sub)),
            ),
            _ => Self::Secret,
        }
    }
}

/// Verifies signature (HS256 and nothing else), issuer, audience and validity at `now`.
pub fn verify(token: &str, secret: &str, now: Timestamp) -> Option<Claims> {
    let mut rules = Validation::new(Algorithm::HS256);
    rules.set_issuer(&[ISSUER]);
    rules.set_audience(&[AUDIENCE]);
    rules.set_required_spec_claims(&["iss", "aud", "exp"]);
    // Validity is judged by the server's own clock, below.
    rules.validate_exp = false;
    rules.validate_nbf = false;
    let claims = decode::<Claims>(token, &DecodingKey::from_secret(secret.as_bytes()), &rules).ok()?.claims;
    let seconds = now.millis() as f64 / 1000.0;
    let valid = claims.public && seconds < claims.exp && claims.nbf.is_none_or(|nbf| nbf <= seconds);
    valid.then_some(claims)
}

/// Signs a token.
///
/// # Errors
/// [`Error::Internal`].
pub fn sign(
    secret: &str,
    environment: &EnvironmentId,
    scopes: &Scopes,
    minted_by: Option<&KeyId>,
    now: Timestamp,
    expires_at: Timestamp,
) -> Result<String> {
    let claims = Signed {
        iss: ISSUER,
        aud: AUDIENCE,
        iat: now.seconds(),
        exp: expires_at.seconds(),
        sub: environment.as_str(),
        public: true,
        scopes: scopes.as_slice(),
        minted_by: minted_by.map(KeyId::as_str),
    };
    let header = Header { typ: None, ..Header::new(Algorithm::HS256) };
    encode(&header, &claims, &EncodingKey::from_secret(secret.as_bytes())).map_err(Error::internal)
}

/// The end of validity that a token claims, as an instant.
pub fn expiry(claims: &Claims) -> Timestamp {
    // Saturates; a token for the year 300,000 is for ever.
    Timestamp::from_millis((claims.exp * 1000.0) as i64)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const NOW: Timestamp = Timestamp::from_millis(1_700_000_000_000);

    fn token(header: &serde_json::Value, claims: &serde_json::Value, secret: &str) -> String {
        let encode = |value: &serde_json::Value| BASE64URL_NOPAD.encode(value.to_string().as_bytes());
        let message = format!("{}.{}", encode(header), encode(claims));
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, secret.as_bytes());
        let signature = aws_lc_rs::hmac::sign(&key, message.as_bytes());
        format!("{message}.{}", BASE64URL_NOPAD.encode(signature.as_ref()))
    }

    fn claims() -> serde_json::Value {
        json!({"iss": ISSUER, "aud": AUDIENCE, "sub": "env_a", "pub": true, "exp": 1_700_000_060,
               "scopes": ["read:sessions"]})
    }

    #[test]
    fn only_a_whole_and_current_token_is_accepted() {
        let hs256 = json!({"alg": "HS256"});
        assert!(verify(&token(&hs256, &claims(), "k"), "k", NOW).is_some());
        assert!(verify(&token(&hs256, &claims(), "k"), "other", NOW).is_none());
        for (field, value) in [
            ("iss", json!("https://evil.example")),
            ("aud", json!("https://evil.example")),
            ("exp", json!(1_700_000_000)),
            ("exp", json!(null)),
            ("nbf", json!(1_700_000_001)),
            ("pub", json!(false)),
        ] {
            let mut changed = claims();
            changed[field] = value;
            assert!(verify(&token(&hs256, &changed, "k"), "k", NOW).is_none(), "{field}");
        }
        for field in ["iss", "aud", "exp"] {
            let mut changed = claims();
            changed.as_object_mut().expect("an object").remove(field);
            assert!(verify(&token(&hs256, &changed, "k"), "k", NOW).is_none(), "without {field}");
        }
    }

    #[test]
    fn no_other_algorithm_is_accepted() {
        for alg in ["none", "None", "HS384", "HS512", "RS256"] {
            assert!(verify(&token(&json!({"alg": alg}), &claims(), "k"), "k", NOW).is_none(), "{alg}");
        }
        let unsigned = token(&json!({"alg": "none"}), &claims(), "k");
        let unsigned = unsigned.rsplit_once('.').expect("three parts").0;
        assert!(verify(&format!("{unsigned}."), "k", NOW).is_none());
    }

    #[test]
    fn our_own_tokens_verify_and_say_what_they_were_given() {
        let scopes = Scopes::new(vec!["read:sessions:a".to_owned()]);
        let environment = EnvironmentId::from_stored("env_a");
        let end = NOW.plus(std::time::Duration::from_secs(60));
        let text =
            sign("k", &environment, &scopes, Some(&KeyId::from_stored("key_a")), NOW, end).expect("signs");
        let claims = verify(&text, "k", NOW).expect("verifies");
        assert_eq!(claims.scopes, scopes.as_slice());
        assert_eq!(claims.minted_by.as_deref(), Some("key_a"));
        assert_eq!(expiry(&claims), end);
        assert!(matches!(Bearer::of(&text), Bearer::Public(Some(id)) if id == environment));
        assert!(matches!(Bearer::of("tr_dev_x.y"), Bearer::Secret));
    }
}
