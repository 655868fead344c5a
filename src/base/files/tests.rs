//! Files and folders appear whole, and what is found in their place is named.

use super::*;

fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_failed_write_keeps_the_old_content_and_no_temporary() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.json");
    write_atomic(&path, |out| out.write_all(b"old")).unwrap();
    let error = write_atomic(&path, |out| {
        out.write_all(b"new")?;
        Err(io::Error::other("the source ended"))
    })
    .unwrap_err();
    assert!(
        error.to_string().contains("a.json`: the source ended"),
        "{error}"
    );
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(entries(dir.path()), ["a.json"]);
}

#[test]
fn paths_without_a_name_or_a_parent_folder_are_errors() {
    let error = write_atomic(Path::new("/"), |_| Ok(())).unwrap_err();
    assert!(matches!(error, FileError::NoName(_)));
    let dir = tempfile::tempdir().unwrap();
    let error = write_atomic(&dir.path().join("no/such"), |_| Ok(())).unwrap_err();
    assert!(matches!(error, FileError::Write { .. }), "{error}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_recognised_through_wrappers() {
    // The kernel's own answer of a full device, passed on by the writing closure.
    let full = |_: &mut dyn Write| {
        let mut device = File::options().write(true).open("/dev/full")?;
        device.write_all(&[0; 4096])
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights.bin");
    let error = write_atomic(&path, full).unwrap_err();
    assert!(matches!(error, FileError::DiskFull { .. }), "{error}");
    assert!(error.to_string().contains("weights.bin") && error.to_string().contains("hint"));
    assert!(entries(dir.path()).is_empty());
    assert!(is_disk_full(&io::Error::other(io::Error::other(error))));
    assert!(!is_disk_full(&io::Error::other("disk is fine")));
}

#[test]
fn sizes_have_three_digits_and_never_show_as_zero() {
    for (bytes, text) in [
        (0, "0 bytes"),
        (812, "812 bytes"),
        (4_041_234, "4.04 MB"),
        (999_600, "1.00 MB"),
        (17_534_000_000, "17.5 GB"),
        (175_340_000_000, "175 GB"),
    ] {
        assert_eq!(size_text(bytes), text);
    }
}

#[test]
fn hashes_match_the_published_vectors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    fs::write(&path, b"abc").unwrap();
    let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    assert_eq!(sha256_file(&path).unwrap(), abc);
    assert_eq!(sha256_bytes(b"abc"), abc);
    let error = sha256_file(&dir.path().join("none")).unwrap_err();
    assert!(error.to_string().contains("none"));
}

#[test]
fn a_folder_appears_whole_and_replaces_an_older_one() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("run/checkpoint");
    for text in ["one", "second"] {
        let writer = FolderWriter::new(&target).unwrap();
        fs::create_dir(writer.path().join("sub")).unwrap();
        fs::write(writer.path().join("sub/b"), text).unwrap();
        fs::write(writer.path().join("a"), "").unwrap();
        let marker = writer.finish().unwrap();
        let names: Vec<_> = marker.files.iter().map(|file| file.name.as_str()).collect();
        assert_eq!(names, ["a", "sub/b"]);
        assert_eq!(verify_folder(&target, Depth::Hashes).unwrap(), marker);
    }
    assert_eq!(fs::read(target.join("sub/b")).unwrap(), b"second");
    assert_eq!(entries(&dir.path().join("run")), ["checkpoint"]);
}

#[test]
fn an_abandoned_folder_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let writer = FolderWriter::new(&dir.path().join("x")).unwrap();
    fs::write(writer.path().join("a"), "a").unwrap();
    drop(writer);
    assert!(entries(dir.path()).is_empty());
}

#[test]
fn a_marker_cannot_point_outside_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    let text = r#"{"format":1,"files":[{"name":"../secret","size":0,"sha256":""}]}"#;
    fs::write(dir.path().join(COMPLETE_MARKER), text).unwrap();
    let damage = verify_folder(dir.path(), Depth::Sizes).unwrap_err();
    assert!(matches!(damage, FolderDamage::BadMarker(_)), "{damage}");
}

#[test]
fn leftovers_go_and_a_displaced_folder_returns() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("c-1.tmp-77.0")).unwrap();
    fs::write(at(".best.json.tmp-77.1"), "{").unwrap();
    fs::create_dir(at("c-2.old-77.2")).unwrap();
    fs::create_dir(at("c-3")).unwrap();
    fs::create_dir(at("c-3.old-77.3")).unwrap();
    fs::write(at("mine.tmp-1"), "").unwrap();
    let ours = |name: &str| name.starts_with("c-") || name == "best.json";
    assert_eq!(remove_leftovers(dir.path(), ours).unwrap().len(), 3);
    assert_eq!(entries(dir.path()), ["c-2", "c-3", "mine.tmp-1"]);
}
