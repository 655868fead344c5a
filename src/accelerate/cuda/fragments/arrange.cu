// Quantised weights between their two forms: row-major words to fragment order (fragments.cuh), and fragments to floats.
//
// Configuration: one of
//   ARRANGE  words of some tiles of 16 rows, row-major -> `to`, in fragment order; a thread an output word
//   SCALES   4 bits: scales f16 [16 tiles, groups] -> `to`, pairs of rows g and g + 8; a thread a pair
//   PUT      `to` <- words, 16 bytes a thread; what the other two wrote goes to where it came from
//   FLOATS   rows start .. start + count in fragment order -> floats [count, K]; a warp a piece, 16 bytes of a row a store
//   PICK     rows by index in fragment order -> floats [count, K]; a thread 8 columns
//   ROWS     rows start .. start + count of row-major words -> floats [count, K], K a multiple of 8; a thread 8 columns,
//            four times; ZEROS = 1: with zero points f16 in the shape of the scales
// and BITS; FLOATS, PICK and ROWS: SCALAR_BF16 (or f32) and GROUP (0 for 8 bits).
// Limit: memory. All layers of the 8B are arranged in some 10 ms.

struct Parameters {
    u64 tiles;   // of 16 rows
    u64 k;
    u64 groups;  // scales of a row
    u64 start, count;
    u64 offset;  // PUT: first 16 bytes in `to`; ARRANGE, SCALES: first word in `from`; ROWS: words of a row
};

#define COLUMNS (BITS == 8 ? 32 : 64)

#if ARRANGE
extern "C" __global__ void __launch_bounds__(256) ENTRY(const u32* from, u32* to, const __grid_constant__ Parameters p) {
    const int pieces = (int)p.k / COLUMNS, words_row = pieces * 8;
    const u64 count = p.tiles * pieces * 128;
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < count; i += (u64)gridDim.x * 256) {
        const int word = i & 3, lane = (i >> 2) & 31;
        const u64 piece_of_all = i >> 7;
        const int piece = piece_of_all % pieces, g = lane >> 2, t = lane & 3;
        const u32* row = from + p.offset + (piece_of_all / pieces * 16 + g) * words_row + piece * 8;
        u32 out = 0;
#if BITS == 8
        // Bytes 2 h and 2 h + 1 of word 2 t + j.
        const int j = word >> 1, h = word & 1;
        const u32 upper = row[2 * t + j] >> (16 * h), lower = row[8 * words_row + 2 * t + j] >> (16 * h);
        out = __byte_perm(upper, lower, 0x5140) ^ 0x80808080u;
#else
        // Four nibbles of word 4 (j / 2) + t.
        const int j = word;
        const u32 upper = row[4 * (j >> 1) + t] >> (16 * (j & 1)), lower = row[8 * words_row + 4 * (j >> 1) + t] >> (16 * (j & 1));
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int nibble = 4 * (2 * h + e);
                out |= ((upper >> nibble) & 15) << (8 * h + 16 * e) | ((lower >> nibble) & 15) << (4 + 8 * h + 16 * e);
            }
#endif
        to[i] = out;
    }
}
#endif

#if SCALES
extern "C" __global__ void __launch_bounds__(256) ENTRY(const u16* from, u32* to, const __grid_constant__ Parameters p) {
    const u64 count = p.tiles * p.groups * 8;
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < count; i += (u64)gridDim.x * 256) {
        const u64 group = i / 8 % p.groups, tile = i / 8 / p.groups;
        const u16* row = from + p.offset + (tile * 16 + i % 8) * p.groups + group;
        to[i] = row[0] | (u32)row[8 * p.groups] << 16;
    }
}
#endif

#if PUT
extern "C" __global__ void __launch_bounds__(256) ENTRY(const uint4* from, uint4* to, const __grid_constant__ Parameters p) {
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < p.count; i += (u64)gridDim.x * 256) to[p.offset + i] = from[i];
}
#endif

__device__ __forceinline__ float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ void store_eight(scalar* to, const float (&values)[8]) {
#pragma unroll
    for (int v = 0; v < 8 / VECTOR; v++) {
        float some[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; i++) some[i] = values[v * VECTOR + i];
        store_vector(to + v * VECTOR, some);
    }
}

#if FLOATS || PICK
#if BITS == 8
typedef float Scale;
#else
typedef u32 Scale;
#endif

// Eight neighbours of row `half * 8 + g` of a tile: columns 32 part + 8 t and on of the piece that `words` is a lane's share of.
__device__ __forceinline__ void eight(const uint4& words, int part, int half, float scale, float (&values)[8]) {
    const u32 all[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int j = i >> 2, h = i >> 1 & 1, e = i & 1;
#if BITS == 8
        const int level = (int)(signed char)(all[2 * j + h] >> (8 * (half + 2 * e)));
#else
        const int level = (int)(all[2 * part + j] >> (4 * (half + 2 * h) + 16 * e) & 15) - 8;
#endif
        values[i] = (float)level * scale;
    }
}

__device__ __forceinline__ float scale_of(const Scale* scales, u64 tile, int g, int half, int column, const Parameters& p) {
#if BITS == 8
    return scales[tile * 16 + half * 8 + g];
#else
    return half_to_float((u16)(scales[(tile * p.groups + column / GROUP) * 8 + g] >> (16 * half)));
#endif
}
#endif

#if FLOATS
extern "C" __global__ void __launch_bounds__(256) ENTRY(const uint4* words, const Scale* scales, scalar* y, const __grid_constant__ Parameters p) {
    const int pieces = (int)p.k / COLUMNS, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const u64 first_tile = p.start / 16, tiles = (p.start + p.count + 15) / 16 - first_tile;
    for (u64 i = (u64)blockIdx.x * 8 + (threadIdx.x >> 5); i < tiles * pieces; i += (u64)gridDim.x * 8) {
        const u64 tile = first_tile + i / pieces;
        const int piece = i % pieces;
        const uint4 own = words[(tile * pieces + piece) * 32 + lane];
#pragma unroll
        for (int part = 0; part < COLUMNS / 32; part++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u64 row = tile * 16 + half * 8 + g;
                if (row < p.start || row >= p.start + p.count) continue;
                const int column = piece * COLUMNS + part * 32;
                float values[8];
                eight(own, part, half, scale_of(scales, tile, g, half, column, p), values);
                store_eight(y + (row - p.start) * p.k + column + t * 8, values);
            }
    }
}
#endif

#if PICK
extern "C" __global__ void __launch_bounds__(256)
ENTRY(const uint4* words, const Scale* scales, const int* rows, scalar* y, const __grid_constant__ Parameters p) {
    const u64 eights = p.k / 8;
    const int pieces = (int)p.k / COLUMNS;
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < p.count * eights; i += (u64)gridDim.x * 256) {
        const u64 tile = rows[i / eights] / 16;
        const int within = rows[i / eights] % 16, g = within % 8, half = within / 8, column = i % eights * 8;
        const uint4 own = words[(tile * pieces + column / COLUMNS) * 32 + g * 4 + column / 8 % 4];
        float values[8];
        eight(own, column % COLUMNS / 32, half, scale_of(scales, tile, g, half, column, p), values);
        store_eight(y + i * 8, values);
    }
}
#endif

#if ROWS
#if BITS == 8
typedef float RowScale;
#else
typedef u16 RowScale;
#endif

__device__ __forceinline__ float row_value(RowScale value) {
#if BITS == 8
    return value;
#else
    return half_to_float(value);
#endif
}

extern "C" __global__ void __launch_bounds__(256) ENTRY(const u32* __restrict__ words, const RowScale* __restrict__ scales,
#if ZEROS
                                                        const RowScale* __restrict__ zeros,
#endif
                                                        scalar* __restrict__ y, const __grid_constant__ Parameters p) {
    constexpr int EACH = 4, WORDS = BITS / 4;
    const u32 eights = (u32)p.k / 8, total = (u32)p.count * eights;
    for (u32 base = blockIdx.x * 256 * EACH + threadIdx.x; base < total; base += gridDim.x * 256 * EACH) {
        u32 own[EACH][WORDS];
        float scale[EACH], zero[EACH];
        // All reads of a turn are under way before the first is used.
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const u32 i = min(base + j * 256, total - 1);
            const u64 row = p.start + i / eights;
            const u32 eight = i % eights;
#pragma unroll
            for (int word = 0; word < WORDS; word++) own[j][word] = words[row * p.offset + eight * WORDS + word];
            const u64 group = row * p.groups + (GROUP ? eight * 8 / (GROUP ? GROUP : 1) : 0);
            scale[j] = row_value(scales[group]);
#if ZEROS
            zero[j] = row_value(zeros[group]);
#else
            zero[j] = (float)(1 << (BITS - 1));
#endif
        }
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const u32 i = base + j * 256;
            float values[8];
#pragma unroll
            for (int v = 0; v < 8; v++) {
                const u32 level = own[j][v * BITS / 32] >> (v * BITS % 32) & ((1u << BITS) - 1);
                values[v] = ((float)level - zero[j]) * scale[j];
            }
            if (i < total) store_eight(y + (u64)i * 8, values);
        }
    }
}
#endif
