//! What the tests need from the machine. Debian packages are installed when they are missing; Rust and Node are
//! the newcomer's own.

use std::process::Command;

use anyhow::{Context, ensure};

use crate::process;

/// Postgres for the contract suites; strace to see that every ack comes after its sync; chromium for the playground.
const DEBIAN: [&str; 3] = ["postgresql", "strace", "chromium"];
/// The first Node that bundles the playground.
const NODE_MIN: (u32, u32) = (20, 19);

/// Installs what the tests miss.
///
/// # Errors
/// Names what is missing and cannot be installed by us.
pub(crate) fn install() -> anyhow::Result<()> {
    let version = process::answer(Command::new("node").arg("--version")).unwrap_or("(none)".to_owned());
    let (major, minor) = NODE_MIN;
    ensure!(
        node_version(&version).is_some_and(|found| found >= NODE_MIN),
        "Node {major}.{minor} or later is needed, here is {version}; install it"
    );
    debian(&DEBIAN)?;
    println!("node {version}; Debian packages {}", DEBIAN.join(", "));
    Ok(())
}

/// Installs those Debian packages that are missing. With none missing it asks nobody and needs no rights.
///
/// # Errors
/// Names those that are missing where we may not install.
pub(crate) fn debian(packages: &[&str]) -> anyhow::Result<()> {
    let missing: Vec<&str> = packages.iter().copied().filter(|name| !installed(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("missing Debian packages: {}", missing.join(", "));
    let asked = process::run(apt_get().arg("update")).and_then(|()| {
        process::run(apt_get().args(["install", "--yes", "--no-install-recommends"]).args(&missing))
    });
    asked.with_context(|| format!("these could not be installed, so install them: {}", missing.join(" ")))
}

fn installed(package: &str) -> bool {
    let status = process::answer(Command::new("dpkg-query").args(["-W", "-f=${db:Status-Status}", package]));
    status.is_some_and(|status| status == "installed")
}

fn apt_get() -> Command {
    let root = process::answer(Command::new("id").arg("-u")).is_some_and(|uid| uid == "0");
    if root {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    } else {
        let mut command = Command::new("sudo");
        command.args(["--non-interactive", "env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        command
    }
}

fn node_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.strip_prefix('v')?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_version_is_read_as_two_numbers() {
        assert_eq!(node_version("v20.19.1"), Some((20, 19)));
        assert!(node_version("v9.99.0").unwrap() < NODE_MIN);
        assert_eq!(node_version("20"), None);
    }
}
