//! `cargo xtask timings`: what building costs from nothing, stage by stage and crate by crate, as tables for
//! `docs/building.md`.
//!
//! Downloads of crates are not measured: run `cargo fetch` first. Run it on an otherwise idle machine.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::Value;

use crate::nextest::{SELECTION, TARGETS};
use crate::stage::Stages;
use crate::workspace::Workspace;
use crate::{lint, process, tools};

/// Where `--write` puts the tables, between these two lines.
const PAGE: &str = "docs/building.md";
const BEGIN: &str = "<!-- cargo xtask timings --write -->\n";
const END: &str = "<!-- end -->\n";
/// How many crates are shown.
const DEAREST: usize = 20;

/// Flags of `timings`.
#[derive(Debug, Args)]
pub(crate) struct TimingsArgs {
    /// Also build the `dist` profile
    #[arg(long)]
    dist: bool,
    /// Write the tables into docs/building.md
    #[arg(long)]
    write: bool,
}

/// Measures.
///
/// # Errors
/// If anything does not build.
pub(crate) fn run(args: &TimingsArgs) -> anyhow::Result<()> {
    let here = Workspace::locate()?;
    let scratch = here.scratch("timings")?;
    let empty = Workspace {
        root: here.root.clone(),
        cache: scratch.path.join("cache"),
        target: scratch.path.join("target"),
    };
    let timed = |arguments: &[&str]| process::run(empty.cargo(arguments).arg("--timings")).map(|()| 0);
    let (mut tests, mut release) = (Vec::new(), Vec::new());
    let mut stages = Stages::new(false);
    stages.run("xtask", || timed(&["build", "--package", "xtask"]));
    stages.run("tools", || {
        [tools::NEXTEST, tools::DENY].iter().try_fold(0, |n, tool| tool.install(&empty).map(|_| n))
    });
    stages.run("tests", || {
        timed(&[&["build"], &SELECTION[..], &TARGETS].concat())?;
        tests = units(&empty.target)?;
        Ok(0)
    });
    stages.run("clippy", || lint::clippy(&empty).map(|()| 0));
    stages.run("release", || {
        timed(&["build", "--release"])?;
        release = units(&empty.target)?;
        Ok(0)
    });
    if args.dist {
        stages.run("dist", || timed(&["build", "--profile", "dist"]));
    }
    let text = format!("{}\n{}", stages.table(), dearest(&tests, &release));
    stages.finish()?;
    println!("{text}");
    if args.write {
        let page = here.root.join(PAGE);
        let old = fs::read_to_string(&page).with_context(|| format!("cannot read {}", page.display()))?;
        fs::write(&page, between(&old, &text)?)?;
    }
    Ok(())
}

/// One thing that cargo built, and the seconds that it took.
type Unit = (String, f64);

/// The units of the last build with `--timings`, read out of the page that it wrote.
fn units(target: &Path) -> anyhow::Result<Vec<Unit>> {
    let page = fs::read_to_string(target.join("cargo-timings/cargo-timing.html"))?;
    parse(&page)
}

fn parse(page: &str) -> anyhow::Result<Vec<Unit>> {
    let (_, rest) =
        page.split_once("const UNIT_DATA = ").context("the page of --timings has no UNIT_DATA")?;
    let units = serde_json::Deserializer::from_str(rest).into_iter::<Value>().next();
    let units = units.context("UNIT_DATA is empty")??;
    let unit = |unit: &Value| Some((unit["name"].as_str()?.to_owned(), unit["duration"].as_f64()?));
    units
        .as_array()
        .and_then(|units| units.iter().map(unit).collect())
        .context("a unit has no name or duration")
}

/// The crates that take longest, all their versions and targets together.
fn dearest(tests: &[Unit], release: &[Unit]) -> String {
    let sum = |units: &[Unit]| {
        let mut seconds: HashMap<String, f64> = HashMap::new();
        units.iter().for_each(|(name, took)| *seconds.entry(name.clone()).or_default() += took);
        seconds
    };
    let (tests, release) = (sum(tests), sum(release));
    let total = |seconds: &HashMap<String, f64>| seconds.values().sum::<f64>();
    let of = |seconds: &HashMap<String, f64>, name: &str| seconds.get(name).copied().unwrap_or_default();
    let mut names: Vec<_> = tests.keys().chain(release.keys()).collect();
    names.sort_by(|a, b| {
        let both = |name: &str| of(&tests, name).max(of(&release, name));
        both(b).total_cmp(&both(a)).then_with(|| a.cmp(b))
    });
    names.dedup();
    let row = |name: &str, a: f64, b: f64| format!("| {name} | {a:.1} | {b:.1} |\n");
    let mut table = "| crate | tests | release |\n| --- | ---: | ---: |\n".to_owned();
    names.iter().take(DEAREST).for_each(|name| table += &row(name, of(&tests, name), of(&release, name)));
    table + &row(&format!("all {}", names.len()), total(&tests), total(&release))
}

/// `page` with `text` between the two marks.
fn between(page: &str, text: &str) -> anyhow::Result<String> {
    let (head, rest) = page.split_once(BEGIN).context("the page has no mark to write behind")?;
    let (_, tail) = rest.split_once(END).context("the page has no mark to write before")?;
    ensure!(!tail.contains(BEGIN), "the page has two marks");
    Ok(format!("{head}{BEGIN}\n{text}\n{END}{tail}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_read_out_of_the_page_and_summed_by_crate() {
        let page = "<script>const UNIT_DATA = [{\"name\":\"a\",\"duration\":1.5},{\"name\":\"b\",\"duration\":2.0},\
                    {\"name\":\"a\",\"duration\":3.0}];\nconst X = 1;";
        let units = parse(page).unwrap();
        assert_eq!(units.len(), 3);
        let table = dearest(&units, &[("b".to_owned(), 9.0)]);
        let rows: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(rows, ["| b | 2.0 | 9.0 |", "| a | 4.5 | 0.0 |", "| all 2 | 6.5 | 9.0 |"]);
    }

    #[test]
    fn tables_go_between_the_marks() {
        let page = format!("a\n{BEGIN}old\n{END}z\n");
        assert_eq!(between(&page, "new").unwrap(), format!("a\n{BEGIN}\nnew\n{END}z\n"));
        assert!(between("a", "new").is_err());
    }
}
