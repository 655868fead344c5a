//! Places in the batch and room in the cache: who shares, who waits, who makes way.

use super::*;

#[test]
fn one_client_with_many_requests_does_not_keep_another_waiting() {
    let bench = bench(
        EngineLimits {
            max_running: 2,
            ..limits()
        },
        Duration::from_millis(1),
    );
    let many: Vec<_> = (0..20u32)
        .map(|job| {
            let mut one = submission(&[100 + job], 20);
            one.client = 1;
            submit(&bench, one)
        })
        .collect();
    let mut single = submission(&[500], 20);
    single.client = 2;
    let single = submit(&bench, single);
    assert!(wait(single).1.is_ok());
    for receiver in many {
        assert!(wait(receiver).1.is_ok());
    }
    let order = bench.seen.lock().unwrap().first_tokens.clone();
    let place = order.iter().position(|token| *token == 500).unwrap();
    assert!(place <= 4, "started as number {place}: {order:?}");
}

#[test]
fn a_prompt_that_begins_alike_is_not_computed_again() {
    let bench = bench(limits(), Duration::ZERO);
    let image: Vec<u32> = (1..=100).collect();
    let first = [image.clone(), vec![200, 201]].concat();
    let second = [image.clone(), vec![300, 301, 302]].concat();
    let (tokens, _) = wait(submit(&bench, submission(&first, 4)));
    assert_eq!(tokens, expected(&first, 4));
    let before = bench.seen.lock().unwrap().prefilled;
    // The last token goes with the step of the batch.
    assert_eq!(before, 101);
    let (tokens, done) = wait(submit(&bench, submission(&second, 4)));
    assert_eq!(tokens, expected(&second, 4));
    assert_eq!(done.unwrap().cached_tokens, 100);
    assert_eq!(bench.seen.lock().unwrap().prefilled - before, 2);
    // The same question again: all but the last token.
    let (tokens, done) = wait(submit(&bench, submission(&second, 4)));
    assert_eq!(tokens, expected(&second, 4));
    assert_eq!(done.unwrap().cached_tokens, 102);
    // A conversation that goes on, its first answer included.
    let next = [second.clone(), expected(&second, 4), vec![400]].concat();
    let (tokens, done) = wait(submit(&bench, submission(&next, 4)));
    assert_eq!(tokens, expected(&next, 4));
    assert_eq!(done.unwrap().cached_tokens, second.len() + 3);
}

#[test]
fn several_answers_to_one_question_share_its_prompt() {
    let bench = bench(limits(), Duration::from_millis(1));
    let ids: Vec<u32> = (1..=60).collect();
    let receivers: Vec<_> = (0..3)
        .map(|_| submit(&bench, submission(&ids, 6)))
        .collect();
    for receiver in receivers {
        assert_eq!(wait(receiver).0, expected(&ids, 6));
    }
    // Each begins with the prompt's last token, in a step of the batch.
    assert_eq!(bench.seen.lock().unwrap().prefilled, 59);
}

#[test]
fn the_cache_stays_within_its_budget() {
    let bench = bench(
        EngineLimits {
            cache_tokens: 1024,
            max_running: 8,
            ..limits()
        },
        Duration::ZERO,
    );
    let receivers: Vec<_> = (0..30u32)
        .map(|job| {
            let ids: Vec<u32> = (0..20).map(|at| 1 + (job * 20 + at) % 600).collect();
            submit(&bench, submission(&ids, 10))
        })
        .collect();
    for receiver in receivers {
        assert!(wait(receiver).1.is_ok());
        let metrics = &bench.metrics;
        assert!(metrics.cache_running_tokens.get() + metrics.cache_kept_tokens.get() <= 1024);
    }
    wait_idle(&bench);
    // Blocks of 256: four sequences at most.
    assert!(bench.seen.lock().unwrap().slots.len() <= 4);
    assert!(bench.seen.lock().unwrap().largest_step <= 4);
}

#[test]
fn whatever_the_limits_let_in_fits_an_empty_cache() {
    let limits = EngineLimits {
        cache_tokens: 1000,
        ..limits()
    };
    let bench = bench(limits, Duration::ZERO);
    let room = bench.engine.limits().cache_tokens;
    assert_eq!(room, 768, "whole blocks of 256");
    let ids: Vec<u32> = (1..=20).collect();
    let mut largest = submission(&ids, room - ids.len());
    largest.deadline = Instant::now() + Duration::from_secs(20);
    assert!(wait(submit(&bench, largest)).1.is_ok());
}

#[test]
fn an_answer_holds_what_it_has_and_not_what_it_might_get() {
    let bench = bench(
        EngineLimits {
            max_running: 8,
            prefill_chunk: 64,
            ..limits()
        },
        Duration::from_millis(1),
    );
    let receivers: Vec<_> = (0..16u32)
        .map(|job| {
            let mut one = submission(&[1 + job, 2, 3], 2000);
            // One token of twenty: such answers end long before their limit.
            one.eos_token_ids = (0..30).collect();
            submit(&bench, one)
        })
        .collect();
    for receiver in receivers {
        assert_eq!(wait(receiver).1.unwrap().reason, FinishReason::Stop);
    }
    // Two of 2,003 tokens each would fill the cache of 4,096.
    let together = bench.seen.lock().unwrap().largest_step;
    assert!(together >= 6, "{together}");
    assert_eq!(bench.metrics.preempted.get(), 0);
}

#[test]
fn when_the_cache_is_full_the_youngest_waits_and_every_answer_is_whole() {
    for prefix_cache in [true, false] {
        let bench = bench(
            EngineLimits {
                cache_tokens: 1024,
                prefix_cache,
                ..limits()
            },
            Duration::ZERO,
        );
        let jobs: Vec<Vec<u32>> = (0..4).map(|job| vec![job, 7, 7]).collect();
        // Three blocks each in the end, of four in all.
        let receivers: Vec<_> = jobs
            .iter()
            .map(|ids| submit(&bench, submission(ids, 600)))
            .collect();
        for (ids, receiver) in jobs.iter().zip(receivers) {
            let (tokens, done) = wait(receiver);
            assert_eq!(tokens, expected(ids, 600));
            assert_eq!(done.unwrap().completion_tokens, 600);
        }
        assert!(bench.metrics.preempted.get() > 0);
        wait_idle(&bench);
        assert!(bench.metrics.cache_kept_tokens.get() <= 1024);
    }
}

#[test]
fn a_client_with_nothing_in_a_full_batch_gets_a_place_at_once() {
    let bench = bench(
        EngineLimits {
            max_running: 2,
            ..limits()
        },
        Duration::from_millis(1),
    );
    let mut many: Vec<_> = (0..10u32)
        .map(|job| {
            let mut one = submission(&[100 + job], 300);
            one.client = 1;
            submit(&bench, one)
        })
        .collect();
    assert!(matches!(many[1].blocking_recv(), Some(Event::Token { .. })));
    let mut single = submission(&[500], 5);
    single.client = 2;
    assert_eq!(
        wait(submit(&bench, single)).0,
        expected(&[500], 5),
        "the other client's answer"
    );
    assert_eq!(bench.metrics.finished.get(), 1, "it came first");
    assert_eq!(bench.metrics.preempted.get(), 1);
    // Who made way goes on where it was.
    let tokens = wait(many.swap_remove(1)).0;
    assert_eq!(tokens, expected(&[101], 300)[1..]);
    for receiver in many {
        assert!(wait(receiver).1.is_ok());
    }
}

#[test]
fn clients_take_turns_where_there_is_one_place() {
    let bench = bench(
        EngineLimits {
            max_running: 1,
            ..limits()
        },
        Duration::from_millis(1),
    );
    let of = |client: u64, token: u32| {
        let mut one = submission(&[token], 10);
        one.client = client;
        submit(&bench, one)
    };
    let many: Vec<_> = (0..20).map(|job| of(1, 100 + job)).collect();
    let few: Vec<_> = (0..2).map(|job| of(2, 500 + job)).collect();
    for receiver in few.into_iter().chain(many) {
        assert!(wait(receiver).1.is_ok());
    }
    let order = bench.seen.lock().unwrap().first_tokens.clone();
    let place = |token| order.iter().position(|found| *found == token).unwrap();
    assert!(place(500) <= 2 && place(501) <= 4, "{order:?}");
}

#[test]
fn patches_are_given_up_once_the_prompt_is_in_the_cache() {
    let bench = bench(limits(), Duration::from_millis(1));
    let counted = Arc::new(());
    let mut one = submission(&(1..40).collect::<Vec<_>>(), 500);
    let prompt = Arc::get_mut(&mut one.prompt).unwrap();
    prompt.patch_memory = Mutex::new(Some(Box::new(counted.clone())));
    prompt.memory = Some(Box::new(counted.clone()));
    let mut events = submit(&bench, one);
    assert_eq!(Arc::strong_count(&counted), 3);
    assert!(matches!(events.blocking_recv(), Some(Event::Token { .. })));
    assert_eq!(Arc::strong_count(&counted), 2, "the patches'");
    drop(events);
    wait_idle(&bench);
    assert_eq!(Arc::strong_count(&counted), 1, "the prompt's");
}

#[test]
fn one_client_does_not_fill_the_queue() {
    let bench = bench(limits(), Duration::ZERO);
    let engine = &bench.engine;
    let many = engine.reserve(1, 88).unwrap();
    assert_eq!(engine.reserve(1, 1).unwrap_err(), Refusal::Busy(88));
    assert_eq!(engine.check_room(1), Err(Refusal::Busy(88)));
    assert_eq!(engine.check_room(2), Ok(()));
    let few = engine.reserve(2, 12).unwrap();
    assert_eq!(engine.reserve(3, 1).unwrap_err(), Refusal::Busy(100));
    drop((many, few));
    assert!(engine.reserve(1, 88).is_ok());
    assert!(engine.queue.by_client().is_empty());
}

#[test]
fn without_a_cache_the_answers_of_one_request_share_its_prompt_and_no_other_request_does() {
    let limits = EngineLimits {
        prefix_cache: false,
        max_running: 1,
        ..limits()
    };
    let bench = bench(limits, Duration::from_millis(20));
    let ids: Vec<u32> = (1..41).collect();
    // One after the other, so that the second finds no sequence that runs.
    let one = submission(&ids, 3);
    let asked = one.prompt.clone();
    let mut events = vec![submit(&bench, one)];
    for _ in 0..2 {
        let mut more = submission(&ids, 3);
        more.prompt = asked.clone();
        events.push(submit(&bench, more));
    }
    let stranger = submit(&bench, submission(&ids, 3));
    for one in events.into_iter().chain([stranger]) {
        assert_eq!(wait(one).0, expected(&ids, 3));
    }
    wait_idle(&bench);
    assert_eq!(bench.metrics.cached_tokens.get(), 2 * 39);
    assert_eq!(bench.metrics.prompt_tokens.get(), 2 * 39);
    assert_eq!(bench.metrics.cache_kept_tokens.get(), 0);
}
