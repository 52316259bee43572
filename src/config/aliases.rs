//! The `SESSION_REPLICATION_*` names of the system whose API we speak (wire contract, section 15), for who brings a
//! deployment along. They count for more than the file, and for less than our own variables.

use figment::Figment;
use figment::providers::Serialized;
use url::Url;

use super::fault;
use crate::domain::{Error, Result};

const PREFIX: &str = "SESSION_REPLICATION_";
/// Names that mean nothing here: there is no lock beside the slot, inserts are always waited for, and none is given up.
const WITHOUT_MEANING: [&str; 13] = [
    "LEADER_LOCK_EXTEND_INTERVAL_MS",
    "LEADER_LOCK_ADDITIONAL_TIME_MS",
    "ACK_INTERVAL_SECONDS",
    "LOG_LEVEL",
    "CLICKHOUSE_LOG_LEVEL",
    "WAIT_FOR_ASYNC_INSERT",
    "INSERT_STRATEGY",
    "KEEP_ALIVE_ENABLED",
    "KEEP_ALIVE_IDLE_SOCKET_TTL_MS",
    "MAX_OPEN_CONNECTIONS",
    "INSERT_MAX_RETRIES",
    "INSERT_BASE_DELAY_MS",
    "INSERT_MAX_DELAY_MS",
];

/// Merges what `variables` say under other names. Answers the names that are known and mean nothing.
pub(super) fn merge(
    mut figment: Figment,
    variables: impl Iterator<Item = (String, String)>,
) -> Result<(Figment, Vec<String>)> {
    let mut ignored = Vec::new();
    for (name, value) in variables.filter(|(_, value)| !value.is_empty()) {
        let Some(short) = name.strip_prefix(PREFIX) else { continue };
        let millis =
            || value.parse::<u64>().map(|millis| format!("{millis}ms")).map_err(|_| not_a_number(&name));
        let number = || value.parse::<u64>().map_err(|_| not_a_number(&name));
        figment = match short {
            "CLICKHOUSE_URL" => clickhouse(figment, &name, &value)?,
            "ENABLED" => set(figment, "replication.enabled", matches!(value.as_str(), "1" | "true")),
            "SLOT_NAME" => set(figment, "replication.slot", value),
            "PUBLICATION_NAME" => set(figment, "replication.publication", value),
            "DATABASE_URL" => set(figment, "replication.url", value),
            "MAX_FLUSH_CONCURRENCY" => set(figment, "replication.concurrency", number()?),
            "FLUSH_BATCH_SIZE" => set(figment, "replication.batch_rows", number()?),
            "FLUSH_INTERVAL_MS" => set(figment, "replication.linger", millis()?),
            "LEADER_LOCK_TIMEOUT_MS" => set(figment, "replication.leader_timeout", millis()?),
            "LEADER_LOCK_RETRY_INTERVAL_MS" => set(figment, "replication.retry_interval", millis()?),
            known if WITHOUT_MEANING.contains(&known) => {
                ignored.push(name);
                figment
            }
            _ => return Err(Error::Invalid(vec![fault(&name, "is no setting")])),
        };
    }
    Ok((figment, ignored))
}

fn set(figment: Figment, key: &str, value: impl serde::Serialize) -> Figment {
    figment.merge(Serialized::default(key, value))
}

fn not_a_number(name: &str) -> Error {
    Error::Invalid(vec![fault(name, "must be a whole number")])
}

/// User, password and database may stand in the URL.
fn clickhouse(mut figment: Figment, name: &str, value: &str) -> Result<Figment> {
    let bad = || Error::Invalid(vec![fault(name, "must be an http or https URL")]);
    let mut url: Url = value.parse().map_err(|_| bad())?;
    let decoded = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
    if !url.username().is_empty() {
        figment = set(figment, "clickhouse.user", decoded(url.username()));
    }
    if let Some(password) = url.password() {
        figment = set(figment, "clickhouse.password", decoded(password));
    }
    if let Some((_, database)) = url.query_pairs().find(|(key, _)| key == "database") {
        figment = set(figment, "clickhouse.database", database.into_owned());
    }
    url.set_query(None);
    let cleared = url.set_username("").and_then(|()| url.set_password(None));
    cleared.map_err(|()| bad())?;
    Ok(set(figment, "clickhouse.url", url))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, DEFAULTS};
    use figment::providers::{Format, Toml};

    fn read(variables: &[(&str, &str)]) -> Result<(Config, Vec<String>)> {
        let variables =
            variables.iter().map(|(name, value)| (format!("{PREFIX}{name}"), (*value).to_owned()));
        let (figment, ignored) = merge(Figment::from(Toml::string(DEFAULTS)), variables)?;
        Ok((figment.extract().expect("reads"), ignored))
    }

    #[test]
    fn every_name_with_a_meaning_sets_what_it_means() {
        let (config, ignored) = read(&[
            ("CLICKHOUSE_URL", "https://me:p%40ss@host:8443/?database=other"),
            ("ENABLED", "1"),
            ("SLOT_NAME", "slot"),
            ("PUBLICATION_NAME", "publication"),
            ("DATABASE_URL", "postgres://x"),
            ("MAX_FLUSH_CONCURRENCY", "3"),
            ("FLUSH_INTERVAL_MS", "70"),
            ("FLUSH_BATCH_SIZE", "60"),
            ("LEADER_LOCK_TIMEOUT_MS", "30000"),
            ("LEADER_LOCK_RETRY_INTERVAL_MS", "400"),
            ("INSERT_MAX_RETRIES", "3"),
        ])
        .expect("reads");
        let (clickhouse, replication) = (&config.clickhouse, &config.replication);
        assert_eq!(clickhouse.url.as_ref().expect("a URL").as_str(), "https://host:8443/");
        assert_eq!((clickhouse.user.as_str(), clickhouse.database.as_str()), ("me", "other"));
        assert_eq!(secrecy::ExposeSecret::expose_secret(clickhouse.password.as_ref().expect("one")), "p@ss");
        assert!(replication.enabled);
        assert_eq!((replication.slot.as_str(), replication.publication.as_str()), ("slot", "publication"));
        assert_eq!((replication.concurrency, replication.batch_rows), (3, 60));
        assert_eq!((replication.linger.as_millis(), replication.retry_interval.as_millis()), (70, 400));
        assert_eq!(replication.leader_timeout.as_secs(), 30);
        assert_eq!(ignored, ["SESSION_REPLICATION_INSERT_MAX_RETRIES"]);
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_its_own_name() {
        for (name, value) in [("FLUSH_INTERVAL_MS", "soon"), ("CLICKHOUSE_URL", "host"), ("SLOT", "x")] {
            let fault = read(&[(name, value)]).expect_err(name).to_string();
            assert!(fault.contains(&format!("{PREFIX}{name}")), "{fault}");
        }
    }
}
