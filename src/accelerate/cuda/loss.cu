// Softmax cross-entropy of rows of f32 logits [rows, vocab] against one id a row: loss, whether the
// id is the likeliest, and the logits' gradient in bf16 (or f32). One block a row, two passes: the
// maximum and the sum of exponentials are carried along together (Milakov and Gimelshein 2018).
//
// Limit: memory; a row is read twice (the second time mostly from L2) and written once.
// On an H100 (Nsight Compute, 512 rows of 151,936): 53 % of the memory's rate, 42 registers.

// With LOSS_SUMS: sums of the losses and of the correct predictions, one block, in a fixed order.

#if LOSS_SUMS
struct Parameters {
    u64 rows;
};

extern "C" __global__ void __launch_bounds__(256)
ENTRY(const float* nll, const float* correct, float* sums, const __grid_constant__ Parameters p) {
    __shared__ float scratch[8];
    float loss = 0.f, right = 0.f;
    for (u64 i = threadIdx.x; i < p.rows; i += 256) {
        loss += nll[i];
        right += correct[i];
    }
    loss = block_sum<8>(loss, scratch);
    right = block_sum<8>(right, scratch);
    if (threadIdx.x == 0) {
        sums[0] = loss;
        sums[1] = right;
    }
}
#else
#define THREADS 512
#define WARPS (THREADS / 32)

struct Parameters {
    u64 vocab;
    u64 weight;  // f32 bits
};

struct Best {
    float value;
    int index;
};

__device__ __forceinline__ Best better(Best a, Best b) {
    // The first of equals, as the plain operation picks.
    const bool take = b.value > a.value || (b.value == a.value && b.index < a.index);
    return take ? b : a;
}

extern "C" __global__ void __launch_bounds__(THREADS)
ENTRY(const float* logits, const int* ids, float* nll, float* correct, scalar* gradient,
      const __grid_constant__ Parameters p) {
    __shared__ float shared_sum[WARPS];
    __shared__ Best shared_best[WARPS];
    const int vocab = (int)p.vocab;
    const float* row = logits + (u64)blockIdx.x * vocab;
    Best best = {-3.4e38f, 0x7fffffff};
    float sum = 0.f;
    for (int at = threadIdx.x; at < vocab; at += THREADS) {
        const float value = row[at];
        if (value > best.value) {
            sum *= __expf(best.value - value);
            best.value = value;
            best.index = at;
        }
        sum += __expf(value - best.value);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance >>= 1) {
        Best other;
        other.value = __shfl_xor_sync(~0u, best.value, distance);
        other.index = __shfl_xor_sync(~0u, best.index, distance);
        const float other_sum = __shfl_xor_sync(~0u, sum, distance);
        const Best joined = better(best, other);
        sum = sum * __expf(best.value - joined.value) + other_sum * __expf(other.value - joined.value);
        best = joined;
    }
    const int warp = threadIdx.x >> 5;
    if ((threadIdx.x & 31) == 0) {
        shared_sum[warp] = sum;
        shared_best[warp] = best;
    }
    __syncthreads();
    best = shared_best[0];
    for (int i = 1; i < WARPS; i++) best = better(best, shared_best[i]);
    sum = 0.f;
    for (int i = 0; i < WARPS; i++) sum += shared_sum[i] * __expf(shared_best[i].value - best.value);

    const int id = ids[blockIdx.x];
    if (threadIdx.x == 0) {
        nll[blockIdx.x] = logf(sum) + best.value - row[id];
        correct[blockIdx.x] = best.index == id ? 1.f : 0.f;
    }
    const float weight = __uint_as_float((u32)p.weight);
    const float scale = weight / sum;
    scalar* out = gradient + (u64)blockIdx.x * vocab;
    for (int at = threadIdx.x; at < vocab; at += THREADS) {
        const float share = __expf(row[at] - best.value) * scale;
        store(out + at, at == id ? share - weight : share);
    }
}
#endif
