//! Windows, their shares and their packing.

use super::*;
use crate::{batch::micro_batch::MicroBatch, runtime::pipeline::PipelineOptions};

fn loader(packing_tokens: usize, devices: usize) -> WindowLoader {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let parts = TextAndImages::load(&PipelineOptions::new(
        root.join("model/tiny"),
        burn::tensor::DType::F32,
    ))
    .unwrap();
    let plan = WindowPlan {
        epochs: 2.0,
        batch_size: 2,
        accumulation: 3,
        devices,
        packing_tokens,
        max_length: 512,
        overlong: Overlong::Error,
        seed: 4,
        in_order: false,
        kind: super::WindowKind::Answers,
    };
    let data = Dataset::open("phantom:11:0..20:house").unwrap();
    WindowLoader::new(data, Arc::new(parts), plan, 0, 1)
}

#[test]
fn the_shares_of_processes_are_the_window_of_one() {
    let first_parts =
        |window: &Window| -> Vec<MicroBatch> { window.parts.iter().flatten().cloned().collect() };
    for packing_tokens in [0, 512] {
        for step in 0..2 {
            let whole = loader(packing_tokens, 3).window(step).unwrap();
            let mut joined = Vec::new();
            // A process with one device and one with two.
            for (first, count) in [(0, 1), (1, 2)] {
                let share = Share {
                    first,
                    count,
                    of: 3,
                };
                let own = loader(packing_tokens, 3).shared(Some(share));
                let own = own.window(step).unwrap();
                assert_eq!(own.first_micro_batch, joined.len());
                assert_eq!(
                    (&own.rows, own.targets, own.tokens, own.micro_batches),
                    (
                        &whole.rows,
                        whole.targets,
                        whole.tokens,
                        whole.micro_batches
                    )
                );
                assert_eq!(own.parts.len(), count);
                joined.extend(first_parts(&own));
            }
            assert!(joined == first_parts(&whole), "step {step}");
            // And the order is that of one device with as many micro-batches.
            let mut alone = loader(packing_tokens, 1);
            alone.plan.accumulation *= 3;
            let alone = alone.window(step).unwrap();
            assert_eq!(alone.rows, whole.rows);
            assert!(joined == first_parts(&alone), "step {step}");
            let targets: usize = joined.iter().map(MicroBatch::targets).sum();
            assert_eq!(targets, whole.targets);
        }
    }
}

#[test]
fn windows_are_dealt_out_in_turn() {
    let whole = loader(0, 1);
    let all: Vec<usize> = whole.stream().map(|window| window.step).collect();
    assert_eq!(all.len(), whole.end());
    let of = |first, count| {
        let share = Share {
            first,
            count,
            of: 3,
        };
        let dealt = loader(0, 1).dealt(Some(share));
        dealt
            .stream()
            .map(|window| window.step)
            .collect::<Vec<usize>>()
    };
    let (one, two) = (of(0, 1), of(1, 2));
    assert_eq!(
        one,
        all.iter()
            .copied()
            .filter(|s| s % 3 == 0)
            .collect::<Vec<_>>()
    );
    assert_eq!(
        two,
        all.iter()
            .copied()
            .filter(|s| s % 3 != 0)
            .collect::<Vec<_>>()
    );
}

#[test]
fn a_packed_window_holds_the_samples_and_targets_of_the_padded_one() {
    for devices in [1, 2] {
        let (padded, packed) = (loader(0, devices), loader(512, devices));
        assert_eq!(padded.end(), packed.end());
        for step in 0..padded.end() {
            let (a, b) = (padded.window(step).unwrap(), packed.window(step).unwrap());
            assert_eq!(
                (&a.rows, a.targets, a.tokens),
                (&b.rows, b.targets, b.tokens)
            );
            assert_eq!((a.step, a.epoch), (b.step, b.epoch));
            assert!(b.micro_batches < a.rows.len(), "nothing was joined");
            for batch in b.parts.iter().flatten() {
                assert_eq!(batch.text.batch(), 1);
                assert!(batch.text.seq() <= 512);
            }
        }
    }
}
