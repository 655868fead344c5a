// Kernels of a step that begin before the previous one has ended (programmatic dependent launch, sm_90).
//
// With OVERLAP 1 a kernel's blocks start while the last of the previous one still run. Until
// `wait_for_last` they may read weights only, which nothing writes; every thread calls it before it
// touches anything else, so that a kernel ends only after all previous ones have.

#ifndef OVERLAP
#define OVERLAP 0
#endif

__device__ __forceinline__ void let_next_begin() {
#if OVERLAP
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_last() {
#if OVERLAP
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
