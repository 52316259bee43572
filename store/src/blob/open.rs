//! Opens the folder or the bucket.

use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ClientOptions, ObjectStore, RetryConfig};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::Semaphore;

use super::{MediaType, ObjectBlobs, sweep};
use sessiond_domain::{Error, Result};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for the next byte of an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest time of one request with its body.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);
const RETRIES: usize = 3;
/// No further attempt is begun after this.
const RETRY_FOR: Duration = Duration::from_secs(20);

/// Where a bucket is, and what opens it.
#[derive(Clone, Debug, Default)]
pub struct S3Options {
    /// Name of the bucket.
    pub bucket: String,
    /// What every key begins with; may be empty.
    pub prefix: String,
    /// URL of a store other than Amazon's.
    pub endpoint: Option<String>,
    /// Region; stores other than Amazon's mostly take any.
    pub region: Option<String>,
    /// Key id and secret; without them the machine's own identity is asked for.
    pub credentials: Option<(SecretString, SecretString)>,
    /// Allow an endpoint without TLS.
    pub allow_http: bool,
}

impl ObjectBlobs {
    /// Blobs in a folder, which is made if it is missing. Every put is with the disk before it returns.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the folder cannot be used.
    pub fn folder(folder: &FilePath) -> Result<Self> {
        let away = |error| Error::unavailable("the folder of blobs", error);
        std::fs::create_dir_all(folder)
            .and_then(|()| sweep::leftovers(folder))
            .map_err(|error| Error::unavailable("the folder of blobs", error))?;
        let store = LocalFileSystem::new_with_prefix(folder).map_err(away)?.with_fsync(true);
        Ok(Self::over(Arc::new(store), Path::default(), MediaType::Header))
    }

    /// Blobs in a bucket. Nothing is asked of it yet.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the settings make no client.
    pub fn s3(options: &S3Options) -> Result<Self> {
        let away = |error| Error::unavailable("the bucket of blobs", error);
        let client = ClientOptions::new()
            .with_allow_http(options.allow_http)
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_read_timeout(READ_TIMEOUT)
            .with_timeout(REQUEST_TIMEOUT);
        let retry = RetryConfig { max_retries: RETRIES, retry_timeout: RETRY_FOR, ..RetryConfig::default() };
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&options.bucket)
            .with_client_options(client)
            .with_retry(retry);
        if let Some(endpoint) = &options.endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/'));
        }
        if let Some(region) = &options.region {
            builder = builder.with_region(region);
        }
        if let Some((id, secret)) = &options.credentials {
            builder =
                builder.with_access_key_id(id.expose_secret()).with_secret_access_key(secret.expose_secret());
        }
        let store = builder.build().map_err(away)?;
        let prefix =
            Path::parse(&options.prefix).map_err(|error| Error::invalid("blobs.url", error.to_string()))?;
        Ok(Self::over(Arc::new(store), prefix, MediaType::Attribute))
    }

    fn over(store: Arc<dyn ObjectStore>, prefix: Path, media_type: MediaType) -> Self {
        let any = || Arc::new(Semaphore::new(Semaphore::MAX_PERMITS));
        Self { store, prefix, media_type, reads: any(), writes: any() }
    }
}
