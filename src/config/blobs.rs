//! Where snapshots are kept.

use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use url::Url;

use super::fault;
use crate::domain::Violation;

const URL_TTL_MIN: Duration = Duration::from_secs(10);
const URL_TTL_MAX: Duration = Duration::from_secs(24 * 3600);

/// The store of snapshots.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BlobsConfig {
    /// `file:///folder` or `s3://bucket/prefix`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<Url>,
    /// Of an S3-compatible store that is not Amazon's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<Url>,
    /// Of the bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Key id of the bucket's owner.
    #[serde(default, serialize_with = "super::masked", skip_serializing_if = "Option::is_none")]
    pub access_key: Option<SecretString>,
    /// Its secret.
    #[serde(default, serialize_with = "super::masked", skip_serializing_if = "Option::is_none")]
    pub secret_key: Option<SecretString>,
    /// Whether the endpoint may do without TLS.
    pub allow_http: bool,
    /// Validity of signed URLs, which end earlier with the caller's own credentials.
    #[serde(with = "humantime_serde")]
    pub url_ttl: Duration,
}

/// What the URL names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlobPlace {
    /// A folder.
    Folder(PathBuf),
    /// A bucket.
    S3 {
        /// Its name.
        bucket: String,
        /// What every key begins with, without slashes around it; may be empty.
        prefix: String,
    },
}

impl BlobsConfig {
    /// What the URL names; `None` without one, or if it names nothing.
    pub fn place(&self) -> Option<BlobPlace> {
        let url = self.url.as_ref().filter(|url| url.query().is_none() && url.fragment().is_none())?;
        match url.scheme() {
            "file" => url.to_file_path().ok().map(BlobPlace::Folder),
            "s3" if url.username().is_empty() && url.password().is_none() && url.port().is_none() => {
                let bucket = url.host_str().filter(|bucket| !bucket.is_empty())?.to_owned();
                Some(BlobPlace::S3 { bucket, prefix: url.path().trim_matches('/').to_owned() })
            }
            _ => None,
        }
    }

    pub(super) fn validate(&self, faults: &mut Vec<Violation>) {
        let place = self.place();
        if self.url.is_some() && place.is_none() {
            faults.push(fault("blobs.url", "must be file:///folder or s3://bucket/prefix"));
        }
        if !(URL_TTL_MIN..=URL_TTL_MAX).contains(&self.url_ttl) {
            faults.push(fault("blobs.url_ttl", "must be 10s to 24h"));
        }
        if self.access_key.is_some() != self.secret_key.is_some() {
            faults.push(fault("blobs.access_key", "and blobs.secret_key must be set together"));
        }
        if let Some(endpoint) = &self.endpoint {
            match endpoint.scheme() {
                "https" => {}
                "http" if self.allow_http => {}
                "http" => faults.push(fault("blobs.endpoint", "needs blobs.allow_http to do without TLS")),
                _ => faults.push(fault("blobs.endpoint", "must be an http or https URL")),
            }
        }
        if matches!(place, Some(BlobPlace::S3 { .. })) {
            if self.endpoint.is_none() && self.region.is_none() {
                faults.push(fault("blobs.region", "is required without blobs.endpoint"));
            }
        } else {
            for (field, set) in [
                ("blobs.endpoint", self.endpoint.is_some()),
                ("blobs.region", self.region.is_some()),
                ("blobs.access_key", self.access_key.is_some()),
            ] {
                if set {
                    faults.push(fault(field, "is only for s3://"));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blobs(toml: &str) -> BlobsConfig {
        toml::from_str(&format!("allow_http = {}\nurl_ttl = \"15m\"\n{toml}", toml.contains("http://minio")))
            .expect("readable")
    }

    #[test]
    fn a_url_names_a_folder_or_a_bucket() {
        let s3 = |bucket: &str, prefix: &str| {
            Some(BlobPlace::S3 { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
        };
        for (url, place) in [
            ("file:///var/blobs", Some(BlobPlace::Folder("/var/blobs".into()))),
            ("file:///var/a%20b", Some(BlobPlace::Folder("/var/a b".into()))),
            ("s3://bucket", s3("bucket", "")),
            ("s3://bucket/a/b/", s3("bucket", "a/b")),
            ("s3://user@bucket", None),
            ("s3://bucket?x=1", None),
            ("s3:///x", None),
            ("https://bucket", None),
        ] {
            assert_eq!(blobs(&format!("url = \"{url}\"")).place(), place, "{url}");
        }
    }

    #[test]
    fn every_fault_is_told_at_once() {
        for (toml, fields) in [
            ("", vec![]),
            ("url = \"file:///x\"", vec![]),
            ("url = \"s3://b\"\nregion = \"r\"", vec![]),
            ("url = \"s3://b\"\nendpoint = \"http://minio\"\naccess_key = \"a\"\nsecret_key = \"s\"", vec![]),
            ("url = \"s3://b\"", vec!["blobs.region"]),
            ("url = \"s3://b\"\nendpoint = \"http://plain\"", vec!["blobs.endpoint"]),
            ("url = \"s3://b\"\nendpoint = \"ftp://x\"", vec!["blobs.endpoint"]),
            ("region = \"r\"", vec!["blobs.region"]),
            (
                "url = \"ftp://x\"\nsecret_key = \"s\"\nendpoint = \"https://x\"",
                vec!["blobs.url", "blobs.access_key", "blobs.endpoint"],
            ),
        ] {
            let mut faults = Vec::new();
            blobs(toml).validate(&mut faults);
            let found: Vec<_> = faults.iter().map(|fault| fault.field.as_str()).collect();
            assert_eq!(found, fields, "{toml}");
        }
        for (ttl, fits) in [("9s", false), ("10s", true), ("24h", true), ("24h 1s", false)] {
            let mut faults = Vec::new();
            let url_ttl = humantime_serde::re::humantime::parse_duration(ttl).expect("a duration");
            BlobsConfig { url_ttl, ..blobs("") }.validate(&mut faults);
            assert_eq!(faults.is_empty(), fits, "{ttl}");
        }
    }
}
