//! The `SESSION_REPLICATION_*` variables of the system whose API this one speaks, for deployments that have them set already.
//! They count for more than the file, and for less than `SESSIOND_*`.

use figment::Figment;
use figment::providers::Serialized;
use serde::Serialize;
use url::Url;

use super::fault;
use crate::domain::{Error, Result};

/// What each of them begins with.
const PREFIX: &str = "SESSION_REPLICATION_";
/// Those that mean nothing here: there is no lock beside the slot, and an insert is waited for and never given up.
const WITHOUT_EFFECT: [&str; 13] = [
    "LEADER_LOCK_EXTEND_INTERVAL_MS",
    "LEADER_LOCK_ADDITIONAL_TIME_MS",
    "ACK_INTERVAL_SECONDS",
    "LOG_LEVEL",
    "CLICKHOUSE_LOG_LEVEL",
    "WAIT_FOR_ASYNC_INSERT",
    "INSERT_STRATEGY",
    "INSERT_MAX_RETRIES",
    "INSERT_BASE_DELAY_MS",
    "INSERT_MAX_DELAY_MS",
    "KEEP_ALIVE_ENABLED",
    "KEEP_ALIVE_IDLE_SOCKET_TTL_MS",
    "MAX_OPEN_CONNECTIONS",
];

/// The settings that the others mean.
const MEANINGS: [(&str, &str, Kind); 8] = [
    ("SLOT_NAME", "replication.slot", Kind::Text),
    ("PUBLICATION_NAME", "replication.publication", Kind::Text),
    ("DATABASE_URL", "replication.url", Kind::Text),
    ("MAX_FLUSH_CONCURRENCY", "replication.in_flight", Kind::Count),
    ("FLUSH_BATCH_SIZE", "replication.flush_rows", Kind::Count),
    ("FLUSH_INTERVAL_MS", "replication.flush_gap", Kind::Millis),
    ("LEADER_LOCK_TIMEOUT_MS", "replication.wal_sender_timeout", Kind::Millis),
    ("LEADER_LOCK_RETRY_INTERVAL_MS", "replication.poll", Kind::Millis),
];

/// What a value is.
#[derive(Clone, Copy)]
enum Kind {
    Text,
    Count,
    Millis,
}

/// Merges what `variables` say. Returns the names of those that have no effect.
///
/// # Errors
/// [`Error::Invalid`] with every variable that is unknown or has a value that it cannot have, by its own name.
pub(super) fn merge(
    mut figment: Figment,
    variables: impl Iterator<Item = (String, String)>,
) -> Result<(Figment, Vec<String>)> {
    let ours = variables.filter(|(name, value)| name.starts_with(PREFIX) && !value.is_empty());
    let ours: Vec<_> = ours.collect();
    // A URL alone must not begin anything: who has it set for the other system need not want this one to write there.
    let enabled = ours.iter().any(|(name, value)| name[PREFIX.len()..] == *"ENABLED" && value == "1");
    let (mut without_effect, mut faults) = (Vec::new(), Vec::new());
    for (name, value) in ours {
        let short = &name[PREFIX.len()..];
        let merged = match short {
            "ENABLED" => Ok(set(figment.clone(), "replication.enabled", enabled)),
            "CLICKHOUSE_URL" if enabled => {
                clickhouse(figment.clone(), &value).ok_or("must be an http or https URL")
            }
            _ => match MEANINGS.iter().find(|(known, ..)| *known == short) {
                Some((_, key, kind)) => one(figment.clone(), key, *kind, value),
                None if short == "CLICKHOUSE_URL" || WITHOUT_EFFECT.contains(&short) => {
                    without_effect.push(name.clone());
                    continue;
                }
                None => Err("is no setting"),
            },
        };
        match merged {
            Ok(merged) => figment = merged,
            Err(message) => faults.push(fault(&name, message)),
        }
    }
    if faults.is_empty() { Ok((figment, without_effect)) } else { Err(Error::Invalid(faults)) }
}

fn set(figment: Figment, key: &str, value: impl Serialize) -> Figment {
    figment.merge(Serialized::default(key, value))
}

fn one(figment: Figment, key: &str, kind: Kind, value: String) -> std::result::Result<Figment, &'static str> {
    let number = || value.parse::<u64>().map_err(|_| "must be a whole number");
    Ok(match kind {
        Kind::Text => set(figment, key, value),
        Kind::Count => set(figment, key, number()?),
        Kind::Millis => set(figment, key, format!("{}ms", number()?)),
    })
}

/// User, password and database may stand in the URL; here they are settings of their own. `None` if it is no URL.
fn clickhouse(mut figment: Figment, value: &str) -> Option<Figment> {
    let mut url: Url = value.parse().ok().filter(|url: &Url| matches!(url.scheme(), "http" | "https"))?;
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
    url.set_username("").ok()?;
    url.set_password(None).ok()?;
    Some(set(figment, "clickhouse.url", url))
}

#[cfg(test)]
mod tests {
    use figment::providers::{Format, Toml};
    use secrecy::ExposeSecret;

    use super::*;
    use crate::config::{Config, DEFAULTS};

    fn read(variables: &[(&str, &str)]) -> Result<(Config, Vec<String>)> {
        let variables =
            variables.iter().map(|(name, value)| (format!("{PREFIX}{name}"), (*value).to_owned()));
        let (figment, without_effect) = merge(Figment::from(Toml::string(DEFAULTS)), variables)?;
        Ok((figment.extract().expect("settings"), without_effect))
    }

    #[test]
    fn every_name_with_a_meaning_sets_what_it_means() {
        let (config, without_effect) = read(&[
            ("CLICKHOUSE_URL", "https://me:p%40ss@host:8443/?database=other"),
            ("ENABLED", "1"),
            ("SLOT_NAME", "123"),
            ("PUBLICATION_NAME", "publication"),
            ("DATABASE_URL", "postgres://x"),
            ("MAX_FLUSH_CONCURRENCY", "3"),
            ("FLUSH_INTERVAL_MS", "70"),
            ("FLUSH_BATCH_SIZE", "60"),
            ("LEADER_LOCK_TIMEOUT_MS", "30000"),
            ("LEADER_LOCK_RETRY_INTERVAL_MS", "400"),
            ("INSERT_MAX_RETRIES", "3"),
        ])
        .expect("settings");
        let (clickhouse, replication) = (&config.clickhouse, &config.replication);
        assert_eq!(clickhouse.url.as_ref().expect("a URL").as_str(), "https://host:8443/");
        assert_eq!((clickhouse.user.as_str(), clickhouse.database.as_str()), ("me", "other"));
        assert_eq!(clickhouse.password.as_ref().expect("a password").expose_secret(), "p@ss");
        assert!(replication.enabled);
        assert_eq!((replication.slot.as_str(), replication.publication.as_str()), ("123", "publication"));
        assert_eq!(replication.url.as_ref().expect("a URL").expose_secret(), "postgres://x");
        assert_eq!((replication.in_flight, replication.flush_rows), (3, 60));
        assert_eq!((replication.flush_gap.as_millis(), replication.poll.as_millis()), (70, 400));
        assert_eq!(replication.wal_sender_timeout.as_secs(), 30);
        assert_eq!(without_effect, ["SESSION_REPLICATION_INSERT_MAX_RETRIES"]);
    }

    #[test]
    fn a_url_of_clickhouse_counts_only_where_replication_is_enabled() {
        for enabled in [&[][..], &[("ENABLED", "0")]] {
            let variables = [&[("CLICKHOUSE_URL", "http://host")], enabled].concat();
            let (config, without_effect) = read(&variables).expect("settings");
            assert!(config.clickhouse.url.is_none() && !config.replication.enabled);
            assert_eq!(without_effect, ["SESSION_REPLICATION_CLICKHOUSE_URL"]);
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_its_own_name() {
        for (name, value) in [("FLUSH_INTERVAL_MS", "soon"), ("CLICKHOUSE_URL", "host"), ("SLOT", "x")] {
            let refused = read(&[("ENABLED", "1"), (name, value)]).expect_err(name).to_string();
            assert!(refused.contains(&format!("{PREFIX}{name}")), "{refused}");
        }
    }
}
