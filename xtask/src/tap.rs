//! What a suite says while it runs, in the TAP of `node --test`: the time of each test, and the counts at the end
//! (`# pass 12`).

use anyhow::ensure;

use crate::slowest::Slowest;

/// What was seen of it.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Counts {
    pass: u64,
    fail: u64,
    cancelled: u64,
    skipped: u64,
    todo: u64,
    slowest: Slowest,
    /// The test whose time comes next.
    current: String,
}

impl Counts {
    /// Takes a line in.
    pub(crate) fn see(&mut self, line: &str) {
        let line = line.trim_start();
        let verdict = line.strip_prefix("not ").unwrap_or(line);
        if let Some((_, name)) = verdict.strip_prefix("ok ").and_then(|rest| rest.split_once(" - ")) {
            name.clone_into(&mut self.current);
        } else if let Some(millis) =
            line.strip_prefix("duration_ms: ").and_then(|text| text.parse::<f64>().ok())
        {
            self.slowest.add(std::mem::take(&mut self.current), millis / 1000.0);
        }
        let Some((name, count)) = line.strip_prefix("# ").and_then(|rest| rest.split_once(' ')) else {
            return;
        };
        let Ok(count) = count.parse() else { return };
        match name {
            "pass" => self.pass = count,
            "fail" => self.fail = count,
            "cancelled" => self.cancelled = count,
            "skipped" => self.skipped = count,
            "todo" => self.todo = count,
            _ => {}
        }
    }

    /// Shows the slowest tests and answers how many passed, once the runner has ended, with `success` or not. Some may be
    /// skipped only if `some` were to run.
    ///
    /// # Errors
    /// If a test failed or was skipped, or none ran.
    pub(crate) fn finish(self, success: bool, some: bool) -> anyhow::Result<u64> {
        self.slowest.print();
        ensure!(success && self.fail == 0 && self.cancelled == 0, "{} failed", self.fail + self.cancelled);
        let skipped = self.skipped + self.todo;
        ensure!(skipped == 0 || some, "{skipped} skipped");
        ensure!(self.pass > 0, "no test ran");
        Ok(self.pass)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_lines_are_counted() {
        let mut counts = Counts::default();
        for line in
            ["ok 1 - # skipped words", "# tests 9", "# pass 4", "# fail 2", "# cancelled 0", "# skipped 1"]
        {
            counts.see(line);
        }
        assert_eq!(
            counts,
            Counts { pass: 4, fail: 2, skipped: 1, current: counts.current.clone(), ..Counts::default() }
        );
    }

    #[test]
    fn the_times_of_tests_are_taken() {
        let mut counts = Counts::default();
        for line in ["# Subtest: one", "not ok 7 - one - two", "  ---", "  duration_ms: 1500.25", "  ..."] {
            counts.see(line);
        }
        let mut slowest = Slowest::default();
        slowest.add("one - two".to_owned(), 1.50025);
        assert_eq!(counts.slowest, slowest);
    }

    #[test]
    fn only_a_run_in_which_all_passed_is_well() {
        let counts = |lines: &[&str]| {
            let mut counts = Counts::default();
            lines.iter().for_each(|line| counts.see(line));
            counts
        };
        assert_eq!(counts(&["# pass 2"]).finish(true, false).ok(), Some(2));
        assert_eq!(counts(&["# pass 2", "# skipped 3"]).finish(true, true).ok(), Some(2));
        for (lines, success) in [
            (&["# pass 2"][..], false),
            (&["# pass 2", "# fail 1"], true),
            (&["# pass 2", "# skipped 1"], true),
            (&["# pass 0"], true),
            (&[], true),
        ] {
            assert!(counts(lines).finish(success, false).is_err(), "{lines:?}");
        }
    }
}
