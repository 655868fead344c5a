//! Which rules of a table can match a text at all: one pass for the beginnings of their patterns, in place of a pass for
//! each pattern.

use aho_corasick::AhoCorasick;
use regex::Regex;
use regex_syntax::hir::literal::Extractor;

/// Longest beginning that is looked for, in bytes: two Chinese characters.
const LONGEST: usize = 6;

/// Most beginnings of a pattern; one that has more is always tried.
const MOST: usize = 2048;

/// Finds the rules whose patterns may match.
pub(super) struct Prefilter {
    /// All beginnings; `None` without any.
    beginnings: Option<AhoCorasick>,
    /// The rules of each beginning.
    rules: Vec<Vec<u32>>,
    /// Rules that are always tried.
    always: Vec<bool>,
}

impl Prefilter {
    /// For the patterns of rules, in their order.
    pub(super) fn of<'p>(patterns: impl Iterator<Item = &'p Regex>) -> Self {
        let mut words: Vec<(Vec<u8>, u32)> = Vec::new();
        let mut always = Vec::new();
        for (rule, pattern) in patterns.enumerate() {
            let beginnings = beginnings(pattern.as_str());
            always.push(beginnings.is_none());
            let beginnings = beginnings.into_iter().flatten();
            words.extend(beginnings.map(|word| (word, rule as u32)));
        }
        words.sort_unstable();
        let mut distinct: Vec<Vec<u8>> = Vec::new();
        let mut rules: Vec<Vec<u32>> = Vec::new();
        for (word, rule) in words {
            match rules.last_mut() {
                Some(last) if distinct.last() == Some(&word) => last.push(rule),
                _ => {
                    distinct.push(word);
                    rules.push(vec![rule]);
                }
            }
        }
        // Without it no rule is left out.
        let built = AhoCorasick::new(&distinct).ok();
        if built.is_none() {
            always.fill(true);
        }
        Self {
            beginnings: built,
            rules,
            always,
        }
    }

    /// For each rule whether it may match somewhere in `text`.
    pub(super) fn candidates(&self, text: &str) -> Vec<bool> {
        let mut found = self.always.clone();
        for word in self
            .beginnings
            .iter()
            .flat_map(|all| all.find_overlapping_iter(text))
        {
            for rule in &self.rules[word.pattern().as_usize()] {
                found[*rule as usize] = true;
            }
        }
        found
    }
}

/// What every match of a pattern begins with one of; `None` where that may be anything.
fn beginnings(pattern: &str) -> Option<Vec<Vec<u8>>> {
    let parsed = regex_syntax::parse(pattern).ok()?;
    let mut extractor = Extractor::new();
    extractor
        .limit_literal_len(LONGEST)
        .limit_total(MOST)
        .limit_class(32);
    let found = extractor.extract(&parsed);
    let words: Vec<Vec<u8>> = found
        .literals()?
        .iter()
        .map(|word| word.as_bytes().to_vec())
        .collect();
    (!words.is_empty() && words.iter().all(|word| !word.is_empty())).then_some(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_rule_that_matches_is_left_out() {
        let patterns = [
            "气胸|积[液血]",
            "(?i:pneumothorax)|PTX",
            r"(?-u:\b)(?:lung|mass(?:s|es)?)(?-u:\b)",
            "[^，]{0,4}异常",
            "(?:左|右)?肺野",
            "x*",
        ];
        let patterns = patterns.map(|pattern| Regex::new(pattern).unwrap());
        let filter = Prefilter::of(patterns.iter());
        for text in [
            "右侧气胸，积血",
            "small PneumoThorax",
            "PTX",
            "two masses",
            "未见异常",
            "右肺野",
            "肺野",
            "",
        ] {
            let candidates = filter.candidates(text);
            for (pattern, may) in patterns.iter().zip(&candidates) {
                assert!(*may || !pattern.is_match(text), "{pattern} in {text}");
            }
        }
        assert_eq!(
            filter.candidates("心影增大"),
            [false, false, false, true, false, true]
        );
    }
}
