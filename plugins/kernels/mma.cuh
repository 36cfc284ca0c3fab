// Instructions of compute capability 8.0 and later as functions: asynchronous copies to shared memory, matrix loads, warp matrix products.
// PTX ISA 9.0: sections 9.7.9.25 (cp.async), 9.7.14.5 (mma, ldmatrix).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fq {

__device__ __forceinline__ uint32_t to_shared(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// ---- copies from global to shared memory ----

// 16 bytes, zeros instead of them where `inside` is false; the source is not read then. Both addresses are multiples of 16. Not kept in L1.
__device__ __forceinline__ void copy_16(uint32_t target, const void* source, bool inside) {
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}

// 8 bytes of addresses that are multiples of 8; otherwise as copy_16.
__device__ __forceinline__ void copy_8(uint32_t target, const void* source, bool inside) {
  const int bytes = inside ? 8 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}

// 4 bytes; otherwise as copy_16.
__device__ __forceinline__ void copy_4(uint32_t target, const void* source, bool inside) {
  const int bytes = inside ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}

// Closes a group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Waits for all of this thread's copies, those of no group as well.
__device__ __forceinline__ void wait_for_all_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A barrier of the `kThreads` threads (whole warps) of a block of `kBlock` that name the same `index` from 1 to 15.
template <int kThreads, int kBlock>
__device__ __forceinline__ void sync_threads(int index) {
  if constexpr (kThreads == 32) {
    __syncwarp();
  } else if constexpr (kThreads == kBlock) {
    __syncthreads();
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(index), "n"(kThreads) : "memory");
  }
}

// ---- from shared memory to registers ----

// Four matrices of 8 rows of 16 bytes: lane i names row i % 8 of matrix i / 8; of each it receives bytes 4 (i % 4) .. + 3 of row i / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_8(uint32_t& first, uint32_t& second, uint32_t address) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(first), "=r"(second) : "r"(address) : "memory");
}

__device__ __forceinline__ void load_16(uint32_t (&registers)[4], uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

// ---- warp matrix products, added to `sum` ----
// Lane 4 g + t holds sum[0..1] of row g and sum[2..3] of row g + 8, columns 2t and 2t + 1.

// int8, K = 32: a[0..3] are (row g, K 4t ..), (g + 8, 4t ..), (g, 16 + 4t ..), (g + 8, 16 + 4t ..); b0, b1: column g, K 4t .., 16 + 4t ..
__device__ __forceinline__ void multiply_s8(int32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// int4, K = 64: as above with 8 codes in the place of 4.
__device__ __forceinline__ void multiply_s4(int32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// int4, K = 32: a0 is row g, a1 row g + 8, b column g, each K 8t .. 8t + 7.
__device__ __forceinline__ void multiply_s4(int32_t (&sum)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a0), "r"(a1), "r"(b));
}

}  // namespace fq
