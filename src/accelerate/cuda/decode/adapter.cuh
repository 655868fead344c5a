// Low-rank terms of a decode step, not merged: y += scale * (x A^T) B^T, each row of the batch with the
// adapter it selects, as in S-LoRA (Sheng et al. 2023) and Punica (Chen et al. 2023). x A^T is
// a launch of its own for all matmuls of one input (SHRINK in step.cu); the matmul with B is in the epilogue
// of the base matmul, which holds the sum in registers.

#define ADAPTER_SHARES 3   // most matmuls of one input
#define ADAPTER_RANK 256   // largest rank

// One adapted matrix; rank 0 where the adapter does not cover it.
struct AdapterMatrix {
    const u16* a;            // [rank, k], rank a multiple of 8
    const u16* b;            // [rows, rank]
    const float* row_scale;  // DoRA: magnitude over norm of each row, [rows]; may be null
    int rank;
    float scale;
};

// The position of a matmul's matrices in the table `[adapters, matrices]`.
struct AdapterPlace {
    u64 matrices, first;
};

// `value` is row `row` of the base matmul for the vector whose x A^T is `low`.
__device__ __forceinline__ float adapted(float value, const AdapterMatrix& m, const float* low, int row) {
    float sum = 0.f;
    for (int r = 0; r < m.rank; r += 8) {
        float b[8];
        load_vector(m.b + (u64)row * m.rank + r, b);
        const float4 first = *(const float4*)(low + r), second = *(const float4*)(low + r + 4);
        sum += b[0] * first.x + b[1] * first.y + b[2] * first.z + b[3] * first.w;
        sum += b[4] * second.x + b[5] * second.y + b[6] * second.z + b[7] * second.w;
    }
    value += m.scale * sum;
    return m.rank > 0 && m.row_scale ? value * m.row_scale[row] : value;
}
