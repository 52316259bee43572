//! One answer, two readers: a line for people, `--json` for scripts.

use clap::Args;
use serde_json::Value;

/// How a command prints its answer.
#[derive(Clone, Copy, Debug, Args)]
pub(super) struct OutputArgs {
    /// Print JSON for a script
    #[arg(long)]
    pub(super) json: bool,
}

impl OutputArgs {
    /// Prints one of the two forms.
    pub(super) fn print(self, json: &Value, text: impl FnOnce() -> String) {
        if self.json {
            println!("{json:#}");
        } else {
            println!("{}", text());
        }
    }
}

/// A table with left-aligned columns.
pub(super) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([head[column].len()]).max().unwrap_or_default()
    };
    let widths: Vec<_> = (0..head.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let cells = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let head = line(head.to_vec());
    let rows = rows.iter().map(|row| line(row.iter().map(String::as_str).collect()));
    [head].into_iter().chain(rows).collect::<Vec<_>>().join("\n")
}
