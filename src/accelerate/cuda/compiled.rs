//! The cache of compiled kernels on disk, one for each compiler and driver.
//!
//! The files are machine code that this process will run, so the folder belongs to its user alone.

use std::{
    io,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use cudarc::{driver::sys, nvrtc};

use super::plan::card;

/// Versions of NVRTC and of the driver, both part of every key: another compiler may write other code.
pub(super) fn toolchain() -> &'static str {
    static VERSIONS: LazyLock<String> = LazyLock::new(|| {
        let versions = crate::base::panics::quietly(|| {
            let (mut major, mut minor, mut driver) = (0, 0, 0);
            // SAFETY: the calls write the numbers they are given.
            #[allow(unsafe_code)]
            unsafe {
                nvrtc::sys::nvrtcVersion(&mut major, &mut minor)
                    .result()
                    .ok()?;
                sys::cuDriverGetVersion(&mut driver).result().ok()?;
            }
            let driver = (driver / 1000, driver % 1000 / 10);
            Some(format!(
                "nvrtc-{major}.{minor}-driver-{}.{}",
                driver.0, driver.1
            ))
        });
        versions.ok().flatten().unwrap_or_default()
    });
    &VERSIONS
}

/// The folder for compiled kernels: below `$XDG_CACHE_HOME` or `~/.cache`, one for each compiler and
/// driver. `None` without either of them, and where others may write: then every start compiles.
pub(super) fn folder() -> Option<&'static Path> {
    static FOLDER: LazyLock<Option<PathBuf>> = LazyLock::new(|| {
        let own = crate::base::system::cache_folder()?.join("kernels");
        let versions = Some(toolchain()).filter(|versions| !versions.is_empty())?;
        // Both levels: whoever may write the upper one can put another folder in place of the lower.
        let private = private(&own).and_then(|()| private(&own.join(versions)));
        match private {
            Ok(()) => Some(own.join(versions)),
            Err(reason) => {
                log::warn!(
                    "compiled kernels are not kept in {}: {reason}",
                    own.display()
                );
                None
            }
        }
    });
    FOLDER.as_deref()
}

/// [`folder`] for what cubecl compiles, whose keys do not name the card's architecture: none where the
/// cards are of several kinds.
pub(super) fn shared_folder() -> Option<PathBuf> {
    let count = crate::base::panics::quietly(cudarc::driver::CudaContext::device_count);
    let count = count.ok()?.ok()? as usize;
    let capability = card(0).capability;
    let alike = (1..count).all(|other| card(other).capability == capability);
    alike.then(|| folder().map(Path::to_path_buf)).flatten()
}

/// Makes a folder that its owner alone may enter, or checks that it is one.
///
/// # Errors
/// If the folder, or a file in it, belongs to another user.
fn private(folder: &Path) -> Result<(), String> {
    make(folder).map_err(|error| error.to_string())?;
    let owner = own_id(folder).map_err(|error| error.to_string())?;
    let refused = |path: &Path| {
        format!(
            "`{}` belongs to another user; remove it, or set XDG_CACHE_HOME to a folder of your own",
            path.display()
        )
    };
    if !belongs(folder, owner) {
        return Err(refused(folder));
    }
    close(folder).map_err(|error| error.to_string())?;
    let entries = std::fs::read_dir(folder).map_err(|error| error.to_string())?;
    for entry in entries.filter_map(Result::ok) {
        if !belongs(&entry.path(), owner) {
            return Err(refused(&entry.path()));
        }
    }
    Ok(())
}

#[cfg(unix)]
fn make(folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
}

/// The user that this process makes files as: who owns one that it has just made.
#[cfg(unix)]
fn own_id(folder: &Path) -> io::Result<u32> {
    use std::os::unix::fs::MetadataExt;
    let probe = folder.join(format!(".owner-{}", std::process::id()));
    let made = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&probe)
        .or_else(|error| match error.kind() {
            // Left by a process of the same number that was killed.
            io::ErrorKind::AlreadyExists => {
                std::fs::remove_file(&probe)?;
                std::fs::File::create_new(&probe)
            }
            _ => Err(error),
        })?;
    let owner = made.metadata()?.uid();
    std::fs::remove_file(&probe)?;
    Ok(owner)
}

/// Whether a path is this user's; a link counts as what it is, not as what it points to.
#[cfg(unix)]
pub(super) fn belongs(path: &Path, owner: u32) -> bool {
    use std::os::unix::fs::MetadataExt;
    // A file that was removed meanwhile belongs to nobody.
    std::fs::symlink_metadata(path).is_ok_and(|found| found.uid() == owner) || !path.exists()
}

#[cfg(unix)]
fn close(folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(folder)?.permissions().mode();
    if mode & 0o077 != 0 {
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

// A user's profile is closed to others where there are no owners of this kind.
#[cfg(not(unix))]
fn make(folder: &Path) -> io::Result<()> {
    std::fs::create_dir_all(folder)
}

#[cfg(not(unix))]
fn own_id(_folder: &Path) -> io::Result<u32> {
    Ok(0)
}

#[cfg(not(unix))]
fn belongs(_path: &Path, _owner: u32) -> bool {
    true
}

#[cfg(not(unix))]
fn close(_folder: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn a_folder_of_kernels_is_its_owners_alone() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("cache").join("kernels");
        private(&folder).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&folder), 0o700);
        // One that was open before is closed.
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o777)).unwrap();
        std::fs::write(folder.join("sm_90a-one.cubin"), b"code").unwrap();
        private(&folder).unwrap();
        assert_eq!(mode(&folder), 0o700);
        // No probe file is left.
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        let owner = std::fs::metadata(&folder).unwrap().uid();
        assert!(belongs(&folder, owner) && !belongs(&folder, owner + 1));
        // Only root can change the owner of a file.
        let file = folder.join("sm_90a-one.cubin");
        if owner == 0 && std::os::unix::fs::chown(&file, Some(1234), None).is_ok() {
            let refused = private(&folder).unwrap_err();
            assert!(refused.contains("sm_90a-one.cubin") && refused.contains("another user"));
            std::fs::remove_file(&file).unwrap();
            std::os::unix::fs::chown(&folder, Some(1234), None).unwrap();
            assert!(private(&folder).unwrap_err().contains("another user"));
        }
    }
}
