//! The key that every stored secret is sealed with: set by the operator, or generated once beside the store.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, bail};
use secrecy::{ExposeSecret, SecretString};

use super::private;
use crate::auth::vault::Vault;
use crate::config::Config;
use crate::domain::tenant::StoredKey;

/// Keys that the master key is tried on, of the oldest and of the newest.
pub(super) const TRIED: u64 = 64;

/// The vault of the configured master key, or of the generated one, which is made only if `make` says so and nothing is
/// sealed yet. `sealed` are live keys of the store: at least one of them must open.
pub(super) fn open(config: &Config, sealed: &[StoredKey], make: bool) -> anyhow::Result<Vault> {
    let path = config.master_key_file();
    let (key, place) = match &config.auth.master_key {
        Some(key) => (key.clone(), "auth.master_key".to_owned()),
        None => (read_or_make(&path, sealed, make)?, path.display().to_string()),
    };
    let vault = Vault::new(&key).with_context(|| format!("cannot use the master key of {place}"))?;
    let unreadable: Vec<_> = sealed
        .iter()
        .filter(|key| vault.open(&key.sealed_secret, &key.environment, &key.id).is_err())
        .map(|key| key.id.as_str())
        .collect();
    if let Some(first) = unreadable.first() {
        if unreadable.len() == sealed.len() {
            bail!(
                "the master key of {place} is not the one that the stored keys are sealed with: none of them opens, \
                 such as {first}. Put the right one back; without it no key of this store can be used again"
            );
        }
        tracing::warn!(
            keys = unreadable.join(" "),
            "some stored keys were sealed with another master key and cannot be used; revoke them"
        );
    }
    Ok(vault)
}

fn read_or_make(path: &Path, sealed: &[StoredKey], make: bool) -> anyhow::Result<SecretString> {
    let there = path.try_exists().with_context(|| format!("cannot look at {}", path.display()))?;
    if !there {
        // Whoever stored a key had made the file before, so it is not being made just now.
        if let Some(key) = sealed.first() {
            bail!(
                "{} is gone, and stored keys are sealed with it, such as {}. Put it back from your backup, or set \
                 auth.master_key; without it no key of this store can be used again",
                path.display(),
                key.id
            );
        }
        if !make {
            bail!("there is no master key in {}: `sessiond serve` makes it", path.display());
        }
        generate(path)?;
    }
    let key = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(key.into())
}

/// Makes a master key that only its owner can read. The file appears whole or not at all, and does not go again with the
/// power: half a key, or none, would lock every secret away.
fn generate(path: &Path) -> anyhow::Result<()> {
    let draft = path.with_extension(format!("key.{}.new", std::process::id()));
    let key = Vault::generate_master_key()?;
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
    file.write_all(key.expose_secret().as_bytes())?;
    file.sync_all()?;
    // Unlike a rename it fails if another process was faster, whose key then counts.
    let linked = std::fs::hard_link(&draft, path);
    std::fs::remove_file(&draft)?;
    match linked {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("cannot make {}", path.display()))
        }
        _ => private::sync_folder(private::parent(path))
            .with_context(|| format!("cannot bring {} to the disk", path.display())),
    }
}
