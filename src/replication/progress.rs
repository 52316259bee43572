//! Which place of the log may be confirmed: everything before it is stored, in whatever order batches are.

use std::collections::VecDeque;

use super::Lsn;

/// The batches that are on their way, oldest first.
#[derive(Debug, Default)]
pub struct Progress {
    next: u64,
    batches: VecDeque<Pending>,
}

/// Names a batch on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

#[derive(Debug)]
struct Pending {
    ticket: Ticket,
    reached: Option<Lsn>,
    stored: bool,
}

impl Progress {
    /// A batch sets out. When it and all before it are stored, everything before `reached` is.
    pub fn begin(&mut self, reached: Option<Lsn>) -> Ticket {
        let ticket = Ticket(self.next);
        self.next += 1;
        self.batches.push_back(Pending { ticket, reached, stored: false });
        ticket
    }

    /// A batch is stored. Returns the place that may be confirmed now, if there is a new one.
    pub fn stored(&mut self, ticket: Ticket) -> Option<Lsn> {
        if let Some(batch) = self.batches.iter_mut().find(|batch| batch.ticket == ticket) {
            batch.stored = true;
        }
        let mut reached = None;
        while self.batches.front().is_some_and(|batch| batch.stored) {
            reached = reached.max(self.batches.pop_front().and_then(|batch| batch.reached));
        }
        reached
    }

    /// Nothing waits that stands before `end`. Returns the place that may be confirmed now, if there is a new one.
    pub fn pass(&mut self, end: Lsn) -> Option<Lsn> {
        match self.batches.back_mut() {
            None => Some(end),
            Some(last) => {
                last.reached = last.reached.max(Some(end));
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_what_is_stored_without_a_gap_is_confirmed() {
        let mut progress = Progress::default();
        let [one, two, three] = [Some(Lsn(10)), None, Some(Lsn(30))].map(|reached| progress.begin(reached));
        assert_eq!(progress.stored(three), None);
        assert_eq!(progress.stored(one), Some(Lsn(10)));
        assert_eq!(progress.pass(Lsn(40)), None);
        assert_eq!(progress.stored(two), Some(Lsn(40)));
        assert_eq!(progress.pass(Lsn(50)), Some(Lsn(50)));
    }

    #[test]
    fn a_part_of_a_transaction_confirms_nothing_and_its_end_all() {
        let mut progress = Progress::default();
        let part = progress.begin(None);
        assert_eq!(progress.stored(part), None);
        let part = progress.begin(None);
        assert_eq!(progress.pass(Lsn(20)), None);
        assert_eq!(progress.stored(part), Some(Lsn(20)));
    }

    proptest! {
        /// In whatever order batches are stored, no place is confirmed before everything that stands before it is, and in the
        /// end the last one is.
        #[test]
        fn whatever_the_order(steps in proptest::collection::vec((any::<bool>(), any::<u8>()), 1..60)) {
            let mut progress = Progress::default();
            let mut open: Vec<(Ticket, u64)> = Vec::new();
            let (mut place, mut confirmed) = (0, 0);
            let steps = steps.into_iter().map(Some).chain(std::iter::repeat_n(None, 60));
            for step in steps {
                let answer = match step {
                    Some((true, pick)) => {
                        place += 1;
                        if pick % 3 == 0 {
                            progress.pass(Lsn(place))
                        } else {
                            open.push((progress.begin((pick % 3 == 1).then_some(Lsn(place))), place));
                            None
                        }
                    }
                    Some((false, pick)) if !open.is_empty() => {
                        let (ticket, _) = open.remove(usize::from(pick) % open.len());
                        progress.stored(ticket)
                    }
                    None if !open.is_empty() => progress.stored(open.remove(0).0),
                    _ => None,
                };
                if let Some(Lsn(now)) = answer {
                    prop_assert!(now > confirmed);
                    confirmed = now;
                    prop_assert!(open.iter().all(|(_, begun)| *begun > now), "{} before {:?}", now, open);
                }
            }
            place += 1;
            prop_assert_eq!(progress.pass(Lsn(place)), Some(Lsn(place)));
        }
    }
}
