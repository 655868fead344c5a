//! What the model does for an evaluation: loss, reports, reports about other images, image embeddings.

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use serde_json::json;

use crate::{
    accelerate::devices::DeviceTask,
    adapters::lora::base::quantisation_remark,
    commands::{
        drafts::{drafting_for_batches, tell},
        pipeline_options::{room_for_answers, with_adapter},
        progress::{Progress, Unit, loading, prepare_kernels},
        question::{image_counts, patches, question_about},
        shared_args::{AdapterArgs, DraftingArgs, LoadArgs},
        shell::{program, shell_word},
    },
    dataset::{
        Dataset,
        loader::{WindowLoader, WindowPlan},
    },
    eval::{
        baselines::systems::swapped,
        cases::{Case, WrittenReport},
        caveat::Caveat,
    },
    runtime::{
        accelerator::Accelerator,
        generate::{FinishReason, GenerationConfig, drafts::DraftCounts},
        pipeline::{Answer, Pipeline},
        vision::encode_images,
    },
    study::counted,
    train::{gradients::evaluate, loss::LossTotals},
};

/// Work for a model on a device.
pub(super) struct ModelWork {
    pub(super) model: PathBuf,
    pub(super) adapter: AdapterArgs,
    pub(super) load: LoadArgs,
    pub(super) generation: GenerationConfig,
    pub(super) stop: Vec<String>,
    pub(super) drafting: DraftingArgs,
    pub(super) batch_size: usize,
    pub(super) data: Dataset,
    /// Rows of the data set, one a case.
    pub(super) rows: Vec<usize>,
    pub(super) cases: Vec<Case>,
    /// Whether it writes reports, and not only looks.
    pub(super) writes: bool,
    /// Whether it also writes about other studies' images.
    pub(super) swaps: bool,
    /// Training set to find the nearest images in.
    pub(super) neighbour: Option<Dataset>,
    /// Where the reports are kept.
    pub(super) output: Option<PathBuf>,
    /// Whether the studies of the cases are known, and not guessed: they are kept with the reports then.
    pub(super) keeps_studies: bool,
}

/// What it gives.
#[derive(Default)]
pub(super) struct ModelRun {
    pub(super) loss: Option<LossTotals>,
    pub(super) written: Option<Vec<WrittenReport>>,
    pub(super) swapped: Option<Vec<WrittenReport>>,
    pub(super) embeddings: Option<Embeddings>,
    pub(super) warnings: Vec<Caveat>,
}

/// Mean image features, row after row.
pub(super) struct Embeddings {
    /// `[cases, dimension]`
    pub(super) queries: Vec<f32>,
    /// `[training rows with an image, dimension]`
    pub(super) training: Vec<f32>,
    /// Training rows with an image.
    pub(super) rows: Vec<usize>,
    pub(super) dimension: usize,
}

impl DeviceTask for ModelWork {
    type Output = Result<ModelRun>;

    fn run<B: Accelerator>(mut self, device: B::Device, dtype: DType) -> Result<ModelRun> {
        let mut output = self
            .output
            .as_deref()
            .map(|path| PredictionFile::create(path, self.keeps_studies))
            .transpose()?;
        let mut options = with_adapter(&self.model, &self.adapter, &self.load, dtype);
        room_for_answers(&mut options, self.batch_size, 2, 0, &self.generation);
        let pipeline = loading(|on_progress| Pipeline::<B>::load(&options, device, on_progress))?;
        if let Some(fit) = pipeline.fit {
            self.batch_size = self.batch_size.min(fit.rows());
        }
        for note in &pipeline.notes {
            eprintln!("note: {note}");
        }
        if let Some(limits) = pipeline.parts.pixel_limits_to_know() {
            eprintln!("{limits}");
        }
        for remark in &pipeline.parts.remarks {
            eprintln!("{remark}");
        }
        let tokenizer = &pipeline.parts.tokenizer;
        self.generation.drafts =
            drafting_for_batches::<B>(&self.drafting, &options, tokenizer, self.batch_size)?;
        let config = &pipeline.parts.config;
        let weights = (dtype, pipeline.model.quantization());
        prepare_kernels::<B>(config, weights, &pipeline.device, self.batch_size);
        let mut run = ModelRun::default();
        let used_on = pipeline.model.quantization();
        let remark = (self.adapter.adapter.as_deref())
            .and_then(|adapter| quantisation_remark(adapter, used_on));
        run.warnings
            .extend(remark.map(|(chinese, english)| Caveat::new(chinese, english)));
        if self.writes {
            run.loss = Some(self.loss(&pipeline)?);
            let own: Vec<usize> = self.rows.clone();
            let answers = self.answers(&pipeline, &own, "reports", output.as_mut())?;
            let cut =
                |reason: FinishReason| answers.iter().filter(|a| a.finish_reason == reason).count();
            for (count, chinese, english) in [
                (
                    cut(FinishReason::Length),
                    "份报告写满 --max-new-tokens 被截断",
                    "cut off at --max-new-tokens",
                ),
                (
                    cut(FinishReason::Repetition),
                    "份报告因文字重复而终止",
                    "ended because the text repeated itself",
                ),
            ] {
                if count > 0 {
                    run.warnings.push(Caveat::new(
                        format!("{count} {chinese}"),
                        format!("{} {english}", counted(count, "report was", "reports were")),
                    ));
                }
            }
            run.written = Some(answers.into_iter().map(written).collect());
            if let Some(output) = output {
                output.finish()?;
            }
        }
        if self.swaps {
            run.swapped = self.swapped_reports(&pipeline, &mut run.warnings)?;
        }
        if let Some(train) = &self.neighbour {
            run.embeddings = self.embeddings(&pipeline, train, &mut run.warnings)?;
        }
        Ok(run)
    }
}

fn written(answer: Answer) -> WrittenReport {
    WrittenReport {
        answer: answer.report,
        thinking: answer.thinking,
    }
}

impl ModelWork {
    /// Loss over the true reports.
    fn loss<B: Accelerator>(&self, pipeline: &Pipeline<B>) -> Result<LossTotals> {
        let parts = std::sync::Arc::new(pipeline.parts.clone());
        let loader = |batch_size: usize| {
            // Nothing is cut: what the model was trained on is not known here.
            let plan = WindowPlan::once_in_order(batch_size);
            WindowLoader::new(self.data.clone(), parts.clone(), plan, 0, 1)
        };
        // Rows in order go some at a time, the rest and chosen rows one by one.
        let in_order = self.rows.iter().enumerate().all(|(at, row)| at == *row);
        let whole = if in_order && self.rows.len() == self.data.len() {
            self.rows.len().div_ceil(self.batch_size)
        } else if in_order {
            self.rows.len() / self.batch_size
        } else {
            0
        };
        let (many, single) = (loader(self.batch_size), loader(1));
        let mut totals = LossTotals::default();
        let mut progress = Progress::new("loss", self.rows.len() as u64, Unit::Items);
        let mut done = 0;
        let rest = self.rows.iter().skip(whole * self.batch_size);
        let windows = (0..whole)
            .map(|step| (&many, step))
            .chain(rest.map(|row| (&single, *row)));
        for (loader, step) in windows {
            let window = loader.window(step)?;
            done += window.rows.len();
            for batch in window.parts.iter().flatten() {
                let config = &pipeline.parts.config;
                totals.add(evaluate(&pipeline.model, config, batch, &pipeline.device).totals());
            }
            progress.set(done as u64, self.rows.len() as u64);
        }
        progress.finish();
        Ok(totals)
    }

    /// The model's answers to the questions of all cases, about the images of the rows `shown`.
    fn answers<B: Accelerator>(
        &self,
        pipeline: &Pipeline<B>,
        shown: &[usize],
        what: &str,
        mut output: Option<&mut PredictionFile>,
    ) -> Result<Vec<Answer>> {
        let mut progress = Progress::new(what, self.rows.len() as u64, Unit::Items);
        let mut answers = Vec::with_capacity(self.rows.len());
        let mut drafted = DraftCounts::default();
        let places: Vec<usize> = (0..self.rows.len()).collect();
        for group in places.chunks(self.batch_size) {
            let prompts = group
                .iter()
                .map(|at| question_about(&self.data, &pipeline.parts, self.rows[*at], shown[*at]))
                .collect::<Result<Vec<_>>>()?;
            let (some, timing) =
                pipeline.answer(&prompts, &self.generation, &self.stop, &mut |_, _| {})?;
            drafted.add(timing.drafts);
            for (at, answer) in group.iter().zip(&some) {
                if let Some(output) = output.as_deref_mut() {
                    output.add(&self.cases[*at], answer)?;
                }
            }
            answers.extend(some);
            progress.set(answers.len() as u64, self.rows.len() as u64);
        }
        progress.finish();
        tell(self.generation.drafts.as_ref(), &drafted);
        Ok(answers)
    }

    fn swapped_reports<B: Accelerator>(
        &self,
        pipeline: &Pipeline<B>,
        warnings: &mut Vec<Caveat>,
    ) -> Result<Option<Vec<WrittenReport>>> {
        let studies: Vec<&str> = self.cases.iter().map(|case| case.study.as_str()).collect();
        let images = image_counts(&self.data, self.rows.iter().copied(), &pipeline.parts)?;
        let others = swapped(&studies, &images);
        let alone = others.iter().enumerate().filter(|(at, other)| at == *other);
        let alone = alone.filter(|(at, _)| images[*at] > 0).count();
        if alone == others.len() || images.iter().all(|count| *count == 0) {
            warnings.push(Caveat::new(
                "没有别的检查可以互换影像",
                "no other study to swap images with",
            ));
            return Ok(None);
        }
        if alone > 0 {
            warnings.push(Caveat::new(
                format!("{alone} 份没有同样张数的别的检查，影像未换"),
                format!(
                    "{} no other study with as many images, and keep their own",
                    counted(alone, "report has", "reports have")
                ),
            ));
        }
        let shown: Vec<usize> = others.iter().map(|other| self.rows[*other]).collect();
        let answers = self.answers(pipeline, &shown, "reports, images swapped", None)?;
        Ok(Some(answers.into_iter().map(written).collect()))
    }

    fn embeddings<B: Accelerator>(
        &self,
        pipeline: &Pipeline<B>,
        train: &Dataset,
        warnings: &mut Vec<Caveat>,
    ) -> Result<Option<Embeddings>> {
        let (queries, with_image) =
            self.embed(pipeline, &self.data, &self.rows, "images of the test set")?;
        if with_image.len() < self.rows.len() {
            warnings.push(Caveat::new(
                "测试集有没有影像的样本，不求最近邻",
                "samples of the test set have no image: no nearest neighbour",
            ));
            return Ok(None);
        }
        let all: Vec<usize> = (0..train.len()).collect();
        let (training, rows) = self.embed(pipeline, train, &all, "images of the training set")?;
        if rows.is_empty() {
            warnings.push(Caveat::new(
                "训练集没有影像，不求最近邻",
                "the training set has no image: no nearest neighbour",
            ));
            return Ok(None);
        }
        Ok(Some(Embeddings {
            dimension: queries.len() / self.rows.len().max(1),
            queries,
            training,
            rows,
        }))
    }

    /// Mean of the vision tower's merged features over all images of each row, and the rows that have one.
    fn embed<B: Accelerator>(
        &self,
        pipeline: &Pipeline<B>,
        data: &Dataset,
        rows: &[usize],
        what: &str,
    ) -> Result<(Vec<f32>, Vec<usize>)> {
        let parts = &pipeline.parts;
        let mut progress = Progress::new(what, rows.len() as u64, Unit::Items);
        let (mut values, mut kept) = (Vec::new(), Vec::new());
        for (done, row) in rows.iter().enumerate() {
            let images = data.read(*row, parts)?.pictures;
            if !images.is_empty() {
                let images = patches(parts, &images)
                    .with_context(|| format!("`{}`, row {}", data.name(), row + 1))?;
                let merged =
                    encode_images(&pipeline.model, &images, &parts.config, &pipeline.device).merged;
                let mean = merged.cast(DType::F32).mean_dim(0);
                values.extend(mean.into_data().iter::<f32>());
                kept.push(*row);
            }
            progress.set(done as u64 + 1, rows.len() as u64);
        }
        progress.finish();
        Ok((values, kept))
    }
}

/// The reports as they come, under a name of their own until all are there.
struct PredictionFile {
    path: PathBuf,
    partial: PathBuf,
    file: File,
    keeps_studies: bool,
}

impl PredictionFile {
    fn create(path: &Path, keeps_studies: bool) -> Result<Self> {
        if path.exists() {
            bail!(
                "`{}` is there already; evaluate it with `{} eval {}`, or name another file with --output",
                path.display(),
                program(),
                shell_word(&path.display().to_string())
            );
        }
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let file = File::create(&partial)
            .with_context(|| format!("cannot write `{}`", partial.display()))?;
        Ok(Self {
            path: path.to_owned(),
            partial,
            file,
            keeps_studies,
        })
    }

    fn add(&mut self, case: &Case, answer: &Answer) -> Result<()> {
        let mut record = json!({
            "image": case.name,
            "prompt": case.question,
            "report": answer.report,
            "reference": case.truth,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
        });
        if self.keeps_studies {
            record["study"] = json!(case.study);
        }
        if let Some(thinking) = &answer.thinking {
            record["thinking"] = json!(thinking);
        }
        writeln!(self.file, "{record}")
            .with_context(|| format!("cannot write `{}`", self.partial.display()))
    }

    fn finish(self) -> Result<()> {
        let context = || format!("cannot write `{}`", self.path.display());
        self.file.sync_all().with_context(context)?;
        std::fs::rename(&self.partial, &self.path).with_context(context)
    }
}
