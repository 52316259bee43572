//! Which place may be confirmed: everything before it must be stored, whichever flush ends first.

use std::collections::VecDeque;

use super::postgres::Lsn;

/// Flushes under way, oldest first.
#[derive(Debug, Default)]
pub(super) struct Tracker {
    next: u64,
    flushes: VecDeque<Flush>,
}

#[derive(Debug)]
struct Flush {
    id: u64,
    reached: Option<Lsn>,
    done: bool,
}

impl Tracker {
    /// A flush begins. Once it and all before it are done, `reached` may be confirmed.
    pub(super) fn begin(&mut self, reached: Option<Lsn>) -> u64 {
        let id = self.next;
        self.next += 1;
        self.flushes.push_back(Flush { id, reached, done: false });
        id
    }

    /// Nothing is to be flushed up to `place`; the answer is as of [`Tracker::done`].
    pub(super) fn idle(&mut self, place: Lsn) -> Option<Lsn> {
        match self.flushes.back_mut() {
            None => return Some(place),
            // Not yet confirmed itself, so it may stand for what follows it as well.
            Some(last) if last.done || last.reached.is_some() => last.reached = last.reached.max(Some(place)),
            Some(_) => {
                let id = self.begin(Some(place));
                return self.done(id);
            }
        }
        None
    }

    /// A flush is stored. What may be confirmed now, if that is more than before.
    pub(super) fn done(&mut self, id: u64) -> Option<Lsn> {
        if let Some(flush) = self.flushes.iter_mut().find(|flush| flush.id == id) {
            flush.done = true;
        }
        let mut reached = None;
        while self.flushes.front().is_some_and(|flush| flush.done) {
            reached = reached.max(self.flushes.pop_front().and_then(|flush| flush.reached));
        }
        reached
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_what_is_stored_without_a_gap_is_confirmed() {
        let mut tracker = Tracker::default();
        let [one, two, three] = [Some(Lsn(10)), None, Some(Lsn(30))].map(|reached| tracker.begin(reached));
        assert_eq!(tracker.done(three), None);
        assert_eq!(tracker.done(one), Some(Lsn(10)));
        assert_eq!(tracker.idle(Lsn(40)), None);
        assert_eq!(tracker.done(two), Some(Lsn(40)));
        assert_eq!(tracker.idle(Lsn(50)), Some(Lsn(50)));
    }

    #[test]
    fn a_cut_inside_a_transaction_confirms_nothing_but_what_follows_does() {
        let mut tracker = Tracker::default();
        let cut = tracker.begin(None);
        assert_eq!(tracker.idle(Lsn(20)), None);
        assert_eq!(tracker.done(cut), Some(Lsn(20)));
    }

    proptest! {
        /// However flushes end, no place is confirmed before every flush that lies before it is stored, and in the end
        /// the last one is.
        #[test]
        fn whatever_the_order(order in proptest::collection::vec((any::<bool>(), any::<u8>()), 1..60)) {
            let mut tracker = Tracker::default();
            let mut open: Vec<(u64, u64)> = Vec::new();
            let (mut place, mut confirmed) = (0, 0);
            let mut steps: Vec<_> = order.into_iter().map(Some).collect();
            steps.extend(std::iter::repeat_n(None, 60));
            for step in steps {
                let answer = match step {
                    Some((true, pick)) => {
                        place += 1;
                        if pick % 3 == 0 {
                            tracker.idle(Lsn(place))
                        } else {
                            open.push((tracker.begin((pick % 3 == 1).then_some(Lsn(place))), place));
                            None
                        }
                    }
                    Some((false, pick)) if !open.is_empty() => {
                        let (id, _) = open.remove(usize::from(pick) % open.len());
                        tracker.done(id)
                    }
                    None if !open.is_empty() => tracker.done(open.remove(0).0),
                    _ => None,
                };
                if let Some(Lsn(now)) = answer {
                    prop_assert!(now > confirmed);
                    confirmed = now;
                    prop_assert!(open.iter().all(|(_, begun)| *begun > now), "{now} before {open:?}");
                }
            }
            place += 1;
            prop_assert_eq!(tracker.idle(Lsn(place)), Some(Lsn(place)));
        }
    }
}
