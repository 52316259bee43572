//! [`FallbackIndex`]: another index while the first one is away.

use std::sync::Arc;

use async_trait::async_trait;

use crate::domain::error::{Error, Result};
use crate::domain::list::{Filter, Page, PageRequest, TagQuery};
use crate::domain::port::ListIndex;
use crate::domain::{EnvironmentId, Timestamp};

/// Two indexes of the same sessions, whose cursors are the same.
pub struct FallbackIndex {
    first: Arc<dyn ListIndex>,
    second: Arc<dyn ListIndex>,
}

impl FallbackIndex {
    /// Asks `second` what `first` cannot answer.
    pub fn new(first: Arc<dyn ListIndex>, second: Arc<dyn ListIndex>) -> Self {
        Self { first, second }
    }

    async fn or<T>(&self, first: Result<T>, second: impl Future<Output = Result<T>>) -> Result<T> {
        match first {
            Err(Error::Unavailable { source, .. }) => {
                tracing::warn!(
                    error = source.as_deref().map(|error| error as &dyn std::error::Error),
                    "lists fall back"
                );
                second.await
            }
            other => other,
        }
    }
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
        let first = self.first.list(environment, filter, page, now).await;
        self.or(first, self.second.list(environment, filter, page, now)).await
    }

    async fn count(&self, environment: &EnvironmentId, filter: &Filter, now: Timestamp) -> Result<u64> {
        let first = self.first.count(environment, filter, now).await;
        self.or(first, self.second.count(environment, filter, now)).await
    }

    async fn tags(&self, environment: &EnvironmentId, query: &TagQuery) -> Result<Vec<String>> {
        let first = self.first.tags(environment, query).await;
        self.or(first, self.second.tags(environment, query)).await
    }
}
