//! Runs as sessions record them. There is no run engine: a run is an id, and who took over from whom.

use super::clock::Timestamp;
use super::error::{Error, Result};
use super::id::{EnvironmentId, RUN_PREFIX, RunId, SessionId, utf16_len};

/// Longest reason of a handover, in UTF-16 units.
pub const RUN_REASON_MAX: usize = 64;
/// Longest run id that is looked up, in bytes; ours are shorter.
const RUN_ID_MAX: usize = 64;

/// Why a run was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunReason {
    /// The session was created.
    Initial,
    /// The run before handed over.
    Continuation,
    /// The run before handed over to another version of the task.
    Upgrade,
    /// Anything else.
    Manual,
}

impl RunReason {
    const ALL: [Self; 4] = [Self::Initial, Self::Continuation, Self::Upgrade, Self::Manual];

    /// The stored word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Initial => "initial",
            Self::Continuation => "continuation",
            Self::Upgrade => "upgrade",
            Self::Manual => "manual",
        }
    }

    /// Reads the stored word.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == text)
    }

    /// The label of a handover as a caller wrote it; what we have no word for is manual, and only a create is initial.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field `reason` if it is too long.
    pub fn of_handover(label: &str) -> Result<Self> {
        if utf16_len(label) > RUN_REASON_MAX {
            return Err(Error::invalid("reason", format!("must be at most {RUN_REASON_MAX} characters")));
        }
        Ok(Self::parse(label).filter(|reason| *reason != Self::Initial).unwrap_or(Self::Manual))
    }
}

/// A run that a session has or had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionRun {
    /// Its id, unique everywhere.
    pub id: RunId,
    /// The session's environment.
    pub environment: EnvironmentId,
    /// The session.
    pub session: SessionId,
    /// Why it was recorded.
    pub reason: RunReason,
    /// The run that it took over from; none for the first one.
    pub previous: Option<RunId>,
    /// When it was recorded.
    pub triggered_at: Timestamp,
}

/// Reads a run id as a caller names it. What could be no run's id becomes one that no run has.
pub fn named_run(text: &str) -> RunId {
    let fits = text.len() <= RUN_ID_MAX
        && text.starts_with(RUN_PREFIX)
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    RunId::from_stored(if fits { text } else { RUN_PREFIX })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_label_is_manual_and_nobody_hands_over_initially() {
        for (label, reason) in [
            ("continuation", RunReason::Continuation),
            ("upgrade", RunReason::Upgrade),
            ("manual", RunReason::Manual),
            ("initial", RunReason::Manual),
            ("because", RunReason::Manual),
            ("", RunReason::Manual),
        ] {
            assert_eq!(RunReason::of_handover(label).expect(label), reason, "{label}");
        }
        assert!(RunReason::of_handover(&"x".repeat(RUN_REASON_MAX)).is_ok());
        assert!(RunReason::of_handover(&"x".repeat(RUN_REASON_MAX + 1)).is_err());
    }

    #[test]
    fn only_what_could_be_a_run_is_looked_up() {
        assert_eq!(named_run("run_0abc").as_str(), "run_0abc");
        for text in ["", "0abc", "session_a", "run_a/b", "run_a\0", &format!("run_{}", "x".repeat(80))] {
            assert_eq!(named_run(text).as_str(), RUN_PREFIX, "{text:?}");
        }
    }
}
