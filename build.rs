//! Bundles the playground with npm and writes the table of its files that `src/api/playground.rs` serves.
//!
//! A server without a playground is still a server: without npm, or when npm fails, the table is empty and
//! `/playground` says how to get it. Everything happens in `OUT_DIR`, which Cargo locks; the checkout is only read.

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

/// What the bundle is made of, below `playground/`.
const SOURCES: [&str; 7] =
    ["package.json", "package-lock.json", "vite.config.ts", "tsconfig.json", "index.html", "public", "src"];
/// Set to anything to build without the playground.
const SKIP: &str = "SESSIOND_SKIP_PLAYGROUND";
/// Set to fail rather than to build without it. Not watched, so that it rebuilds nothing: `cargo xtask` sets it.
const REQUIRE: &str = "SESSIOND_REQUIRE_PLAYGROUND";

fn main() {
    for source in SOURCES {
        println!("cargo:rerun-if-changed=playground/{source}");
    }
    println!("cargo:rerun-if-env-changed={SKIP}");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let files = if env::var_os(SKIP).is_some_and(|value| !value.is_empty()) {
        Vec::new()
    } else {
        bundle(Path::new("playground"), &out.join("playground")).unwrap_or_else(|reason| {
            assert!(env::var_os(REQUIRE).is_none(), "the playground cannot be built: {reason}");
            println!("cargo:warning=built without the playground: {reason}");
            Vec::new()
        })
    };
    fs::write(out.join("playground.rs"), table(&files, &out)).expect("OUT_DIR can be written");
}

/// A file of the bundle: its path in it, and where its compressed content is.
struct Bundled {
    path: String,
    gzip: PathBuf,
}

fn bundle(sources: &Path, work: &Path) -> Result<Vec<Bundled>, String> {
    for source in SOURCES {
        replace(&sources.join(source), &work.join(source)).map_err(|error| format!("{source}: {error}"))?;
    }
    // npm removes node_modules before it installs, so the copy is there only if what it names is.
    let (wanted, installed) =
        (work.join("package-lock.json"), work.join("node_modules/.installed-lock.json"));
    if fs::read(&wanted).ok() != fs::read(&installed).ok() {
        let quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-progress", "--loglevel=error"];
        // What is cached needs no network; what is not is waited for, but not for ever.
        let network = ["--prefer-offline", "--fetch-retries=1", "--fetch-timeout=60000"];
        let mut npm = Command::new("npm");
        npm.args(["ci", "--omit=dev", "--engine-strict"]).args(quiet).args(network);
        run(npm.current_dir(work))?;
        fs::copy(&wanted, &installed).map_err(|error| error.to_string())?;
    }
    let mut vite = Command::new("node");
    vite.args(["node_modules/vite/bin/vite.js", "build", "--outDir", "dist"]);
    run(vite.current_dir(work).env("NODE_ENV", "production"))?;
    let dist = work.join("dist");
    let mut files = Vec::new();
    collect(&dist, &dist, &mut files).map_err(|error| error.to_string())?;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files
        .iter()
        .any(|file| file.path == "index.html")
        .then_some(files)
        .ok_or("vite made no index.html".to_owned())
}

fn run(command: &mut Command) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            format!("{name} is not installed; install Node 20.19 or later, then `cargo xtask playground`")
        }
        _ => format!("{name}: {error}"),
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    // A warning is one line, without the stack.
    let is_news = |line: &&str| !line.is_empty() && !line.contains("  at ");
    let said: Vec<&str> = said.lines().map(str::trim).filter(is_news).take(6).collect();
    let said = said.join(" | ");
    Err(format!("{name} failed ({}): {said}; `cargo xtask playground` tries again", output.status))
}

/// Makes `to` a copy of `from`, without what was there before.
fn replace(from: &Path, to: &Path) -> io::Result<()> {
    if to.is_dir() {
        fs::remove_dir_all(to)?;
    }
    if from.is_file() {
        fs::create_dir_all(to.parent().expect("below the work folder"))?;
        return fs::copy(from, to).map(drop);
    }
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        replace(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}

fn collect(dist: &Path, dir: &Path, files: &mut Vec<Bundled>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let gzip = entry?.path();
        if gzip.is_dir() {
            collect(dist, &gzip, files)?;
        } else if gzip.extension().is_some_and(|extension| extension == "gz") {
            let path =
                gzip.with_extension("").strip_prefix(dist).expect("below").to_string_lossy().into_owned();
            files.push(Bundled { path, gzip });
        }
    }
    Ok(())
}

/// The slice of `Asset`s, as Rust.
fn table(files: &[Bundled], out: &Path) -> String {
    let mut table = "&[\n".to_owned();
    for Bundled { path, gzip } in files {
        let mut hasher = DefaultHasher::new();
        fs::read(gzip).expect("was just written").hash(&mut hasher);
        let etag = format!("W/\"{:016x}\"", hasher.finish());
        // Relative, so that a build output can be moved or copied with its checkout.
        let below = gzip.strip_prefix(out).expect("below OUT_DIR");
        let include = format!("include_bytes!(concat!(env!(\"OUT_DIR\"), \"/\", {below:?}))");
        writeln!(table, "Asset {{ path: {path:?}, etag: {etag:?}, gzip: {include} }},")
            .expect("a string takes everything");
    }
    table + "]\n"
}
