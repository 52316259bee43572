//! The tests that took longest.

/// How many are shown.
const SHOWN: usize = 10;

/// Names of tests with their seconds.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Slowest(Vec<(String, f64)>);

impl Slowest {
    /// Takes one test in.
    pub(crate) fn add(&mut self, name: String, seconds: f64) {
        self.0.push((name, seconds));
        self.0.sort_by(|(_, a), (_, b)| b.total_cmp(a));
        self.0.truncate(SHOWN);
    }

    /// Shows them, the slowest first.
    pub(crate) fn print(&self) {
        println!("the slowest:");
        for (name, seconds) in &self.0 {
            println!("{seconds:>8.2} s  {name}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_slowest_are_kept() {
        let mut slowest = Slowest::default();
        for second in 0..=SHOWN {
            slowest.add(format!("{second}"), second as f64);
        }
        assert_eq!(slowest.0.len(), SHOWN);
        assert_eq!(slowest.0[0], ("10".to_owned(), 10.0));
        assert!(slowest.0.iter().all(|(name, _)| name != "0"));
    }
}
