// What both matrix-product kernels do with a finished tile, and the order in which they walk over the tiles.
// Comes after common.cuh and before gemm_wgmma.cu or gemm_mma.cu, below the host's #defines:
//
//   HAS_BIAS      0 or 1: bf16 bias[N], added to every row
//   ACTIVATION    0 none, 1 GELU (tanh form), 2 GELU (erf form), 3 SiLU
//   HAS_RESIDUAL  0 or 1: bf16 residual[M, N], added last; may be the output buffer itself
//   OUT_F32       0: output is bf16[M, N]; 1: f32[M, N]
//
//   output = activation(accumulator + bias) + residual, all in f32, rounded once.

#if OUT_F32
using Output = float;
#else
using Output = bf16;
#endif

// The by-value parameter of the kernels: output[m, n] = sum over k, and over the further pairs of
// operands where a kernel takes several (gemm_wgmma.cu).
struct GemmShape {
    int m, n, k, more_k[3];
};

struct Epilogue {
    Output* output;        // [rows, columns]
    const bf16* bias;      // [columns] or null
    const bf16* residual;  // [rows, columns] or null. No __restrict__: it may be `output`.
    int rows, columns;
};

__device__ __forceinline__ float activate(float x) {
#if ACTIVATION == 1
    return gelu_tanh(x);
#elif ACTIVATION == 2
    return gelu_erf(x);
#elif ACTIVATION == 3
    return silu(x);
#else
    return x;
#endif
}

// Finishes 16 rows x 32 columns that one warp holds, as accumulators of mma.m16n8 or wgmma.m64nN:
// accumulators[first + 4 block + 2 half + i] of lane l is row l / 4 + 8 half, column 8 block + 2 (l % 4) + i,
// block 0..3. `warp_row`, `warp_column`: where the 16 x 32 lie in the output. N % 8 = 0, so that a block of 8
// columns lies wholly inside or outside.
//
// A lane stores the 16 bytes at the place from where it read the residual, after reading them: in-place is safe.
template <int COUNT>
__device__ __forceinline__ void finish_16x32(const float (&accumulators)[COUNT], int first, int warp_row,
                                             int warp_column, const Epilogue& epilogue) {
    const int lane = threadIdx.x & 31, quad_lane = lane & 3;
    [[maybe_unused]] const int pair_column = warp_column + 2 * quad_lane;  // of this lane's pair in block 0
    [[maybe_unused]] const int block_column = warp_column + 8 * quad_lane;  // of the block it has once transposed

#if HAS_BIAS
    u32 bias[4] = {0, 0, 0, 0};
#pragma unroll
    for (int block = 0; block < 4; block++) {
        const int column = pair_column + 8 * block;
        if (column < epilogue.columns) bias[block] = *reinterpret_cast<const u32*>(epilogue.bias + column);
    }
#endif

#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = warp_row + lane / 4 + 8 * half;
        const size_t row_start = static_cast<size_t>(row) * epilogue.columns;
        [[maybe_unused]] const bool owns_block = row < epilogue.rows && block_column < epilogue.columns;

#if HAS_RESIDUAL
        u32 residual[4] = {0, 0, 0, 0};
        if (owns_block) {
            const uint4 words = *reinterpret_cast<const uint4*>(epilogue.residual + row_start + block_column);
            residual[0] = words.x;
            residual[1] = words.y;
            residual[2] = words.z;
            residual[3] = words.w;
        }
        quad_transpose(residual);
#endif

        float low[4], high[4];
#pragma unroll
        for (int block = 0; block < 4; block++) {
            low[block] = accumulators[first + 4 * block + 2 * half];
            high[block] = accumulators[first + 4 * block + 2 * half + 1];
#if HAS_BIAS
            low[block] += low_bf16(bias[block]);
            high[block] += high_bf16(bias[block]);
#endif
            low[block] = activate(low[block]);
            high[block] = activate(high[block]);
#if HAS_RESIDUAL
            low[block] += low_bf16(residual[block]);
            high[block] += high_bf16(residual[block]);
#endif
        }

#if OUT_F32
        // Eight bytes a lane: the quad fills a 32-byte sector.
#pragma unroll
        for (int block = 0; block < 4; block++) {
            const int column = pair_column + 8 * block;
            if (row < epilogue.rows && column < epilogue.columns)
                *reinterpret_cast<float2*>(epilogue.output + row_start + column) = make_float2(low[block], high[block]);
        }
#else
        u32 packed[4];
#pragma unroll
        for (int block = 0; block < 4; block++) packed[block] = pack_bf16x2(low[block], high[block]);
        quad_transpose(packed);
        if (owns_block)
            *reinterpret_cast<uint4*>(epilogue.output + row_start + block_column) =
                make_uint4(packed[0], packed[1], packed[2], packed[3]);
#endif
    }
}

struct TileOrigin {
    int row, column;
};

// Where tile number `tile` starts. Tiles are numbered down a strip of 8 row tiles, then along the columns, strip
// after strip: blocks that run at one time share rows of A and columns of B in L2.
__device__ __forceinline__ TileOrigin tile_origin(int tile, int row_tiles, int column_tiles, int tile_rows,
                                                  int tile_columns) {
    const int strip_height = 8;
    const int strip_tiles = strip_height * column_tiles;
    const int first_row_tile = tile / strip_tiles * strip_height;
    const int height = min(row_tiles - first_row_tile, strip_height);
    const int within = tile % strip_tiles;
    return {(first_row_tile + within % height) * tile_rows, within / height * tile_columns};
}
