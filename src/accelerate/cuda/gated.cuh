// The gate of the feed-forward block, silu(gate) * up, in f32.

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }

__device__ __forceinline__ float gated(float gate, float up) { return gate * sigmoid(gate) * up; }

// What flows back into gate and up, in their places.
__device__ __forceinline__ void gated_backward(float& gate, float& up, float flowing) {
    const float s = sigmoid(gate);
    const float into_up = flowing * gate * s;
    gate = flowing * up * s * (1.f + gate * (1.f - s));
    up = into_up;
}
