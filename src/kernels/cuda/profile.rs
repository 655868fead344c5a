//! A table by kernel, on request: how often each ran and how long the device was busy with it.
//!
//! Only while it is on, every launch waits for the one before, so the sum is longer than the work
//! takes otherwise.

use std::{
    collections::BTreeMap,
    sync::{
        LazyLock, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use super::launch::Client;

static ON: AtomicBool = AtomicBool::new(false);
static TABLE: LazyLock<Mutex<Table>> = LazyLock::new(Mutex::default);

#[derive(Default)]
struct Table {
    rows: BTreeMap<String, (usize, Duration)>,
    running: Option<(String, Instant)>,
}

/// One row of the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Kernel and configuration.
    pub kernel: String,
    /// Launches.
    pub count: usize,
    /// Seconds of all launches together.
    pub seconds: f64,
}

/// Starts counting.
pub fn start() {
    *TABLE.lock().unwrap_or_else(|lock| lock.into_inner()) = Table::default();
    ON.store(true, Ordering::SeqCst);
}

/// Stops counting: the rows, longest first.
pub fn stop() -> Vec<Row> {
    ON.store(false, Ordering::SeqCst);
    let table = std::mem::take(&mut *TABLE.lock().unwrap_or_else(|lock| lock.into_inner()));
    let mut rows: Vec<Row> = table
        .rows
        .into_iter()
        .map(|(kernel, (count, time))| Row {
            kernel,
            count,
            seconds: time.as_secs_f64(),
        })
        .collect();
    rows.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    rows
}

/// Called at every launch.
pub(super) fn count(kernel: &str, client: &Client) {
    if !ON.load(Ordering::Relaxed) {
        return;
    }
    let _ = cubecl_common::future::block_on(client.sync());
    let mut table = TABLE.lock().unwrap_or_else(|lock| lock.into_inner());
    let now = Instant::now();
    // Whatever Burn launched in between counts as the kernel before it.
    if let Some((name, since)) = table.running.replace((kernel.to_string(), now)) {
        let row = table.rows.entry(name).or_default();
        row.0 += 1;
        row.1 += now - since;
    }
}
