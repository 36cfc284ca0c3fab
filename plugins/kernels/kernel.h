// What api.cpp and the kernels' files share. A kernel is one .cu file with one object of type GemmKernel, QuantizeKernel or AttentionKernel, and one line in kernels.def.
#pragma once

#include <cuda_runtime_api.h>

#include "fqonnx.h"

namespace fq {

struct Device {
  int capability;     // such as 90
  int multiprocessors;
  int shared_memory;  // bytes that a block may ask for
};

// Sets this thread's message (printf's format) and returns the status.
fq_status fail(fq_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// A CUDA call's result as a status, with its text as the message; `what` names the call.
fq_status check(cudaError_t error, const char* what);

enum class PrologueKind { kNone, kRmsNorm, kSiluMul };

// What happens to x before the transform; the pointer of another kind is null.
struct Prologue {
  PrologueKind kind = PrologueKind::kNone;
  const fq_rms_norm_params* norm = nullptr;
  const fq_silu_mul_params* gate = nullptr;
};

// Arguments were checked before (pointers, alignment, ranges); `fits` answers for one kernel alone: null, or why it does not take the
// problem (a static text that completes "kernel mma_s8: "). `launch` is called only where it fits, enqueues and returns.
struct GemmKernel {
  const char* (*fits)(const fq_w4a4_gemm_params&, const Device&);
  fq_status (*launch)(const fq_w4a4_gemm_params&, const Device&, cudaStream_t);
  int tactics;  // tiles to choose from, numbered from 1
};

struct QuantizeKernel {
  const char* (*fits)(const fq_flat_quantize_params&, const Prologue&, const Device&);
  fq_status (*launch)(const fq_flat_quantize_params&, const Prologue&, const Device&, cudaStream_t);
};

struct AttentionKernel {
  const char* (*fits)(const fq_decode_attention_params&, const Device&);
  fq_status (*launch)(const fq_decode_attention_params&, const Device&, cudaStream_t);
};

extern const GemmKernel W4A4Gemm_wgmma_s8;
extern const GemmKernel W4A4Gemm_mma_s4;
extern const GemmKernel W4A4Gemm_mma_s8;
extern const QuantizeKernel FlatQuantize_wgmma_f16;
extern const QuantizeKernel FlatQuantize_mma_f16;
extern const AttentionKernel GroupQueryAttention_decode;

fq_status launch_dequantize(const fq_dequantize_params& params, cudaStream_t stream);  // rows > 0

}  // namespace fq
