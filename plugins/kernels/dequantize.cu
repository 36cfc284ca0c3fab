// Codes back to numbers: y = q * scale of the row, in fp32, rounded once. Bound by memory: a thread reads 8 codes and writes 16 or 32
// bytes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernel.h"

namespace fq {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;     // codes of a thread at a time, where sizes and addresses allow
constexpr int kPerThread = 4;  // times

template <typename Y>
__device__ __forceinline__ Y from_float(float value) {
  if constexpr (std::is_same<Y, __half>::value) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same<Y, __nv_bfloat16>::value) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

template <int kCount>
struct alignas(kCount) Bytes {
  int8_t value[kCount];
};

template <typename Y, int kCount>
struct alignas(sizeof(Y) * kCount < 16 ? sizeof(Y) * kCount : 16) Values {
  Y value[kCount];
};

// Codes `at` .. at + kCount - 1 of all rows, sign-extended.
template <bool kPacked, int kCount>
__device__ __forceinline__ void load_codes(const void* q, int64_t at, int (&codes)[kCount]) {
  if constexpr (!kPacked) {
    const auto bytes = reinterpret_cast<const Bytes<kCount>*>(q)[at / kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) codes[i] = bytes.value[i];
  } else if constexpr (kCount == 1) {
    const int byte = static_cast<const int8_t*>(q)[at / 2];
    codes[0] = (at % 2 == 0 ? byte << 28 : byte << 24) >> 28;
  } else {
    const auto bytes = reinterpret_cast<const Bytes<kCount / 2>*>(q)[at / kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) codes[i] = (i % 2 == 0 ? bytes.value[i / 2] << 28 : bytes.value[i / 2] << 24) >> 28;
  }
}

// Index: of a vector in all rows, int32_t where that is enough, since the division by the row's length takes longer in 64 bits.
template <typename Y, bool kPacked, int kCount, typename Index>
__global__ void __launch_bounds__(kThreads) dequantize(const void* q, const float* scale, Y* y, Index vectors, Index vectors_per_row) {
  const Index first = static_cast<Index>(blockIdx.x) * (kThreads * kPerThread) + threadIdx.x;
  int codes[kPerThread][kCount];
  float scales[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const Index at = first + i * kThreads;
    if (at >= vectors) break;
    load_codes<kPacked>(q, static_cast<int64_t>(at) * kCount, codes[i]);
    scales[i] = scale[at / vectors_per_row];
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const Index at = first + i * kThreads;
    if (at >= vectors) break;
    Values<Y, kCount> values;
#pragma unroll
    for (int j = 0; j < kCount; ++j) values.value[j] = from_float<Y>(static_cast<float>(codes[i][j]) * scales[i]);
    reinterpret_cast<Values<Y, kCount>*>(y)[at] = values;
  }
}

template <typename Y, bool kPacked, int kCount>
fq_status launch(const fq_dequantize_params& params, cudaStream_t stream) {
  const int64_t vectors = params.rows * params.k / kCount, per_row = params.k / kCount, per_block = kThreads * kPerThread;
  const int64_t blocks = (vectors + per_block - 1) / per_block;
  if (blocks > INT32_MAX)
    return fail(FQ_INVALID_ARGUMENT, "rows * k is %lld * %lld, too many for one call", static_cast<long long>(params.rows),
                static_cast<long long>(params.k));
  Y* y = static_cast<Y*>(params.y);
  if (vectors + per_block <= INT32_MAX) {
    dequantize<Y, kPacked, kCount, int32_t><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
        params.q, params.scale, y, static_cast<int32_t>(vectors), static_cast<int32_t>(per_row));
  } else {
    dequantize<Y, kPacked, kCount, int64_t>
        <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params.q, params.scale, y, vectors, per_row);
  }
  return check(cudaGetLastError(), "launch of dequantize");
}

template <typename Y>
fq_status launch_as(const fq_dequantize_params& params, cudaStream_t stream) {
  const bool packed = params.container != FQ_INT8;
  const bool vector =
      params.k % kVector == 0 && reinterpret_cast<uintptr_t>(params.q) % kVector == 0 && reinterpret_cast<uintptr_t>(params.y) % 16 == 0;
  if (vector) return packed ? launch<Y, true, kVector>(params, stream) : launch<Y, false, kVector>(params, stream);
  return packed ? launch<Y, true, 1>(params, stream) : launch<Y, false, 1>(params, stream);
}

}  // namespace

fq_status launch_dequantize(const fq_dequantize_params& params, cudaStream_t stream) {
  switch (params.dtype) {
    case FQ_FLOAT16:
      return launch_as<__half>(params, stream);
    case FQ_BFLOAT16:
      return launch_as<__nv_bfloat16>(params, stream);
    default:
      return launch_as<float>(params, stream);
  }
}

}  // namespace fq
