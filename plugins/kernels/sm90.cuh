// Hopper's instructions as functions: barriers in shared memory, the bulk tensor copy engine, warpgroup matrix products' fences.
// PTX ISA 9.0: sections 9.7.13 (mbarrier), 9.7.9.27 (cp.async.bulk.tensor), 9.7.15 (wgmma).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernel.h"

namespace fq::sm90 {

// ---- host: tensor maps ----


struct Matrix {
  const void* data;      // 16-byte aligned
  uint64_t rows, columns;
  uint64_t row_bytes;    // from row to row, a multiple of 16
  CUtensorMapDataType type;
  int element_bytes;
};

using EncodeTensorMap = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                     const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                     CUtensorMapFloatOOBfill);

// The driver's encoder of tensor maps, so that the library need not be linked to the driver; null where the driver is too old.
inline EncodeTensorMap tensor_map_encoder() {
  static const EncodeTensorMap encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTensorMap>(function) : nullptr;
  }();
  return encode;
}

// A map of kRank dimensions, the contiguous one first, for copies of boxes; what lies outside of the tensor reads as zero and is not written.
// `strides` are the bytes from one index to the next of all dimensions but the first, multiples of 16.
template <int kRank>
fq_status make_tensor_map(CUtensorMap* map, const void* data, CUtensorMapDataType type, const cuuint64_t (&sizes)[kRank],
                          const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank], CUtensorMapSwizzle swizzle,
                          CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  const EncodeTensorMap encode = tensor_map_encoder();
  if (encode == nullptr) return fail(FQ_CUDA_ERROR, "the driver has no cuTensorMapEncodeTiled: update it to one for CUDA 12 or later");
  cuuint32_t steps[kRank];
  for (cuuint32_t& step : steps) step = 1;
  const auto make = [&] {
    return encode(map, type, kRank, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = make();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {  // a thread of which the runtime does not know yet
    int device = 0;
    if (cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess) result = make();
  }
  if (result != CUDA_SUCCESS)
    return fail(FQ_CUDA_ERROR, "cuTensorMapEncodeTiled refused a tensor with rows of %llu with error %d",
                static_cast<unsigned long long>(sizes[0]), static_cast<int>(result));
  return FQ_OK;
}

// The same for boxes of `box_rows` x `box_columns` of a matrix.
inline fq_status make_tensor_map(CUtensorMap* map, const Matrix& matrix, uint32_t box_rows, uint32_t box_columns, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  return make_tensor_map<2>(map, matrix.data, matrix.type, {matrix.columns, matrix.rows}, {matrix.row_bytes}, {box_columns, box_rows}, swizzle,
                            promotion);
}

// ---- addresses and barriers ----

__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Makes initialized barriers visible to the cluster and to the copy engine.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Orders ordinary accesses to shared memory before those of the copy engine and of wgmma.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives at the same barrier of another block of the cluster. It orders nothing beyond the block: enough to give a stage back, whose
// contents only the copy engine writes; a release at cluster scope would cost a fence of the whole GPU at each stage.
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, uint32_t block) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(block)
      : "memory");
}

__device__ __forceinline__ bool barrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// The same at once.
__device__ __forceinline__ bool barrier_test(uint64_t* barrier, uint32_t parity) {
  uint32_t complete;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(complete)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return complete != 0;
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!barrier_try_wait(barrier, parity)) {
  }
}

// ---- the copy engine ----

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Whether what is copied is wanted again: cache hints as the copy engine takes them.
enum class Keep : uint64_t { kNormal = 0x1000000000000000, kFirstOut = 0x12F0000000000000, kLastOut = 0x14F0000000000000 };

__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, int32_t column, int32_t row, Keep keep) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "l"(static_cast<uint64_t>(keep))
      : "memory");
}

__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, int32_t column, int32_t row, int32_t plane,
                                         Keep keep) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(plane), "l"(static_cast<uint64_t>(keep))
      : "memory");
}

// The same to the same place, and barrier, of every block of the cluster whose bit is set in `blocks`.
__device__ __forceinline__ void copy_box_to(void* to, const CUtensorMap* map, uint64_t* barrier, int32_t column, int32_t row, uint16_t blocks,
                                            Keep keep) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4}], "
      "[%2], %5, %6;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(blocks), "l"(static_cast<uint64_t>(keep))
      : "memory");
}

// `bytes` (a multiple of 16) of this block's shared memory to that of another of the cluster; `barrier` there counts them.
__device__ __forceinline__ void copy_to_block(void* to, const void* from, uint32_t bytes, uint64_t* barrier, uint32_t block) {
  asm volatile(
      "{\n"
      ".reg .b32 remote, remote_barrier;\n"
      "mapa.shared::cluster.u32 remote, %0, %4;\n"
      "mapa.shared::cluster.u32 remote_barrier, %3, %4;\n"
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [remote], [%1], %2, [remote_barrier];\n"
      "}\n" ::"r"(shared_address(to)),
      "r"(shared_address(from)), "r"(bytes), "r"(shared_address(barrier)), "r"(block)
      : "memory");
}

__device__ __forceinline__ void store_box(const CUtensorMap* map, const void* from, int32_t column, int32_t row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(shared_address(from)),
               "r"(column), "r"(row)
               : "memory");
}

__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all but the newest kPending committed stores have read their shared memory.
template <int kPending>
__device__ __forceinline__ void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void prefetch_second_level(const void* place) { asm volatile("prefetch.global.L2 [%0];" ::"l"(place)); }

// ---- warpgroups ----

template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A barrier among `threads` threads of the block; id 0 is __syncthreads'.
__device__ __forceinline__ void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Counts this thread in without waiting.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Descriptor of a K-major operand in shared memory, in 128-byte rows swizzled as CU_TENSOR_MAP_SWIZZLE_128B writes them; groups of eight
// rows are 1,024 bytes apart. `address` is 1,024-byte aligned plus the offset of the K slice (below 128) within the row.
__device__ __forceinline__ uint64_t descriptor_128b(uint32_t address) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

}  // namespace fq::sm90
