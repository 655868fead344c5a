//! How requests and the engine end: cancelled, refused, late, failed, drained.

use super::*;

#[test]
fn a_panic_ends_its_own_request_alone() {
    let bench = bench(limits(), Duration::from_micros(500));
    let good: Vec<u32> = (1..20).collect();
    let first = submit(&bench, submission(&good, 60));
    let second = submit(&bench, submission(&[5, 6, 7], 60));
    // One fails in its prompt, one in a step of the batch.
    let in_prompt = submit(&bench, submission(&[1, POISON], 10));
    let mut biased = submission(&[9, 9, 9], 10);
    biased.penalties.bias = vec![(POISON, 100.0)];
    let in_step = submit(&bench, biased);
    assert_eq!(wait(in_prompt).1, Err(Failure::Internal));
    let (tokens, end) = wait(in_step);
    assert_eq!(
        (tokens.as_slice(), end),
        (&[POISON][..], Err(Failure::Internal))
    );
    assert_eq!(wait(first).0, expected(&good, 60));
    assert_eq!(wait(second).0, expected(&[5, 6, 7], 60));
    assert_eq!(
        wait(submit(&bench, submission(&good, 5))).0,
        expected(&good, 5)
    );
}

#[test]
fn a_cancelled_request_frees_its_place_and_slot() {
    let bench = bench(
        EngineLimits {
            max_running: 2,
            ..limits()
        },
        Duration::from_millis(1),
    );
    let mut running: Vec<_> = (0..2)
        .map(|job| submit(&bench, submission(&[job, 50], 500)))
        .collect();
    let waiting: Vec<_> = (0..5)
        .map(|job| submit(&bench, submission(&[job, 60], 500)))
        .collect();
    let last = submit(&bench, submission(&[3, 70], 3));
    for receiver in &mut running {
        assert!(matches!(
            receiver.blocking_recv(),
            Some(Event::Token { .. })
        ));
    }
    drop(running);
    drop(waiting);
    let started = Instant::now();
    assert_eq!(wait(last).0, expected(&[3, 70], 3));
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "cancelled requests went on"
    );
    wait_idle(&bench);
    // The finished one is kept for its beginning; the cancelled ones are gone.
    assert_eq!(bench.seen.lock().unwrap().slots.len(), 1);
    assert_eq!(bench.metrics.cache_running_tokens.get(), 0);
    assert_eq!(bench.engine.reserve(0, 88).unwrap().count, 88);
}

#[test]
fn a_full_queue_refuses_and_recovers() {
    let bench = bench(
        EngineLimits {
            max_running: 1,
            max_queue: 3,
            ..limits()
        },
        Duration::from_millis(1),
    );
    let mut first = submit(&bench, submission(&[1], 400));
    assert!(matches!(first.blocking_recv(), Some(Event::Token { .. })));
    let waiting: Vec<_> = (0..3)
        .map(|job| submit(&bench, submission(&[2, job], 2)))
        .collect();
    assert_eq!(bench.engine.reserve(0, 1).unwrap_err(), Refusal::Busy(3));
    drop(first);
    for receiver in waiting {
        assert!(wait(receiver).1.is_ok());
    }
    assert!(bench.engine.reserve(0, 3).is_ok());
    assert_eq!(bench.engine.reserve(0, 4).unwrap_err(), Refusal::Busy(0));
}

#[test]
fn a_deadline_ends_running_and_waiting_requests() {
    let bench = bench(
        EngineLimits {
            max_running: 1,
            ..limits()
        },
        Duration::from_millis(2),
    );
    let mut running = submission(&[1], 2000);
    running.deadline = Instant::now() + Duration::from_millis(60);
    let mut waiting = submission(&[2], 5);
    waiting.deadline = Instant::now() + Duration::from_millis(30);
    let (running, waiting) = (submit(&bench, running), submit(&bench, waiting));
    assert_eq!(wait(waiting).1, Err(Failure::Deadline));
    let (tokens, end) = wait(running);
    assert_eq!(end, Err(Failure::Deadline));
    assert!(!tokens.is_empty());
    assert!(wait(submit(&bench, submission(&[3], 5))).1.is_ok());
}

#[test]
fn draining_finishes_what_there_is() {
    let bench = bench(limits(), Duration::from_millis(1));
    let receivers: Vec<_> = (0..6u32)
        .map(|job| submit(&bench, submission(&[job], 20)))
        .collect();
    bench.engine.drain();
    assert_eq!(bench.engine.reserve(0, 1).unwrap_err(), Refusal::Stopping);
    for (job, receiver) in receivers.into_iter().enumerate() {
        assert_eq!(wait(receiver).0, expected(&[job as u32], 20));
    }
    bench.thread.join().unwrap();
}

#[test]
fn aborting_tells_everybody() {
    let bench = bench(limits(), Duration::from_millis(1));
    let receivers: Vec<_> = (0..6u32)
        .map(|job| submit(&bench, submission(&[job], 1000)))
        .collect();
    bench.engine.abort();
    for receiver in receivers {
        assert_eq!(wait(receiver).1, Err(Failure::Stopping));
    }
    bench.thread.join().unwrap();
}

#[test]
fn an_adapter_is_dropped_when_its_last_answer_is_over() {
    let bench = bench(limits(), Duration::from_millis(1));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let adapter = runtime
        .block_on(bench.engine.load_adapter("x".into()))
        .unwrap()
        .id;
    let ids: Vec<u32> = (1..30).collect();
    let of_adapter = |new| {
        let mut one = submission(&ids, new);
        one.adapter = adapter;
        submit(&bench, one)
    };
    assert!(wait(of_adapter(3)).1.is_ok());
    let running = of_adapter(50);
    runtime.block_on(bench.engine.unload_adapter(adapter));
    // The answer was there before the adapter went.
    assert_eq!(wait(running).0, expected(&ids, 50));
    wait_idle(&bench);
    assert!(bench.seen.lock().unwrap().slots.is_empty());
    // What the adapter computed is not taken over by the base.
    let (_, done) = wait(submit(&bench, submission(&ids, 3)));
    assert_eq!(done.unwrap().cached_tokens, 0);
    // A request that was being prepared meanwhile ends alone, and what is kept stays.
    assert_eq!(wait(of_adapter(3)).1, Err(Failure::Unloaded));
    let (_, done) = wait(submit(&bench, submission(&ids, 3)));
    assert!(done.unwrap().cached_tokens > 0);
}

#[test]
fn a_device_that_fails_three_times_in_a_row_ends_the_engine() {
    let bench = bench(limits(), Duration::ZERO);
    assert!(wait(submit(&bench, submission(&[1, 2], 5))).1.is_ok());
    bench.seen.lock().unwrap().dead = true;
    for job in 0..3 {
        let failed = wait(submit(&bench, submission(&[job, 2], 5)));
        assert_eq!(failed.1, Err(Failure::Internal));
    }
    bench.thread.join().unwrap();
    assert_eq!(bench.engine.end(), Some(End::DeviceLost));
    assert!(bench.engine.is_stopping());
    assert_eq!(bench.engine.reserve(0, 1).unwrap_err(), Refusal::Stopping);
}

#[test]
fn requests_that_fail_by_themselves_do_not_end_the_engine() {
    let bench = bench(limits(), Duration::ZERO);
    for job in 0..10 {
        let failed = wait(submit(&bench, submission(&[job, POISON, 2], 5)));
        assert_eq!(failed.1, Err(Failure::Internal));
    }
    assert_eq!(
        wait(submit(&bench, submission(&[1, 2], 5))).0,
        expected(&[1, 2], 5)
    );
    assert_eq!(bench.engine.end(), None);
}
