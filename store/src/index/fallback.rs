//! [`FallbackIndex`]: another index while the first one is away.

use std::sync::Arc;

use async_trait::async_trait;

use sessiond_domain::error::{Error, Result};
use sessiond_domain::list::{Filter, Page, PageRequest, TagQuery};
use sessiond_domain::port::ListIndex;
use sessiond_domain::{EnvironmentId, Timestamp};

/// Two indexes of the same sessions. Their order is the same and so are their cursors, so a walk may change between them.
pub struct FallbackIndex {
    first: Arc<dyn ListIndex>,
    second: Arc<dyn ListIndex>,
}

impl FallbackIndex {
    /// Asks `second` what `first` cannot answer. `first` must say so soon.
    pub fn new(first: Arc<dyn ListIndex>, second: Arc<dyn ListIndex>) -> Self {
        Self { first, second }
    }
}

/// Whether the other one may have an answer.
fn is_away<T>(answer: &Result<T>) -> bool {
    matches!(answer, Err(Error::Unavailable { .. } | Error::NotReady(_)))
}

#[async_trait]
impl ListIndex for FallbackIndex {
    async fn list(
        &self,
        environment: &EnvironmentId,
        filter: &Filter,
        page: &PageRequest,
        now: Timestamp,
    ) -> Result<Page> {
        let answer = self.first.list(environment, filter, page, now).await;
        if is_away(&answer) { self.second.list(environment, filter, page, now).await } else { answer }
    }

    async fn count(&self, environment: &EnvironmentId, filter: &Filter, now: Timestamp) -> Result<u64> {
        let answer = self.first.count(environment, filter, now).await;
        if is_away(&answer) { self.second.count(environment, filter, now).await } else { answer }
    }

    async fn tags(&self, environment: &EnvironmentId, query: &TagQuery) -> Result<Vec<String>> {
        let answer = self.first.tags(environment, query).await;
        if is_away(&answer) { self.second.tags(environment, query).await } else { answer }
    }

    async fn ping(&self) -> Result<Vec<String>> {
        match self.first.ping().await {
            Ok(sentences) => Ok(sentences),
            Err(error) => Ok(vec![format!("{error}; lists come from the metadata store meanwhile")]),
        }
    }
}
