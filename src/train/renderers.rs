//! What the Learner shows a run with, besides its own dashboard.

use std::sync::Arc;

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

/// What the keys of the dashboard's dialog do, which its own text does not say.
const QUIT: (&str, &str) = (
    "Quit (q)",
    "s: save a checkpoint after this step and end; k: end at once, all since the last checkpoint is lost",
);

/// A renderer chosen at run time, shown what Burn's dashboard works out rightly.
///
/// The dashboard's second bar and its time left come from epochs of equal length, all of them run to
/// their end by one process. Here a run may end inside an epoch and begin where another process left off.
pub(super) struct RunRenderer {
    inner: Box<dyn MetricsRenderer>,
    steps: RunSteps,
    told_keys: bool,
}

/// Steps of a run, as its progress is shown.
#[derive(Debug, Clone, Copy)]
pub(super) struct RunSteps {
    /// Done before this process.
    pub(super) before: usize,
    /// Of the whole run.
    pub(super) total: usize,
    /// Of an epoch.
    pub(super) an_epoch: usize,
}

impl RunSteps {
    /// The epoch that step `step` (from 0) belongs to, from 1.
    pub(super) fn epoch(&self, step: usize) -> usize {
        step / self.an_epoch.max(1) + 1
    }

    /// Epoch and place in it after `done` steps.
    pub(super) fn progress(&self, done: usize) -> [Progress; 2] {
        let an_epoch = self.an_epoch.max(1);
        let last = done.saturating_sub(1);
        [
            Progress::new(last % an_epoch + 1, an_epoch),
            Progress::new(self.epoch(last), self.total.div_ceil(an_epoch).max(1)),
        ]
    }

    /// What the dashboard divides into the share of the epoch and the share of this process's steps.
    ///
    /// The second is `((e - 1) · n + i) / (e_all · n)` for item `i` of `n` in epoch `e` of `e_all`; with
    /// epochs counted in thousandths of a step it is the share of the steps to three digits.
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
}

impl RunRenderer {
    pub(super) fn new(inner: Box<dyn MetricsRenderer>, steps: RunSteps) -> Self {
        Self {
            inner,
            steps,
            told_keys: false,
        }
    }

    fn tell_keys(&mut self) {
        if std::mem::replace(&mut self.told_keys, true) {
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
        self.tell_keys();
        self.inner.update_train(state);
    }
    fn update_valid(&mut self, state: MetricState) {
        self.tell_keys();
        self.inner.update_valid(state);
    }
    fn render_train(&mut self, item: TrainingProgress, indicators: Vec<ProgressType>) {
        let Some(done) = item.iteration else {
            return self.inner.render_train(item, indicators);
        };
        let [_, epoch] = self.steps.progress(done);
        let detailed = |tag: &str, progress| ProgressType::Detailed {
            tag: tag.to_string(),
            progress,
        };
        let indicators = vec![
            detailed("Epoch", epoch),
            detailed("Step", Progress::new(done, self.steps.total)),
        ];
        self.inner.render_train(self.steps.shown(done), indicators);
    }
    fn render_valid(&mut self, item: TrainingProgress, indicators: Vec<ProgressType>) {
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
    use super::*;

    /// As Burn's dashboard works out its second bar: `calculate_progress`, burn-train 0.21.
    fn second_bar(shown: &TrainingProgress) -> f64 {
        let within = shown.progress.as_ref().unwrap();
        let epochs = &shown.global_progress;
        let done = (epochs.items_processed - 1) * within.items_total + within.items_processed;
        done as f64 / (within.items_total * epochs.items_total) as f64
    }

    /// Six epochs of 80 steps; the same cut after 60 steps; and gone on with after 240.
    #[test]
    fn both_bars_are_shares_of_what_they_stand_for() {
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
