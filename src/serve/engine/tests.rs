//! The worker with a device made of arithmetic: who runs when, and who is not hurt by whom.

mod drafts;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use tokio::sync::mpsc::UnboundedReceiver;

use super::*;
use crate::{
    adapters::lora::config::AdapterError,
    batch::{images::ImageInput, positions::Positions},
    runtime::generate::backend::{Chunk, Pick, SlotId, StepRow, Stepped},
};

/// Tokens the device knows.
const VOCAB: usize = 997;

/// A token at which the device fails.
const POISON: u32 = 666;

/// What the device did, seen from outside.
#[derive(Default)]
struct Seen {
    slots: HashMap<SlotId, Vec<u32>>,
    prefilled: usize,
    largest_step: usize,
    first_tokens: Vec<u32>,
    /// Rows whose logits went to the host in a step.
    logits_read: usize,
    /// Every call fails from now on.
    dead: bool,
}

/// The next token is a function of all tokens so far, so a mixed-up row shows.
struct Arithmetic {
    seen: Arc<Mutex<Seen>>,
    next: u64,
    delay: Duration,
}

impl Arithmetic {
    /// What was seen; a failure meant by a test leaves the lock poisoned.
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn next_token(tokens: &[u32]) -> u32 {
    let sum = tokens.iter().fold(7u64, |sum, token| {
        (sum * 31 + u64::from(*token)) % 1_000_003
    });
    (sum % 600) as u32
}

fn logits_of(tokens: &[u32]) -> Vec<f32> {
    assert!(!tokens.contains(&POISON), "poison");
    let mut logits = vec![0.0; VOCAB];
    logits[next_token(tokens) as usize] = 1.0;
    logits
}

impl DecodeBackend for Arithmetic {
    type Features = ();

    fn encode_image(&mut self, _adapter: AdapterId, _image: &ImageInput) {}

    fn start(&mut self, _adapter: AdapterId, _capacity: usize) -> SlotId {
        self.next += 1;
        let mut seen = self.seen();
        seen.slots.insert(SlotId(self.next), Vec::new());
        SlotId(self.next)
    }

    fn fork(&mut self, source: SlotId, tokens: usize, _capacity: usize) -> SlotId {
        self.next += 1;
        let mut seen = self.seen();
        let copy = seen.slots[&source][..tokens].to_vec();
        seen.slots.insert(SlotId(self.next), copy);
        SlotId(self.next)
    }

    fn prefill(&mut self, slot: SlotId, chunk: &Chunk<'_, ()>) -> Option<Vec<f32>> {
        let mut seen = self.seen();
        assert!(!seen.dead, "the device is gone");
        seen.prefilled += chunk.input_ids.len();
        let tokens = seen.slots.get_mut(&slot).unwrap();
        if tokens.is_empty() {
            let first = chunk.input_ids[0];
            tokens.extend_from_slice(chunk.input_ids);
            seen.first_tokens.push(first);
        } else {
            tokens.extend_from_slice(chunk.input_ids);
        }
        chunk.wants_logits.then(|| logits_of(&seen.slots[&slot]))
    }

    fn step(&mut self, rows: &[StepRow]) -> Vec<Stepped> {
        std::thread::sleep(self.delay);
        let seen = &mut *self.seen();
        assert!(!seen.dead, "the device is gone");
        seen.largest_step = seen.largest_step.max(rows.len());
        let stepped: Vec<Stepped> = rows
            .iter()
            .enumerate()
            .map(|(place, row)| {
                let mut tokens = seen.slots[&row.slot].clone();
                let before = rows[..place].iter().rev();
                let ahead = before.take_while(|other| other.slot == row.slot).count();
                tokens.extend(rows[place - ahead..=place].iter().map(|row| row.token));
                let logits = logits_of(&tokens);
                match row.pick {
                    Pick::Logits => {
                        seen.logits_read += 1;
                        Stepped::Logits(logits)
                    }
                    Pick::Token(choice) => {
                        let before = tokens.iter().copied().collect();
                        Stepped::Token(Some(choice.token(&logits, &before)))
                    }
                }
            })
            .collect();
        for row in rows {
            let tokens = seen.slots.get_mut(&row.slot).unwrap();
            if tokens.is_empty() {
                seen.first_tokens.push(row.token);
            }
            tokens.push(row.token);
        }
        stepped
    }

    fn truncate(&mut self, slot: SlotId, tokens: usize) {
        let mut seen = self.seen();
        let held = seen.slots.get_mut(&slot).unwrap();
        assert!(tokens <= held.len(), "it holds fewer");
        held.truncate(tokens);
    }

    fn cheap_rows(&self) -> usize {
        16
    }

    fn free(&mut self, slot: SlotId) {
        let mut seen = self.seen();
        seen.slots.remove(&slot);
    }

    fn load_adapter(&mut self, _dir: &Path) -> Result<LoadedAdapter, AdapterError> {
        self.next += 1;
        Ok(LoadedAdapter {
            id: AdapterId(self.next),
            notes: Vec::new(),
        })
    }

    fn unload_adapter(&mut self, _adapter: AdapterId) {}
}

fn limits() -> EngineLimits {
    EngineLimits {
        max_running: 4,
        cache_tokens: 4096,
        max_queue: 100,
        prefill_chunk: 8,
        prefix_cache: true,
        drafts: EngineDrafts::default(),
    }
}

struct Bench {
    engine: Engine,
    thread: JoinHandle<()>,
    seen: Arc<Mutex<Seen>>,
    metrics: Arc<Metrics>,
}

fn tokenizer() -> Tokenizer {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("model/tiny");
    Tokenizer::from_folder(folder).unwrap()
}

fn bench(limits: EngineLimits, delay: Duration) -> Bench {
    let seen = Arc::new(Mutex::new(Seen::default()));
    let device = Arithmetic {
        seen: seen.clone(),
        next: 0,
        delay,
    };
    let metrics = Arc::new(Metrics::default());
    let (engine, thread) = Engine::start(device, tokenizer(), limits, metrics.clone()).unwrap();
    Bench {
        engine,
        thread,
        seen,
        metrics,
    }
}

fn prompt(ids: &[u32]) -> Arc<PreparedPrompt> {
    let mut positions = Positions::default();
    (0..ids.len()).for_each(|at| positions.push([at as i64; 3]));
    Arc::new(PreparedPrompt {
        input_ids: ids.to_vec(),
        positions,
        delta: 0,
        images: Vec::new(),
        keys: ids.iter().map(|id| prompt::token_key(*id)).collect(),
        patch_memory: Mutex::default(),
        memory: None,
        remarks: Vec::new(),
    })
}

fn submission(ids: &[u32], new: usize) -> Submission {
    Submission {
        adapter: AdapterId::BASE,
        prompt: prompt(ids),
        max_new_tokens: new,
        eos_token_ids: Vec::new(),
        sampling: SamplingConfig::default(),
        penalties: Penalties::default(),
        stop: Vec::new(),
        shown: StreamOptions::default(),
        stop_on_repetition: false,
        logprobs: Some(0),
        prompt_logprobs: None,
        constraint: None,
        prediction: Vec::new(),
        continuations: None,
        deadline: Instant::now() + Duration::from_secs(60),
        client: 0,
    }
}

fn submit(bench: &Bench, submission: Submission) -> UnboundedReceiver<Event> {
    let mut place = bench.engine.reserve(submission.client, 1).unwrap();
    bench
        .engine
        .submit(submission, &mut place, Instant::now())
        .unwrap()
}

/// Tokens of an answer and how it ended.
fn wait(mut events: UnboundedReceiver<Event>) -> (Vec<u32>, Result<Done, Failure>) {
    let mut tokens = Vec::new();
    loop {
        match events.blocking_recv() {
            Some(Event::Prompt(_)) => {}
            Some(Event::Token { logprob, .. }) => tokens.extend(logprob.map(|one| one.id)),
            Some(Event::Done(done)) => return (tokens, Ok(done)),
            Some(Event::Failed(failure)) => return (tokens, Err(failure)),
            None => panic!("the worker is gone"),
        }
    }
}

/// The answer by arithmetic alone, without an engine.
fn expected(ids: &[u32], new: usize) -> Vec<u32> {
    let mut tokens = ids.to_vec();
    for _ in 0..new {
        tokens.push(next_token(&tokens));
    }
    tokens.split_off(ids.len())
}

fn wait_idle(bench: &Bench) {
    let started = Instant::now();
    while bench.metrics.running.get() > 0 {
        assert!(started.elapsed() < Duration::from_secs(10), "still running");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn every_answer_is_its_own_whatever_runs_beside_it() {
    let bench = bench(limits(), Duration::from_micros(200));
    let jobs: Vec<Vec<u32>> = (0..40u32)
        .map(|job| (0..3 + job % 23).map(|at| 1 + job * 7 + at).collect())
        .collect();
    let receivers: Vec<_> = jobs
        .iter()
        .enumerate()
        .map(|(job, ids)| submit(&bench, submission(ids, 5 + job % 30)))
        .collect();
    for (job, (ids, receiver)) in jobs.iter().zip(receivers).enumerate() {
        let (tokens, done) = wait(receiver);
        assert_eq!(tokens, expected(ids, 5 + job % 30), "job {job}");
        assert_eq!(done.unwrap().reason, FinishReason::Length);
    }
    assert_eq!(bench.seen.lock().unwrap().largest_step, 4);
}

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
fn logits_are_read_only_where_they_are_asked_for() {
    let bench = bench(limits(), Duration::ZERO);
    let ids = [1, 2, 3];
    let answer = |change: &dyn Fn(&mut Submission)| {
        let mut one = submission(&ids, 6);
        one.logprobs = None;
        change(&mut one);
        let (_, done) = wait(submit(&bench, one));
        assert_eq!(done.unwrap().completion_tokens, 6);
        std::mem::take(&mut bench.seen.lock().unwrap().logits_read)
    };
    assert_eq!(answer(&|_| {}), 0);
    assert_eq!(answer(&|one| one.sampling.temperature = 2.0), 0);
    assert_eq!(answer(&|one| one.sampling.repetition_penalty = 1.5), 0);
    assert_eq!(answer(&|one| one.logprobs = Some(2)), 6);
    assert_eq!(answer(&|one| one.penalties.presence = 1.0), 6);
}

#[test]
fn a_device_draws_what_the_host_would_have_drawn() {
    let bench = bench(limits(), Duration::ZERO);
    let text = |logprobs, penalty| {
        let mut one = submission(&[1, 2, 3], 20);
        one.sampling.temperature = 5.0;
        one.sampling.repetition_penalty = penalty;
        one.sampling.seed = 11;
        one.logprobs = logprobs;
        let mut events = submit(&bench, one);
        let mut text = String::new();
        while let Some(event) = events.blocking_recv() {
            match event {
                Event::Prompt(_) => {}
                Event::Token { text: piece, .. } => text.push_str(&piece),
                Event::Done(done) => return text + &done.text,
                Event::Failed(failure) => panic!("{failure:?}"),
            }
        }
        panic!("the worker is gone")
    };
    for penalty in [1.0, 1.4] {
        let here = text(Some(0), penalty);
        assert!(!here.is_empty());
        assert_eq!(text(None, penalty), here);
    }
}

#[test]
fn one_seed_gives_one_answer_in_any_company() {
    let bench = bench(limits(), Duration::ZERO);
    let drawn = |seed| {
        let mut one = submission(&[1, 2, 3], 12);
        one.sampling.temperature = 5.0;
        one.sampling.seed = seed;
        submit(&bench, one)
    };
    let alone = wait(drawn(7)).0;
    let together: Vec<_> = (5..9).map(drawn).collect();
    let together: Vec<_> = together.into_iter().map(|one| wait(one).0).collect();
    assert_eq!(together[2], alone);
    assert_ne!(together[1], alone);
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
fn log_probabilities_of_a_prompt_are_those_of_each_prefix() {
    let bench = bench(limits(), Duration::ZERO);
    // Once more, when the prompt is in the cache.
    for _ in 0..2 {
        let ids = [5, next_token(&[5]), 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
        let mut wanted = submission(&ids, 2);
        wanted.prompt_logprobs = Some(1);
        let mut events = submit(&bench, wanted);
        let Some(Event::Prompt(found)) = events.blocking_recv() else {
            panic!("no log probabilities of the prompt");
        };
        assert_eq!(found.len(), ids.len() - 1);
        for (at, one) in found.iter().enumerate() {
            assert_eq!(one.id, ids[at + 1]);
            assert_eq!(one.top[0].0, next_token(&ids[..=at]));
            let likeliest = one.id == one.top[0].0;
            assert_eq!(one.rank == 1, likeliest, "{at}: {one:?}");
        }
        assert_eq!(wait(events).0, expected(&ids, 2));
    }
}

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
