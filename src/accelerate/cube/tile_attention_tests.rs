//! Attention in tiles against plain attention in f32.

use burn::tensor::{DType, Tensor};

use super::{
    launch::Cache,
    tile_attention::attended,
    tile_config::cooperative,
    vulkan::{Backend, strided, tensor},
};
use crate::{
    accelerate::draws,
    ops::{AttentionSpans, cast::to_f32, plain},
};

type T<const D: usize> = Tensor<Backend, D>;

#[test]
#[ignore = "needs a Vulkan device with cooperative matrices"]
fn attention_in_tiles() {
    let device = super::tests::device();
    let probe = strided(T::<1>::zeros([1], (&device, DType::F16)));
    assert!(
        cooperative(&probe.client),
        "the device has no cooperative matrices"
    );
    let padded = |before: usize, tokens: usize| [vec![-1; before], vec![0; tokens]].concat();
    let packed = [vec![0; 21], vec![1; 1], vec![2; 113]].concat();
    let causal = |segments: &[Vec<i32>], first| AttentionSpans::causal(segments, first, &device);
    for (name, heads, kv_heads, head_dim, spans) in [
        ("packed", 4, 1, 32, causal(std::slice::from_ref(&packed), 0)),
        (
            "padded",
            4,
            2,
            64,
            causal(&[padded(3, 130), padded(0, 133)], 0),
        ),
        ("after a cache", 8, 8, 128, causal(&[vec![0; 300]], 250)),
        (
            "images",
            3,
            3,
            72,
            AttentionSpans::blocks(&[25, 80, 140], &device),
        ),
        ("short", 2, 1, 16, causal(&[vec![0; 9]], 0)),
    ] {
        let [batch, queries, keys] = spans.dims();
        let half = |heads: usize, rows: usize| -> T<4> {
            let shape = [batch, rows, heads, head_dim];
            draws::normal(shape, 1.0, DType::F16, &device)
        };
        let q = half(heads, queries).swap_dims(1, 2);
        // A cache with more room than tokens: what is there is no number.
        let held = || -> T<4> {
            let rest = T::<4>::full(
                [batch, 7, kv_heads, head_dim],
                f32::NAN,
                (&device, DType::F16),
            );
            let all = Tensor::cat(vec![half(kv_heads, keys), rest], 1).swap_dims(1, 2);
            strided_copy(all).narrow(2, 0, keys)
        };
        let (k, v) = (held(), held());
        let want = plain::attention(
            to_f32(q.clone()),
            to_f32(k.clone()),
            to_f32(v.clone()),
            &spans,
        );
        let want: Vec<f32> = want.into_data().to_vec().unwrap();
        let [first, end] = spans.ranges().clone().map(|range| range.into_primitive());
        let [q, k, v] = [q, k, v].map(strided);
        let cache = Cache {
            keys: &k,
            values: &v,
        };
        let y = attended(&q, &cache, [&first, &end], keys);
        let got: Vec<f32> = to_f32(tensor::<4>(y).swap_dims(1, 2))
            .into_data()
            .to_vec()
            .unwrap();
        let (mut off, mut size) = (0.0f64, 0.0f64);
        for (at, (got, want)) in got.iter().zip(&want).enumerate() {
            // The output of padding rows is not compared.
            if name == "padded"
                && at / (heads * queries * head_dim) == 0
                && at / head_dim % queries < 3
            {
                continue;
            }
            off += f64::from(got - want).powi(2);
            size += f64::from(*want).powi(2);
        }
        let distance = (off / size).sqrt();
        println!("{name}: {distance:.2e}");
        // Weights and results are rounded to f16.
        assert!(distance < 1e-3, "{name}: {distance}");
    }
}

fn strided_copy(x: T<4>) -> T<4> {
    tensor(burn_cubecl::kernel::into_contiguous(strided(x)))
}
