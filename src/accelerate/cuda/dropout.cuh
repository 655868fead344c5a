// Dropout masks from a counter: the forward and the backward pass draw the same mask without
// storing it. One 32-bit hash decides two neighbouring columns, 16 bits each. The same function as
// `Dropout::mask` in ops/dropout.rs, bit for bit.

struct Mask {
    u32 seed_low, seed_high;
    u32 threshold;  // of 65,536: columns whose 16 bits are below it are dropped
    float scale;    // 1 / share that is kept
};

// Source: the finaliser of MurmurHash3, keyed before and between its rounds.
__device__ __forceinline__ u32 mask_bits(u32 pair, const Mask& mask) {
    u32 x = (pair ^ mask.seed_low) * 0x9e3779b1u;
    x ^= x >> 15;
    x = (x ^ mask.seed_high) * 0x85ebca77u;
    x ^= x >> 13;
    x *= 0xc2b2ae3du;
    return x ^ (x >> 16);
}

// Whether the left and the right of two columns are kept, by their half of the bits.
__device__ __forceinline__ bool keeps_low(u32 bits, const Mask& mask) { return bits << 16 >= mask.threshold << 16; }
__device__ __forceinline__ bool keeps_high(u32 bits, const Mask& mask) { return bits >= mask.threshold << 16; }

// Zeroes or keeps two bf16 values that share a register; the scale is applied elsewhere.
__device__ __forceinline__ u32 drop_pair(u32 packed, u32 pair, const Mask& mask) {
    const u32 bits = mask_bits(pair, mask);
    if (!keeps_low(bits, mask)) packed &= 0xffff0000u;
    if (!keeps_high(bits, mask)) packed &= 0x0000ffffu;
    return packed;
}
