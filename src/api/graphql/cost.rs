//! What an operation costs: counted by the validator, limited here, and told in `extensions.cost`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_graphql::extensions::{Extension, ExtensionContext, ExtensionFactory, NextValidation};
use async_graphql::{ServerError, ValidationResult};
use http::StatusCode;

use super::error::protocol;

/// Most points that one operation may cost: a point a field, a list's fields as often as its page is long.
pub(super) const COST_MAX: usize = 5000;

/// The cost of the request at hand; zero until it has been validated.
#[derive(Debug, Default)]
pub(super) struct Cost(AtomicUsize);

impl Cost {
    /// Points.
    pub fn points(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counts and limits.
pub(super) struct CostLimit;

impl ExtensionFactory for CostLimit {
    fn create(&self) -> Arc<dyn Extension> {
        Arc::new(Self)
    }
}

#[async_graphql::async_trait::async_trait]
impl Extension for CostLimit {
    async fn validation(
        &self,
        ctx: &ExtensionContext<'_>,
        next: NextValidation<'_>,
    ) -> Result<ValidationResult, Vec<ServerError>> {
        let result = next.run(ctx).await?;
        if let Some(cost) = ctx.data_opt::<Arc<Cost>>() {
            cost.0.store(result.complexity, Ordering::Relaxed);
        }
        if result.complexity > COST_MAX {
            let message =
                format!("the operation costs {} points; the limit is {COST_MAX}", result.complexity);
            let failure = protocol(StatusCode::BAD_REQUEST, "query_too_complex", message);
            return Err(vec![async_graphql::Error::from(failure).into_server_error(Default::default())]);
        }
        Ok(result)
    }
}
