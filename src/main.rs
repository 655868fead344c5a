//! The program: arguments, one command, one exit code.
#![recursion_limit = "512"]

use std::{panic, process::ExitCode, sync::Mutex};

use clap::{CommandFactory, Parser};
use xray_qwen3vl::{
    base::{
        out_of_memory,
        panics::{is_closed_output, panic_text},
    },
    cli::{Cli, Command},
    commands::{
        bench, calibrate, check, clean, completions, config, convert, doctor, drafts, eval,
        exit_code, export, infer, init_tiny, label, log_lines, merge, phantoms, plan, prefer,
        preview, pull, quantize, score, serve, store, train, version,
    },
};

/// What helps a command whose device is too small.
fn what_to_lower(command: &Command) -> &'static str {
    match command {
        Command::Train(_) => out_of_memory::TRAIN,
        Command::Infer(_) => out_of_memory::INFER,
        Command::Eval(_) => out_of_memory::EVAL,
        Command::Serve(_) => out_of_memory::SERVE,
        Command::Bench(bench::BenchCommand {
            model: Some(args), ..
        }) if args.kind == bench::BenchKind::Train => out_of_memory::BENCH_TRAIN,
        _ => out_of_memory::OTHER,
    }
}

fn main() -> ExitCode {
    xray_qwen3vl::base::system::keep_large_buffers();
    let typed: Vec<String> = std::env::args_os()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let cli = Cli::try_parse().unwrap_or_else(|error| {
        if let Some(hint) = train::flag_hint(&error, &typed) {
            eprintln!("error: {hint}");
            std::process::exit(2);
        }
        error.exit()
    });
    // A panic is a defect of ours or of a driver; the user gets one sentence, not a backtrace.
    static PLACE: Mutex<String> = Mutex::new(String::new());
    let full = std::env::var_os("RUST_BACKTRACE").map(|_| panic::take_hook());
    panic::set_hook(Box::new(move |info| {
        let text = panic_text(info.payload());
        out_of_memory::note(&text);
        if is_closed_output(&text) {
            return;
        }
        if let Some(full) = &full {
            full(info);
        } else if let (Ok(mut place), Some(location)) = (PLACE.lock(), info.location()) {
            *place = format!("{}:{}", location.file(), location.line());
        }
    }));
    let advice = what_to_lower(&cli.command);
    // Burn's training log is a file of the run's own.
    if !matches!(cli.command, Command::Train(_)) {
        log_lines::init(log::LevelFilter::Warn);
    }
    let result = panic::catch_unwind(|| match cli.command {
        Command::Infer(args) => infer::run(*args),
        Command::Train(args) => train::run(args),
        Command::Pull(args) => pull::run(args),
        Command::Store(command) => store::run(&command),
        Command::Export(args) => export::run(&args),
        Command::Merge(args) => merge::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Plan(args) => plan::run(&args),
        Command::Eval(args) => eval::run(*args),
        Command::Calibrate(args) => calibrate::run(args),
        Command::Label(args) => label::run(&args),
        Command::Prefer(args) => prefer::run(args),
        Command::Score(args) => score::run(args),
        Command::Clean(args) => clean::run(&args),
        Command::Convert(args) => convert::run(args),
        Command::Check(args) => check::run(args),
        Command::Preview(args) => preview::run(&args),
        Command::Phantoms(args) => phantoms::run(&args),
        Command::InitTiny(args) => init_tiny::run(&args),
        Command::Serve(args) => serve::run(*args),
        Command::Doctor(args) => doctor::run(args),
        Command::Drafts(args) => drafts::run(args),
        Command::Bench(command) => bench::run(command),
        Command::Config(args) => config::run(args),
        Command::Completions(args) => completions::run(&args, Cli::command()),
        Command::Man(args) => completions::run_man(&args, Cli::command()),
        Command::Version(args) => version::run(&args),
    });
    match result {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            let message = format!("{error:#}");
            let message = out_of_memory::explain(&message, advice).unwrap_or(message);
            eprintln!("error: {message}");
            ExitCode::from(exit_code(&error))
        }
        Err(payload) => {
            let reason = panic_text(payload.as_ref());
            if is_closed_output(&reason) {
                return ExitCode::SUCCESS;
            }
            if let Some(message) = out_of_memory::explain(&reason, advice) {
                eprintln!("error: {message}");
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
