//! Automatic persisted queries: a client sends the SHA-256 of a document and the document itself only when asked.
//!
//! The protocol is Apollo's (`extensions.persistedQuery`, version 1). Only documents that passed the guard and the
//! parser are kept, and no more of them than fit a budget of bytes.

use std::fmt;
use std::sync::Arc;

use async_graphql::{Request, Value};
use aws_lc_rs::digest;
use data_encoding::HEXLOWER_PERMISSIVE;
use http::StatusCode;
use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::error::protocol;
use crate::api::error::Failure;

/// Bytes of documents kept.
const BUDGET: u64 = 8 * 1024 * 1024;
/// How many documents the budget is expected to hold.
const EXPECTED: usize = 4096;

type Hash = [u8; digest::SHA256_OUTPUT_LEN];

#[derive(Clone)]
struct Length;

impl Weighter<Hash, Arc<str>> for Length {
    fn weight(&self, _: &Hash, document: &Arc<str>) -> u64 {
        (document.len() + size_of::<Hash>()) as u64
    }
}

/// The documents that clients may name by their hash.
pub(super) struct PersistedQueries(Cache<Hash, Arc<str>, Length>);

/// What a request says of persistence.
pub(super) enum Lookup {
    /// Nothing.
    Absent,
    /// The document was found and put into the request.
    Found,
    /// The request brings the document along, to be kept once it has been read.
    Offered(Offer),
}

/// A document whose hash is right.
#[derive(Clone, Copy)]
pub(super) struct Offer(Hash);

impl PersistedQueries {
    pub fn new() -> Self {
        Self(Cache::with_weighter(EXPECTED, BUDGET, Length))
    }

    /// Finds the document that `request` names, or checks the one that it brings.
    ///
    /// # Errors
    /// If the hash is unknown, malformed, or not the document's.
    pub fn look_up(&self, request: &mut Request) -> Result<Lookup, Failure> {
        let Some(named) = request.extensions.get("persistedQuery") else { return Ok(Lookup::Absent) };
        let hash = hash(named)?;
        if request.query.is_empty() {
            let Some(document) = self.0.get(&hash) else {
                // Clients compare the message, letter by letter.
                return Err(protocol(
                    StatusCode::BAD_REQUEST,
                    "persisted_query_not_found",
                    "PersistedQueryNotFound",
                ));
            };
            request.query = document.to_string();
            return Ok(Lookup::Found);
        }
        let own = digest::digest(&digest::SHA256, request.query.as_bytes());
        if own.as_ref() == hash {
            Ok(Lookup::Offered(Offer(hash)))
        } else {
            Err(Failure::bad_request("extensions.persistedQuery.sha256Hash is not the document's SHA-256"))
        }
    }

    /// Keeps a document.
    pub fn keep(&self, offer: Offer, document: &str) {
        self.0.insert(offer.0, document.into());
    }
}

fn hash(named: &Value) -> Result<Hash, Failure> {
    let Value::Object(fields) = named else {
        return Err(Failure::bad_request("extensions.persistedQuery must be an object"));
    };
    if !matches!(fields.get("version"), Some(Value::Number(version)) if version.as_u64() == Some(1)) {
        return Err(Failure::bad_request("extensions.persistedQuery.version must be 1"));
    }
    let Some(Value::String(text)) = fields.get("sha256Hash") else {
        return Err(Failure::bad_request("extensions.persistedQuery.sha256Hash must be a string"));
    };
    let bytes = HEXLOWER_PERMISSIVE.decode(text.as_bytes()).ok();
    bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| {
        Failure::bad_request("extensions.persistedQuery.sha256Hash must be 64 hexadecimal digits")
    })
}

impl fmt::Debug for PersistedQueries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PersistedQueries")
    }
}
