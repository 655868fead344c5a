//! Keys of rows that nothing uses, counted over a data file.

use std::collections::BTreeMap;

use crate::processor::row_keys::is_kept;

/// Keys of rows that nothing uses: the first row of each, and how many have it.
#[derive(Debug, Default)]
pub(crate) struct UnusedKeys(BTreeMap<String, (usize, usize)>);

impl UnusedKeys {
    /// Notes the keys of a row.
    pub(crate) fn add(&mut self, row: usize, keys: Vec<String>) {
        for key in keys {
            self.0.entry(key).or_insert((row, 0)).1 += 1;
        }
    }

    /// The first row of each key, and a sentence about it.
    pub(crate) fn sentences(self) -> impl Iterator<Item = (usize, String)> {
        self.0.into_iter().map(|(key, (row, count))| {
            let others = match count {
                1 => String::new(),
                2 => ", nor in 1 other row".to_string(),
                count => format!(", nor in {} other rows", count - 1),
            };
            let hint = if is_kept(&key) {
                "it belongs to preference training (`objective = \"dpo\"`), and only the answer in `messages` is learnt"
            } else {
                "hint: begin its name with `_` if it is meant for you alone"
            };
            (row, format!("the key `{key}` is not used{others}; {hint}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unused_keys_are_one_remark_each() {
        let mut unused = UnusedKeys::default();
        unused.add(2, vec!["visit".to_owned()]);
        unused.add(5, vec!["visit".to_owned(), "age".to_owned()]);
        let sentences: Vec<_> = unused.sentences().collect();
        assert_eq!((sentences[0].0, sentences[1].0), (5, 2));
        assert!(sentences[0].1.starts_with("the key `age` is not used; "));
        let visit = "the key `visit` is not used, nor in 1 other row; ";
        assert!(sentences[1].1.starts_with(visit));
    }
}
