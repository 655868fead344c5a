//! Names of files as text such that no two files share one.
//!
//! A file's name need not be UTF-8 (archives made with GBK names are the usual case), a record is.
//! A UTF-8 name is written as it is; in any other each byte that is not part of a character, and `%`
//! itself, becomes `%` and two hexadecimal digits, and [`PERCENT`] is written beside it.

use std::{
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

/// What is written beside a text in which bytes are percent-encoded.
pub const PERCENT: &str = "percent";

/// The names of `paths` with `;` between several, and [`PERCENT`] where bytes are encoded in them.
pub fn text_of<P: AsRef<Path>>(paths: &[P]) -> (String, Option<&'static str>) {
    let plain = |path: &Path| {
        let text = path.to_str()?;
        (paths.len() == 1 || !text.contains(';')).then(|| text.to_owned())
    };
    if let Some(names) = paths.iter().map(|path| plain(path.as_ref())).collect() {
        let names: Vec<String> = names;
        return (names.join(";"), None);
    }
    let names: Vec<String> = paths
        .iter()
        .map(|path| encode(path.as_ref(), paths.len() > 1))
        .collect();
    (names.join(";"), Some(PERCENT))
}

/// What [`text_of`] made a text of: `encoding` is what is written beside it, `several` says whether
/// `;` separates names.
pub fn paths_of(text: &str, encoding: Option<&str>, several: bool) -> Vec<PathBuf> {
    let names: Vec<&str> = if several {
        text.split(';').collect()
    } else {
        vec![text]
    };
    names
        .into_iter()
        .map(|name| match encoding {
            Some(_) => path_of(decode(name)),
            None => PathBuf::from(name),
        })
        .collect()
}

/// A path by which a file is known however it was named: absolute, the folder's links resolved, the
/// file's own name kept. What cannot be resolved stays as near to that as it can.
pub fn place_of(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => match fs::canonicalize(parent) {
            Ok(parent) => parent.join(name),
            Err(_) => absolute,
        },
        _ => absolute,
    }
}

fn encode(path: &Path, several: bool) -> String {
    let mut text = String::new();
    for chunk in path.as_os_str().as_encoded_bytes().utf8_chunks() {
        for character in chunk.valid().chars() {
            if character == '%' || (several && character == ';') {
                let _ = write!(text, "%{:02X}", u32::from(character));
            } else {
                text.push(character);
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

fn decode(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let digits = tail.get(..2).and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 16).ok()
        });
        match digits {
            Some(byte) if *first == b'%' => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    bytes
}

#[cfg(unix)]
fn path_of(bytes: Vec<u8>) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(not(unix))]
fn path_of(bytes: Vec<u8>) -> PathBuf {
    String::from_utf8_lossy(&bytes).into_owned().into()
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

    /// `name_1.png` in GBK.
    fn gbk(bytes: &[u8]) -> PathBuf {
        let name = [b"films/", bytes, b"_1.png"].concat();
        OsStr::from_bytes(&name).into()
    }

    #[test]
    fn names_that_are_not_utf8_are_told_apart_and_come_back() {
        // 甲, 乙, 丙 in GBK: two bytes each that are no UTF-8, and all one text when decoded with losses.
        let paths = [&[0xbc, 0xd7][..], &[0xd2, 0xd2], &[0xb1, 0xfb]].map(gbk);
        let texts = paths.clone().map(|path| text_of(&[path]));
        assert_eq!(texts[0], ("films/%BC%D7_1.png".into(), Some(PERCENT)));
        assert_eq!(texts[1], ("films/%D2%D2_1.png".into(), Some(PERCENT)));
        assert_eq!(texts[2], ("films/%B1%FB_1.png".into(), Some(PERCENT)));
        for (path, (text, encoding)) in paths.iter().zip(&texts) {
            let back = paths_of(text, *encoding, false);
            assert_eq!(back, std::slice::from_ref(path));
        }
        let (text, encoding) = text_of(&paths);
        assert_eq!(paths_of(&text, encoding, true), paths);
    }

    #[test]
    fn utf8_names_stay_as_they_are() {
        for name in ["胸片_001.png", "a%BC;b.png", "%41.png"] {
            assert_eq!(text_of(&[name]), (name.into(), None));
            assert_eq!(paths_of(name, None, false), [PathBuf::from(name)]);
        }
        assert_eq!(text_of(&["a.png", "b.png"]), ("a.png;b.png".into(), None));
    }

    #[test]
    fn percent_and_semicolon_survive_where_they_could_mislead() {
        let percent = [gbk(&[b'%', 0xbc])];
        let (text, encoding) = text_of(&percent);
        assert_eq!(text, "films/%25%BC_1.png");
        assert_eq!(paths_of(&text, encoding, false), percent);
        let views = ["a;b.png", "c%.png"];
        let (text, encoding) = text_of(&views);
        assert_eq!(
            (text.as_str(), encoding),
            ("a%3Bb.png;c%25.png", Some(PERCENT))
        );
        assert_eq!(paths_of(&text, encoding, true), views.map(PathBuf::from));
    }

    #[test]
    fn a_file_has_one_place_however_it_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("films")).unwrap();
        let direct = place_of(&dir.path().join("films/a.png"));
        assert_eq!(place_of(&dir.path().join("films/../films/./a.png")), direct);
        std::os::unix::fs::symlink("films", dir.path().join("link")).unwrap();
        assert_eq!(place_of(&dir.path().join("link/a.png")), direct);
        assert_ne!(place_of(&dir.path().join("films/b.png")), direct);
        assert_eq!(
            place_of(Path::new("Cargo.toml")),
            place_of(Path::new("./Cargo.toml"))
        );
    }
}
