//! The one thread that writes: takes whatever is queued, commits it as one group with one sync, again.
//! While a group syncs the next one queues up, so the groups grow with the load.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use super::Shared;
use super::group::{Group, refuse};
use super::queue::Request;
use super::state::Memory;
use sessiond_domain::record::Chain;

/// Metered bytes after which a group is full.
const GROUP_BYTES: usize = 8 << 20;
/// Requests after which it is. Many writers that wait for one group would all be idle while it syncs, and the disk while
/// they prepare the next one.
const GROUP_REQUESTS: usize = 256;

/// Runs until the queue is closed and empty.
pub(super) fn run(shared: &Arc<Shared>, mut memory: Memory) {
    // However this thread ends, nobody may wait for it.
    let _last = Last(shared);
    let mut waiting = VecDeque::new();
    loop {
        if waiting.is_empty() {
            if !shared.queue.take(&mut waiting) {
                return;
            }
        } else {
            shared.queue.take_more(&mut waiting);
        }
        if shared.poisoned.load(Ordering::SeqCst) {
            waiting.drain(..).for_each(refuse);
            continue;
        }
        memory.trim();
        let full = shared.space.look();
        let mut group = Group::new(shared, &mut memory);
        while group.bytes() < GROUP_BYTES
            && group.requests() < GROUP_REQUESTS
            && let Some(request) = waiting.pop_front()
        {
            // What closes and what forgets takes little room, or makes some.
            match request {
                Request::Append { ref append, .. } if full => {
                    // What was sent behind it must not land before it, when there is room again.
                    append.chain.iter().for_each(Chain::break_off);
                    refuse(request);
                }
                request => group.add(request),
            }
        }
        if let Err(error) = group.commit() {
            shared.poison(&error);
        }
    }
}

struct Last<'a>(&'a Arc<Shared>);

impl Drop for Last<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.poison(&"its writer has panicked");
            self.0.background.fatal("log writer");
        }
        self.0.poisoned.store(true, Ordering::SeqCst);
        self.0.queue.close();
        let mut waiting = VecDeque::new();
        self.0.queue.take_more(&mut waiting);
        waiting.into_iter().for_each(refuse);
    }
}
