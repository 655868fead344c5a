//! Bytes to the few attributes a picture needs.
//!
//! Only the attributes of [`WANTED`] are kept, so no name, date or number of a patient is stored with pixels; `identity` alone
//! asks for others.
//! Everything else is skipped in a loop: neither depth nor announced lengths cost memory.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Read;

use dicom_core::header::{DataElementHeader, Length};
use dicom_core::{Tag, VR};
use dicom_dictionary_std::tags;

use super::encoding::{Encoding, HEAD, MAGIC, PREAMBLE};
use super::error::DicomError;
use super::syntax::{self, Syntax};

/// Tag and length.
const SHORTEST_HEADER: usize = 8;

const ITEM: Tag = Tag(0xfffe, 0xe000);
const ITEM_END: Tag = Tag(0xfffe, 0xe00d);
const SEQUENCE_END: Tag = Tag(0xfffe, 0xe0dd);

/// The attributes that are kept.
const WANTED: [Tag; 46] = [
    tags::MODALITY,
    tags::PRESENTATION_INTENT_TYPE,
    tags::BURNED_IN_ANNOTATION,
    tags::PRESENTATION_LUT_SHAPE,
    tags::BODY_PART_EXAMINED,
    tags::VIEW_POSITION,
    tags::IMAGER_PIXEL_SPACING,
    tags::PATIENT_ORIENTATION,
    tags::LATERALITY,
    tags::IMAGE_LATERALITY,
    tags::SAMPLES_PER_PIXEL,
    tags::PHOTOMETRIC_INTERPRETATION,
    tags::PLANAR_CONFIGURATION,
    tags::NUMBER_OF_FRAMES,
    tags::ROWS,
    tags::COLUMNS,
    tags::PIXEL_SPACING,
    tags::PIXEL_ASPECT_RATIO,
    tags::BITS_ALLOCATED,
    tags::BITS_STORED,
    tags::HIGH_BIT,
    tags::PIXEL_REPRESENTATION,
    tags::PIXEL_PADDING_VALUE,
    tags::PIXEL_PADDING_RANGE_LIMIT,
    tags::WINDOW_CENTER,
    tags::WINDOW_WIDTH,
    tags::RESCALE_INTERCEPT,
    tags::RESCALE_SLOPE,
    tags::VOILUT_FUNCTION,
    tags::MODALITY_LUT_SEQUENCE,
    tags::VOILUT_SEQUENCE,
    tags::LUT_DESCRIPTOR,
    tags::LUT_DATA,
    tags::RED_PALETTE_COLOR_LOOKUP_TABLE_DESCRIPTOR,
    tags::GREEN_PALETTE_COLOR_LOOKUP_TABLE_DESCRIPTOR,
    tags::BLUE_PALETTE_COLOR_LOOKUP_TABLE_DESCRIPTOR,
    tags::RED_PALETTE_COLOR_LOOKUP_TABLE_DATA,
    tags::GREEN_PALETTE_COLOR_LOOKUP_TABLE_DATA,
    tags::BLUE_PALETTE_COLOR_LOOKUP_TABLE_DATA,
    tags::SEGMENTED_RED_PALETTE_COLOR_LOOKUP_TABLE_DATA,
    tags::SEGMENTED_GREEN_PALETTE_COLOR_LOOKUP_TABLE_DATA,
    tags::SEGMENTED_BLUE_PALETTE_COLOR_LOOKUP_TABLE_DATA,
    tags::LOSSY_IMAGE_COMPRESSION,
    tags::FLOAT_PIXEL_DATA,
    tags::DOUBLE_FLOAT_PIXEL_DATA,
    tags::PIXEL_DATA,
];

/// The value of an attribute, as stored.
#[derive(Debug, Clone, Copy)]
struct Element<'a> {
    vr: VR,
    value: &'a [u8],
}

/// Where the pixels are.
#[derive(Debug, Clone)]
pub(super) enum PixelData<'a> {
    /// Plain values; `vr` says how big endian files order 8-bit ones.
    Native { vr: VR, bytes: &'a [u8] },
    /// Compressed: pieces, and where frames begin in them, if stated.
    Fragments {
        offsets: Vec<u32>,
        fragments: Vec<&'a [u8]>,
    },
    /// The file ends inside of them.
    Cut,
    /// There are none.
    None,
}

/// A table of grey levels, as stored.
#[derive(Debug, Clone)]
pub(super) struct StoredTable<'a> {
    /// Entries, first level, bits of an entry.
    pub(super) descriptor: [u16; 3],
    /// Whether the first level is declared to be signed.
    pub(super) signed: bool,
    pub(super) encoding: Encoding,
    pub(super) data: &'a [u8],
}

/// The attributes of one picture.
#[derive(Debug)]
pub(super) struct DataSet<'a> {
    pub(super) encoding: Encoding,
    /// The attributes that are kept.
    wanted: &'static [Tag],
    elements: BTreeMap<Tag, Element<'a>>,
    pub(super) modality_table: Option<StoredTable<'a>>,
    pub(super) voi_table: Option<StoredTable<'a>>,
    /// Whether graphics are stored beside the pixels.
    pub(super) has_overlay: bool,
    pub(super) pixels: PixelData<'a>,
}

/// The data set of a file, inflated if it was deflated.
#[derive(Debug)]
pub(super) struct DicomFile<'a> {
    pub(super) syntax: Syntax,
    encoding: Encoding,
    data: Cow<'a, [u8]>,
}

impl<'a> DicomFile<'a> {
    /// Reads what precedes the data set; `max_bytes` bounds an inflated one.
    pub(super) fn new(bytes: &'a [u8], max_bytes: u64) -> Result<Self, DicomError> {
        let bytes = match bytes.get(PREAMBLE..HEAD) {
            Some(MAGIC) => &bytes[HEAD..],
            _ => bytes,
        };
        let (uid, at) = file_meta(bytes)?;
        let rest = &bytes[at..];
        let guess = Encoding::guess(rest).unwrap_or(Encoding::ImplicitLittle);
        let syntax = uid.map_or_else(|| Syntax::plain(guess), |uid| Syntax::of(&uid));
        let data = if syntax.is_deflated() {
            let mut data = Vec::new();
            flate2::read::DeflateDecoder::new(rest)
                .take(max_bytes.saturating_add(1))
                .read_to_end(&mut data)
                .map_err(|_| DicomError::damaged("its deflated data cannot be inflated"))?;
            if data.len() as u64 > max_bytes {
                return Err(DicomError::TooMuchMemory);
            }
            Cow::Owned(data)
        } else {
            Cow::Borrowed(rest)
        };
        Ok(Self {
            encoding: syntax.encoding(),
            syntax,
            data,
        })
    }

    /// Reads the attributes that are wanted.
    pub(super) fn data_set(&self) -> Result<DataSet<'_>, DicomError> {
        self.data_set_of(&WANTED)
    }

    /// Reads the attributes of `wanted`.
    pub(super) fn data_set_of(&self, wanted: &'static [Tag]) -> Result<DataSet<'_>, DicomError> {
        let mut set = DataSet::empty(self.encoding);
        set.wanted = wanted;
        set.walk(&self.data)?;
        Ok(set)
    }
}

/// The transfer syntax in the group before the data set, and where that begins.
fn file_meta(bytes: &[u8]) -> Result<(Option<String>, usize), DicomError> {
    const META: u16 = 0x0002;
    let mut uid = None;
    let mut at = 0;
    // This group is explicit little endian in every file.
    while bytes.get(at..at + 2) == Some(&META.to_le_bytes()[..]) {
        let (header, length) = Encoding::ExplicitLittle.header(&bytes[at..])?;
        at += length;
        let value = value(bytes, at, header.len)?;
        at += value.len();
        if header.tag == tags::TRANSFER_SYNTAX_UID {
            uid = ascii(value)
                .filter(|uid| syntax::is_uid(uid))
                .map(str::to_owned);
            if uid.is_none() {
                return Err(DicomError::damaged("its transfer syntax is no identifier"));
            }
        }
    }
    Ok((uid, at))
}

/// The bytes from `at` on, as many as `length` says.
fn value(bytes: &[u8], at: usize, length: Length) -> Result<&[u8], DicomError> {
    let length = length
        .get()
        .ok_or_else(|| DicomError::damaged("an attribute has no length"))?;
    let end = at.checked_add(length as usize);
    end.and_then(|end| bytes.get(at..end))
        .ok_or(DicomError::Truncated)
}

/// Text without the padding; `None` if it is not plain ASCII.
fn ascii(value: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(value)
        .ok()
        .filter(|text| text.is_ascii());
    Some(text?.trim_matches(['\0', ' ']))
}

impl<'a> DataSet<'a> {
    fn empty(encoding: Encoding) -> Self {
        Self {
            encoding,
            wanted: &WANTED,
            elements: BTreeMap::new(),
            modality_table: None,
            voi_table: None,
            has_overlay: false,
            pixels: PixelData::None,
        }
    }

    /// Keeps the wanted attributes of `bytes`, up to the pixels.
    fn walk(&mut self, bytes: &'a [u8]) -> Result<(), DicomError> {
        let mut at = 0;
        // Less than a header, or zeros: padding after the last attribute.
        while bytes.len() - at >= SHORTEST_HEADER {
            let (header, length) = self.encoding.header(&bytes[at..])?;
            at += length;
            let tag = header.tag;
            if tag == Tag(0, 0) {
                break;
            }
            if tag.group() == ITEM.group() {
                continue;
            }
            if tag == tags::PIXEL_DATA {
                self.pixels = self.pixel_data(bytes, at, &header)?;
                break;
            }
            let content = match header.len.get() {
                Some(_) => value(bytes, at, header.len)?,
                None => {
                    let end = end_of_sequence(bytes, at, inner(self.encoding, header.vr))?;
                    &bytes[at..end]
                }
            };
            at += content.len();
            match tag {
                tags::MODALITY_LUT_SEQUENCE => self.modality_table = self.table(content)?,
                tags::VOILUT_SEQUENCE => self.voi_table = self.table(content)?,
                tag if is_overlay_data(tag) => self.has_overlay |= !content.is_empty(),
                tag if self.wanted.contains(&tag) => {
                    self.elements.entry(tag).or_insert(Element {
                        vr: header.vr,
                        value: content,
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn pixel_data(
        &self,
        bytes: &'a [u8],
        mut at: usize,
        header: &DataElementHeader,
    ) -> Result<PixelData<'a>, DicomError> {
        if header.len.is_defined() {
            return Ok(match value(bytes, at, header.len) {
                Ok(bytes) => PixelData::Native {
                    vr: header.vr,
                    bytes,
                },
                Err(_) => PixelData::Cut,
            });
        }
        let mut items = Vec::new();
        loop {
            let Ok((header, length)) = self.encoding.header(&bytes[at..]) else {
                return Ok(PixelData::Cut);
            };
            at += length;
            match header.tag {
                ITEM => match value(bytes, at, header.len) {
                    Ok(item) => {
                        at += item.len();
                        items.push(item);
                    }
                    Err(_) => return Ok(PixelData::Cut),
                },
                SEQUENCE_END => break,
                _ => {
                    return Err(DicomError::damaged(
                        "its pixel data are no list of fragments",
                    ));
                }
            }
        }
        if items.is_empty() {
            return Err(DicomError::damaged("its pixel data are empty"));
        }
        let table = items.remove(0).as_chunks::<4>().0;
        Ok(PixelData::Fragments {
            offsets: table
                .iter()
                .map(|bytes| u32::from_le_bytes(*bytes))
                .collect(),
            fragments: items,
        })
    }

    /// The first table of a sequence of tables.
    fn table(&self, content: &'a [u8]) -> Result<Option<StoredTable<'a>>, DicomError> {
        if content.is_empty() {
            return Ok(None);
        }
        let (header, length) = self.encoding.header(content)?;
        if header.tag != ITEM {
            return Ok(None);
        }
        let end = match header.len.get() {
            Some(_) => length + value(content, length, header.len)?.len(),
            None => content.len(),
        };
        let mut item = DataSet::empty(self.encoding);
        let mut at = length;
        while at < end {
            let (header, length) = self.encoding.header(&content[at..end])?;
            at += length;
            if header.tag == ITEM_END || header.tag == ITEM {
                break;
            }
            let value = value(&content[..end], at, header.len)?;
            at += value.len();
            let vr = header.vr;
            item.elements.insert(header.tag, Element { vr, value });
        }
        let descriptor = item.words(tags::LUT_DESCRIPTOR);
        let data = item.elements.get(&tags::LUT_DATA);
        let signed = item.elements.get(&tags::LUT_DESCRIPTOR);
        Ok(match (descriptor.as_deref(), data, signed) {
            (Some(&[entries, first, bits]), Some(data), Some(descriptor)) => Some(StoredTable {
                descriptor: [entries, first, bits],
                signed: descriptor.vr == VR::SS,
                encoding: self.encoding,
                data: data.value,
            }),
            _ => None,
        })
    }

    /// Whether the attribute is there with a value.
    pub(super) fn has(&self, tag: Tag) -> bool {
        self.elements.get(&tag).is_some_and(|e| !e.value.is_empty())
    }

    /// The bytes of an attribute, as stored; none if it is absent.
    pub(super) fn bytes(&self, tag: Tag) -> &'a [u8] {
        self.elements.get(&tag).map_or(&[], |element| element.value)
    }

    /// An attribute of 16-bit numbers.
    pub(super) fn words(&self, tag: Tag) -> Option<Vec<u16>> {
        let (words, rest) = self.elements.get(&tag)?.value.as_chunks::<2>();
        rest.is_empty()
            .then(|| words.iter().map(|word| self.encoding.u16(*word)).collect())
    }

    /// The first of an attribute of 16-bit numbers.
    pub(super) fn word(&self, tag: Tag) -> Option<u16> {
        self.words(tag)?.first().copied()
    }

    /// The values of an attribute of short text; none if it is absent or holds nothing but padding.
    pub(super) fn texts(&self, tag: Tag) -> Vec<&'a str> {
        let value = self.elements.get(&tag).and_then(|e| ascii(e.value));
        let value = value.filter(|text| !text.is_empty());
        let values = value.into_iter().flat_map(|text| text.split('\\'));
        values.map(|text| text.trim_matches(['\0', ' '])).collect()
    }

    /// The values of an attribute of code words; what is no code word is left out.
    ///
    /// A field that may hold nothing but these cannot carry free text into a message.
    pub(super) fn codes(&self, tag: Tag) -> Vec<&'a str> {
        const LONGEST: usize = 16;
        let is_code = |text: &&str| {
            let known = |c: u8| matches!(c, b'A'..=b'Z' | b'0'..=b'9' | b'_' | b' ');
            !text.is_empty() && text.len() <= LONGEST && text.bytes().all(known)
        };
        self.texts(tag).into_iter().filter(is_code).collect()
    }

    /// The values of an attribute of numbers in words, or `None` if one is no finite number.
    pub(super) fn numbers(&self, tag: Tag) -> Option<Vec<f64>> {
        let texts = self.texts(tag);
        let number = |text: &str| text.parse().ok().filter(|value: &f64| value.is_finite());
        texts.into_iter().map(number).collect()
    }
}

/// Whether an attribute holds the bits of an overlay; its group is even, 6000 to 60FF.
fn is_overlay_data(tag: Tag) -> bool {
    const OVERLAY_DATA: u16 = 0x3000;
    tag.group() & 0xff01 == 0x6000 && tag.element() == OVERLAY_DATA
}

/// How attributes inside an attribute are encoded.
fn inner(encoding: Encoding, vr: VR) -> Encoding {
    // PS3.5, 6.2.2: what is of unknown kind and without length is implicit little endian inside.
    if vr == VR::UN {
        Encoding::ImplicitLittle
    } else {
        encoding
    }
}

/// Where the sequence without length that begins at `at` ends, its end mark included.
fn end_of_sequence(bytes: &[u8], mut at: usize, encoding: Encoding) -> Result<usize, DicomError> {
    /// Far more than any picture has.
    const DEEPEST: usize = 64;
    let mut open = vec![encoding];
    while let Some(encoding) = open.last().copied() {
        let (header, length) = encoding.header(&bytes[at..])?;
        at += length;
        match (header.tag, header.len.get()) {
            (SEQUENCE_END, _) => {
                open.pop();
            }
            // Items need no count of their own: their content ends with the sequence around them.
            (ITEM | ITEM_END, None | Some(0)) => {}
            (_, Some(_)) => at += value(bytes, at, header.len)?.len(),
            (_, None) => open.push(inner(encoding, header.vr)),
        }
        if open.len() > DEEPEST {
            return Err(DicomError::damaged("its sequences are nested too deep"));
        }
    }
    Ok(at)
}
