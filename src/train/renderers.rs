//! What the Learner shows a run with: Burn's dashboard with corrections, or nothing.

use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use burn::{
    data::dataloader::Progress,
    train::{
        LearnerSummary,
        metric::{MetricAttributes, MetricDefinition, MetricEntry, MetricId, SerializedEntry},
        renderer::{
            EvaluationName, EvaluationProgress, MetricState, MetricsRenderer,
            MetricsRendererEvaluation, MetricsRendererTraining, ProgressType, TrainingProgress,
        },
    },
};

use crate::base::panics::panic_text;

/// What the keys of the dashboard's quit dialog do; the dialog's own text does not say that `s` saves.
///
/// Shown as a metric of the training split, so the dashboard puts the word "Train" before the text. Short:
/// a terminal of 80 columns and 24 lines has room for seven lines of metrics.
const QUIT: (&str, &str) = (
    "Quit: q, then",
    "to the end of this step and save: s; stop at once, unsaved: k",
);

/// Adapts the progress of a run to what Burn's dashboard computes correctly.
///
/// The dashboard's second bar and its time left assume epochs of equal length, all of them run to the end
/// by one process. A run here may end inside an epoch and may continue one that another process began.
pub(super) struct RunRenderer {
    inner: Box<dyn MetricsRenderer>,
    steps: RunSteps,
    keys_shown: bool,
}

/// Number of steps of a run, for its progress display.
#[derive(Debug, Clone, Copy)]
pub(super) struct RunSteps {
    /// Steps done before this process started.
    pub(super) before: usize,
    /// Steps of the whole run.
    pub(super) total: usize,
    /// Steps of an epoch.
    pub(super) an_epoch: usize,
}

impl RunSteps {
    /// The epoch that step `step` (from 0) belongs to, from 1.
    pub(super) fn epoch(&self, step: usize) -> usize {
        step / self.an_epoch.max(1) + 1
    }

    /// Position in the epoch, and the epoch, after `done` steps.
    pub(super) fn progress(&self, done: usize) -> [Progress; 2] {
        let an_epoch = self.an_epoch.max(1);
        let last = done.saturating_sub(1);
        [
            Progress::new(last % an_epoch + 1, an_epoch),
            Progress::new(self.epoch(last), self.total.div_ceil(an_epoch).max(1)),
        ]
    }

    /// Progress from which the dashboard computes the share of the epoch (first bar) and the share of this
    /// process's steps (second bar, time left).
    ///
    /// The dashboard computes the second share as `((e - 1) · n + i) / (e_all · n)` for item `i` of `n` in
    /// epoch `e` of `e_all`. With epochs counted in thousandths of a step this equals the share of the steps
    /// to three digits.
    fn shown(&self, done: usize) -> TrainingProgress {
        const PARTS: usize = 1000;
        let [within, _] = self.progress(done);
        let own = done.saturating_sub(self.before).max(1);
        let all = self.total.saturating_sub(self.before).max(own);
        TrainingProgress {
            progress: Some(within),
            global_progress: Progress::new(own * PARTS, all * PARTS),
            iteration: Some(done),
        }
    }

    /// Lines of the dashboard's status after `done` steps.
    fn indicators(&self, done: usize) -> Vec<ProgressType> {
        let [_, epoch] = self.progress(done);
        vec![
            detailed("Epoch", epoch),
            detailed("Step", Progress::new(done, self.total)),
        ]
    }
}

fn detailed(tag: &str, progress: Progress) -> ProgressType {
    ProgressType::Detailed {
        tag: tag.to_string(),
        progress,
    }
}

impl RunRenderer {
    pub(super) fn new(inner: Box<dyn MetricsRenderer>, steps: RunSteps) -> Self {
        Self {
            inner,
            steps,
            keys_shown: false,
        }
    }

    fn show_keys(&mut self) {
        if std::mem::replace(&mut self.keys_shown, true) {
            return;
        }
        let (name, text) = QUIT;
        let metric_id = MetricId::new(Arc::new(name.to_string()));
        self.inner.register_metric(MetricDefinition {
            metric_id: metric_id.clone(),
            name: name.to_string(),
            description: None,
            attributes: MetricAttributes::None,
        });
        let text = SerializedEntry::new(text.to_string(), String::new());
        self.inner
            .update_train(MetricState::Generic(MetricEntry::new(metric_id, text)));
    }
}

impl MetricsRendererTraining for RunRenderer {
    fn update_train(&mut self, state: MetricState) {
        self.show_keys();
        self.inner.update_train(state);
    }
    fn update_valid(&mut self, mut state: MetricState) {
        self.show_keys();
        // The mean is that of one validation; an epoch may have several.
        let (MetricState::Generic(entry) | MetricState::Numeric(entry, _)) = &mut state;
        let text = &mut entry.serialized_entry.formatted;
        if let Some(mean) = text.strip_prefix("epoch ") {
            *text = format!("mean {mean}");
        }
        self.inner.update_valid(state);
    }
    fn render_train(&mut self, item: TrainingProgress, indicators: Vec<ProgressType>) {
        let Some(done) = item.iteration else {
            return self.inner.render_train(item, indicators);
        };
        let indicators = self.steps.indicators(done);
        self.inner.render_train(self.steps.shown(done), indicators);
    }
    fn render_valid(&mut self, item: TrainingProgress, indicators: Vec<ProgressType>) {
        let indicators = match (item.iteration, &item.progress) {
            (Some(done), Some(batches)) => {
                let mut indicators = self.steps.indicators(done);
                indicators.push(detailed("Batch", batches.clone()));
                indicators
            }
            _ => indicators,
        };
        self.inner.render_valid(item, indicators);
    }
    fn on_train_end(
        &mut self,
        summary: Option<LearnerSummary>,
    ) -> Result<(), Box<dyn core::error::Error>> {
        self.inner.on_train_end(summary)
    }
}

impl MetricsRendererEvaluation for RunRenderer {
    fn update_test(&mut self, name: EvaluationName, state: MetricState) {
        self.inner.update_test(name, state);
    }
    fn render_test(&mut self, item: EvaluationProgress, indicators: Vec<ProgressType>) {
        self.inner.render_test(item, indicators);
    }
}

impl MetricsRenderer for RunRenderer {
    fn manual_close(&mut self) {
        self.inner.manual_close();
    }
    fn register_metric(&mut self, definition: MetricDefinition) {
        self.inner.register_metric(definition);
    }
}

/// Burn's dashboard, and whether its user ended the run at once (`q`, then `k`).
///
/// Burn ends such a run by a panic in the thread that calls the renderer. The thread that trains only sees
/// a closed channel, which says nothing of the reason.
pub struct Dashboard {
    inner: Box<dyn MetricsRenderer>,
    killed: Arc<AtomicBool>,
}

impl Dashboard {
    /// Wraps Burn's dashboard; `killed` becomes true when its user ends the run at once.
    pub fn new(inner: Box<dyn MetricsRenderer>, killed: Arc<AtomicBool>) -> Self {
        Self { inner, killed }
    }

    fn call<T>(&mut self, call: impl FnOnce(&mut dyn MetricsRenderer) -> T) -> T {
        let inner = self.inner.as_mut();
        catch_unwind(AssertUnwindSafe(|| call(inner))).unwrap_or_else(|payload| {
            if panic_text(payload.as_ref()).contains("from user input") {
                // Before the thread ends and its channel closes: whoever sees that looks here.
                self.killed.store(true, Ordering::SeqCst);
            }
            resume_unwind(payload)
        })
    }
}

impl MetricsRendererTraining for Dashboard {
    fn update_train(&mut self, state: MetricState) {
        self.call(|inner| inner.update_train(state));
    }
    fn update_valid(&mut self, state: MetricState) {
        self.call(|inner| inner.update_valid(state));
    }
    fn render_train(&mut self, item: TrainingProgress, indicators: Vec<ProgressType>) {
        self.call(|inner| inner.render_train(item, indicators));
    }
    fn render_valid(&mut self, item: TrainingProgress, indicators: Vec<ProgressType>) {
        self.call(|inner| inner.render_valid(item, indicators));
    }
    fn on_train_end(
        &mut self,
        summary: Option<LearnerSummary>,
    ) -> Result<(), Box<dyn core::error::Error>> {
        self.call(|inner| inner.on_train_end(summary))
    }
}

impl MetricsRendererEvaluation for Dashboard {
    fn update_test(&mut self, name: EvaluationName, state: MetricState) {
        self.call(|inner| inner.update_test(name, state));
    }
    fn render_test(&mut self, item: EvaluationProgress, indicators: Vec<ProgressType>) {
        self.call(|inner| inner.render_test(item, indicators));
    }
}

impl MetricsRenderer for Dashboard {
    fn manual_close(&mut self) {
        self.call(|inner| inner.manual_close());
    }
    fn register_metric(&mut self, definition: MetricDefinition) {
        self.call(|inner| inner.register_metric(definition));
    }
}

/// A renderer that shows nothing: the strategy prints lines of its own.
pub struct QuietRenderer;

impl MetricsRendererTraining for QuietRenderer {
    fn update_train(&mut self, _state: MetricState) {}
    fn update_valid(&mut self, _state: MetricState) {}
    fn render_train(&mut self, _item: TrainingProgress, _indicators: Vec<ProgressType>) {}
    fn render_valid(&mut self, _item: TrainingProgress, _indicators: Vec<ProgressType>) {}
}

impl MetricsRendererEvaluation for QuietRenderer {
    fn update_test(&mut self, _name: EvaluationName, _state: MetricState) {}
    fn render_test(&mut self, _item: EvaluationProgress, _indicators: Vec<ProgressType>) {}
}

impl MetricsRenderer for QuietRenderer {
    fn manual_close(&mut self) {}
    fn register_metric(&mut self, _definition: MetricDefinition) {}
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Keeps what it is shown; ends the run as Burn's dashboard does where `kills` is set.
    #[derive(Default)]
    struct Fake {
        shown: Arc<Mutex<Vec<String>>>,
        kills: bool,
    }

    impl Fake {
        fn note(&self, text: String) {
            self.shown.lock().unwrap().push(text);
        }
    }

    impl MetricsRendererTraining for Fake {
        fn update_train(&mut self, _state: MetricState) {
            if self.kills {
                std::panic::resume_unwind(Box::new("Killing training from user input."));
            }
        }
        fn update_valid(&mut self, state: MetricState) {
            let (MetricState::Generic(entry) | MetricState::Numeric(entry, _)) = state;
            self.note(entry.serialized_entry.formatted);
        }
        fn render_train(&mut self, _item: TrainingProgress, _indicators: Vec<ProgressType>) {}
        fn render_valid(&mut self, _item: TrainingProgress, indicators: Vec<ProgressType>) {
            let words = indicators.iter().map(|one| match one {
                ProgressType::Detailed { tag, progress } => {
                    format!(
                        "{tag} {}/{}",
                        progress.items_processed, progress.items_total
                    )
                }
                ProgressType::Value { tag, value } => format!("{tag} {value}"),
            });
            self.note(words.collect::<Vec<_>>().join(", "));
        }
    }

    impl MetricsRendererEvaluation for Fake {
        fn update_test(&mut self, _name: EvaluationName, _state: MetricState) {}
        fn render_test(&mut self, _item: EvaluationProgress, _indicators: Vec<ProgressType>) {}
    }

    impl MetricsRenderer for Fake {
        fn manual_close(&mut self) {}
        fn register_metric(&mut self, _definition: MetricDefinition) {}
    }

    fn entry(text: &str) -> MetricState {
        let text = SerializedEntry::new(text.to_string(), String::new());
        let id = MetricId::new(Arc::new("Loss".to_string()));
        MetricState::Generic(MetricEntry::new(id, text))
    }

    #[test]
    fn a_validation_is_shown_with_the_step_it_follows_and_its_own_mean() {
        let fake = Fake::default();
        let shown = fake.shown.clone();
        let steps = RunSteps {
            before: 0,
            total: 480,
            an_epoch: 80,
        };
        let mut renderer = RunRenderer::new(Box::new(fake), steps);
        renderer.update_valid(entry("epoch 0.4603 - batch 0.4721"));
        let item = TrainingProgress {
            progress: Some(Progress::new(1, 2)),
            global_progress: Progress::new(2, 6),
            iteration: Some(120),
        };
        renderer.render_valid(item, Vec::new());
        assert_eq!(
            *shown.lock().unwrap(),
            [
                "mean 0.4603 - batch 0.4721",
                "Epoch 2/6, Step 120/480, Batch 1/2"
            ]
        );
    }

    #[test]
    fn a_run_ended_at_once_from_the_dashboard_is_known_as_such() {
        for kills in [true, false] {
            let killed = Arc::new(AtomicBool::new(false));
            let fake = Fake {
                kills,
                ..Fake::default()
            };
            let mut dashboard = Dashboard::new(Box::new(fake), killed.clone());
            let ended = catch_unwind(AssertUnwindSafe(|| dashboard.update_train(entry(""))));
            assert_eq!(ended.is_err(), kills);
            assert_eq!(killed.load(Ordering::SeqCst), kills);
        }
    }

    /// The second bar as Burn's dashboard computes it: `calculate_progress`, burn-train 0.21.
    fn second_bar(shown: &TrainingProgress) -> f64 {
        let within = shown.progress.as_ref().unwrap();
        let epochs = &shown.global_progress;
        let done = (epochs.items_processed - 1) * within.items_total + within.items_processed;
        done as f64 / (within.items_total * epochs.items_total) as f64
    }

    /// Six epochs of 80 steps; a run that ends after 60 steps; a run continued after 240.
    #[test]
    fn the_bars_are_shares_of_the_epoch_and_of_this_process() {
        let steps = |before, total| RunSteps {
            before,
            total,
            an_epoch: 80,
        };
        for (before, total, done, epoch, bar) in [
            (0, 480, 41, 1, 41.0 / 480.0),
            (0, 480, 171, 3, 171.0 / 480.0),
            (0, 480, 480, 6, 1.0),
            (0, 60, 17, 1, 17.0 / 60.0),
            (0, 60, 60, 1, 1.0),
            (240, 480, 250, 4, 10.0 / 240.0),
        ] {
            let steps = steps(before, total);
            let shown = steps.shown(done);
            let found = second_bar(&shown);
            assert!(
                (found - bar).abs() < 2e-3,
                "{done} of {total}: {found}, not {bar}"
            );
            let [within, epochs] = steps.progress(done);
            assert_eq!(within.items_processed, (done - 1) % 80 + 1);
            assert_eq!(epochs.items_processed, epoch);
            assert_eq!(epochs.items_total, total.div_ceil(80));
        }
    }
}
