//! How much room the disk has. A write that finds none is lost, and with it the log until a restart; so appends are refused
//! while there is still enough for what the engine does in the background.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::sys::statvfs::statvfs;

/// Largest part of the disk that is kept free by default: flushing every memtable and rewriting the largest tables at once
/// takes no more.
const RESERVE_MAX: u64 = 512 << 20;
/// Of a small disk only this part of the whole.
const RESERVE_SHARE: u64 = 10;

/// Watches one disk.
pub(super) struct Space {
    folder: PathBuf,
    reserve: AtomicU64,
    full: AtomicBool,
}

impl Space {
    /// Of the disk that a folder is on. `reserve` bytes of it are kept free; `None` takes what suits its size.
    pub(super) fn new(folder: &Path, reserve: Option<u64>) -> Self {
        let total = statvfs(folder).map_or(0, |disk| disk.blocks().saturating_mul(disk.fragment_size()));
        let reserve = reserve.unwrap_or((total / RESERVE_SHARE).min(RESERVE_MAX));
        Self { folder: folder.to_owned(), reserve: AtomicU64::new(reserve), full: AtomicBool::new(false) }
    }

    /// Looks, and says whether appends must be refused. A disk that cannot be asked counts as having room.
    pub(super) fn look(&self) -> bool {
        let reserve = self.reserve.load(Ordering::Relaxed);
        let free = match statvfs(&self.folder) {
            Ok(disk) => disk.blocks_available().saturating_mul(disk.fragment_size()),
            Err(_) => u64::MAX,
        };
        let full = free < reserve;
        if self.full.swap(full, Ordering::SeqCst) != full {
            if full {
                tracing::error!(
                    free,
                    reserve,
                    "the disk of the log is full: appends are refused until there is room"
                );
            } else {
                tracing::info!(free, reserve, "the disk of the log has room again: appends are taken");
            }
        }
        full
    }

    /// What was seen last.
    pub(super) fn is_full(&self) -> bool {
        self.full.load(Ordering::SeqCst)
    }

    #[cfg(test)]
    pub(super) fn keep_free(&self, reserve: u64) {
        self.reserve.store(reserve, Ordering::SeqCst);
    }
}
