// The kernels on the CPU, for tests of what lies above them: api.cpp's checks and choice are the library's own, and below them are two
// kernels in plain loops, on a device that the environment describes (FQ_TEST_CAPABILITY, 90 by default). What they compute is defined by
// fqonnx/ops/reference.py, as for all kernels.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernel.h"

// --- the runtime's functions that are called on the host --------------------------------------------------------------------------------

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const char* const told = std::getenv("FQ_TEST_CAPABILITY");
  const int capability = told == nullptr ? 90 : std::atoi(told);
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? capability / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? capability % 10
                                                            : 1;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind,
                              cudaStream_t) {
  for (size_t row = 0; row < height; ++row)
    std::memcpy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
  return cudaSuccess;
}

}  // extern "C"

namespace fq {
namespace {

// --- elements ---------------------------------------------------------------------------------------------------------------------------

float load(const void* data, int64_t index, int32_t dtype) {
  if (dtype == FQ_FLOAT) return static_cast<const float*>(data)[index];
  if (dtype == FQ_FLOAT16) return static_cast<float>(static_cast<const _Float16*>(data)[index]);
  const uint32_t bits = uint32_t{static_cast<const uint16_t*>(data)[index]} << 16;
  float value = 0;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

void store(void* data, int64_t index, int32_t dtype, float value) {
  if (dtype == FQ_FLOAT) {
    static_cast<float*>(data)[index] = value;
  } else if (dtype == FQ_FLOAT16) {
    static_cast<_Float16*>(data)[index] = static_cast<_Float16>(value);
  } else {
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof(bits));
    bits += 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
    static_cast<uint16_t*>(data)[index] = static_cast<uint16_t>(bits >> 16);
  }
}

float rounded(float value, int32_t dtype) {
  float kept = 0;
  store(&kept, 0, dtype, value);
  return load(&kept, 0, dtype);
}

int nibble(const void* data, int64_t index) {
  const int byte = static_cast<const int8_t*>(data)[index / 2];
  return index % 2 == 0 ? static_cast<int8_t>(byte << 4) >> 4 : byte >> 4;
}

// --- kernels ----------------------------------------------------------------------------------------------------------------------------

const char* quantize_fits(const fq_flat_quantize_params&, const Prologue&, const Device&) { return nullptr; }

// One row of what is quantized, after the norm or the gate.
std::vector<float> row_of(const fq_flat_quantize_params& p, const Prologue& prologue, int64_t row) {
  std::vector<float> h(static_cast<size_t>(p.k));
  double squares = 0;
  for (int64_t i = 0; i < p.k; ++i) {
    float value = load(p.x, row * p.x_stride + i, p.dtype);
    if (prologue.kind == PrologueKind::kSiluMul) {
      value = rounded(value / (1 + std::exp(-value)) * load(prologue.gate->up, row * prologue.gate->up_stride + i, p.dtype), p.dtype);
    }
    if (prologue.norm != nullptr && prologue.norm->residual != nullptr) {
      value = rounded(value + load(prologue.norm->residual, row * p.k + i, p.dtype), p.dtype);
      if (prologue.norm->sum != nullptr) store(prologue.norm->sum, row * p.k + i, p.dtype, value);
    }
    squares += double{value} * value;
    h[static_cast<size_t>(i)] = value;
  }
  if (prologue.norm == nullptr) return h;
  const auto root = static_cast<float>(std::sqrt(squares / static_cast<double>(p.k) + prologue.norm->epsilon));
  for (int64_t i = 0; i < p.k; ++i) {
    float& value = h[static_cast<size_t>(i)];
    value = rounded(load(prologue.norm->gamma, i, p.dtype) * (value / root), p.dtype);
  }
  return h;
}

fq_status quantize(const fq_flat_quantize_params& p, const Prologue& prologue, const Device&, cudaStream_t) {
  const float qmax = p.bits == 4 ? 7 : 127, clip = p.clip_ptr != nullptr ? *p.clip_ptr : p.clip;
  for (int64_t row = 0; row < p.rows; ++row) {
    const std::vector<float> h = row_of(p, prologue, row);
    std::vector<double> t(h.size());
    const int64_t block = int64_t{p.n1} * p.n2;
    double largest = 0;
    for (int64_t place = 0; place < p.k; ++place) {
      const int64_t first = place / block * block, a = place % block / p.n2, b = place % p.n2;
      double sum = 0;
      for (int64_t i = 0; i < p.n1; ++i) {
        for (int64_t j = 0; j < p.n2; ++j) {
          sum += double{load(p.left, i * p.n1 + a, p.factor_dtype)} * h[static_cast<size_t>(first + i * p.n2 + j)] *
                 load(p.right, j * p.n2 + b, p.factor_dtype);
        }
      }
      t[static_cast<size_t>(place)] = sum;
      largest = std::max(largest, std::abs(sum));
    }
    const float step = static_cast<float>(largest) * clip / qmax, scale = step < 0x1p-126f ? 1 : step;
    p.scale[row] = scale;
    for (int64_t i = 0; i < p.k; ++i) {
      const float code = std::nearbyint(static_cast<float>(t[static_cast<size_t>(i)]) / scale);
      const auto q = static_cast<int8_t>(std::min(std::max(code, -qmax - 1), qmax));
      int8_t* const out = static_cast<int8_t*>(p.q);
      if (p.container == FQ_INT8) {
        out[row * p.k + i] = q;
      } else {
        int8_t& byte = out[(row * p.k + i) / 2];
        byte = static_cast<int8_t>(i % 2 == 0 ? q & 15 : (byte & 15) | q << 4);
      }
    }
  }
  return FQ_OK;
}

const char* gemm_fits(const fq_w4a4_gemm_params&, const Device&) { return nullptr; }

// Where the code of column k lies in a row of the weight: fqonnx/ops/layout.py.
int64_t place_of(int64_t k, int32_t layout) {
  if (layout == FQ_PLAIN) return k;
  const int64_t j = k % 128 / 32, h = k % 32 / 16, t = k % 16 / 4, i = k % 4;
  return k / 128 * 128 + ((t * 4 + j) * 4 + i) * 2 + h;
}

fq_status gemm(const fq_w4a4_gemm_params& p, const Device&, cudaStream_t) {
  for (int64_t row = 0; row < p.m; ++row) {
    for (int64_t n = 0; n < p.n; ++n) {
      float sum = 0;
      for (int64_t group = 0; group < p.groups; ++group) {
        int64_t part = 0;
        for (int64_t k = group * p.k / p.groups; k < (group + 1) * p.k / p.groups; ++k) {
          const int64_t index = row * p.k + k;
          part += (p.container == FQ_INT8 ? static_cast<const int8_t*>(p.q)[index] : nibble(p.q, index)) *
                  nibble(p.w, n * p.k + place_of(k, p.layout));
        }
        sum += static_cast<float>(part) * p.w_scale[n * p.groups + group];
      }
      store(p.y, row * p.n + n, p.dtype, sum * p.scale[row] + (p.bias != nullptr ? p.bias[n] : 0));
    }
  }
  return FQ_OK;
}

}  // namespace

extern const GemmKernel W4A4Gemm_mma_s8 = {gemm_fits, gemm, 5};
extern const GemmKernel W4A4Gemm_mma_s4 = {gemm_fits, gemm, 3};
extern const QuantizeKernel FlatQuantize_mma_f16 = {quantize_fits, quantize};

fq_status launch_dequantize(const fq_dequantize_params&, cudaStream_t) { return fail(FQ_UNSUPPORTED, "there is no such kernel here"); }

}  // namespace fq
