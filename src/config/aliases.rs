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
/// Whether there is to be a replicator.
const ENABLED: &str = "SESSION_REPLICATION_ENABLED";
/// Our own variable for the URL of ClickHouse.
const OURS: &str = "SESSIOND_CLICKHOUSE__URL";
/// The settings that the names mean.
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
/// [`Error::Invalid`] with every variable that has a value which it cannot have, by its own name.
pub(super) fn merge(
    mut figment: Figment,
    variables: impl Iterator<Item = (String, String)>,
) -> Result<(Figment, Vec<String>)> {
    let variables: Vec<_> = variables.filter(|(_, value)| !value.is_empty()).collect();
    // Who names another server by our own variable means none of what the other one says, least of all its password.
    let is_ours_set = variables.iter().any(|(name, _)| name.eq_ignore_ascii_case(OURS));
    // A URL alone must not begin anything: who has it set for the other system need not want this one to write there.
    let is_enabled = variables.iter().any(|(name, value)| name[..] == *ENABLED && value == "1");
    let takes_url = is_enabled && !is_ours_set;
    let (mut without_effect, mut faults) = (Vec::new(), Vec::new());
    for (name, value) in variables {
        let Some(short) = name.strip_prefix(PREFIX) else { continue };
        let merged = match (short, MEANINGS.iter().find(|(known, ..)| *known == short)) {
            // Whatever else it says is off there.
            ("ENABLED", _) => Ok(set(figment.clone(), "replication.enabled", is_enabled)),
            ("CLICKHOUSE_URL", _) if takes_url => {
                clickhouse(figment.clone(), &value).ok_or("must be an http or https URL")
            }
            (_, Some((_, key, kind))) => one(figment.clone(), key, *kind, value),
            // Those that mean nothing here: there is no lock beside the slot, and an insert is waited for and never given up. Or
            // no setting of anybody: the name may be that of a service, of which an orchestrator tells where it is.
            _ => {
                without_effect.push(name.clone());
                continue;
            }
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
    fn what_means_nothing_here_is_named_and_keeps_nobody_from_starting() {
        let (_, without_effect) =
            read(&[("SERVICE_HOST", "10.0.0.1"), ("LOG_LEVEL", "info")]).expect("settings");
        assert_eq!(without_effect, ["SESSION_REPLICATION_SERVICE_HOST", "SESSION_REPLICATION_LOG_LEVEL"]);
    }

    #[test]
    fn a_password_goes_to_no_other_server_than_its_own() {
        let theirs = [(ENABLED, "1"), ("SESSION_REPLICATION_CLICKHOUSE_URL", "http://me:secret@host")];
        let variables = theirs.into_iter().chain([(OURS, "http://elsewhere")]);
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let (figment, without_effect) =
            merge(Figment::from(Toml::string(DEFAULTS)), variables).expect("settings");
        let config: Config = figment.extract().expect("settings");
        assert!(config.clickhouse.password.is_none() && config.clickhouse.user == "default");
        assert_eq!(without_effect, ["SESSION_REPLICATION_CLICKHOUSE_URL"]);
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_its_own_name() {
        for (name, value) in [("FLUSH_INTERVAL_MS", "soon"), ("CLICKHOUSE_URL", "host")] {
            let refused = read(&[("ENABLED", "1"), (name, value)]).expect_err(name).to_string();
            assert!(refused.contains(&format!("{PREFIX}{name}")), "{refused}");
        }
    }
}
