// Clusters of thread blocks, from compute capability 9.0 on; what waits or stores does nothing before.
// PTX ISA 9.0: sections 9.7.13.4 (barrier.cluster), 9.7.9.23 (mapa).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fq {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster: what each wrote before it arrives, each sees once it has waited.
__device__ __forceinline__ void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// The same for barriers that order no ordinary accesses between blocks.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Reads the same place of shared memory in another block.
__device__ __forceinline__ float read_from_block(const float& place, uint32_t block) {
  float value = 0.0f;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [remote];\n"
      "}\n"
      : "=f"(value)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(&place))), "r"(block)
      : "memory");
#endif
  return value;
}

// Writes to it.
__device__ __forceinline__ void write_to_block(float& place, uint32_t block, float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.f32 [remote], %2;\n"
      "}\n" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(&place))),
      "r"(block), "f"(value)
      : "memory");
#endif
}

}  // namespace fq
