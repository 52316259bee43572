//! Removes what a crash left of uploads into a folder.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

/// No upload takes so long: whatever is older belongs to a process that is gone.
const LEFT_AFTER: Duration = Duration::from_secs(6 * 3600);

/// Removes unfinished files, `{name}#{number}`, that nobody has written to for hours.
pub(super) fn leftovers(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            leftovers(&entry.path())?;
        } else if is_unfinished(&entry.file_name().to_string_lossy()) && is_old(&entry) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn is_unfinished(name: &str) -> bool {
    let number = name.rsplit_once('#').map(|(_, number)| number);
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

fn is_old(entry: &fs::DirEntry) -> bool {
    let changed = entry.metadata().and_then(|metadata| metadata.modified());
    changed.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > LEFT_AFTER))
}

#[cfg(test)]
mod tests {
    use std::fs::{File, FileTimes};
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn only_old_unfinished_files_go() {
        let folder = tempfile::tempdir().expect("a folder");
        let inner = folder.path().join("a/b");
        fs::create_dir_all(&inner).expect("folders");
        for (name, old) in [("snapshot", true), ("snapshot#1", true), ("snapshot#2", false), ("x#y", true)] {
            let file = File::create(inner.join(name)).expect("a file");
            if old {
                file.set_times(FileTimes::new().set_modified(SystemTime::UNIX_EPOCH)).expect("times");
            }
        }
        leftovers(folder.path()).expect("swept");
        let mut names: Vec<_> = fs::read_dir(&inner)
            .expect("a folder")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
            .collect();
        names.sort();
        assert_eq!(names, ["snapshot", "snapshot#2", "x#y"]);
    }
}
