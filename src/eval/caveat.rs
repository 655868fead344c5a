//! What a reader must know before believing the numbers, in both languages.

use super::bootstrap::{FEWEST_FOR_INTERVAL, FEWEST_FOR_P};

/// Something a reader must know before believing the numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caveat {
    /// For Chinese readers.
    pub chinese: String,
    /// For English readers.
    pub english: String,
}

impl Caveat {
    /// The same in both languages.
    pub fn new(chinese: impl Into<String>, english: impl Into<String>) -> Self {
        Self {
            chinese: chinese.into(),
            english: english.into(),
        }
    }
}

/// What `studies` studies are too few for, if for anything.
pub fn too_few(studies: usize, compares: bool) -> Option<Caveat> {
    let least = format!(
        "2/2^{FEWEST_FOR_P} = {:.3}",
        f64::powf(2.0, 1.0 - FEWEST_FOR_P as f64)
    );
    if studies < FEWEST_FOR_INTERVAL {
        return Some(Caveat::new(
            "只有 1 项检查：没有区间，也没有 p 值",
            "1 study: no interval and no p value",
        ));
    }
    (compares && studies < FEWEST_FOR_P).then(|| {
        Caveat::new(
            format!("只有 {studies} 项检查，少于 {FEWEST_FOR_P} 项（符号翻转检验的最小 p 值为 {least}）：不给 p 值"),
            format!(
                "{studies} studies: no p value; at least {FEWEST_FOR_P} are needed (a sign-flip test of {FEWEST_FOR_P} gives {least} at best)"
            ),
        )
    })
}
