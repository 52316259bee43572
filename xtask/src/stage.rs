//! Stages with names and times, and the table at the end.

use std::time::{Duration, Instant};

use anyhow::bail;

/// What one stage came to.
struct Outcome {
    name: &'static str,
    took: Duration,
    error: Option<anyhow::Error>,
}

/// The stages of one run, in order.
pub(crate) struct Stages {
    started: Instant,
    outcomes: Vec<Outcome>,
}

impl Stages {
    pub(crate) fn new() -> Self {
        Self { started: Instant::now(), outcomes: Vec::new() }
    }

    /// Runs a stage. A failure is remembered and the next stage still runs, so that one run shows every fault.
    pub(crate) fn run(&mut self, name: &'static str, stage: impl FnOnce() -> anyhow::Result<()>) {
        println!("\n=== {name} ===");
        let started = Instant::now();
        let error = stage().err();
        let took = started.elapsed();
        match &error {
            None => println!("=== {name}: ok in {:.1} s ===", took.as_secs_f64()),
            Some(error) => println!("=== {name}: FAILED in {:.1} s: {error:#} ===", took.as_secs_f64()),
        }
        self.outcomes.push(Outcome { name, took, error });
    }

    /// Prints the table.
    ///
    /// # Errors
    /// If any stage failed.
    pub(crate) fn finish(self) -> anyhow::Result<()> {
        println!("\n{:<10} {:>9}  result", "stage", "seconds");
        for Outcome { name, took, error } in &self.outcomes {
            let result = error.as_ref().map_or("ok".to_owned(), |error| format!("FAILED: {error:#}"));
            println!("{name:<10} {:>9.1}  {result}", took.as_secs_f64());
        }
        println!("{:<10} {:>9.1}", "total", self.started.elapsed().as_secs_f64());
        let failed: Vec<_> = self.outcomes.iter().filter(|o| o.error.is_some()).map(|o| o.name).collect();
        if !failed.is_empty() {
            bail!("failed: {}", failed.join(", "));
        }
        Ok(())
    }
}
