//! Keeps secret keys: under AEAD at rest, found by keyed hash, recoverable because clients sign with them.
//!
//! The master key lives outside the database; from it every other key is derived.

use aws_lc_rs::aead::{AES_256_GCM, Aad, Nonce, RandomizedNonceKey};
use aws_lc_rs::{hkdf, hmac, rand};
use data_encoding::HEXLOWER_PERMISSIVE;
use secrecy::{ExposeSecret, SecretString};

use crate::domain::tenant::EnvironmentKind;
use crate::domain::{EnvironmentId, Error, KeyId, Result};

const KEY_LEN: usize = 32;
const NONCE_LEN: usize = 12;
const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
/// Random characters of a root key (190 bits); it must not be 24, which is the length of a scoped one.
const ROOT_LEN: usize = 32;
/// Random characters after `_sk_` in a scoped key, as clients recognise it.
const SCOPED_LEN: usize = 24;
/// Characters of a secret that may be shown to recognise it by.
const HINT_LEN: usize = 4;

/// Derives and uses the keys that protect secrets at rest.
pub struct Vault {
    seal: RandomizedNonceKey,
    lookup: hmac::Key,
    direct: [u8; KEY_LEN],
    url: [u8; KEY_LEN],
}

impl Vault {
    /// A fresh master key, in hex.
    ///
    /// # Errors
    /// [`Error::Internal`] if the machine has no randomness.
    pub fn generate_master_key() -> Result<SecretString> {
        let mut bytes = [0; KEY_LEN];
        rand::fill(&mut bytes).map_err(Error::internal)?;
        Ok(HEXLOWER_PERMISSIVE.encode(&bytes).into())
    }

    /// A vault over a master key of 64 hex digits.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `auth.master_key`.
    pub fn new(master_key: &SecretString) -> Result<Self> {
        let master = HEXLOWER_PERMISSIVE
            .decode(master_key.expose_secret().trim().as_bytes())
            .ok()
            .filter(|bytes| bytes.len() == KEY_LEN)
            .ok_or_else(|| Error::invalid("auth.master_key", "must be 64 hex digits (32 random bytes)"))?;
        let seal = RandomizedNonceKey::new(&AES_256_GCM, &derive(&master, b"sessiond secret sealing v1")?)
            .map_err(Error::internal)?;
        let lookup = hmac::Key::new(hmac::HMAC_SHA256, &derive(&master, b"sessiond secret lookup v1")?);
        let direct = derive(&master, b"sessiond direct tokens v1")?;
        let url = derive(&master, b"sessiond signed urls v1")?;
        Ok(Self { seal, lookup, direct, url })
    }

    /// What a secret is found by in the store.
    pub fn lookup_hash(&self, secret: &str) -> Vec<u8> {
        hmac::sign(&self.lookup, secret.as_bytes()).as_ref().to_vec()
    }

    /// What tokens for direct writes are signed with.
    pub(super) fn direct_key(&self) -> &[u8] {
        &self.direct
    }

    /// What signed URLs are signed with.
    pub(super) fn url_key(&self) -> &[u8] {
        &self.url
    }

    /// Encrypts a secret, bound to its environment and key id.
    ///
    /// # Errors
    /// [`Error::Internal`].
    pub fn seal(&self, secret: &str, environment: &EnvironmentId, id: &KeyId) -> Result<Vec<u8>> {
        let mut sealed = secret.as_bytes().to_vec();
        let aad = Aad::from(binding(environment, id));
        let nonce = self.seal.seal_in_place_append_tag(aad, &mut sealed).map_err(Error::internal)?;
        let mut stored = nonce.as_ref().to_vec();
        stored.append(&mut sealed);
        Ok(stored)
    }

    /// Decrypts what [`Vault::seal`] made for the same environment and key id.
    ///
    /// # Errors
    /// [`Error::Internal`] if it was sealed under another master key or for another key.
    pub fn open(&self, stored: &[u8], environment: &EnvironmentId, id: &KeyId) -> Result<SecretString> {
        let unreadable = || Error::internal(format!("key {id} does not open with this master key"));
        let (nonce, sealed) = stored.split_at_checked(NONCE_LEN).ok_or_else(unreadable)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| unreadable())?;
        let mut sealed = sealed.to_vec();
        let aad = Aad::from(binding(environment, id));
        let secret = self.seal.open_in_place(nonce, aad, &mut sealed).map_err(|_| unreadable())?;
        let secret = std::str::from_utf8(secret).map_err(|_| unreadable())?;
        Ok(secret.to_owned().into())
    }
}

fn derive(master: &[u8], purpose: &'static [u8]) -> Result<[u8; KEY_LEN]> {
    let mut key = [0; KEY_LEN];
    hkdf::Salt::new(hkdf::HKDF_SHA256, b"sessiond")
        .extract(master)
        .expand(&[purpose], hkdf::HKDF_SHA256)
        .and_then(|okm| okm.fill(&mut key))
        .map_err(Error::internal)?;
    Ok(key)
}

fn binding(environment: &EnvironmentId, id: &KeyId) -> Vec<u8> {
    format!("{environment}/{id}").into_bytes()
}

/// A fresh root key, `tr_<kind>_...`.
///
/// # Errors
/// [`Error::Internal`] if the machine has no randomness.
pub fn generate_root(kind: EnvironmentKind) -> Result<SecretString> {
    Ok(format!("tr_{}_{}", kind.as_str(), random_text(ROOT_LEN)?).into())
}

/// A fresh scoped key, `tr_<kind>_sk_...`: clients see from its form that it cannot sign tokens.
///
/// # Errors
/// [`Error::Internal`] if the machine has no randomness.
pub fn generate_scoped(kind: EnvironmentKind) -> Result<SecretString> {
    Ok(format!("tr_{}_sk_{}", kind.as_str(), random_text(SCOPED_LEN)?).into())
}

/// Whether clients would take this for a scoped key.
pub fn looks_scoped(secret: &str) -> bool {
    secret
        .strip_prefix("tr_")
        .and_then(|rest| rest.split_once("_sk_"))
        .filter(|(kind, _)| EnvironmentKind::parse(kind).is_some())
        .is_some_and(|(_, tail)| tail.len() == SCOPED_LEN && tail.bytes().all(|b| b.is_ascii_alphanumeric()))
}

/// Last characters of a secret: enough to tell two apart, useless to an attacker.
pub fn hint(secret: &str) -> String {
    let tail = secret.len().saturating_sub(HINT_LEN);
    format!("...{}", secret.get(tail..).unwrap_or_default())
}

/// Rejection sampling, so that every character is equally likely.
fn random_text(len: usize) -> Result<String> {
    let fair = u8::try_from(256 - 256 % ALPHABET.len()).unwrap_or(u8::MAX);
    let mut text = String::with_capacity(len);
    let mut bytes = [0; 64];
    while text.len() < len {
        rand::fill(&mut bytes).map_err(Error::internal)?;
        let fresh = bytes.iter().filter(|byte| **byte < fair);
        text.extend(fresh.map(|byte| char::from(ALPHABET[usize::from(*byte) % ALPHABET.len()])));
    }
    text.truncate(len);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(environment: &str, key: &str) -> (EnvironmentId, KeyId) {
        (EnvironmentId::from_stored(environment), KeyId::from_stored(key))
    }

    #[test]
    fn a_sealed_secret_opens_only_for_its_own_environment_and_key() {
        let vault = Vault::new(&Vault::generate_master_key().expect("random")).expect("a vault");
        let (environment, key) = ids("env_a", "key_a");
        let sealed = vault.seal("tr_dev_secret", &environment, &key).expect("sealed");
        assert!(!sealed.windows(6).any(|window| window == b"secret"));
        let opened = vault.open(&sealed, &environment, &key).expect("opens");
        assert_eq!(opened.expose_secret(), "tr_dev_secret");
        for (environment, key) in [ids("env_b", "key_a"), ids("env_a", "key_b")] {
            assert!(vault.open(&sealed, &environment, &key).is_err());
        }
        let other = Vault::new(&Vault::generate_master_key().expect("random")).expect("a vault");
        assert!(other.open(&sealed, &environment, &key).is_err());
        assert_ne!(vault.lookup_hash("a"), other.lookup_hash("a"));
        assert!(vault.open(&sealed[..5], &environment, &key).is_err());
    }

    #[test]
    fn clients_can_tell_root_and_scoped_keys_apart() {
        for kind in EnvironmentKind::ALL {
            let (root, scoped) =
                (generate_root(kind).expect("random"), generate_scoped(kind).expect("random"));
            assert!(!looks_scoped(root.expose_secret()));
            assert!(looks_scoped(scoped.expose_secret()));
        }
        assert!(!looks_scoped("tr_dev_sk_short"));
    }

    #[test]
    fn a_master_key_is_sixty_four_hex_digits() {
        for text in ["", "abc", &"g".repeat(64), &"a".repeat(62)] {
            assert!(Vault::new(&SecretString::from(text.to_owned())).is_err(), "{text}");
        }
    }
}
