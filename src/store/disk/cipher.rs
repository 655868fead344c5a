//! Encryption at rest: records and films under one key, each bound to its place.

use chacha20poly1305::{
    KeyInit, XChaCha20Poly1305, XNonce,
    aead::{Aead, Payload},
};
use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::store::StoreError;

/// What encrypted bytes begin with, before the nonce of 24 bytes.
const MAGIC: &[u8; 4] = b"XSE1";
const NONCE_BYTES: usize = 24;

/// The key of a store: 32 bytes, as 64 hexadecimal digits in a file or in the environment.
#[derive(Clone)]
pub struct StoreKey([u8; 32]);

impl StoreKey {
    /// Reads 64 hexadecimal digits; blanks around them are passed over.
    ///
    /// # Errors
    /// What is expected; the text itself is never repeated.
    pub fn read(text: &str) -> Result<Self, String> {
        let digits = text.trim();
        let wrong =
            || "expected 64 hexadecimal digits, as `openssl rand -hex 32` prints".to_owned();
        if digits.len() != 64 || !digits.is_ascii() {
            return Err(wrong());
        }
        let mut key = [0; 32];
        for (byte, pair) in key.iter_mut().zip(digits.as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| wrong())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| wrong())?;
        }
        Ok(Self(key))
    }

    /// A key for another purpose, from which this one cannot be computed.
    fn derived(&self, purpose: &str) -> [u8; 32] {
        hmac(&self.0, &[purpose.as_bytes()])
    }
}

/// HMAC-SHA-256 of parts, each with its length before it.
pub(super) fn hmac(key: &[u8; 32], parts: &[&[u8]]) -> [u8; 32] {
    // A key of any length is taken.
    let Ok(mut mac) = <Hmac<Sha256> as Mac>::new_from_slice(key) else {
        unreachable!("HMAC takes keys of any length");
    };
    for part in parts {
        mac.update(&(part.len() as u64).to_le_bytes());
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

/// What records and films go through on their way to the disk.
pub(super) struct Cipher {
    aead: Option<XChaCha20Poly1305>,
    /// For the chain of the audit log and for lookups; zeros without encryption.
    chain: [u8; 32],
    lookup: [u8; 32],
}

impl Cipher {
    pub(super) fn new(key: Option<&StoreKey>) -> Self {
        let derived = |purpose: &str| key.map_or([0; 32], |key| key.derived(purpose));
        Self {
            aead: key.map(|key| XChaCha20Poly1305::new(&key.derived("records and films").into())),
            chain: derived("audit chain"),
            lookup: derived("lookup"),
        }
    }

    pub(super) fn is_encrypted(&self) -> bool {
        self.aead.is_some()
    }

    /// Bytes for the disk; `place` names what they are of, and they open nowhere else.
    pub(super) fn seal(&self, place: &str, bytes: &[u8]) -> Result<Vec<u8>, StoreError> {
        let Some(aead) = &self.aead else {
            return Ok(bytes.to_vec());
        };
        // 192 random bits: no two are alike in the life of a store.
        let nonce: [u8; NONCE_BYTES] = rand::random();
        let payload = Payload {
            msg: bytes,
            aad: place.as_bytes(),
        };
        let sealed = aead
            .encrypt(XNonce::from_slice(&nonce), payload)
            .map_err(|_| StoreError::Failed("bytes could not be encrypted".into()))?;
        Ok([&MAGIC[..], &nonce, &sealed].concat())
    }

    /// The bytes that [`Cipher::seal`] took.
    ///
    /// # Errors
    /// [`StoreError::Failed`] for another key, another place or changed bytes.
    pub(super) fn open(&self, place: &str, bytes: Vec<u8>) -> Result<Vec<u8>, StoreError> {
        let Some(aead) = &self.aead else {
            return Ok(bytes);
        };
        let damaged =
            || StoreError::Failed(format!("`{place}` was changed, or is of another store"));
        let rest = bytes.strip_prefix(MAGIC).ok_or_else(damaged)?;
        let (nonce, sealed) = rest.split_at_checked(NONCE_BYTES).ok_or_else(damaged)?;
        let payload = Payload {
            msg: sealed,
            aad: place.as_bytes(),
        };
        aead.decrypt(XNonce::from_slice(nonce), payload)
            .map_err(|_| damaged())
    }

    /// One link of the audit log.
    pub(super) fn link(&self, parts: &[&[u8]]) -> [u8; 32] {
        hmac(&self.chain, parts)
    }

    /// What a UID is found by.
    pub(super) fn lookup(&self, uid: &str) -> [u8; 32] {
        hmac(&self.lookup, &[uid.as_bytes()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_bytes_open_with_their_key_in_their_place_alone() {
        let key = StoreKey::read(&"0f".repeat(32)).unwrap();
        let cipher = Cipher::new(Some(&key));
        let sealed = cipher.seal("study:a", "张三".as_bytes()).unwrap();
        assert!(!sealed.windows(6).any(|part| part == "张三".as_bytes()));
        let open = |cipher: &Cipher, place: &str, bytes: &[u8]| cipher.open(place, bytes.to_vec());
        assert_eq!(
            open(&cipher, "study:a", &sealed).unwrap(),
            "张三".as_bytes()
        );
        assert!(open(&cipher, "study:b", &sealed).is_err());
        let other = Cipher::new(Some(&StoreKey::read(&"1f".repeat(32)).unwrap()));
        assert!(open(&other, "study:a", &sealed).is_err());
        for at in [0, 5, sealed.len() - 1] {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(open(&cipher, "study:a", &changed).is_err(), "{at}");
        }
        assert!(open(&cipher, "study:a", b"XSE1").is_err());
    }

    #[test]
    fn a_key_is_64_digits_and_is_never_repeated() {
        let wrong = StoreKey::read("secret").err().unwrap();
        assert!(wrong.contains("64") && !wrong.contains("secret"));
        assert!(StoreKey::read(&"zz".repeat(32)).is_err());
        assert!(StoreKey::read(&format!(" {}\n", "aB".repeat(32))).is_ok());
    }
}
