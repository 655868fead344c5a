//! Fresh memory filled with NaN, so that a read of unwritten memory shows in the results.
//!
//! Freed memory mostly holds plausible numbers, so a kernel that reads unwritten memory goes unnoticed.
//! With `XRAY_CUDA_POISON=1` every buffer that kernels are about to write starts as bytes of 0xFF: NaN in
//! f32, bf16 and f16, −1 in integers.

use std::sync::atomic::{AtomicU8, Ordering};

/// Set to 1 to fill fresh memory.
const POISON: &str = "XRAY_CUDA_POISON";

/// Whether memory is filled: 0 not looked up yet, 1 no, 2 yes.
static STATE: AtomicU8 = AtomicU8::new(0);

/// Whether fresh memory is filled.
pub(crate) fn is_on() -> bool {
    match STATE.load(Ordering::Relaxed) {
        0 => {
            let on = std::env::var(POISON).is_ok_and(|value| value == "1");
            set(on);
            on
        }
        state => state == 2,
    }
}

/// Turns it on or off for the whole process.
pub(crate) fn set(on: bool) {
    STATE.store(1 + u8::from(on), Ordering::Relaxed);
}
