//! The commands that can be typed; the arguments of each are in its own file.

use clap::{Parser, Subcommand};

use crate::commands::{
    bench, check, clean, convert, doctor, eval, infer, init_tiny, merge, phantoms, plan, quantize,
    serve, train,
};

/// Fine-tunes Qwen3-VL on chest X-rays and writes Chinese radiology reports.
///
/// For research. Nothing it writes is a diagnosis.
#[derive(Debug, Parser)]
#[command(name = "xray-qwen3vl", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the program does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write reports about images.
    ///
    /// Without arguments, about the repository's sample image, with the repository's tiny model.
    ///
    /// Each line of --json and --output is an object with these keys: `image` (the name as given; `;`
    /// between several), `image_encoding` (`percent` where the name is not UTF-8: `%` and two digits are a
    /// byte), `image_sha256`, `prompt`, `settings` (a hash of what else decides the answer), `report`,
    /// `thinking`, `finish_reason` (`stop`, `length`, `repetition`), `remarks` (a list of `code` and `text`:
    /// what a reader should know about the image), `prompt_tokens`, `completion_tokens`, `seconds`, `error`.
    Infer(infer::InferArgs),
    /// Fine-tune a model.
    ///
    /// Without arguments, the tiny model on the sample data set, both from the repository: a minute or two on
    /// two CPU cores.
    Train(train::TrainArgs),
    /// Merge an adapter into its base model and write the result as a checkpoint.
    ///
    /// The written checkpoint is read back and compared with base plus adapter on a test input. Without an
    /// adapter, a checkpoint is rewritten in another dtype.
    Merge(merge::MergeArgs),
    /// Quantise a checkpoint to 8 or 4 bits, for cards with less memory.
    ///
    /// The result loads without the original and takes adapters that were trained on the original. Every
    /// byte is read back and the model is run once before the command ends.
    Quantize(quantize::QuantizeArgs),
    /// Estimate a run before anything is loaded: parameters, memory, steps, tokens, time.
    Plan(plan::PlanArgs),
    /// Score a model's reports, or a file of predictions, beside baselines: text metrics and findings.
    ///
    /// Without arguments, the tiny model that comes with the repository on the sample data set.
    Eval(Box<eval::EvalArgs>),
    /// Turn a corpus of chest X-rays and reports, as it is published, or any data set in a known form, into train.jsonl
    /// and val.jsonl.
    Convert(convert::ConvertArgs),
    /// Report the translation defects of a corpus, row by row, and propose a corrected copy.
    Clean(clean::CleanArgs),
    /// Validate a data set before a model is loaded.
    Check(check::CheckArgs),
    /// Draw a data set of synthetic chest radiographs with Chinese reports.
    Phantoms(phantoms::PhantomsArgs),
    /// Write the config and tokenizer of the tiny model, for training it from random weights.
    InitTiny(init_tiny::InitTinyArgs),
    /// Serve a model to many people: OpenAI's API and a web page, in one process.
    ///
    /// Without arguments, the tiny model that comes with the repository at http://127.0.0.1:7860.
    Serve(serve::ServeArgs),
    /// List the devices of this machine, and check for each of their dtypes that results agree with the CPU.
    Doctor(doctor::DoctorArgs),
    /// Measure speed and memory of the model on this machine beside the hardware's limits, or of a server.
    Bench(bench::BenchCommand),
}
