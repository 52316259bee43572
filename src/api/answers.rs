//! Answers whose length is known only once they exist.

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_TYPE, HeaderValue};
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::Failure;
use crate::domain::send_budget::Reserved;
use crate::domain::{ConnectionBudget, Error};

/// Answers that may exist before they have room.
const MADE_AT_ONCE: usize = 32;

/// What an answer takes of the connection's budget before it is known how long it is: a connection that has taken nothing
/// yet has eight made at once.
pub const FIRST_BYTES: usize = 8 << 10;

/// Whose turn it is to make an answer.
#[derive(Clone)]
pub struct Answers(Arc<Semaphore>);

impl Answers {
    /// As many as there may be.
    pub fn new() -> Self {
        Self(Arc::new(Semaphore::new(MADE_AT_ONCE)))
    }

    /// Waits for a turn, which is to be kept until the answer has room.
    pub async fn turn(&self) -> Option<OwnedSemaphorePermit> {
        // Never closed, so there is always a permit.
        self.0.clone().acquire_owned().await.ok()
    }

    /// What `made` gives as JSON, in room that is waited for.
    ///
    /// # Errors
    /// Those of `made`.
    pub async fn json<T: Serialize>(
        &self,
        budget: &ConnectionBudget,
        made: impl Future<Output = Result<T, Failure>>,
    ) -> Result<Response, Failure> {
        // Before the turn: nobody may hold one for as long as a client likes not to read.
        let mut room = budget.reserve(FIRST_BYTES).await.at_work();
        let _turn = self.turn().await;
        let text = serde_json::to_vec(&made.await?).map_err(Error::internal)?;
        room.grow(text.len()).await;
        let headers = [(CONTENT_TYPE, HeaderValue::from_static("application/json"))];
        Ok((headers, Extension(Reserved), Body::from(room.around(text.into()))).into_response())
    }
}

impl fmt::Debug for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Answers")
    }
}
