//! A ZIP archive of a few small files, stored without compression: all that a .docx needs.
//!
//! Source: APPNOTE.TXT 6.3, sections 4.3.7, 4.3.12 and 4.3.16.

use flate2::Crc;

/// 1980-01-01, so that the same report is the same file.
const DATE: u16 = 0x21;

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// What both headers of a file have in common.
fn common(name: &str, content: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    // Version 2.0, names in UTF-8, stored.
    for word in [20_u16, 0x800, 0, 0, DATE] {
        out.extend(word.to_le_bytes());
    }
    let size = content.len() as u32;
    for number in [crc(content), size, size] {
        out.extend(number.to_le_bytes());
    }
    out.extend((name.len() as u16).to_le_bytes());
    out.extend(0_u16.to_le_bytes());
    out
}

/// An archive of files by name, in their order; each is below 4 GiB.
pub(super) fn archive(files: &[(&str, String)]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, content) in files {
        let content = content.as_bytes();
        let offset = out.len() as u32;
        let common = common(name, content);
        out.extend(b"PK\x03\x04");
        out.extend(&common);
        out.extend(name.as_bytes());
        out.extend(content);
        directory.extend(b"PK\x01\x02\x14\x00");
        directory.extend(&common);
        // Comment, disk, internal and external attributes.
        directory.extend([0; 10]);
        directory.extend(offset.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let (count, offset) = (files.len() as u16, out.len() as u32);
    let size = directory.len() as u32;
    out.extend(directory);
    out.extend(b"PK\x05\x06\x00\x00\x00\x00");
    out.extend([count.to_le_bytes(), count.to_le_bytes()].concat());
    out.extend([size.to_le_bytes(), offset.to_le_bytes()].concat());
    out.extend(0_u16.to_le_bytes());
    out
}
