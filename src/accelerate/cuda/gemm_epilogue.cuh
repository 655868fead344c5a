// The epilogue of both matmul kernels (bias, activation, residual, store), and the order of their tiles.
// Comes after common.cuh and before gemm_wgmma.cu or gemm_mma.cu, below the host's #defines:
//
//   OUT_F32       0: output is bf16[M, N]; 1: f32[M, N]
//
//   output = activation(accumulator + bias) + residual, all in f32, rounded once.
//
// Which parts apply is chosen at run time (GemmShape::flags): a uniform branch costs nothing here, and each
// configuration less saves a second of compiling.

#if OUT_F32
using Output = float;
#else
using Output = bf16;
#endif

// The by-value parameter of the kernels: output[m, n] = sum over k, and over the further pairs of
// operands where a kernel takes several (gemm_wgmma.cu).
struct GemmShape {
    int m, n, k, more_k[3];
    int flags;  // EPILOGUE_BIAS, EPILOGUE_RESIDUAL and an activation, added up
    int unused;
};

constexpr int EPILOGUE_BIAS = 1;      // bf16 bias[N], added to every row
constexpr int EPILOGUE_RESIDUAL = 2;  // bf16 residual[M, N], added last; may be the output buffer itself
constexpr int EPILOGUE_GELU_TANH = 4, EPILOGUE_GELU_ERF = 8;

struct Epilogue {
    Output* output;        // [rows, columns]
    const bf16* bias;      // [columns] or null
    const bf16* residual;  // [rows, columns] or null. No __restrict__: it may be `output`.
    int rows, columns, flags;
};

__device__ __forceinline__ Epilogue make_epilogue(Output* output, const bf16* bias, const bf16* residual,
                                                  const GemmShape& shape) {
    return {output, shape.flags & EPILOGUE_BIAS ? bias : nullptr, shape.flags & EPILOGUE_RESIDUAL ? residual : nullptr,
            shape.m, shape.n, shape.flags};
}

// Finishes 16 rows x 32 columns that one warp holds, as accumulators of mma.m16n8 or wgmma.m64nN:
// accumulators[first + 4 block + 2 half + i] of lane l is row l / 4 + 8 half, column 8 block + 2 (l % 4) + i,
// block 0..3. `warp_row`, `warp_column`: the position of the 16 x 32 in the output. N % 8 = 0, so that a block of 8
// columns is wholly inside or outside.
//
// A lane stores the 16 bytes at the address it read the residual from, after reading them: in-place is safe.
template <int COUNT>
__device__ __forceinline__ void finish_16x32(const float (&accumulators)[COUNT], int first, int warp_row,
                                             int warp_column, const Epilogue& epilogue) {
    const int lane = threadIdx.x & 31, quad_lane = lane & 3;
    [[maybe_unused]] const int pair_column = warp_column + 2 * quad_lane;  // of this lane's pair in block 0
    [[maybe_unused]] const int block_column = warp_column + 8 * quad_lane;  // of the block it has once transposed

    u32 bias[4] = {0, 0, 0, 0};
    if (epilogue.bias != nullptr) {
#pragma unroll
        for (int block = 0; block < 4; block++) {
            const int column = pair_column + 8 * block;
            if (column < epilogue.columns) bias[block] = *reinterpret_cast<const u32*>(epilogue.bias + column);
        }
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = warp_row + lane / 4 + 8 * half;
        const size_t row_start = static_cast<size_t>(row) * epilogue.columns;
        [[maybe_unused]] const bool owns_block = row < epilogue.rows && block_column < epilogue.columns;

        u32 residual[4] = {0, 0, 0, 0};
        if (epilogue.residual != nullptr) {
            if (owns_block) {
                const uint4 words = *reinterpret_cast<const uint4*>(epilogue.residual + row_start + block_column);
                residual[0] = words.x;
                residual[1] = words.y;
                residual[2] = words.z;
                residual[3] = words.w;
            }
            quad_transpose(residual);
        }

        float low[4], high[4];
#pragma unroll
        for (int block = 0; block < 4; block++) {
            low[block] = accumulators[first + 4 * block + 2 * half] + low_bf16(bias[block]);
            high[block] = accumulators[first + 4 * block + 2 * half + 1] + high_bf16(bias[block]);
        }
        if (epilogue.flags & EPILOGUE_GELU_TANH) {
#pragma unroll
            for (int block = 0; block < 4; block++) {
                low[block] = gelu_tanh(low[block]);
                high[block] = gelu_tanh(high[block]);
            }
        } else if (epilogue.flags & EPILOGUE_GELU_ERF) {
#pragma unroll
            for (int block = 0; block < 4; block++) {
                low[block] = gelu_erf(low[block]);
                high[block] = gelu_erf(high[block]);
            }
        }
#pragma unroll
        for (int block = 0; block < 4; block++) {
            low[block] += low_bf16(residual[block]);
            high[block] += high_bf16(residual[block]);
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
