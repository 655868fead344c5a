//! The commands that can be typed; the arguments of each are in its own file.

use clap::{Parser, Subcommand};

use crate::{
    base::build_info::{LONG_VERSION, VERSION},
    commands::{
        bench, calibrate, check, clean, completions, config, convert, doctor, drafts, eval,
        examples::{self, section},
        export, infer, init_tiny, label, merge, phantoms, plan, prefer, preview, pull, quantize,
        score, serve, store, train, version,
    },
};

/// Fine-tunes Qwen3-VL on chest X-rays and writes Chinese radiology reports.
///
/// For research. Nothing it writes is a diagnosis.
#[derive(Debug, Parser)]
#[command(name = "xray-qwen3vl", version = VERSION, long_version = LONG_VERSION, after_help = section(examples::FIRST, ""))]
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
    /// byte), `image_sha256`, for rows of data files `data`, `row` (from 1), `row_sha256`, `id`, `study`, `patient`,
    /// `system` and `reference` (the answer that the row has), `prompt`, `settings` (a hash of what else decides the answer), `report`,
    /// `thinking`, `finish_reason` (`stop`, `length`, `repetition`), `remarks` (a list of `code` and `text`:
    /// what a reader should know about the image), with --findings also `calibrated`, `findings_rules` and `findings`
    /// (class: `probability`, `logit`, `decision`, `in_report`, `conflict`), `prompt_tokens`, `completion_tokens`, `seconds`, `error`.
    #[command(after_help = section(examples::INFER, ""))]
    Infer(Box<infer::InferArgs>),
    /// Fine-tune a model.
    ///
    /// Without arguments, the tiny model on the sample data set, both from the repository: a minute or two on
    /// two CPU cores.
    #[command(after_help = section(examples::TRAIN, ""))]
    Train(train::TrainArgs),
    /// Download a model or an adapter from Hugging Face or ModelScope.
    ///
    /// Takes the files a model needs into the cache that Python's tools use too; every file is checked against
    /// the hub's hash. Started again, it goes on where it was. `--model ID` then finds the model.
    ///
    /// Environment: HF_ENDPOINT (a mirror), HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE,
    /// HF_HUB_DOWNLOAD_TIMEOUT; USE_MODELSCOPE_HUB, MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN, MODELSCOPE_CACHE;
    /// HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE.
    #[command(after_help = section(examples::PULL, ""))]
    Pull(pull::PullArgs),
    /// Merge an adapter into its base model and write the result as a checkpoint.
    ///
    /// The written checkpoint is read back and compared with base plus adapter on a test input. Without an
    /// adapter, a checkpoint is rewritten in another dtype.
    #[command(after_help = section(examples::MERGE, ""))]
    Merge(merge::MergeArgs),
    /// Quantise a checkpoint to 8 or 4 bits, for cards with less memory.
    ///
    /// The result loads without the original and takes adapters that were trained on the original. Every
    /// byte is read back and the model is run once before the command ends.
    #[command(after_help = section(examples::QUANTIZE, ""))]
    Quantize(quantize::QuantizeArgs),
    /// Estimate a run before anything is loaded: parameters, memory, steps, tokens, time.
    #[command(after_help = section(examples::PLAN, ""))]
    Plan(plan::PlanArgs),
    /// Score a model's reports, or a file of predictions, beside baselines: text metrics and findings.
    ///
    /// Without arguments, the tiny model that comes with the repository on the sample data set.
    #[command(after_help = section(examples::EVAL, ""))]
    Eval(Box<eval::EvalArgs>),
    /// Make the probabilities of findings honest: fit temperature, biases and thresholds on a validation set.
    ///
    /// A model that was trained on reports says how likely it is to state or to deny each class of finding about an
    /// image. That is turned into a probability and, with two thresholds, into present, absent or undecided. The
    /// result is a file that `infer --findings` finds beside the adapter or model.
    #[command(after_help = section(examples::CALIBRATE, ""))]
    Calibrate(calibrate::CalibrateArgs),
    /// Store answers of a data set, from which `infer`, `serve` and `eval` draft tokens: the same answers, faster.
    #[command(after_help = section(examples::DRAFTS, ""))]
    Drafts(drafts::DraftsArgs),
    /// Turn a corpus of chest X-rays and reports, as it is published, or any data set in a known form, into train.jsonl
    /// and val.jsonl.
    #[command(after_help = section(examples::CONVERT, ""))]
    Convert(convert::ConvertArgs),
    /// Report the translation defects of a corpus, row by row, and propose a corrected copy.
    #[command(after_help = section(examples::CLEAN, ""))]
    Clean(clean::CleanArgs),
    /// Read the findings of reports by rules: present, absent or uncertain, side, degree, and the words.
    #[command(after_help = section(examples::LABEL, ""))]
    Label(label::LabelArgs),
    /// Draw answers of a model about a data set and write pairs of a better and a worse one, for `train` with `objective = "dpo"`.
    #[command(after_help = section(examples::PREFER, ""))]
    Prefer(prefer::PreferArgs),
    /// Print the log-probabilities of given answers, as training computes them.
    ///
    /// A JSON line a row: `row` (from 1), `name`, `answer`, `tokens` (the end token among them), `log_probability` (their
    /// sum, in nats), `mean_log_probability`, `mean_entropy`, with --tokens `token_log_probabilities` (a list of `id`, `token`,
    /// `log_probability`), with --rejected `rejected`, an object with the same keys.
    #[command(after_help = section(examples::SCORE, ""))]
    Score(score::ScoreArgs),
    /// Validate a data set before a model is loaded.
    #[command(after_help = section(examples::CHECK, ""))]
    Check(check::CheckArgs),
    /// Show what the model sees of an image: upright, levelled and scaled, with its sizes and remarks.
    #[command(after_help = section(examples::PREVIEW, ""))]
    Preview(preview::PreviewArgs),
    /// Draw a data set of synthetic chest radiographs with Chinese reports.
    #[command(after_help = section(examples::PHANTOMS, ""))]
    Phantoms(phantoms::PhantomsArgs),
    /// Write the config and tokenizer of the tiny model, for training it from random weights.
    #[command(after_help = section(examples::INIT_TINY, ""))]
    InitTiny(init_tiny::InitTinyArgs),
    /// Serve a model to many people: OpenAI's API and a web page, in one process.
    ///
    /// Without arguments, the tiny model that comes with the repository at http://127.0.0.1:7860.
    #[command(after_help = section(examples::SERVE, serve::EXIT_CODES))]
    Serve(Box<serve::ServeArgs>),
    /// Look after a store of studies: accounts, verification, backup, deletion, audit log.
    #[command(after_help = section(examples::STORE, ""))]
    Store(store::StoreCommand),
    /// Write the signed reports of a store as rows to train on, without what says whom they are of.
    ///
    /// Rows have `messages`, `images` (PNG, nothing but pixels), `study` and `patient` (drawn for this file), with --pairs
    /// `rejected_response`. Left out, with a count: reports without consent, those that name the patient or a number of the
    /// study, films with annotations in their pixels.
    #[command(after_help = section(examples::EXPORT, ""))]
    Export(export::ExportArgs),
    /// List the devices of this machine, and check for each of their dtypes that results agree with the CPU.
    #[command(after_help = section(examples::DOCTOR, ""))]
    Doctor(doctor::DoctorArgs),
    /// Measure speed and memory of the model on this machine beside the hardware's limits, or of a server.
    #[command(after_help = section(examples::BENCH, ""))]
    Bench(bench::BenchCommand),
    /// Print the settings of a run as it would use them, a config to start from, or the schema of config files.
    #[command(after_help = section(examples::CONFIG, ""))]
    Config(config::ConfigArgs),
    /// Print completions for a shell.
    #[command(after_help = section(examples::COMPLETIONS, ""))]
    Completions(completions::CompletionsArgs),
    /// Write manual pages, one for each command.
    #[command(after_help = section(examples::MAN, ""))]
    Man(completions::ManArgs),
    /// Print version, commit, features, and the devices that are found.
    #[command(after_help = section(examples::VERSION, ""))]
    Version(version::VersionArgs),
}
