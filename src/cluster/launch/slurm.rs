//! How SLURM writes lists.

use super::{LaunchError, wrong};

/// The first host of a list such as `node[03-07,9],login`.
pub(super) fn first_host(list: &str) -> Result<String, LaunchError> {
    let list = list.trim();
    let refuse = || wrong(format!("cannot read SLURM's list of nodes `{list}`"));
    // Up to the first comma outside brackets.
    let mut depth = 0usize;
    let mut end = list.len();
    for (at, c) in list.char_indices() {
        match c {
            '[' => depth += 1,
            ']' => depth = depth.checked_sub(1).ok_or_else(refuse)?,
            ',' if depth == 0 => {
                end = at;
                break;
            }
            _ => {}
        }
    }
    if depth != 0 {
        return Err(refuse());
    }
    let mut rest = &list[..end];
    let mut host = String::new();
    while let Some((before, after)) = rest.split_once('[') {
        let (numbers, after) = after.split_once(']').ok_or_else(refuse)?;
        host.push_str(before);
        host.push_str(numbers.split([',', '-']).next().unwrap_or_default());
        rest = after;
    }
    host.push_str(rest);
    if host.is_empty() {
        return Err(refuse());
    }
    Ok(host)
}

/// Tasks of the node with this number, from a list such as `2(x3),1`.
pub(super) fn tasks_of(list: &str, node: usize) -> Result<Option<usize>, LaunchError> {
    let refuse = || wrong(format!("cannot read SLURM's tasks of each node `{list}`"));
    let mut left = node;
    for piece in list.split(',') {
        let (tasks, times) = match piece.split_once("(x") {
            Some((tasks, times)) => (tasks, times.strip_suffix(')').ok_or_else(refuse)?),
            None => (piece, "1"),
        };
        let tasks: usize = tasks.trim().parse().map_err(|_| refuse())?;
        let times: usize = times.trim().parse().map_err(|_| refuse())?;
        if left < times {
            return Ok(Some(tasks));
        }
        left -= times;
    }
    Ok(None)
}

/// A port that jobs of one machine do not share: 15000 and the last four digits of the job's number, as
/// PyTorch Lightning has it.
pub(super) fn port(job: Option<&str>) -> u16 {
    let digits: String = job
        .unwrap_or_default()
        .chars()
        .filter(char::is_ascii_digit)
        .collect();
    let last = &digits[digits.len().saturating_sub(4)..];
    15000 + last.parse::<u16>().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_slurm_writes_them() {
        for (list, first) in [
            ("gpu01", "gpu01"),
            ("gpu01,gpu02", "gpu01"),
            ("gpu[01-03,7],login", "gpu01"),
            ("rack[2-3]n[05,07]", "rack2n05"),
            ("a[7]", "a7"),
        ] {
            assert_eq!(first_host(list).unwrap(), first);
        }
        for list in ["", "gpu[01", "gpu01]", ","] {
            assert!(first_host(list).is_err(), "{list}");
        }
        let of = |node| tasks_of("2(x3),1", node).unwrap();
        assert_eq!(
            [of(0), of(2), of(3), of(4)],
            [Some(2), Some(2), Some(1), None]
        );
        assert!(tasks_of("2(y3)", 0).is_err());
        assert_eq!(
            [port(Some("1234567")), port(Some("89")), port(None)],
            [19567, 15089, 15000]
        );
    }
}
