//! A report as PDF, A4, in one font that is embedded as far as the report needs it.

use std::{collections::BTreeMap, io::Write};

use flate2::{Compression, write::ZlibEncoder};
use pdf_writer::{
    Content, Filter, Finish, Name, Pdf, Rect, Ref, Str, TextStr,
    types::{CidFontType, FontFlags, SystemInfo, UnicodeCmap},
};
use subsetter::GlyphRemapper;
use ttf_parser::{Face, GlyphId};

use super::{NOTICE, Outgone, font::PdfFont};

/// Why a PDF cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PdfError {
    /// The font.
    #[error("the font cannot be used: {0}")]
    Font(String),
}

/// Sizes in points of A4.
const PAGE: (f32, f32) = (595.28, 841.89);
const MARGIN: f32 = 56.0;
const SYSTEM: SystemInfo<'static> = SystemInfo {
    registry: Str(b"Adobe"),
    ordering: Str(b"Identity"),
    supplement: 0,
};
const FONT: Name<'static> = Name(b"F1");

/// A line of text at its size.
struct Line {
    size: f32,
    text: String,
    /// Space before it.
    gap: f32,
}

/// Letters that stay at the end of a line, however full it is.
fn closes(letter: char) -> bool {
    "。，、；：？！）】》”’.,;:?!)]".contains(letter)
}

struct Fitted<'a> {
    face: Face<'a>,
}

impl Fitted<'_> {
    fn glyph(&self, letter: char) -> u16 {
        let found = self.face.glyph_index(letter);
        found
            .or_else(|| self.face.glyph_index('□'))
            .map_or(0, |glyph| glyph.0)
    }

    /// Width of a letter at size 1.
    fn width(&self, letter: char) -> f32 {
        let advance = self
            .face
            .glyph_hor_advance(GlyphId(self.glyph(letter)))
            .unwrap_or(1000);
        f32::from(advance) / f32::from(self.face.units_per_em())
    }

    /// A paragraph as lines that fit: broken between Chinese letters and at spaces.
    fn wrap(&self, text: &str, size: f32, gap: f32, lines: &mut Vec<Line>) {
        let room = PAGE.0 - 2.0 * MARGIN;
        let mut first = true;
        let mut push = |text: &str| {
            lines.push(Line {
                size,
                text: text.trim_end().to_owned(),
                gap: if std::mem::take(&mut first) { gap } else { 0.0 },
            });
        };
        let (mut line, mut width) = (String::new(), 0.0);
        for letter in text.chars() {
            let letter = if letter.is_control() { ' ' } else { letter };
            let wide = self.width(letter) * size;
            if width + wide > room && !closes(letter) && !line.is_empty() {
                // A Latin word goes to the next line whole, unless it is a line of its own.
                let latin = |c: char| c.is_ascii_graphic();
                let kept = line.trim_end_matches(latin).len();
                let tail = if latin(letter) && kept > 0 {
                    line.split_off(kept)
                } else {
                    String::new()
                };
                push(&line);
                width = tail.chars().map(|c| self.width(c) * size).sum();
                line = tail;
                if letter == ' ' && line.is_empty() {
                    continue;
                }
            }
            line.push(letter);
            width += wide;
        }
        push(&line);
    }
}

fn lines(fitted: &Fitted<'_>, report: &Outgone<'_>) -> Vec<Line> {
    let study = report.study;
    let patient = &study.patient;
    let mut lines = Vec::new();
    fitted.wrap(
        "胸部 X 线检查报告 / Chest radiograph report",
        17.0,
        0.0,
        &mut lines,
    );
    if report.signed_by.is_none() {
        fitted.wrap(NOTICE, 11.0, 6.0, &mut lines);
    }
    let rows = [
        (
            "姓名 / Name",
            patient.name.replace('^', " ").replace('=', " / "),
        ),
        ("编号 / Patient ID", patient.id.clone()),
        ("出生日期 / Birth date", patient.birth_date.clone()),
        ("性别 / Sex", patient.sex.clone()),
        ("年龄 / Age", patient.age.clone()),
        ("检查号 / Accession", study.accession.clone()),
        (
            "检查日期 / Study date",
            study.date.get(..8).unwrap_or_default().to_owned(),
        ),
        ("检查 UID / Study UID", report.study_uid()),
    ];
    let mut gap = 10.0;
    for (name, value) in rows.iter().filter(|(_, value)| !value.is_empty()) {
        fitted.wrap(&format!("{name}: {value}"), 10.0, gap, &mut lines);
        gap = 1.0;
    }
    fitted.wrap("所见 / Findings", 12.0, 14.0, &mut lines);
    let mut gap = 4.0;
    for paragraph in report.text.lines() {
        fitted.wrap(paragraph, 12.0, gap, &mut lines);
        gap = 2.0;
    }
    let at = report.at.format("%Y-%m-%d %H:%M UTC");
    let standing = match report.signed_by {
        Some(name) if report.version > 1 => format!(
            "签名 / Signed: {name}, {at} （第 {0} 版 / version {0}）",
            report.version
        ),
        Some(name) => format!("签名 / Signed: {name}, {at}"),
        None => format!("未签名 / Not signed, {at}"),
    };
    fitted.wrap(&standing, 11.0, 18.0, &mut lines);
    fitted.wrap(
        &format!("模型 / Model: {}", report.device()),
        9.0,
        4.0,
        &mut lines,
    );
    lines
}

/// Lines of each page.
fn pages(lines: Vec<Line>) -> Vec<Vec<(f32, Line)>> {
    let mut pages = vec![Vec::new()];
    let mut y = PAGE.1 - MARGIN;
    for line in lines {
        let step = line.size * 1.5;
        y -= step + line.gap;
        if y < MARGIN {
            pages.push(Vec::new());
            y = PAGE.1 - MARGIN - step;
        }
        if let Some(page) = pages.last_mut() {
            page.push((y, line));
        }
    }
    pages
}

fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    // Writing into memory does not fail.
    let _ = encoder.write_all(bytes);
    encoder.finish().unwrap_or_default()
}

/// The report as PDF; the same bytes for the same report.
///
/// # Errors
/// A font that cannot be cut down.
pub fn pdf(report: &Outgone<'_>, font: &PdfFont) -> Result<Vec<u8>, PdfError> {
    let wrong = |error: &dyn std::fmt::Display| PdfError::Font(error.to_string());
    let face = Face::parse(&font.data, font.index).map_err(|error| wrong(&error))?;
    let cff = face.tables().cff.is_some();
    let fitted = Fitted { face };
    let pages = pages(lines(&fitted, report));
    let mut remapper = GlyphRemapper::new();
    let mut letters: BTreeMap<u16, char> = BTreeMap::new();
    let mut contents = Vec::new();
    for page in &pages {
        let mut content = Content::new();
        for (y, line) in page {
            let mut bytes = Vec::new();
            for letter in line.text.chars() {
                let id = remapper.remap(fitted.glyph(letter));
                letters.entry(id).or_insert(letter);
                bytes.extend(id.to_be_bytes());
            }
            content.begin_text();
            content.set_font(FONT, line.size);
            content.next_line(MARGIN, *y);
            content.show(Str(&bytes));
            content.end_text();
        }
        contents.push(packed(&content.finish()));
    }
    let subset =
        subsetter::subset(&font.data, font.index, &remapper).map_err(|error| wrong(&error))?;
    Ok(written(
        &fitted.face,
        cff,
        &subset,
        &remapper,
        &letters,
        &contents,
    ))
}

fn written(
    face: &Face<'_>,
    cff: bool,
    subset: &[u8],
    remapper: &GlyphRemapper,
    letters: &BTreeMap<u16, char>,
    contents: &[Vec<u8>],
) -> Vec<u8> {
    let mut next = 0;
    let mut new = || {
        next += 1;
        Ref::new(next)
    };
    let (catalog, tree, info) = (new(), new(), new());
    let (font, cid, descriptor, cmap, file) = (new(), new(), new(), new(), new());
    let refs: Vec<(Ref, Ref)> = contents.iter().map(|_| (new(), new())).collect();
    let mut pdf = Pdf::new();
    pdf.catalog(catalog).pages(tree).lang(TextStr("zh-CN"));
    pdf.document_info(info)
        .title(TextStr("Chest radiograph report"))
        .producer(TextStr("xray-qwen3vl"));
    pdf.pages(tree)
        .kids(refs.iter().map(|(page, _)| *page))
        .count(refs.len() as i32);
    for ((page, stream), content) in refs.iter().zip(contents) {
        let mut written = pdf.page(*page);
        written
            .media_box(Rect::new(0.0, 0.0, PAGE.0, PAGE.1))
            .parent(tree)
            .contents(*stream);
        written.resources().fonts().pair(FONT, font);
        written.finish();
        pdf.stream(*stream, content).filter(Filter::FlateDecode);
    }
    let name = Name(b"XRAYQW+Report");
    pdf.type0_font(font)
        .base_font(name)
        .encoding_predefined(Name(b"Identity-H"))
        .descendant_font(cid)
        .to_unicode(cmap);
    let scale = 1000.0 / f32::from(face.units_per_em());
    let widths = remapper
        .remapped_gids()
        .map(|glyph| f32::from(face.glyph_hor_advance(GlyphId(glyph)).unwrap_or(1000)) * scale);
    let mut written = pdf.cid_font(cid);
    written
        .subtype(if cff {
            CidFontType::Type0
        } else {
            CidFontType::Type2
        })
        .base_font(name)
        .system_info(SYSTEM)
        .font_descriptor(descriptor)
        .default_width(1000.0);
    if !cff {
        written.cid_to_gid_map_predefined(Name(b"Identity"));
    }
    written.widths().consecutive(0, widths);
    written.finish();
    let bounds = face.global_bounding_box();
    let at = |value: i16| f32::from(value) * scale;
    let mut written = pdf.font_descriptor(descriptor);
    written
        .name(name)
        .flags(FontFlags::SYMBOLIC)
        .bbox(Rect::new(
            at(bounds.x_min),
            at(bounds.y_min),
            at(bounds.x_max),
            at(bounds.y_max),
        ))
        .italic_angle(0.0)
        .ascent(at(face.ascender()))
        .descent(at(face.descender()))
        .cap_height(at(face.capital_height().unwrap_or(face.ascender())))
        .stem_v(80.0);
    if cff {
        written.font_file3(file);
    } else {
        written.font_file2(file);
    }
    written.finish();
    let mut unicode = UnicodeCmap::new(Name(b"Report"), SYSTEM);
    for (glyph, letter) in letters {
        unicode.pair(*glyph, *letter);
    }
    let unicode = packed(&unicode.finish().into_vec());
    pdf.stream(cmap, &unicode).filter(Filter::FlateDecode);
    let packed = packed(subset);
    let mut stream = pdf.stream(file, &packed);
    stream.filter(Filter::FlateDecode);
    if cff {
        // The subset is a whole OpenType file around a CID-keyed CFF.
        stream.pair(Name(b"Subtype"), Name(b"OpenType"));
    }
    stream.finish();
    pdf.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exchange::report::samples;

    #[test]
    fn a_report_of_many_lines_has_pages_and_the_same_bytes_twice() {
        // A machine without such a font cannot make a PDF, and says so.
        let font = match PdfFont::find(None) {
            Ok(font) => font,
            Err(error) => {
                assert!(error.to_string().contains("--pdf-font"), "{error}");
                return;
            }
        };
        let mut study = samples::study();
        study.signed[0].text = "右侧气胸，压缩约10%。Follow-up in 24 h. ".repeat(200);
        let report = Outgone::new(&study, 1).unwrap();
        let bytes = pdf(&report, &font).unwrap();
        assert!(bytes.starts_with(b"%PDF-1.7"));
        assert_eq!(bytes, pdf(&report, &font).unwrap());
        let pages = bytes
            .windows(12)
            .filter(|part| part == b"/Type /Page\n" || part == b"/Type/Page/M")
            .count();
        assert!(
            pages != 1 && bytes.len() < 200_000,
            "{pages} pages, {} bytes",
            bytes.len()
        );
        if let Some(folder) = std::env::var_os("XRAY_TEST_PDF") {
            std::fs::write(std::path::Path::new(&folder).join("report.pdf"), &bytes).unwrap();
        }
    }

    #[test]
    fn lines_fit_the_page_and_words_stay_whole() {
        let Ok(font) = PdfFont::find(None) else {
            return;
        };
        let fitted = Fitted {
            face: Face::parse(&font.data, font.index).unwrap(),
        };
        let text = "pneumothorax 右侧气胸。".repeat(40);
        let mut lines = Vec::new();
        fitted.wrap(&text, 12.0, 0.0, &mut lines);
        for line in &lines {
            let width: f32 = line
                .text
                .chars()
                .map(|letter| fitted.width(letter) * 12.0)
                .sum();
            // A closing mark may hang over.
            assert!(
                width <= PAGE.0 - 2.0 * MARGIN + 12.0,
                "{width}: {}",
                line.text
            );
            assert!(!line.text.ends_with("pneumo"), "{}", line.text);
        }
        let joined: String = lines
            .iter()
            .map(|line| line.text.replace(' ', ""))
            .collect();
        assert_eq!(joined, text.replace(' ', ""));
    }
}
