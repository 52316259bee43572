//! Which callers stand on which keys, so that revoking a key ends everything that was opened with it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::domain::{EnvironmentId, KeyId};

/// The keys that a caller stands on: the one that signed or was shown, and the one that asked for the token.
type Ground = (KeyId, Option<KeyId>);

/// One cancellation for all callers that stand on the same keys.
#[derive(Default)]
pub(super) struct Leases(Mutex<HashMap<Ground, (EnvironmentId, CancellationToken)>>);

impl Leases {
    /// What is cancelled when one of these keys ends.
    pub(super) fn of(
        &self,
        environment: &EnvironmentId,
        key: &KeyId,
        by: Option<&KeyId>,
    ) -> CancellationToken {
        let ground = (key.clone(), by.cloned());
        self.lock().entry(ground).or_insert_with(|| (environment.clone(), CancellationToken::new())).1.clone()
    }

    /// The environments with open leases.
    pub(super) fn environments(&self) -> Vec<EnvironmentId> {
        let mut environments: Vec<_> =
            self.lock().values().map(|(environment, _)| environment.clone()).collect();
        environments.sort_unstable();
        environments.dedup();
        environments
    }

    /// Ends every lease of an environment that stands on a key which is not live.
    pub(super) fn keep(&self, environment: &EnvironmentId, is_live: impl Fn(&KeyId) -> bool) {
        self.lock().retain(|(key, by), (owner, token)| {
            let holds = owner != environment || (is_live(key) && by.as_ref().is_none_or(&is_live));
            if !holds {
                token.cancel();
            }
            holds
        });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Ground, (EnvironmentId, CancellationToken)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
