//! Identifiers that are functions of what they name, so that a second attempt sends the same object.

use sha2::{Digest, Sha256};

/// The UID of `parts`: `2.25.` and a UUID of version 8 (RFC 9562) made of their hash.
pub(super) fn derived(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        // The length keeps `a`, `bc` apart from `ab`, `c`.
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    let digest = hash.finalize();
    let number = digest
        .iter()
        .take(16)
        .fold(0_u128, |all, byte| all << 8 | u128::from(*byte));
    let number = number & !(0xf << 76) & !(0x3 << 62) | 0x8 << 76 | 0x2 << 62;
    format!("2.25.{number}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_parts_have_one_identifier_and_others_another() {
        let one = derived(&["a", "bc"]);
        assert_eq!(one, derived(&["a", "bc"]));
        assert_ne!(one, derived(&["ab", "c"]));
        assert!(one.len() <= 64 && one.bytes().all(|c| c.is_ascii_digit() || c == b'.'));
        let number: u128 = one.strip_prefix("2.25.").unwrap().parse().unwrap();
        assert_eq!((number >> 76 & 0xf, number >> 62 & 0x3), (8, 2));
    }
}
