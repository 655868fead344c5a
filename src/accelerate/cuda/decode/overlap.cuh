// Kernels of a step that begin before the one in front has ended (programmatic dependent launch, sm_90).
//
// With OVERLAP 1 a kernel's blocks come in while the last of the one in front still run. Until
// `wait_for_last` they may read weights only, which nothing writes; every thread calls it before it
// touches anything else, so that a kernel has ended only after all in front of it have.

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
