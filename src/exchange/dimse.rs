//! Commands of DICOM's network (PS3.7): groups of attributes, implicit little endian, read with bounds and written.

use std::collections::BTreeMap;

/// C-STORE-RQ; its answer has the highest bit set, as all have.
pub(super) const STORE: u16 = 0x0001;
/// C-ECHO-RQ.
pub(super) const ECHO: u16 = 0x0030;
/// C-CANCEL-RQ, which has no answer.
pub(super) const CANCEL: u16 = 0x0fff;
/// What makes a request's field that of its answer.
pub(super) const ANSWER: u16 = 0x8000;

/// CommandDataSetType of a message without a data set.
pub(super) const NO_DATA: u16 = 0x0101;

/// Statuses of answers.
pub(super) mod status {
    pub(in crate::exchange) const SUCCESS: u16 = 0x0000;
    pub(in crate::exchange) const SOP_CLASS_NOT_SUPPORTED: u16 = 0x0122;
    pub(in crate::exchange) const UNRECOGNISED: u16 = 0x0211;
    pub(in crate::exchange) const NO_ROOM: u16 = 0xa700;
    pub(in crate::exchange) const DOES_NOT_MATCH: u16 = 0xa900;
    pub(in crate::exchange) const NOT_UNDERSTOOD: u16 = 0xc000;
    pub(in crate::exchange) const REFUSED: u16 = 0x0124;
}

/// Elements of group 0000.
pub(super) mod element {
    pub(in crate::exchange) const CLASS: u16 = 0x0002;
    pub(in crate::exchange) const FIELD: u16 = 0x0100;
    pub(in crate::exchange) const ID: u16 = 0x0110;
    pub(in crate::exchange) const ANSWERED_ID: u16 = 0x0120;
    pub(in crate::exchange) const PRIORITY: u16 = 0x0700;
    pub(in crate::exchange) const DATA_SET_TYPE: u16 = 0x0800;
    pub(in crate::exchange) const STATUS: u16 = 0x0900;
    pub(in crate::exchange) const INSTANCE: u16 = 0x1000;
}

/// Most bytes of a command: far more than any has.
pub(super) const MAX_COMMAND: usize = 4096;

/// A command: values by element.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Command(BTreeMap<u16, Vec<u8>>);

impl Command {
    /// Reads a command; `None` where it is damaged.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        if bytes.len() > MAX_COMMAND {
            return None;
        }
        let mut elements = BTreeMap::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            let (head, after) = rest.split_first_chunk::<8>()?;
            let [g0, g1, e0, e1, length @ ..] = *head;
            if u16::from_le_bytes([g0, g1]) != 0 {
                return None;
            }
            let length = usize::try_from(u32::from_le_bytes(length)).ok()?;
            let value = after.get(..length)?;
            elements.insert(u16::from_le_bytes([e0, e1]), value.to_vec());
            rest = &after[length..];
        }
        Some(Self(elements))
    }

    /// A number.
    pub(super) fn number(&self, element: u16) -> Option<u16> {
        let bytes = self.0.get(&element)?.as_slice();
        Some(u16::from_le_bytes(bytes.try_into().ok()?))
    }

    /// An identifier; `None` where it is none.
    pub(super) fn uid(&self, element: u16) -> Option<&str> {
        let text = std::str::from_utf8(self.0.get(&element)?).ok()?;
        let text = text.trim_end_matches(['\0', ' ']);
        let known = |c: u8| c.is_ascii_digit() || c == b'.';
        let good = !text.is_empty() && text.len() <= 64 && text.bytes().all(known);
        good.then_some(text)
    }

    /// Sets a number.
    pub(super) fn with(mut self, element: u16, number: u16) -> Self {
        self.0.insert(element, number.to_le_bytes().to_vec());
        self
    }

    /// Sets an identifier.
    pub(super) fn with_uid(mut self, element: u16, uid: &str) -> Self {
        self.0.insert(element, padded(uid));
        self
    }

    /// The command with its length before it.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut body = Vec::new();
        for (element, value) in &self.0 {
            if *element != 0 {
                push(&mut body, *element, value);
            }
        }
        let mut all = Vec::with_capacity(body.len() + 12);
        push(&mut all, 0, &(body.len() as u32).to_le_bytes());
        all.extend(body);
        all
    }
}

fn push(bytes: &mut Vec<u8>, element: u16, value: &[u8]) {
    bytes.extend([0, 0]);
    bytes.extend(element.to_le_bytes());
    bytes.extend((value.len() as u32).to_le_bytes());
    bytes.extend(value);
}

/// An identifier with the byte that makes its length even.
fn padded(uid: &str) -> Vec<u8> {
    let mut bytes = uid.as_bytes().to_vec();
    if bytes.len() % 2 == 1 {
        bytes.push(0);
    }
    bytes
}

/// What precedes a data set in a file: preamble, mark and group 0002.
pub(super) fn file_head(class: &str, instance: &str, syntax: &str) -> Vec<u8> {
    let mut meta = Vec::new();
    // FileMetaInformationVersion, of a kind with a long length.
    meta.extend([2, 0, 1, 0]);
    meta.extend(b"OB\0\0");
    meta.extend(2_u32.to_le_bytes());
    meta.extend([0, 1]);
    let uids = [
        (0x0002_u16, class),
        (0x0003, instance),
        (0x0010, syntax),
        (0x0012, IMPLEMENTATION),
    ];
    for (element, uid) in uids {
        let value = padded(uid);
        meta.extend([2, 0]);
        meta.extend(element.to_le_bytes());
        meta.extend(b"UI");
        meta.extend((value.len() as u16).to_le_bytes());
        meta.extend(value);
    }
    let mut head = vec![0; 128];
    head.extend(b"DICM");
    head.extend([2, 0, 0, 0]);
    head.extend(b"UL");
    head.extend(4_u16.to_le_bytes());
    head.extend((meta.len() as u32).to_le_bytes());
    head.extend(meta);
    head
}

/// ImplementationClassUID of this program: of a UUID that was drawn once.
pub(super) const IMPLEMENTATION: &str = "2.25.219803418294716504371288764901553271604";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_read_as_it_was_written() {
        let command = Command::default()
            .with_uid(element::CLASS, "1.2.840.10008.1.1")
            .with(element::FIELD, ECHO)
            .with(element::ID, 7)
            .with(element::DATA_SET_TYPE, NO_DATA);
        let bytes = command.bytes();
        // Length element: 12 bytes, and 26 + 10 + 10 + 10 of the others.
        assert_eq!(bytes[8..12], 56_u32.to_le_bytes());
        let read = Command::read(&bytes).unwrap();
        assert_eq!(read.number(element::ID), Some(7));
        assert_eq!(read.uid(element::CLASS), Some("1.2.840.10008.1.1"));
        for cut in 1..bytes.len() {
            // Whole elements alone are a command; nothing panics.
            let _ = Command::read(&bytes[..cut]);
        }
        assert_eq!(Command::read(&bytes[..bytes.len() - 1]), None);
        assert_eq!(Command::read(&[8, 0, 0, 0, 0, 0, 0, 0]), None);
    }

    #[test]
    fn a_file_head_says_what_follows() {
        let head = file_head("1.2.3", "1.2.3.4", "1.2.840.10008.1.2.1");
        assert_eq!(&head[128..132], b"DICM");
        let length = u32::from_le_bytes(head[140..144].try_into().unwrap());
        assert_eq!(length as usize, head.len() - 144);
    }
}
