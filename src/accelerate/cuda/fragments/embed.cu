// The rows of a quantised table for the tokens of a decode step: x[row] = table[token[row]], 8 bits, a scale a row; and what the
// first norm needs of them (fragments.cuh: NEXT).
//
// Configuration: FRAGMENTS (the table is in fragment order, because it is the head too; else row-major), OVERLAP.
// A block a row, a thread 16 columns. Limit: launch.

struct Parameters {
    u64 width;  // a multiple of 16
};

extern "C" __global__ void __launch_bounds__(256)
ENTRY(const u32* words, const float* scales, const int* token, u16* x, const u16* next_weight, u16* next_x, float* next_squares,
      const __grid_constant__ Parameters p) {
    let_next_begin();
    wait_for_last();
    const int width = (int)p.width, parts = width / 16;
    const u64 row = token[blockIdx.x];
    const float scale = scales[row];
    for (int i = threadIdx.x; i < parts; i += 256) {
        float squares = 0.f;
#pragma unroll
        for (int v = 0; v < 16; v++) {
            const int column = i * 16 + v;
#if FRAGMENTS
            const u64 lane = (row / 16 * (width / 32) + column / 32) * 32 + row % 8 * 4 + column % 32 / 8;
            const int place = row / 8 % 2 + 2 * (column % 2);
            const float level = (float)(int)(signed char)(words[lane * 4 + column % 8 / 2] >> (8 * place));
#else
            const float level = (float)((int)(words[row * (width / 4) + column / 4] >> (8 * (column % 4)) & 255) - 128);
#endif
            const float value = rounded(level * scale);
            const u64 at = (u64)blockIdx.x * width + column;
            x[at] = (u16)pack_bf16(value, 0.f);
            next_x[at] = (u16)pack_bf16(value * bf16_to_float(next_weight[column]), 0.f);
            squares += value * value;
        }
        next_squares[(u64)blockIdx.x * parts + i] = squares;
    }
}
