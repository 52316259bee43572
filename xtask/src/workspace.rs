//! Where things are: the checkout, the build output, and the cache outside the checkout.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, ensure};

use crate::process;

/// The paths that every command needs.
pub(crate) struct Workspace {
    /// The checkout.
    pub(crate) root: PathBuf,
    /// Downloads and tools that outlive a checkout.
    pub(crate) cache: PathBuf,
    /// Build output of the child cargo calls.
    pub(crate) target: PathBuf,
}

impl Workspace {
    /// Finds the paths from the environment.
    ///
    /// CI clones anew each time, so there the build output goes to the cache unless `CARGO_TARGET_DIR` says
    /// otherwise.
    pub(crate) fn locate() -> anyhow::Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in the workspace")?;
        let base = match set("XDG_CACHE_HOME") {
            Some(dir) => PathBuf::from(dir),
            None => {
                let home = set("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?;
                Path::new(&home).join(".cache")
            }
        };
        let cache = base.join("sessiond");
        let target = match set("CARGO_TARGET_DIR") {
            Some(dir) => root.join(dir),
            None if set("CI").is_some_and(|ci| ci == "true") => cache.join("target"),
            None => root.join("target"),
        };
        Ok(Self { root: root.to_owned(), cache, target })
    }

    /// Cargo, in the checkout, building where we said.
    pub(crate) fn cargo(&self, args: &[&str]) -> Command {
        self.command(process::cargo(), args)
    }

    /// A cargo subcommand that is not on the `PATH`, likewise.
    pub(crate) fn subcommand(&self, tool: &Path, args: &[&str]) -> Command {
        self.command(Command::new(tool), args)
    }

    fn command(&self, mut command: Command, args: &[&str]) -> Command {
        command.args(args).current_dir(&self.root).env("CARGO_TARGET_DIR", &self.target);
        command
    }

    /// A new folder in the cache, gone when dropped.
    pub(crate) fn scratch(&self, purpose: &str) -> anyhow::Result<Scratch> {
        fs::create_dir_all(&self.cache)?;
        Scratch::new(&self.cache, purpose)
    }

    /// Where a tool is kept in the cache, by its name and version.
    pub(crate) fn tool(&self, name: &str) -> PathBuf {
        self.cache.join("tools").join(name)
    }

    /// A binary of the workspace's debug build.
    pub(crate) fn debug_binary(&self, name: &str) -> PathBuf {
        self.target.join("debug").join(name)
    }
}

/// Moves what was `made` to its `home` in the cache: whole or not at all, whoever else does it now. `proof` is a file below
/// `home` that shows that it is there.
///
/// # Errors
/// If it cannot be moved, and nobody else has put it there.
pub(crate) fn keep(made: &Path, home: &Path, proof: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(home.parent().context("the cache has folders")?)?;
    if let Err(error) = fs::rename(made, home) {
        ensure!(proof.exists(), "cannot move {} to {}: {error}", made.display(), home.display());
    }
    Ok(())
}

/// A folder that is removed when dropped.
pub(crate) struct Scratch {
    pub(crate) path: PathBuf,
}

impl Scratch {
    /// Makes it, empty, below `parent`.
    ///
    /// # Errors
    /// If it cannot be made, or an earlier process of our number has left one.
    pub(crate) fn new(parent: &Path, purpose: &str) -> anyhow::Result<Self> {
        let path = parent.join(format!("{purpose}-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("could not remove {}: {error}", self.path.display());
        }
    }
}

/// An environment variable that is set and not empty.
fn set(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}
