//! Two CPU ranks of the tiny model.

use std::path::Path;

use burn::{backend::Autodiff, module::Module, tensor::DType};

use super::*;
use crate::{
    adapters::lora::attach::attach,
    dataset::{Dataset, loader::WindowLoader},
    runtime::pipeline::{PipelineOptions, TextAndImages, load_model},
    train::{config::TrainConfig, learner::StepSettings},
};

type AB = Autodiff<burn_flex::Flex>;

/// The tiny model with fresh adapters, two CPU ranks of it, and a window for both.
fn two_ranks(patience: Duration) -> (Trainee<AB>, Result<Replicas<AB>, RankError>, Window) {
    let config = TrainConfig {
        gradient_accumulation_steps: 1,
        lora_dropout: 0.0,
        ..TrainConfig::default()
    };
    let options = PipelineOptions::new(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("model/tiny"),
        DType::F32,
    );
    let device = Default::default();
    let parts = TextAndImages::load(&options).unwrap();
    let sizes = parts.config.clone();
    let base = load_model::<AB>(&options, &sizes, &device, &mut |_, _| {}).unwrap();
    let (model, _) = attach(base.no_grad(), &config.lora_config(), 1).unwrap();
    let settings = StepSettings {
        config: sizes,
        train: config.clone(),
        loss_scale: None,
        reference: Default::default(),
    };
    let model = Trainee::new(model, Arc::new(settings));
    let data = Dataset::open("phantom:11:0..8:house").unwrap();
    let loader = WindowLoader::new(data, Arc::new(parts), config.window_plan(2), 0, 1);
    let replicas = Replicas::start(
        &[device, device],
        &["cpu".to_string(), "cpu".to_string()],
        &model,
        &AdamW::new(config.adamw()),
        1.0,
        None,
        patience,
    );
    (model, replicas, loader.window(0).unwrap())
}

#[test]
fn a_rank_that_panics_in_the_model_ends_the_step_of_both() {
    let (model, replicas, window) = two_ranks(Duration::from_secs(300));
    let mut replicas = replicas.unwrap();
    let learnt = replicas.learn(&model, window.clone(), None).unwrap();
    assert_eq!(learnt.len(), 2);
    let pieces = learnt.iter().flat_map(|part| &part.pieces);
    let targets: usize = pieces.map(|piece| piece.totals.targets).sum();
    assert_eq!(targets, window.targets);
    replicas.compare(&model, 0).unwrap();
    let sums = replicas.reduce(&model, 1e-3).unwrap();
    assert!(!sums.is_empty());
    replicas.finish_step().unwrap();
    // The first rank was left where it was.
    let error = replicas.compare(&model, 1).unwrap_err().to_string();
    assert!(
        error.contains("after step 1 the weights of device `cpu` (rank 1)"),
        "{error}"
    );

    // A window that was sent ahead is trained on as if it had come in its turn.
    let mut ahead = window.clone();
    let first = replicas
        .learn(&model, window.clone(), Some(&mut ahead))
        .unwrap();
    assert_eq!((ahead.parts.len(), ahead.targets), (0, window.targets));
    let second = replicas.learn(&model, ahead, None).unwrap();
    let loss = |all: &[Learnt]| {
        let pieces = all.iter().flat_map(|part| &part.pieces);
        pieces.map(|piece| piece.objective).sum::<f64>()
    };
    assert_eq!(loss(&first), loss(&second));

    // No row of the embedding has this number: the second rank's model panics.
    let mut broken = window;
    broken.parts[1][0].text.input_ids[0][0] = 1 << 24;
    let error = replicas.learn(&model, broken, None).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("`cpu` (rank 1) failed while working out gradients: "),
        "{text}"
    );
}

#[test]
fn ranks_that_are_slow_beyond_the_time_out_are_named() {
    // Now and then both are done before anybody looks.
    let slow = || two_ranks(Duration::from_nanos(1)).1.err();
    let error = (0..50).find_map(|_| slow()).unwrap().to_string();
    assert!(
        error.contains("`cpu` (rank 1) did not end taking a copy of the model"),
        "{error}"
    );
}
