//! Drafted tokens in the fused step: rows of one sequence.

use burn::tensor::DType;

use super::{tests::device, vulkan::Backend};
use crate::runtime::{
    generate::{
        GenerationConfig, Prompt,
        drafts::{DraftCounts, DraftStore, Drafts},
        generate,
    },
    synthetic::weights::{RandomSize, draw},
};

#[test]
#[ignore = "needs a Vulkan device"]
fn drafted_text_is_the_same_token_for_token() {
    let device = device();
    let config = RandomSize::Tiny.config(None).unwrap();
    for quantize in [None, Some("int4".parse().unwrap())] {
        let model = draw::<Backend>(&config, 3, DType::F32, quantize, &device);
        let answer = |prompt: &Prompt, drafts: Option<Drafts>| {
            let settings = GenerationConfig {
                max_new_tokens: 40,
                stop_on_repetition: false,
                drafts,
                ..GenerationConfig::default()
            };
            let one = std::slice::from_ref(prompt);
            let (mut answers, timing) =
                generate(&model, &config, one, &settings, &device, &mut |_, _| None).unwrap();
            (answers.remove(0).token_ids, timing)
        };
        let nothing = Drafts {
            most: 0,
            ..Drafts::default()
        };
        let (mut counts, mut other_kernels) = (DraftCounts::default(), 0);
        for at in 0..2u32 {
            let prompt = Prompt {
                input_ids: (0..230 + 7 * at)
                    .map(|id| (id * 37 + at * 11) % 1000)
                    .collect(),
                images: Default::default(),
            };
            let (want, none) = answer(&prompt, Some(nothing.clone()));
            assert_eq!((none.drafts.drafted, none.drafts.steps), (0, 39));
            let mut texts = vec![want.clone()];
            texts[0][13] = 3;
            let drafts = Drafts::from_store(DraftStore::new(&texts));
            let (got, timing) = answer(&prompt, Some(drafts));
            assert_eq!(got, want, "prompt {at}");
            assert_eq!(timing.decoded_tokens, 39);
            counts.add(timing.drafts);
            let (plain, _) = answer(&prompt, None);
            other_kernels += usize::from(plain != want);
        }
        println!("{quantize:?}: {counts:?}; {other_kernels} of 2 differ from the step of one row");
        assert!(counts.accepted > 33, "{counts:?}");
        assert!(other_kernels <= 1, "{other_kernels}");
    }
}
