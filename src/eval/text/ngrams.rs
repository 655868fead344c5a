//! How many n-grams two texts share.

/// N-grams of one order in a prediction and a reference.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Overlap {
    /// N-grams in both; where they repeat, the smaller count.
    pub matches: usize,
    /// N-grams of the prediction.
    pub prediction: usize,
    /// N-grams of the reference.
    pub reference: usize,
}

/// Counts n-grams of `order` tokens, a repeated one as often as it occurs.
#[must_use]
pub fn repeated<T: Ord>(prediction: &[T], reference: &[T], order: usize) -> Overlap {
    overlap(&sorted(prediction, order), &sorted(reference, order))
}

/// Counts n-grams of `order` tokens, a repeated one once.
#[must_use]
pub fn distinct<T: Ord>(prediction: &[T], reference: &[T], order: usize) -> Overlap {
    let (mut prediction, mut reference) = (sorted(prediction, order), sorted(reference, order));
    prediction.dedup();
    reference.dedup();
    overlap(&prediction, &reference)
}

fn sorted<T: Ord>(tokens: &[T], order: usize) -> Vec<&[T]> {
    let mut ngrams: Vec<&[T]> = if order == 0 {
        Vec::new()
    } else {
        tokens.windows(order).collect()
    };
    ngrams.sort_unstable();
    ngrams
}

fn overlap<T: Ord>(prediction: &[T], reference: &[T]) -> Overlap {
    let (mut matches, mut at, mut other) = (0, 0, 0);
    while at < prediction.len() && other < reference.len() {
        match prediction[at].cmp(&reference[other]) {
            std::cmp::Ordering::Less => at += 1,
            std::cmp::Ordering::Greater => other += 1,
            std::cmp::Ordering::Equal => {
                matches += 1;
                at += 1;
                other += 1;
            }
        }
    }
    Overlap {
        matches,
        prediction: prediction.len(),
        reference: reference.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_count_as_often_as_both_have_them() {
        let (prediction, reference) = ([1, 1, 1, 2], [1, 1, 3]);
        assert_eq!(
            repeated(&prediction, &reference, 1),
            Overlap {
                matches: 2,
                prediction: 4,
                reference: 3
            }
        );
        assert_eq!(
            distinct(&prediction, &reference, 1),
            Overlap {
                matches: 1,
                prediction: 2,
                reference: 2
            }
        );
        assert_eq!(
            repeated(&prediction, &reference, 2),
            Overlap {
                matches: 1,
                prediction: 3,
                reference: 2
            }
        );
    }

    #[test]
    fn a_text_shorter_than_the_order_has_no_ngrams() {
        assert_eq!(
            repeated(&[1], &[1, 2], 2),
            Overlap {
                matches: 0,
                prediction: 0,
                reference: 1
            }
        );
        assert_eq!(repeated::<u32>(&[], &[], 1), Overlap::default());
        assert_eq!(repeated(&[1], &[1], 0), Overlap::default());
    }
}
