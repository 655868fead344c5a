//! Values of images on the host, known by a number.

use std::{
    ops::Deref,
    sync::atomic::{AtomicU64, Ordering},
};

/// Normalised patches of some images. What is made of them ahead of time is found again by their number:
/// an address may be another image's by then.
#[derive(Debug, Clone)]
pub struct Pixels {
    values: Vec<f32>,
    number: u64,
}

impl Pixels {
    /// Clones have the number of what they are clones of, all others one of their own.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Appends values: the result is another image's.
    pub fn extend_from_slice(&mut self, values: &[f32]) {
        let mut all = std::mem::take(&mut self.values);
        all.extend_from_slice(values);
        *self = Self::from(all);
    }
}

impl From<Vec<f32>> for Pixels {
    fn from(values: Vec<f32>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            values,
            number: NEXT.fetch_add(1, Ordering::Relaxed),
        }
    }
}

impl FromIterator<f32> for Pixels {
    fn from_iter<I: IntoIterator<Item = f32>>(values: I) -> Self {
        values.into_iter().collect::<Vec<_>>().into()
    }
}

impl Default for Pixels {
    fn default() -> Self {
        Vec::new().into()
    }
}

impl Deref for Pixels {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values
    }
}

impl PartialEq for Pixels {
    fn eq(&self, other: &Self) -> bool {
        self.values == other.values
    }
}
