//! Continuations of a prompt beside answers.

use super::*;

/// Tokens with what is put after them, for a prompt.
fn asked(tokens: &[Vec<u32>], after: &[u32], ends: &[usize]) -> Continuations {
    let places = Places {
        tokens: after.to_vec(),
        ends: ends.to_vec(),
    };
    Continuations {
        tokens: Arc::new(tokens.to_vec()),
        places: Box::new(move |_| Ok(places)),
    }
}

/// Log-probabilities by arithmetic alone.
fn expected_continuations(
    ids: &[u32],
    tokens: &[Vec<u32>],
    after: &[u32],
    ends: &[usize],
) -> Vec<Vec<Vec<f32>>> {
    let log_sum = (f64::from(VOCAB as u32 - 1) + 1f64.exp()).ln();
    let of = |end: &usize| -> Vec<Vec<f32>> {
        let before = [ids, &after[..*end]].concat();
        let one = |continuation: &Vec<u32>| {
            let mut all = before.clone();
            let mut found = Vec::new();
            for token in continuation {
                let logit = f64::from(u8::from(next_token(&all) == *token));
                found.push((logit - log_sum) as f32);
                all.push(*token);
            }
            found
        };
        tokens.iter().map(one).collect()
    };
    ends.iter().map(of).collect()
}

fn assert_near(found: &[Vec<Vec<f32>>], expected: &[Vec<Vec<f32>>]) {
    let flat =
        |all: &[Vec<Vec<f32>>]| -> Vec<f32> { all.iter().flatten().flatten().copied().collect() };
    let shape = |all: &[Vec<Vec<f32>>]| -> Vec<Vec<usize>> {
        let place = |place: &Vec<Vec<f32>>| place.iter().map(Vec::len).collect();
        all.iter().map(place).collect()
    };
    assert_eq!(shape(found), shape(expected));
    for (found, expected) in flat(found).iter().zip(flat(expected)) {
        assert!((found - expected).abs() < 1e-5, "{found} {expected}");
    }
}

/// Continuations of several lengths, among them some that the device finds likely.
fn some_continuations(ids: &[u32], after: &[u32]) -> Vec<Vec<u32>> {
    let mut all: Vec<Vec<u32>> = (0..9u32)
        .map(|at| (0..1 + at % 5).map(|token| 30 + 7 * at + token).collect())
        .collect();
    all.push(expected(ids, 4));
    all.push(expected(&[ids, after].concat(), 3));
    all
}

#[test]
fn continuations_share_the_prompt_of_the_answer_which_goes_through_once() {
    for prefix_cache in [true, false] {
        let bench = bench(
            EngineLimits {
                prefix_cache,
                ..limits()
            },
            Duration::ZERO,
        );
        let ids: Vec<u32> = (1..=60).collect();
        let (after, ends) = ([300, 301, 302, 303, 304], [0, 2, 2, 5]);
        let tokens = some_continuations(&ids, &after);
        let mut one = submission(&ids, 6);
        one.continuations = Some(asked(&tokens, &after, &ends));
        let (answer, done) = wait(submit(&bench, one));
        assert_eq!(answer, expected(&ids, 6));
        let done = done.unwrap();
        assert_eq!(
            (done.completion_tokens, done.reason),
            (6, FinishReason::Length)
        );
        let expected = expected_continuations(&ids, &tokens, &after, &ends);
        assert_near(&done.continuations.unwrap(), &expected);
        wait_idle(&bench);
        let seen = bench.seen.lock().unwrap();
        // The prompt but for its last token, and of the tokens before a place all but its last.
        assert_eq!(seen.prefilled, 59 + 1 + 2);
        assert_eq!(seen.slots.len(), usize::from(prefix_cache));
        assert!(bench.metrics.scored_tokens.get() > 0);
        assert_eq!(bench.metrics.cache_running_tokens.get(), 0);
    }
}

#[test]
fn continuations_of_many_neither_change_nor_starve_each_others_answers() {
    // Room for three prompts, or one with two rows.
    let bench = bench(
        EngineLimits {
            cache_tokens: 3 * 256,
            ..limits()
        },
        Duration::from_micros(50),
    );
    let jobs: Vec<Vec<u32>> = (0..12u32)
        .map(|job| (0..20 + job).map(|at| 1 + job * 11 + at).collect())
        .collect();
    let (after, ends) = ([300, 301], [0, 2]);
    let receivers: Vec<_> = jobs
        .iter()
        .enumerate()
        .map(|(job, ids)| {
            let mut one = submission(ids, 10 + job);
            one.client = job as u64 % 3;
            if job % 4 != 3 {
                let tokens = some_continuations(ids, &after);
                one.continuations = Some(asked(&tokens, &after, &ends));
            }
            submit(&bench, one)
        })
        .collect();
    for (job, (ids, receiver)) in jobs.iter().zip(receivers).enumerate() {
        let (tokens, done) = wait(receiver);
        assert_eq!(tokens, expected(ids, 10 + job), "job {job}");
        let found = done.unwrap().continuations;
        assert_eq!(found.is_some(), job % 4 != 3);
        if let Some(found) = found {
            let tokens = some_continuations(ids, &after);
            assert_near(&found, &expected_continuations(ids, &tokens, &after, &ends));
        }
    }
    wait_idle(&bench);
    assert_eq!(bench.metrics.cache_running_tokens.get(), 0);
    assert_eq!(bench.metrics.failed.get(), 0);
    let kept = bench.metrics.cache_kept_sequences.get() as usize;
    assert_eq!(bench.seen.lock().unwrap().slots.len(), kept);
}

/// Continuations take a turn beside each step of the batch; they do not hold it up.
#[test]
fn an_answer_goes_on_beside_the_continuations_of_another() {
    let bench = bench(limits(), Duration::from_millis(1));
    let ids: Vec<u32> = (1..=30).collect();
    let tokens: Vec<Vec<u32>> = (0..200)
        .map(|at| vec![at, at + 1, at + 2, at + 3])
        .collect();
    let mut slow = submission(&ids, 1);
    slow.continuations = Some(asked(&tokens, &[], &[0]));
    let mut slow = submit(&bench, slow);
    assert!(matches!(slow.blocking_recv(), Some(Event::Token { .. })));
    let mut other = submission(&[5, 6, 7], 30);
    other.client = 1;
    // Four rows at once: the continuations take 150 steps, the answer 30.
    assert_eq!(wait(submit(&bench, other)).0, expected(&[5, 6, 7], 30));
    assert!(slow.try_recv().is_err(), "the continuations came first");
    assert!(wait(slow).1.unwrap().continuations.is_some());
}

#[test]
fn continuations_that_fail_or_that_nobody_waits_for_leave_nothing_behind() {
    let bench = bench(
        EngineLimits {
            prefix_cache: false,
            ..limits()
        },
        Duration::from_millis(1),
    );
    let ids: Vec<u32> = (1..=30).collect();
    let mut poisoned = submission(&ids, 3);
    poisoned.continuations = Some(asked(&[vec![3, 4], vec![POISON, 5]], &[], &[0]));
    let poisoned = submit(&bench, poisoned);
    let good = submit(&bench, submission(&[8, 9], 40));
    assert_eq!(wait(poisoned).1, Err(Failure::Internal));
    let many: Vec<Vec<u32>> = (0..300).map(|at| vec![at, 1, 2, 3, 4, 5]).collect();
    let mut left = submission(&ids, 2);
    left.continuations = Some(asked(&many, &[], &[0]));
    let mut left = submit(&bench, left);
    for _ in 0..2 {
        assert!(matches!(left.blocking_recv(), Some(Event::Token { .. })));
    }
    std::thread::sleep(Duration::from_millis(5));
    drop(left);
    assert_eq!(wait(good).0, expected(&[8, 9], 40));
    wait_idle(&bench);
    // The poison left the lock poisoned.
    let seen = bench.seen.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(seen.slots.is_empty());
    assert_eq!(bench.metrics.cancelled.get(), 1);
}
