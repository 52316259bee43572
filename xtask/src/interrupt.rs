//! Ctrl-C: what runs in the foreground gets Ctrl-C too and ends; what we have started beside it is stopped
//! in order, because we end by returning.

use std::sync::{Condvar, Mutex, PoisonError};

use anyhow::Context;

static REQUESTED: Mutex<bool> = Mutex::new(false);
static WOKEN: Condvar = Condvar::new();

/// From here on Ctrl-C only says that it came.
///
/// # Errors
/// If the system refuses a handler.
pub(crate) fn install() -> anyhow::Result<()> {
    let handler = || {
        *REQUESTED.lock().unwrap_or_else(PoisonError::into_inner) = true;
        WOKEN.notify_all();
    };
    ctrlc::set_handler(handler).context("cannot handle signals")
}

/// Whether we were asked to end.
pub(crate) fn requested() -> bool {
    *REQUESTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns when we are asked to end.
pub(crate) fn wait() {
    let requested = REQUESTED.lock().unwrap_or_else(PoisonError::into_inner);
    drop(WOKEN.wait_while(requested, |requested| !*requested));
}
