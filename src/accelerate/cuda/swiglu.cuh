// SwiGLU of the feed-forward block, silu(gate) * up, in f32.

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }

__device__ __forceinline__ float swiglu(float gate, float up) { return gate * sigmoid(gate) * up; }

// The gradients of gate and up, in place; `gradient` is that of the output.
__device__ __forceinline__ void swiglu_backward(float& gate, float& up, float gradient) {
    const float s = sigmoid(gate);
    const float into_up = gradient * gate * s;
    gate = gradient * up * s * (1.f + gate * (1.f - s));
    up = into_up;
}
