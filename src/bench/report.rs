//! Result of a measurement: one record with stable keys, and a table for people.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::{
    clock::Laps,
    device::{Ceilings, DeviceFacts},
    operations::Operation,
};

/// One measurement. Every key is always there; `null` is what was not measured or is not known.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// `load`, `vision`, `prefill`, `decode` or `train`.
    pub bench: String,
    /// What is measured, with its shape.
    pub name: String,
    /// Folder of the model, or `random 8b`.
    pub model: String,
    /// Decoder layers.
    pub layers: usize,
    /// Parameters of the model.
    pub parameters: u64,
    /// Type of the weights.
    pub dtype: String,
    /// As `--device` takes it.
    pub device: String,
    /// The hardware.
    pub device_name: String,
    /// Version of the GPU's driver.
    pub driver: Option<String>,
    /// This program's version, Burn's, and the backends built in.
    pub program: String,

    /// Requests that go through the model together; in training, samples of a micro-batch.
    pub batch: usize,
    /// Lengths as OpenI-zh has them, in place of one length.
    pub mixed: bool,
    /// Side of every image in pixels, where it is not 512.
    pub image_side: Option<usize>,
    /// Training: samples of a micro-batch are packed into one row.
    pub packing: Option<bool>,
    /// Training: every layer is run again in the backward pass.
    pub recompute: Option<bool>,

    /// Wall time of the first call, compilation and tuning included.
    pub first_call_seconds: f64,
    /// Unmeasured warm-up calls after the first.
    pub warm_up_calls: usize,
    /// Measured calls.
    pub samples: usize,
    /// Median of the measured calls. `decode`: of 128 steps; `train`: of one optimizer step.
    pub median_seconds: f64,
    /// Fastest call.
    pub min_seconds: f64,
    /// Slowest call.
    pub max_seconds: f64,
    /// Longest wait after warm-up: a whole call, in `decode` the gap between two tokens of a row.
    pub longest_stall_seconds: f64,

    /// Requests, in training samples, a second.
    pub samples_per_second: Option<f64>,
    /// Tokens a second; `decode`: new ones after the first of each row.
    pub tokens_per_second: Option<f64>,
    /// The model's floating-point operations in one call.
    pub flop: Option<f64>,
    /// Operations that recomputing adds to a call.
    pub recompute_flop: Option<f64>,
    /// Bytes that must cross the device's memory in one call (in training: weights alone).
    pub bytes: Option<f64>,
    /// `flop` a second, in TFLOP/s.
    pub tflops: Option<f64>,
    /// `bytes` a second, in GB/s.
    pub gb_per_second: Option<f64>,
    /// Share of the matmul ceiling.
    pub flop_share: Option<f64>,
    /// Share of the copy ceiling; above 1 where what is read stays in a cache.
    pub bandwidth_share: Option<f64>,
    /// Large matmul measured in this run, in TFLOP/s.
    pub matmul_ceiling_tflops: Option<f64>,
    /// Copy on the device measured in this run, in GB/s.
    pub copy_ceiling_gb_per_second: Option<f64>,
    /// The card's data sheet, dense bf16, in TFLOP/s.
    pub published_tflops: Option<f64>,
    /// The card's data sheet, memory, in GB/s.
    pub published_gb_per_second: Option<f64>,

    /// Most device memory in use during the measurement, by all processes, in GiB.
    pub device_memory_peak_gib: Option<f64>,
    /// Device memory this process has taken for tensors when the measurement ends, in GiB; it is kept for
    /// later tensors, so this is what was needed at most.
    pub device_memory_reserved_gib: Option<f64>,
    /// That which tensors alive then take, in GiB: weights, mostly.
    pub device_memory_in_use_gib: Option<f64>,
    /// Most host memory this process ever held, in GiB.
    pub host_memory_peak_gib: Option<f64>,
    /// Time to load or draw the model before the measurement.
    pub load_seconds: Option<f64>,
    /// From the start of the process to the first token on the host, loading included.
    pub first_token_seconds: Option<f64>,

    /// Training: loss of the first step.
    pub loss_first: Option<f64>,
    /// Training: loss of the last step.
    pub loss_last: Option<f64>,
    /// Training: a hash over losses and gradient norms of all steps, bit for bit.
    pub losses_digest: Option<String>,
    /// Training: memory that the device's pools (on the CPU: the process) held after the first measured
    /// step, in GiB.
    pub memory_first_gib: Option<f64>,
    /// Training: the same after the last step.
    pub memory_last_gib: Option<f64>,
    /// Training: time in the measured steps in which no samples were ready: at most so long the device
    /// waited for data.
    pub data_wait_seconds: Option<f64>,
    /// Training: whether all losses and gradient norms were numbers.
    pub finite: Option<bool>,

    /// With `--table`: the device's operations in one call (`decode`: in its steps), longest first.
    pub operations: Option<Vec<Operation>>,
}

impl Record {
    /// Writes the timing and the speeds that follow from it.
    pub fn set_laps(&mut self, laps: &Laps) {
        let some = |value: f64| (value > 0.0).then_some(value);
        let seconds = laps.seconds_per_call();
        self.first_call_seconds = laps.first_call_seconds;
        self.warm_up_calls = laps.warm_up_calls;
        self.samples = laps.measured.len();
        self.median_seconds = laps.median_seconds();
        (self.min_seconds, self.max_seconds) = laps.range_seconds();
        self.longest_stall_seconds = laps.longest_stall_seconds();
        self.samples_per_second = some(laps.mean(|lap| lap.samples) / seconds);
        self.tokens_per_second = some(laps.mean(|lap| lap.tokens) / seconds);
        self.flop = some(laps.mean(|lap| lap.work.flop));
        self.bytes = some(laps.mean(|lap| lap.work.bytes));
        self.tflops = self.flop.map(|flop| flop / seconds / 1e12);
        self.gb_per_second = self.bytes.map(|bytes| bytes / seconds / 1e9);
    }

    /// Writes who the device is.
    pub fn set_device(&mut self, facts: &DeviceFacts) {
        self.device.clone_from(&facts.device);
        self.device_name.clone_from(&facts.name);
        self.driver.clone_from(&facts.driver);
        self.published_tflops = facts.published.map(|peak| peak.tflops);
        self.published_gb_per_second = facts.published.map(|peak| peak.gb_per_second);
    }

    /// Writes what the device can do at best, and the shares of it.
    pub fn set_ceilings(&mut self, ceilings: &Ceilings) {
        self.matmul_ceiling_tflops = Some(ceilings.tflops);
        self.copy_ceiling_gb_per_second = ceilings.gb_per_second;
        self.flop_share = self.tflops.map(|speed| speed / ceilings.tflops);
        self.bandwidth_share = self
            .gb_per_second
            .zip(ceilings.gb_per_second)
            .map(|(speed, ceiling)| speed / ceiling);
    }

    /// Warning about what makes the measurement doubtful.
    pub fn warning(&self) -> Option<String> {
        (self.finite == Some(false)).then(|| {
            format!(
                "{}: a loss or gradient norm is not a number (loss {:?} to {:?}); these are the times of steps that learn nothing",
                self.name,
                self.loss_first.unwrap_or(f64::NAN),
                self.loss_last.unwrap_or(f64::NAN)
            )
        })
    }

    /// The record as one line of JSON; numbers that are none become `null`.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// All records as a table.
pub fn table(records: &[Record]) -> String {
    const HEAD: [&str; 10] = [
        "what",
        "median",
        "min",
        "max",
        "first call",
        "stall",
        "samples/s",
        "tokens/s",
        "TFLOP/s",
        "GB/s",
    ];
    let rows: Vec<[String; 10]> = records.iter().map(row).collect();
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .chain([HEAD[column].len()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    let mut text = String::new();
    let mut line = |cells: [&str; 10]| {
        let _ = write!(text, "{:<1$}", cells[0], widths[0]);
        for (cell, width) in cells.iter().zip(&widths).skip(1) {
            let _ = write!(text, "  {cell:>width$}");
        }
        text.push('\n');
    };
    line(HEAD);
    for row in &rows {
        line(row.each_ref().map(String::as_str));
    }
    for record in records {
        if let Some(notes) = notes(record) {
            let _ = writeln!(text, "{}: {notes}", record.name);
        }
    }
    if let Some(one) = records.first() {
        text.push_str(&footer(one));
    }
    for record in records {
        text.push_str(&operation_table(record));
    }
    text
}

/// The operations of one call, the longest ones.
fn operation_table(record: &Record) -> String {
    const MOST: usize = 30;
    let Some(operations) = record.operations.as_ref().filter(|all| !all.is_empty()) else {
        return String::new();
    };
    let all: f64 = operations.iter().map(|one| one.seconds).sum();
    let count: u64 = operations.iter().map(|one| one.count).sum();
    let mut text = format!(
        "\n{}: {count} operations, {} on the device when timed one by one\n",
        record.name,
        seconds(all)
    );
    let mut line = |count: u64, time: f64, name: &str| {
        let share = 100.0 * time / all.max(f64::MIN_POSITIVE);
        let _ = writeln!(
            text,
            "{count:>8}  {:>9}  {share:>5.1} %  {name}",
            seconds(time)
        );
    };
    for one in operations.iter().take(MOST) {
        line(one.count, one.seconds, &one.name);
    }
    if let Some(rest) = operations.get(MOST..).filter(|rest| !rest.is_empty()) {
        let time = rest.iter().map(|one| one.seconds).sum();
        line(rest.iter().map(|one| one.count).sum(), time, "all others");
    }
    text
}

fn row(record: &Record) -> [String; 10] {
    let plain = |value: Option<f64>| value.map_or("-".into(), number);
    let shared = |value: Option<f64>, share: Option<f64>| match (value, share) {
        (Some(value), Some(share)) => format!("{} ({:.0} %)", number(value), share * 100.0),
        (value, _) => plain(value),
    };
    [
        record.name.clone(),
        seconds(record.median_seconds),
        seconds(record.min_seconds),
        seconds(record.max_seconds),
        seconds(record.first_call_seconds),
        seconds(record.longest_stall_seconds),
        plain(record.samples_per_second),
        plain(record.tokens_per_second),
        shared(record.tflops, record.flop_share),
        shared(record.gb_per_second, record.bandwidth_share),
    ]
}

/// Facts that do not fit the columns.
fn notes(record: &Record) -> Option<String> {
    let mut parts = Vec::new();
    if let Some(gib) = record.device_memory_peak_gib {
        parts.push(format!("{gib:.2} GiB of device memory at most"));
    }
    if let Some(gib) = record.device_memory_reserved_gib {
        let in_use = record.device_memory_in_use_gib.unwrap_or(gib);
        parts.push(format!(
            "{gib:.2} GiB taken for tensors ({in_use:.2} alive)"
        ));
    }
    if let Some(gib) = record.host_memory_peak_gib {
        parts.push(format!("{gib:.2} GiB on the host"));
    }
    if let Some(time) = record.first_token_seconds {
        parts.push(format!(
            "first token {} after the start of the process",
            seconds(time)
        ));
    }
    if let Some(time) = record.load_seconds {
        parts.push(format!("weights in {}", seconds(time)));
    }
    if let (Some(first), Some(last)) = (record.loss_first, record.loss_last) {
        parts.push(format!("loss {first:.4} to {last:.4}"));
    }
    if let Some(digest) = &record.losses_digest {
        parts.push(format!("losses {digest}"));
    }
    if let (Some(first), Some(last)) = (record.memory_first_gib, record.memory_last_gib) {
        parts.push(format!("pools {first:.3} GiB, at the end {last:.3}"));
    }
    if let Some(waited) = record.data_wait_seconds {
        parts.push(format!(
            "the device waited for data {:.1} ms of {} at most",
            waited * 1e3,
            seconds(record.median_seconds * record.samples as f64)
        ));
    }
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// A number of parameters: in G, in M below 0.1 G.
fn count_text(parameters: u64) -> String {
    let count = parameters as f64;
    if count < 1e8 {
        format!("{:.2} M", count / 1e6)
    } else {
        format!("{:.2} G", count / 1e9)
    }
}

fn footer(record: &Record) -> String {
    let mut text = format!(
        "{}, {} layers, {} parameters, {} on {} ({}",
        record.model,
        record.layers,
        count_text(record.parameters),
        record.dtype,
        record.device,
        record.device_name,
    );
    if let Some(driver) = &record.driver {
        let _ = write!(text, ", driver {driver}");
    }
    text.push_str(")\n");
    if let (Some(tflops), Some(copy)) = (
        record.matmul_ceiling_tflops,
        record.copy_ceiling_gb_per_second,
    ) {
        let _ = write!(
            text,
            "100 % is what this run reached: {} TFLOP/s in a large matmul, {} GB/s in a copy",
            number(tflops),
            number(copy)
        );
        if let (Some(tflops), Some(copy)) =
            (record.published_tflops, record.published_gb_per_second)
        {
            let _ = write!(text, " (data sheet: {tflops:.0} and {copy:.0})");
        }
        text.push('\n');
    }
    text
}

/// A time with three or four digits that count.
fn seconds(value: f64) -> String {
    if value < 1.0 {
        format!("{} ms", number(value * 1e3))
    } else {
        format!("{} s", number(value))
    }
}

fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{clock::Lap, count::Work};
    use super::*;

    #[test]
    fn a_small_model_has_its_parameters_in_millions() {
        assert_eq!(count_text(412_160), "0.41 M");
        assert_eq!(count_text(8_767_123_696), "8.77 G");
    }

    #[test]
    fn speeds_follow_from_the_median_and_shares_from_the_ceilings() {
        let lap = |seconds| Lap {
            seconds,
            stall_seconds: seconds,
            samples: 4.0,
            tokens: 100.0,
            work: Work {
                flop: 2e12,
                bytes: 3e9,
            },
        };
        let mut record = Record::default();
        record.set_laps(&Laps {
            first_call_seconds: 9.0,
            warm_up_calls: 1,
            measured: vec![lap(0.5), lap(4.0), lap(0.25)],
        });
        record.set_ceilings(&Ceilings {
            tflops: 8.0,
            gb_per_second: Some(12.0),
        });
        assert_eq!(record.median_seconds, 0.5);
        assert_eq!(record.longest_stall_seconds, 4.0);
        assert_eq!(record.samples_per_second, Some(8.0));
        assert_eq!(record.tokens_per_second, Some(200.0));
        assert_eq!((record.tflops, record.flop_share), (Some(4.0), Some(0.5)));
        assert_eq!(record.bandwidth_share, Some(0.5));
        let read: Record = serde_json::from_str(&record.to_json()).unwrap();
        assert_eq!(read, record);
        let text = table(&[record]);
        assert!(text.contains("4.00 (50 %)"), "{text}");
    }

    #[test]
    fn a_loss_that_is_no_number_is_a_warning() {
        let mut record = Record {
            name: "train_m1x16".into(),
            loss_first: Some(2.5),
            loss_last: Some(f64::NAN),
            finite: Some(true),
            ..Record::default()
        };
        assert_eq!(record.warning(), None);
        record.finite = Some(false);
        let warning = record.warning().unwrap();
        assert!(
            warning.contains("train_m1x16") && warning.contains("NaN"),
            "{warning}"
        );
        let json: serde_json::Value = serde_json::from_str(&record.to_json()).unwrap();
        assert!(
            json["loss_last"].is_null() && json["finite"] == false,
            "{json}"
        );
    }

    #[test]
    fn operations_are_listed_with_their_shares() {
        let one = |name: &str, count, seconds| Operation {
            name: name.into(),
            count,
            seconds,
        };
        let record = Record {
            name: "prefill_b1".into(),
            operations: Some(vec![one("gemm", 7, 0.003), one("norm", 2, 0.001)]),
            ..Record::default()
        };
        let text = operation_table(&record);
        assert!(text.contains("9 operations, 4.00 ms"), "{text}");
        assert!(text.contains("75.0 %  gemm"), "{text}");
        assert_eq!(operation_table(&Record::default()), "");
    }

    #[test]
    fn unequal_work_is_divided_by_the_mean_time() {
        let lap = |seconds, flop| Lap {
            seconds,
            samples: 1.0,
            work: Work { flop, bytes: 0.0 },
            ..Lap::default()
        };
        let mut record = Record::default();
        record.set_laps(&Laps {
            first_call_seconds: 1.0,
            warm_up_calls: 0,
            measured: vec![lap(1.0, 1.0), lap(1.0, 2.0), lap(4.0, 9.0)],
        });
        assert_eq!(record.samples_per_second, Some(0.5));
        assert_eq!(record.bytes, None);
    }
}
