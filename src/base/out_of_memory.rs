//! A device or host that ran out of memory, and the message that says what to lower.
//!
//! CubeCL reports a failed allocation in two ways: its server's thread panics where a buffer cannot be
//! had (`BufferTooBig`), and the thread that waits for the result then only learns that something is
//! missing; or an error is kept and comes up at the next read. So panics of all threads are read,
//! and what ends a command is put beside what was seen.

use std::sync::{Mutex, MutexGuard};

static SEEN: Mutex<Option<Failure>> = Mutex::new(None);

/// An allocation that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    /// Bytes of the failed allocation, where the message names them.
    pub bytes: Option<u64>,
}

fn seen() -> MutexGuard<'static, Option<Failure>> {
    SEEN.lock().unwrap_or_else(|lock| lock.into_inner())
}

/// Notes what a panic said where that is a failed allocation; to be called by the program's panic hook.
pub fn note(text: &str) {
    if let Some(failure) = Failure::read(text) {
        // The first one is the cause, others follow from it.
        seen().get_or_insert(failure);
    }
}

impl Failure {
    /// Reads a message of CubeCL, a driver or an allocator; `None` where it is about something else.
    pub fn read(message: &str) -> Option<Self> {
        const SIGNS: [&str; 6] = [
            "buffertoobig",
            "can't allocate buffer",
            "out of memory",
            "outofmemory",
            "out_of_memory",
            "memory allocation of",
        ];
        let lower = message.to_lowercase();
        SIGNS.iter().any(|sign| lower.contains(sign)).then(|| {
            let number = ["size: ", "memory allocation of "]
                .iter()
                .find_map(|before| {
                    let (_, after) = lower.split_once(before)?;
                    let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
                    digits.parse().ok()
                });
            Self { bytes: number }
        })
    }

    /// What happened and what to lower in this command.
    pub fn sentence(&self, advice: &str) -> String {
        let request = match self.bytes {
            Some(bytes) => format!(
                " (a buffer of {:.2} GiB could not be had)",
                bytes as f64 / (1u64 << 30) as f64
            ),
            None => String::new(),
        };
        format!("the device ran out of memory{request}; {advice}")
    }
}

/// The sentence for a command that ended with `message`, where memory was the cause; after the name
/// of the device, where the message begins with one of several.
pub fn explain(message: &str, advice: &str) -> Option<String> {
    let failure = Failure::read(message).or(*seen())?;
    let sentence = failure.sentence(advice);
    let device = message
        .split_once(": ")
        .map(|(place, _)| place)
        .filter(|place| place.contains("(rank ") || place.starts_with("worker "));
    Some(match device {
        Some(device) => format!("{device}: {sentence}"),
        None => sentence,
    })
}

/// What helps in training.
pub const TRAIN: &str = "let `--memory-budget auto` choose the form of the step, or lower packing_tokens or per_device_train_batch_size (with more gradient_accumulation_steps), max_pixels or max_length, or set gradient_checkpointing = true";
/// What helps in `bench train`.
pub const BENCH_TRAIN: &str = "let `--memory-budget` choose, lower --batch, or drop --no-recompute";
/// What helps where reports are written.
pub const INFER: &str =
    "lower --batch-size, --max-pixels or --max-new-tokens, or use --dtype bf16 or --quantize int8";
/// What helps in `eval`.
pub const EVAL: &str = "lower --batch-size or --max-pixels, or use --dtype bf16 or --quantize int8";
/// What helps in `serve`.
pub const SERVE: &str = "lower the number of requests at once, --max-pixels or --max-new-tokens-limit, or use --dtype bf16 or --quantize int8";
/// What helps elsewhere.
pub const OTHER: &str = "use a smaller model, --dtype bf16, or a device with more memory";

#[cfg(test)]
mod tests {
    use super::*;

    /// What the server's thread says in cubecl 0.10: `Result::unwrap` on its error.
    fn server_panic(bytes: u64) -> String {
        format!(
            "called `Result::unwrap()` on an `Err` value: BufferTooBig {{ size: {bytes}, backtrace: <disabled> }}"
        )
    }

    #[test]
    fn messages_of_failed_allocations_are_known_and_others_are_not() {
        let size = |text: &str| Failure::read(text).map(|failure| failure.bytes);
        assert_eq!(size(&server_panic(3 << 30)), Some(Some(3 << 30)));
        let error = "An IO error happened\nCaused by:\n  can't allocate buffer of size: 42\n";
        assert_eq!(size(error), Some(Some(42)));
        assert_eq!(size("CUDA_ERROR_OUT_OF_MEMORY"), Some(None));
        assert_eq!(size("memory allocation of 99 bytes failed"), Some(Some(99)));
        assert_eq!(size("the kernel's shapes disagree"), None);
    }

    /// The server's thread panics, the waiting thread learns of something else: the sentence names both
    /// the memory and what to lower.
    #[test]
    fn a_panic_of_another_thread_explains_the_command() {
        let server = || std::thread::spawn(|| panic!("{}", server_panic(5 << 30))).join();
        assert!(crate::base::panics::quietly(server).unwrap().is_err());
        let text = explain("couldn't find resource for that handle", TRAIN).unwrap();
        for word in [
            "5.00 GiB",
            "packing_tokens",
            "gradient_checkpointing",
            "max_pixels",
            "--memory-budget",
        ] {
            assert!(text.contains(word), "{text}");
        }
        let failed = "device `cuda:1` (rank 1) failed while taking the step";
        let text = explain(&format!("{failed}: CallError"), TRAIN).unwrap();
        assert!(
            text.starts_with(&format!("{failed}: the device ran out")),
            "{text}"
        );
        seen().take();
        assert_eq!(explain("no such file", TRAIN), None);
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn cubecl_still_words_it_so() {
        use cubecl::server::IoError;
        let error = IoError::BufferTooBig {
            size: 77,
            backtrace: cubecl_common::backtrace::BackTrace::capture(),
        };
        for text in [format!("{error}"), format!("{error:?}")] {
            assert_eq!(
                Failure::read(&text),
                Some(Failure { bytes: Some(77) }),
                "{text}"
            );
        }
    }
}
