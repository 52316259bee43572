//! Stages with names and times, and the table at the end.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};

use crate::interrupt;

/// Linux counts processor time for user space in hundredths of a second.
const TICK: Duration = Duration::from_millis(10);

/// What one stage came to.
struct Outcome {
    name: &'static str,
    took: Duration,
    /// Processor time of the programs that it ran and waited for.
    cpu: Duration,
    /// How many tests passed, if it runs any.
    passed: anyhow::Result<u64>,
}

/// The stages of one run, in order.
pub(crate) struct Stages {
    /// Whether it is a fault that no test ran.
    tests: bool,
    started: Instant,
    outcomes: Vec<Outcome>,
}

impl Stages {
    /// With `tests`, at least one must have passed in the end.
    pub(crate) fn new(tests: bool) -> Self {
        Self { tests, started: Instant::now(), outcomes: Vec::new() }
    }

    /// Runs a stage, which says how many tests passed. A failure is remembered and the next stage still runs, so that one
    /// run shows every fault; after Ctrl-C none does.
    pub(crate) fn run(&mut self, name: &'static str, stage: impl FnOnce() -> anyhow::Result<u64>) {
        println!("\n=== {name} ===");
        let (started, cpu) = (Instant::now(), children_cpu());
        let passed = if interrupt::requested() { Err(anyhow::anyhow!("interrupted")) } else { stage() };
        let took = started.elapsed();
        match &passed {
            Ok(_) => println!("=== {name}: ok in {:.1} s ===", took.as_secs_f64()),
            Err(error) => println!("=== {name}: FAILED in {:.1} s: {error:#} ===", took.as_secs_f64()),
        }
        let cpu = children_cpu().saturating_sub(cpu);
        self.outcomes.push(Outcome { name, took, cpu, passed });
    }

    /// Prints the table, and how many tests passed.
    ///
    /// # Errors
    /// If any stage failed.
    pub(crate) fn finish(self) -> anyhow::Result<()> {
        println!("\n{}", self.table());
        let failed: Vec<_> = self.outcomes.iter().filter(|o| o.passed.is_err()).map(|o| o.name).collect();
        if !failed.is_empty() {
            bail!("failed: {}", failed.join(", "));
        }
        let passed: u64 = self.outcomes.iter().filter_map(|outcome| outcome.passed.as_ref().ok()).sum();
        ensure!(passed > 0 || !self.tests, "no test ran");
        if passed > 0 {
            println!("{passed} passed, 0 failed");
        }
        Ok(())
    }

    /// The stages, with their times, as Markdown.
    pub(crate) fn table(&self) -> String {
        let mut table = format!("| {:<16} | {:>9} | {:>11} | result |\n", "stage", "seconds", "CPU seconds");
        table += "| :--------------- | --------: | ----------: | :----- |\n";
        let row = |name: &str, took: Duration, cpu: Duration, result: &str| {
            let (took, cpu) = (took.as_secs_f64(), cpu.as_secs_f64());
            format!("| {name:<16} | {took:>9.1} | {cpu:>11.1} | {result} |\n")
        };
        for Outcome { name, took, cpu, passed } in &self.outcomes {
            let result = match passed {
                Ok(0) => "ok".to_owned(),
                Ok(tests) => format!("ok, {tests} tests"),
                Err(error) => format!("FAILED: {error:#}"),
            };
            table += &row(name, *took, *cpu, &result);
        }
        let cpu = self.outcomes.iter().map(|outcome| outcome.cpu).sum();
        table + &row("total", self.started.elapsed(), cpu, "")
    }
}

/// Processor time, user and system, of every program that we have waited for; zero where the system does not tell.
fn children_cpu() -> Duration {
    fs::read_to_string("/proc/self/stat").ok().and_then(|stat| children(&stat)).unwrap_or_default()
}

/// `cutime` and `cstime` of proc_pid_stat(5).
fn children(stat: &str) -> Option<Duration> {
    // The name before them may hold spaces; what follows its last parenthesis does not.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut times = fields.split_whitespace().skip(13);
    let mut ticks = || times.next()?.parse::<u32>().ok();
    Some(TICK * (ticks()? + ticks()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_children_is_read_behind_any_name() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 11 12 250 50 20 0 1 0 99";
        assert_eq!(children(stat), Some(Duration::from_secs(3)));
    }
}
