//! Panics of drivers as one sentence.

use std::{panic, sync::Mutex};

use super::out_of_memory;

static PANIC_HOOK: Mutex<()> = Mutex::new(());

/// Runs `work` and gives a panic's first line in place of printing it.
pub fn quietly<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    let _guard = PANIC_HOOK.lock().unwrap_or_else(|lock| lock.into_inner());
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|info| {
        out_of_memory::note(&panic_text(info.payload()));
    }));
    let result = panic::catch_unwind(panic::AssertUnwindSafe(work));
    panic::set_hook(hook);
    result.map_err(|payload| panic_text(payload.as_ref()))
}

/// The first line of what a panic said.
pub fn panic_text(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("no reason given");
    let line = text.lines().next().unwrap_or_default().trim();
    missing_library(line).unwrap_or_else(|| line.to_string())
}

/// Whether a panic says that nobody reads the program's output any more, as after `| head`: std's `println!` knows no
/// other way to say so.
pub fn is_closed_output(text: &str) -> bool {
    let closed = ["(os error 32)", "(os error 232)"];
    text.starts_with("failed printing to stdout") && closed.iter().any(|code| text.contains(code))
}

/// A sentence in place of the list of file names that cudarc tried.
fn missing_library(text: &str) -> Option<String> {
    let (_, rest) = text.split_once("Unable to dynamically load the \"")?;
    let (name, _) = rest.split_once('"')?;
    Some(match name {
        "cuda" | "nvcuda" => "no NVIDIA driver was found (its library is `libcuda.so`)".to_string(),
        name => format!(
            "the library `lib{name}.so` was not found; install the CUDA toolkit, or name its folder in LD_LIBRARY_PATH"
        ),
    })
}

/// What a device's failure means, where its driver's thread keeps the reason to itself: a request for
/// memory that is refused there shows as an answer that never comes.
pub fn device_reason(reason: &str) -> String {
    if reason.contains("CallError") || reason.contains("Resource to exist") {
        format!(
            "the device did not do its work, most likely because it is out of memory ({reason})"
        )
    } else {
        reason.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_one_sentence() {
        let text = |name: &str| {
            let choices = vec!["cuda"; 40];
            let panic = format!(
                "Unable to dynamically load the \"{name}\" shared library - searched for library names: {choices:?}."
            );
            panic_text(&panic)
        };
        assert_eq!(
            text("cuda"),
            "no NVIDIA driver was found (its library is `libcuda.so`)"
        );
        assert!(text("nvrtc").starts_with("the library `libnvrtc.so` was not found; "));
    }
}
