//! The word that a misspelt one most likely means.

/// The word of `known` that `word` is likely a misspelling of: the same but for capitals, `-` and `_`, or
/// with one letter in four wrong.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |word: &str| word.to_lowercase().replace(['-', ' ', '_'], "");
    let word = plain(word);
    let (distance, found) = known
        .into_iter()
        .map(|known| (strsim::osa_distance(&word, &plain(known)), known))
        .min_by_key(|(distance, _)| *distance)?;
    (distance * 4 <= plain(found).chars().count()).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_letter_in_four_may_be_wrong() {
        let known = ["loss_scale", "images", "seed"];
        for (word, expected) in [
            ("LOSS-Scale", Some("loss_scale")),
            ("imags", Some("images")),
            ("image", Some("images")),
            ("sede", Some("seed")),
            ("side", None),
            ("hospital", None),
        ] {
            assert_eq!(nearest(word, known), expected, "{word}");
        }
        assert_eq!(nearest("seed", []), None);
    }
}
