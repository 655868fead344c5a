//! Measuring: warm-up apart, median and spread of several, one JSON line at the end.
#![allow(dead_code, reason = "each bench uses its share")]

use std::{
    hint::black_box,
    path::{Path, PathBuf},
    time::Instant,
};

use burn::tensor::DType;
use xray_qwen3vl::{
    batch::images::ImageInput,
    processor::image::RgbImage,
    runtime::{
        accelerator::Accelerator,
        pipeline::{Pipeline, PipelineOptions},
    },
};

/// The CPU backend.
pub type Cpu = burn_flex::Flex;

/// One measurement of several runs.
pub struct Measured {
    /// Shape and what is measured.
    pub name: String,
    /// Median of the runs, in milliseconds.
    pub median_ms: f64,
    /// Fastest and slowest run.
    pub spread_ms: (f64, f64),
}

/// Runs `work` a few times unmeasured, then `runs` times.
pub fn measure<T>(name: &str, runs: usize, mut work: impl FnMut() -> T) -> Measured {
    for _ in 0..3 {
        black_box(work());
    }
    let mut times: Vec<f64> = (0..runs)
        .map(|_| {
            let start = Instant::now();
            black_box(work());
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    let measured = Measured {
        name: name.to_string(),
        median_ms: times[times.len() / 2],
        spread_ms: (times[0], times[times.len() - 1]),
    };
    println!(
        "{name:<28} {:>9.3} ms  ({:.3} to {:.3})",
        measured.median_ms, measured.spread_ms.0, measured.spread_ms.1
    );
    measured
}

/// Prints all measurements as one line.
pub fn report(bench: &str, all: &[Measured]) {
    let rows: Vec<_> = all
        .iter()
        .map(|one| {
            serde_json::json!({
                "name": one.name,
                "median_ms": one.median_ms,
                "min_ms": one.spread_ms.0,
                "max_ms": one.spread_ms.1,
            })
        })
        .collect();
    let line = serde_json::json!({
        "bench": bench,
        "device": "cpu",
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "burn": "0.21.0",
        "results": rows,
    });
    println!("{line}");
}

/// A path of the repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The tiny model in f32, as it is.
pub fn options() -> PipelineOptions {
    PipelineOptions::new(repository("model/tiny"), DType::F32)
}

/// The tiny model on the CPU.
pub fn tiny() -> Pipeline<Cpu> {
    Pipeline::load(&options(), Default::default(), &mut |_, _| {}).expect("model/tiny loads")
}

/// A grey image of `side` pixels with structure everywhere.
pub fn picture(side: usize) -> RgbImage {
    let pixels: Vec<u8> = (0..side * side)
        .map(|i| ((i % side) * 3 + (i / side) * 5 + i % 7) as u8)
        .collect();
    RgbImage::from_gray(side, side, &pixels).expect("a picture of its own size")
}

/// Patches of an image.
pub fn patches<B: Accelerator>(pipeline: &Pipeline<B>, side: usize) -> ImageInput {
    pipeline
        .parts
        .image_input(&picture(side))
        .expect("a square picture")
}
