//! The secret that processes of one run share, and how they prove to each other that they have it.
//!
//! Each side sends a random number and answers the other's with HMAC-SHA256 over both; the secret itself is
//! never sent. This says who connects; what is sent afterwards is not encrypted.

use std::{
    fs,
    hash::{BuildHasher, Hasher, RandomState},
    path::Path,
};

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::ClusterError;

/// A random number that is used once.
pub(super) type Nonce = [u8; 32];
/// Proof of the key.
pub(super) type Proof = [u8; 32];

/// The shared secret; empty where a run has none.
#[derive(Clone, Default)]
pub struct Key(Vec<u8>);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_empty() {
            "Key(none)"
        } else {
            "Key(..)"
        })
    }
}

impl Key {
    /// A key as it is typed, or the one in a file, without white space at its ends; none without both.
    ///
    /// # Errors
    /// [`ClusterError::Key`]: both are given, the file cannot be read, or the key is empty.
    pub fn load(typed: Option<&str>, file: Option<&Path>) -> Result<Self, ClusterError> {
        let text = match (typed, file) {
            (None, None) => return Ok(Self::default()),
            (Some(_), Some(_)) => {
                return Err(ClusterError::Key(
                    "--cluster-key (or XRAY_CLUSTER_KEY) and --cluster-key-file are both given; leave one out"
                        .into(),
                ));
            }
            (Some(text), None) => text.trim().to_string(),
            (None, Some(path)) => fs::read_to_string(path)
                .map_err(|cause| {
                    ClusterError::Key(format!("cannot read the key `{}`: {cause}", path.display()))
                })?
                .trim()
                .to_string(),
        };
        if text.is_empty() {
            return Err(ClusterError::Key(
                "the key of --cluster-key or --cluster-key-file is empty; `openssl rand -hex 32` makes one".into(),
            ));
        }
        Ok(Self(text.into_bytes()))
    }

    /// Whether the run has none.
    pub fn is_none(&self) -> bool {
        self.0.is_empty()
    }

    /// Proves the key to whoever sent `theirs`; `role` keeps an answer from being sent back as one's own.
    pub(super) fn proof(&self, role: &[u8], theirs: &Nonce, ours: &Nonce) -> Proof {
        hmac_sha256(&self.0, &[role, theirs, ours])
    }

    /// Whether a proof is right; takes the same time whatever is wrong with it.
    pub(super) fn accepts(&self, proof: &Proof, role: &[u8], ours: &Nonce, theirs: &Nonce) -> bool {
        let right = self.proof(role, ours, theirs);
        right.ct_eq(proof).into()
    }
}

/// HMAC with SHA-256 over some pieces one after another.
///
/// Source: RFC 2104.
fn hmac_sha256(key: &[u8], pieces: &[&[u8]]) -> [u8; 32] {
    let mut block = [0u8; 64];
    if key.len() > block.len() {
        block[..32].copy_from_slice(&Sha256::digest(key));
    } else {
        block[..key.len()].copy_from_slice(key);
    }
    let mut inner = Sha256::new();
    inner.update(block.map(|byte| byte ^ 0x36));
    pieces.iter().for_each(|piece| inner.update(piece));
    let mut outer = Sha256::new();
    outer.update(block.map(|byte| byte ^ 0x5c));
    outer.update(inner.finalize());
    outer.finalize().into()
}

/// A number that nobody can guess and that does not come again: the system's randomness is in every `RandomState`.
pub(super) fn nonce() -> Nonce {
    let mut hash = Sha256::new();
    for _ in 0..4 {
        let state = RandomState::new();
        for place in 0..4u64 {
            let mut hasher = state.build_hasher();
            hasher.write_u64(place);
            hash.update(hasher.finish().to_le_bytes());
        }
    }
    hash.update(std::process::id().to_le_bytes());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    hash.update(now.map_or(0, |now| now.as_nanos()).to_le_bytes());
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn the_mac_is_that_of_the_standard() {
        // RFC 4231, cases 1, 2 and 6.
        let one = hmac_sha256(&[0x0b; 20], &[b"Hi ", b"There"]);
        assert_eq!(
            hex(&one),
            "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"
        );
        let two = hmac_sha256(b"Jefe", &[b"what do ya want ", b"for nothing?"]);
        assert_eq!(
            hex(&two),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
        let long = hmac_sha256(
            &[0xaa; 131],
            &[b"Test Using Larger Than Block-Size Key - Hash Key First"],
        );
        assert_eq!(
            hex(&long),
            "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"
        );
    }

    #[test]
    fn a_proof_counts_for_one_key_one_role_and_one_pair_of_numbers() {
        let (key, other) = (Key(b"one".to_vec()), Key(b"two".to_vec()));
        let (ours, theirs) = (nonce(), nonce());
        assert_ne!(ours, theirs);
        let proof = key.proof(b"client", &ours, &theirs);
        assert!(key.accepts(&proof, b"client", &ours, &theirs));
        assert!(!other.accepts(&proof, b"client", &ours, &theirs));
        assert!(!key.accepts(&proof, b"server", &ours, &theirs));
        assert!(!key.accepts(&proof, b"client", &theirs, &ours));
        assert!(!key.accepts(&proof, b"client", &nonce(), &theirs));
    }

    #[test]
    fn a_key_comes_from_one_place() {
        assert!(Key::load(None, None).unwrap().is_none());
        assert!(!Key::load(Some(" secret\n"), None).unwrap().is_none());
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        fs::write(&file, "secret\n").unwrap();
        assert_eq!(
            Key::load(None, Some(&file)).unwrap().0,
            Key::load(Some("secret"), None).unwrap().0
        );
        for (typed, file) in [
            (Some("  "), None),
            (Some("secret"), Some(file.as_path())),
            (None, Some(Path::new("/none/of/this"))),
        ] {
            assert!(Key::load(typed, file).is_err());
        }
    }
}
