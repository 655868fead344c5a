//! The program: arguments, one command, one exit code.
#![recursion_limit = "512"]

use std::{panic, process::ExitCode, sync::Mutex};

use clap::Parser;
use xray_qwen3vl::{
    backend::panic_text,
    cli::{BenchCommand, BenchServer, Cli, Command},
    commands::{
        UsageError, bench, bench_serve, check, clean, convert, doctor, eval, infer, init_tiny,
        merge, phantoms, plan, quantize, serve, train,
    },
};

fn main() -> ExitCode {
    xray_qwen3vl::system::keep_large_buffers();
    let cli = Cli::parse();
    // A panic is a defect of ours or of a driver; the user gets one sentence, not a backtrace.
    static PLACE: Mutex<String> = Mutex::new(String::new());
    if std::env::var_os("RUST_BACKTRACE").is_none() {
        panic::set_hook(Box::new(|info| {
            if let (Ok(mut place), Some(location)) = (PLACE.lock(), info.location()) {
                *place = format!("{}:{}", location.file(), location.line());
            }
        }));
    }
    let result = panic::catch_unwind(|| match cli.command {
        Command::Infer(args) => infer::run(args),
        Command::Train(args) => train::run(args),
        Command::Merge(args) => merge::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Plan(args) => plan::run(&args),
        Command::Eval(args) => eval::run(*args),
        Command::Clean(args) => clean::run(&args),
        Command::Convert(args) => convert::run(args),
        Command::Check(args) => check::run(args),
        Command::Phantoms(args) => phantoms::run(&args),
        Command::InitTiny(args) => init_tiny::run(&args),
        Command::Serve(args) => serve::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Bench(BenchCommand {
            server: Some(BenchServer::Serve(args)),
            ..
        }) => bench_serve::run(&args),
        Command::Bench(BenchCommand { model, .. }) => match model {
            Some(args) => bench::run(args),
            None => Err(UsageError("bench needs to be told what to measure".into()).into()),
        },
    });
    match result {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            eprintln!("error: {error:#}");
            ExitCode::from(if error.is::<UsageError>() { 2 } else { 1 })
        }
        Err(payload) => {
            let reason = panic_text(payload.as_ref());
            let lower = reason.to_lowercase();
            if lower.contains("out of memory")
                || lower.contains("outofmemory")
                || lower.contains("alloc")
            {
                eprintln!(
                    "error: the device ran out of memory ({reason}); lower --batch-size, --max-pixels or --max-new-tokens, or use --dtype bf16 or --quantize int8"
                );
            } else {
                let place = PLACE.lock().map(|place| place.clone()).unwrap_or_default();
                eprintln!(
                    "error: internal error at {place}: {reason}; run again with RUST_BACKTRACE=1 for more"
                );
            }
            ExitCode::FAILURE
        }
    }
}
