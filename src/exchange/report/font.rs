//! A font for PDF: read from a file, cut down to the letters of a report.

use std::{
    fs,
    path::{Path, PathBuf},
};

use ttf_parser::Face;

/// Why there is no font.
#[derive(Debug, thiserror::Error)]
pub enum FontError {
    /// None of the usual files is there.
    #[error(
        "no font with Chinese letters was found on this machine; give one with --pdf-font FILE (Debian: fonts-noto-cjk or \
         fonts-wqy-zenhei)"
    )]
    None,
    /// A file that is no font, or lacks letters.
    #[error("font `{}`: {}", .0.display(), .1)]
    Unusable(PathBuf, String),
}

/// Where systems keep fonts with Chinese letters.
const USUAL: [&str; 14] = [
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/noto-cjk/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/google-noto-cjk/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/google-noto-sans-cjk-fonts/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/opentype/source-han-sans/SourceHanSansCN-Regular.otf",
    "/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc",
    "/usr/share/fonts/wenquanyi/wqy-zenhei/wqy-zenhei.ttc",
    "/usr/share/fonts/truetype/wqy/wqy-microhei.ttc",
    "/usr/share/fonts/truetype/droid/DroidSansFallbackFull.ttf",
    "/usr/share/fonts/truetype/arphic/uming.ttc",
    "C:/Windows/Fonts/simhei.ttf",
    "C:/Windows/Fonts/simsun.ttc",
    "/System/Library/Fonts/Hiragino Sans GB.ttc",
    "/Library/Fonts/Arial Unicode.ttf",
];

/// Letters that a font of Chinese reports has.
const NEEDED: &str = "双肺未见异常。，Aa0";

/// A font file that was looked into.
pub struct PdfFont {
    pub(super) data: Vec<u8>,
    /// Number of the face in a collection: the one of simplified Chinese, if names say so.
    pub(super) index: u32,
}

/// Whether the face's family is that of simplified Chinese.
fn is_simplified(face: &Face<'_>) -> bool {
    let names = face.names().into_iter().filter_map(|name| name.to_string());
    names
        .into_iter()
        .any(|name| name.ends_with(" SC") || name.contains("SC "))
}

impl PdfFont {
    /// The font in `file`, or the first of the usual ones.
    ///
    /// # Errors
    /// Any [`FontError`].
    pub fn find(file: Option<&Path>) -> Result<Self, FontError> {
        match file {
            Some(file) => Self::read(file),
            None => {
                let found = USUAL.iter().map(Path::new).filter(|path| path.is_file());
                let mut last = FontError::None;
                for path in found {
                    match Self::read(path) {
                        Ok(font) => return Ok(font),
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }

    fn read(path: &Path) -> Result<Self, FontError> {
        let wrong = |reason: String| FontError::Unusable(path.to_owned(), reason);
        let data = fs::read(path).map_err(|error| wrong(error.to_string()))?;
        let faces = ttf_parser::fonts_in_collection(&data).unwrap_or(1);
        let mut index = 0;
        for number in 0..faces {
            let face = Face::parse(&data, number).map_err(|error| {
                wrong(format!(
                    "{error}; expected TrueType or OpenType (.ttf, .otf, .ttc)"
                ))
            })?;
            if is_simplified(&face) && !face.is_monospaced() {
                index = number;
                break;
            }
        }
        let face = Face::parse(&data, index).map_err(|error| wrong(error.to_string()))?;
        if let Some(letter) = NEEDED
            .chars()
            .find(|letter| face.glyph_index(*letter).is_none())
        {
            return Err(wrong(format!(
                "has no letter `{letter}`; give one with Chinese letters"
            )));
        }
        Ok(Self { data, index })
    }
}
