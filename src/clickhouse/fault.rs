//! What can go wrong with ClickHouse, by what to do about it.

use std::time::Duration;

/// Codes that blame the rows themselves: no retry of the same rows can help.
/// (ErrorCodes.cpp of ClickHouse: cannot parse, type mismatch, out of range, incorrect data, too deep, violated constraint.)
const POISON: [u32; 15] = [6, 25, 26, 27, 38, 41, 53, 69, 72, 117, 130, 131, 306, 321, 469];
/// TOO_MANY_PARTS.
const TOO_MANY_PARTS: u32 = 252;

/// Why ClickHouse did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// It is away, overloaded or set up in another way than we expect. Asking again may help.
    #[error("ClickHouse does not answer as it should")]
    Transient(#[source] clickhouse::error::Error),
    /// No answer in time.
    #[error("ClickHouse did not answer within {0:?}")]
    TimedOut(Duration),
    /// It cannot merge as fast as we insert.
    #[error("ClickHouse has too many parts")]
    TooManyParts(#[source] clickhouse::error::Error),
    /// It refuses the rows.
    #[error("ClickHouse refuses the rows")]
    Poison(#[source] clickhouse::error::Error),
    /// A newer binary has migrated the table.
    #[error(
        "the ClickHouse table {table} was migrated by a newer sessiond (step {step}); start that version"
    )]
    NewerSchema {
        /// Which table.
        table: String,
        /// The step that this binary does not know.
        step: u32,
    },
    /// A row does not hold what it should.
    #[error("cannot read {column} of session {session} in ClickHouse")]
    Row {
        /// Which column.
        column: &'static str,
        /// Whose row.
        session: String,
    },
}

impl Fault {
    /// What an operator reads: the code and name that ClickHouse gives, without data.
    pub fn summary(&self) -> String {
        match self {
            Self::Transient(error) | Self::TooManyParts(error) | Self::Poison(error) => match code(error) {
                Some(code) => format!("{self}: code {code} {}", name(error).unwrap_or_default()),
                None => format!("{self}: {}", kind(error)),
            },
            other => other.to_string(),
        }
    }
}

impl From<clickhouse::error::Error> for Fault {
    fn from(error: clickhouse::error::Error) -> Self {
        match code(&error) {
            Some(TOO_MANY_PARTS) => Self::TooManyParts(error),
            Some(code) if POISON.contains(&code) => Self::Poison(error),
            _ => Self::Transient(error),
        }
    }
}

/// The number behind `Code: ` of an answer.
fn code(error: &clickhouse::error::Error) -> Option<u32> {
    let clickhouse::error::Error::BadResponse(text) = error else { return None };
    let rest = text.split_once("Code: ")?.1;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// The name of the code, which stands in brackets near the end: `(TOO_MANY_PARTS)`.
fn name(error: &clickhouse::error::Error) -> Option<&str> {
    let clickhouse::error::Error::BadResponse(text) = error else { return None };
    text.split(['(', ')'])
        .rev()
        .find(|word| word.len() > 3 && word.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_'))
}

fn kind(error: &clickhouse::error::Error) -> &'static str {
    match error {
        clickhouse::error::Error::Network(_) => "cannot connect, or the connection broke",
        clickhouse::error::Error::TimedOut => "timed out",
        clickhouse::error::Error::SchemaMismatch(_) => "the table has other columns than expected",
        _ => "an answer that cannot be understood",
    }
}

#[cfg(test)]
mod tests {
    use clickhouse::error::Error;

    use super::*;

    fn fault(text: &str) -> Fault {
        Error::BadResponse(text.to_owned()).into()
    }

    #[test]
    fn codes_decide() {
        assert!(matches!(
            fault("Code: 252. DB::Exception: Too many parts. (TOO_MANY_PARTS) (version 26)"),
            Fault::TooManyParts(_)
        ));
        assert!(matches!(
            fault("Code: 117. DB::Exception: Cannot parse. (INCORRECT_DATA)"),
            Fault::Poison(_)
        ));
        assert!(matches!(
            fault("Code: 241. DB::Exception: Memory limit. (MEMORY_LIMIT_EXCEEDED)"),
            Fault::Transient(_)
        ));
        assert!(matches!(fault("502 Bad Gateway"), Fault::Transient(_)));
    }

    #[test]
    fn a_summary_names_the_code_and_no_data() {
        let fault =
            fault("Code: 117. DB::Exception: Cannot parse {\"secret\":1}. (INCORRECT_DATA) (version 26.7)");
        assert_eq!(fault.summary(), "ClickHouse refuses the rows: code 117 INCORRECT_DATA");
    }
}
