//! Keeps other users of the machine out of what the server makes: files 0600, folders 0700.

use std::fs::{self, DirBuilder, File, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, umask};

use crate::config::{BlobPlace, Config};

/// What group and others may do.
const OTHERS: u32 = 0o077;
/// The kernel keeps others out of a folder like /tmp by this bit, so it is surely not ours alone.
const STICKY: u32 = 0o1000;
/// Entries of a folder and all below it that are looked at in one start. What lies deeper in a larger one is closed by
/// the folders above it, which come first.
const LOOKED_AT_MAX: usize = 100_000;
/// What a file system puts into the root of a volume.
const LOST_AND_FOUND: &str = "lost+found";

/// From now on whatever this process makes is its user's alone.
pub fn keep_private() {
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
}

/// Makes a folder for this user alone, and sees to it that a crash does not lose it. One that is there stays as it is.
pub(super) fn make_folder(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    sync_folder(parent(path))
}

/// Brings the entries of a folder to the disk: the sync of a file does not cover its name.
pub(super) fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// The folder that something is in.
pub(super) fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Closes what an earlier version, or a copy, has left open to other users. What cannot be changed is named in a warning.
pub(super) fn repair(config: &Config) {
    let mut repair = Repair::default();
    repair.folder(&config.data, is_data);
    if let Some(BlobPlace::Folder(folder)) = config.blobs.place() {
        repair.folder(&folder, |name| name.starts_with("env_"));
    }
    let url = config.metadata_url();
    if let Some(path) = url.strip_prefix("sqlite:") {
        let path = path.strip_prefix("//").unwrap_or(path);
        for suffix in ["", "-wal", "-shm", "-journal"] {
            repair.entry(Path::new(&format!("{path}{suffix}")));
        }
    }
    repair.report();
}

/// Whether a name in the data folder is one that we give.
fn is_data(name: &str) -> bool {
    matches!(name, "log" | "blobs") || name.starts_with("metadata.db") || name.starts_with("master.key")
}

#[derive(Default)]
struct Repair {
    closed: usize,
    failed: usize,
    /// The first that could not be changed, and why.
    first: Option<(PathBuf, io::Error)>,
}

impl Repair {
    /// What is ours in a folder that somebody has named, and the folder itself unless it holds what others may need.
    fn folder(&mut self, folder: &Path, is_ours: fn(&str) -> bool) {
        let Ok(entries) = fs::read_dir(folder) else { return };
        let mut foreign = None;
        for entry in entries.flatten().take(LOOKED_AT_MAX) {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if is_ours(&name) {
                self.tree(&entry.path());
            } else if name != LOST_AND_FOUND {
                foreign = Some(entry.path());
            }
        }
        let Ok(metadata) = fs::metadata(folder) else { return };
        let mode = metadata.permissions().mode();
        match foreign {
            _ if mode & OTHERS == 0 => {}
            None if mode & STICKY == 0 => self.close(folder, &metadata),
            _ => tracing::warn!(
                folder = %folder.display(),
                mode = format!("{:o}", mode & 0o7777),
                other = foreign.map(|path| path.display().to_string()),
                "other users may look into a folder of the server; it is left so, because it is not the server's alone"
            ),
        }
    }

    /// A file of ours, or a folder and what is in it. Folders come before what they hold: once closed, nobody else gets further.
    fn tree(&mut self, root: &Path) {
        self.entry(root);
        let mut folders = vec![root.to_owned()];
        let mut looked_at = 0;
        while let Some(folder) = folders.pop() {
            let Ok(entries) = fs::read_dir(&folder) else { continue };
            for entry in entries.flatten() {
                looked_at += 1;
                if looked_at > LOOKED_AT_MAX {
                    return;
                }
                let path = entry.path();
                self.entry(&path);
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push(path);
                }
            }
        }
    }

    /// One file or folder; a link is somebody's decision, and is not followed.
    fn entry(&mut self, path: &Path) {
        if let Ok(metadata) = fs::symlink_metadata(path)
            && !metadata.is_symlink()
        {
            self.close(path, &metadata);
        }
    }

    fn close(&mut self, path: &Path, metadata: &Metadata) {
        let mode = metadata.permissions().mode();
        if mode & OTHERS == 0 {
            return;
        }
        match fs::set_permissions(path, Permissions::from_mode(mode & 0o7777 & !OTHERS)) {
            Ok(()) => self.closed += 1,
            // Gone meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                self.failed += 1;
                self.first.get_or_insert((path.to_owned(), error));
            }
        }
    }

    fn report(self) {
        if self.closed > 0 {
            tracing::info!(count = self.closed, "closed files and folders that other users could look into");
        }
        if let Some((path, error)) = self.first {
            tracing::warn!(
                path = %path.display(),
                count = self.failed,
                error = &error as &dyn std::error::Error,
                "other users may look into files or folders of the server, and it cannot change that"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("is there").permissions().mode() & 0o7777
    }

    fn make(path: &Path, mode: u32) {
        if let Some(name) = path.to_str()
            && name.ends_with('/')
        {
            fs::create_dir_all(path).expect("made");
        } else {
            fs::create_dir_all(parent(path)).expect("made");
            fs::write(path, "").expect("made");
        }
        fs::set_permissions(path, Permissions::from_mode(mode)).expect("changed");
    }

    #[test]
    fn whole_trees_are_closed_and_no_link_is_followed() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        for (name, old) in
            [("tree/a/b/file", 0o644), ("tree/script", 0o755), ("tree/kept", 0o400), ("outside", 0o644)]
        {
            make(&at(name), old);
        }
        make(&at("elsewhere/"), 0o755);
        for (name, old) in [("tree/a/b/", 0o755), ("tree/a/", 0o2755), ("tree/", 0o755)] {
            make(&at(name), old);
        }
        std::os::unix::fs::symlink(at("outside"), at("tree/link")).expect("linked");
        std::os::unix::fs::symlink(at("elsewhere"), at("tree/a/link")).expect("linked");
        let mut repair = Repair::default();
        repair.tree(&at("tree"));
        assert_eq!((repair.closed, repair.failed), (5, 0));
        for (name, new) in [
            ("tree", 0o700),
            ("tree/a", 0o2700),
            ("tree/a/b", 0o700),
            ("tree/a/b/file", 0o600),
            ("tree/script", 0o700),
            ("tree/kept", 0o400),
            ("outside", 0o644),
            ("elsewhere", 0o755),
        ] {
            assert_eq!(mode(&at(name)), new, "{name}");
        }
    }

    #[test]
    fn a_folder_that_others_use_too_keeps_its_mode_and_what_is_not_ours_as_well() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        for data in ["own", "shared", "sticky"] {
            for ours in ["master.key", "metadata.db-wal", "log/lock"] {
                make(&at(&format!("{data}/{ours}")), 0o644);
            }
        }
        make(&at("own/lost+found/"), 0o755);
        make(&at("shared/notes.txt"), 0o644);
        for (data, old, new) in [("own", 0o755, 0o700), ("shared", 0o755, 0o755), ("sticky", 0o1777, 0o1777)]
        {
            fs::set_permissions(at(data), Permissions::from_mode(old)).expect("changed");
            Repair::default().folder(&at(data), is_data);
            assert_eq!(mode(&at(data)), new, "{data}");
            for ours in ["master.key", "metadata.db-wal", "log/lock"] {
                assert_eq!(mode(&at(&format!("{data}/{ours}"))), 0o600, "{data}/{ours}");
            }
        }
        assert_eq!((mode(&at("own/lost+found")), mode(&at("shared/notes.txt"))), (0o755, 0o644));
    }
}
