//! Base64 as programs write it: with line breaks, with the letters of addresses, with or without `=`.

use std::borrow::Cow;

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};

const READER: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The bytes of base64 text; `None` for other text.
pub fn base64_bytes(text: &str) -> Option<Vec<u8>> {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"+/=".contains(byte);
    let text = if text.bytes().all(|byte| plain(&byte)) {
        Cow::Borrowed(text.as_bytes())
    } else {
        Cow::Owned(standard(text.as_bytes())?)
    };
    READER.decode(&text).ok()
}

/// The same text in the standard alphabet, without white space, `%2B` and its like put back.
fn standard(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.iter().copied();
    while let Some(byte) = rest.next() {
        let byte = match byte {
            b'%' => {
                let digit = |byte: u8| (byte as char).to_digit(16);
                let (high, low) = (digit(rest.next()?)?, digit(rest.next()?)?);
                (high * 16 + low) as u8
            }
            byte => byte,
        };
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => {}
            b'-' => out.push(b'+'),
            b'_' => out.push(b'/'),
            byte => out.push(byte),
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read_however_it_is_written() {
        let bytes = [0xfb, 0xef, 0xff, 0x00, 0x01];
        for text in [
            "++//AAE=",
            "++//AAE",
            "++//\nAAE=\n",
            "++//\r\nAA E=",
            "--__AAE",
            "%2B%2b//AAE%3D",
            "%2B+_/AAE%0A",
        ] {
            assert_eq!(base64_bytes(text).as_deref(), Some(&bytes[..]), "{text:?}");
        }
        for bad in ["++//AA!E", "++//%2", "%zz", "心", "++//A"] {
            assert_eq!(base64_bytes(bad), None, "{bad:?}");
        }
        assert_eq!(base64_bytes(""), Some(Vec::new()));
    }
}
