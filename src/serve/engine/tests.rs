//! The worker with a device made of arithmetic: who runs when, and who is not hurt by whom.

mod continuations;
mod drafts;
mod ends;
mod room;

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
