//! Which samples share a row.

/// Fills rows of at most `budget` tokens with samples: for each row the places of its samples.
///
/// First-fit decreasing: the longest sample goes first, each into the first row with room for it. That
/// needs at most 11/9 of the fewest rows, and it is a function of the lengths alone, so that a resumed
/// run packs as it would have. A sample longer than the budget has a row of its own. Places rise within
/// a row, and rows are in the order of their first sample.
pub(super) fn fill_rows(lengths: &[usize], budget: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|place| std::cmp::Reverse(lengths[*place]));
    let mut rows: Vec<(usize, Vec<usize>)> = Vec::new();
    for place in order {
        let length = lengths[place];
        match rows.iter_mut().find(|(used, _)| used + length <= budget) {
            Some((used, places)) => {
                *used += length;
                places.push(place);
            }
            None => rows.push((length, vec![place])),
        }
    }
    let mut rows: Vec<Vec<usize>> = rows
        .into_iter()
        .map(|(_, mut places)| {
            places.sort_unstable();
            places
        })
        .collect();
    rows.sort();
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_filled_to_the_budget_and_no_sample_is_lost() {
        // 7+3, 6+4, 5+5 and nothing left over.
        assert_eq!(
            fill_rows(&[3, 5, 7, 4, 6, 5], 10),
            [vec![0, 2], vec![1, 5], vec![3, 4]]
        );
        assert_eq!(fill_rows(&[12, 2, 8], 10), [vec![0], vec![1, 2]]);
        assert_eq!(fill_rows(&[4, 4, 4], 4), [[0], [1], [2]]);
        assert!(fill_rows(&[], 10).is_empty());
        let lengths: Vec<usize> = (0..200).map(|i| 1 + i * 7919 % 97).collect();
        let rows = fill_rows(&lengths, 100);
        let mut all: Vec<usize> = rows.iter().flatten().copied().collect();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..lengths.len()));
        for row in &rows {
            assert!(row.iter().map(|place| lengths[*place]).sum::<usize>() <= 100);
        }
    }
}
