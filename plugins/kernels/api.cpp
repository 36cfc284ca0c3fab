// The C API's host side: checks arguments, chooses a kernel from kernels.def and launches it.
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>

#include "kernel.h"

#if !defined(FQ_ARCHITECTURES) || !defined(FQ_COMPILER) || !defined(FQ_SOURCES)
#error "what fq_build_info says is given by the build: see plugins/build.py and CMakeLists.txt"
#endif

namespace fq {

// A library that was built for some architectures only lacks the kernels that are for others: their addresses are then null.
#define FQ_KERNEL(op, name, ...) extern __attribute__((weak)) decltype(op##_##name) op##_##name;
#include "kernels.def"
#undef FQ_KERNEL

namespace {

constexpr int64_t kMaxSize = INT32_MAX;
constexpr int64_t kMaxGemmK = 131071;  // from 131,072 on, sums of 16 (-8) 16 (-8) leave int32
constexpr int kMaxFactor = 256;
constexpr size_t kVector = 16;  // bytes of the widest load and store
constexpr int kMaxDevices = 64;
constexpr int32_t FQ_ANY = -1;

thread_local char last_error[2048] = "";

// A piece of text that grows; what does not fit is cut off.
class Text {
 public:
  __attribute__((format(printf, 2, 3))) void add(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const int written = vsnprintf(text_ + length_, sizeof(text_) - length_, format, arguments);
    va_end(arguments);
    if (written > 0) length_ = length_ + written < sizeof(text_) ? length_ + written : sizeof(text_) - 1;
  }

  const char* get() const { return text_; }

 private:
  char text_[sizeof(last_error) - 256] = "";
  size_t length_ = 0;
};

// Checks arguments one by one; the first that is off sets the status and the message, and what follows is not looked at.
class Arguments {
 public:
  fq_status status() const { return status_; }
  bool ok() const { return status_ == FQ_OK; }

  void given(const char* name, const void* pointer) {
    if (ok() && pointer == nullptr) status_ = fail(FQ_INVALID_ARGUMENT, "%s is null", name);
  }

  // Null passes: `given` asks for it.
  void aligned(const char* name, const void* pointer, size_t alignment) {
    if (ok() && reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
      status_ = fail(FQ_INVALID_ARGUMENT, "%s is %p, which is not aligned to %zu bytes", name, pointer, alignment);
  }

  void range(const char* name, int64_t value, int64_t lowest, int64_t highest) {
    if (ok() && (value < lowest || value > highest))
      status_ = fail(FQ_INVALID_ARGUMENT, "%s is %lld, not %lld to %lld", name, static_cast<long long>(value), static_cast<long long>(lowest),
                     static_cast<long long>(highest));
  }

  void multiple(const char* name, int64_t value, int64_t of) {
    if (ok() && value % of != 0)
      status_ = fail(FQ_INVALID_ARGUMENT, "%s is %lld, not a multiple of %lld", name, static_cast<long long>(value), static_cast<long long>(of));
  }

  void require(bool condition, const char* format, ...) __attribute__((format(printf, 3, 4))) {
    if (!ok() || condition) return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof(last_error), format, arguments);
    va_end(arguments);
    status_ = FQ_INVALID_ARGUMENT;
  }

  void dtype(const char* name, int32_t value) {
    require(value == FQ_FLOAT || value == FQ_FLOAT16 || value == FQ_BFLOAT16, "%s is %d, not %d (float), %d (float16) or %d (bfloat16)", name, value,
            FQ_FLOAT, FQ_FLOAT16, FQ_BFLOAT16);
  }

  void container(int32_t value, int64_t k) {
    range("container", value, FQ_INT8, FQ_INT32X8);
    require(value != FQ_PACKED || k % 2 == 0, "k is %lld: container %d (packed) holds an even number of codes", static_cast<long long>(k), value);
    require(value != FQ_INT32X8 || k % 8 == 0, "k is %lld: container %d (int32x8) holds a multiple of 8 codes", static_cast<long long>(k), value);
  }

  // Distances between rows, in elements; vectors are loaded from where rows begin.
  void stride(const char* name, int64_t value, int64_t rows, int64_t k, size_t element) {
    range(name, value, k, kMaxSize);
    require(rows <= 1 || value * element % kVector == 0, "%s is %lld elements of %zu bytes: rows are then not aligned to %zu bytes", name,
            static_cast<long long>(value), element, kVector);
  }

 private:
  fq_status status_ = FQ_OK;
};

size_t size_of(int32_t dtype) { return dtype == FQ_FLOAT ? 4 : 2; }

struct Implementation {
  const GemmKernel* gemm = nullptr;
  const QuantizeKernel* quantize = nullptr;
  const AttentionKernel* attention = nullptr;

  constexpr Implementation(const GemmKernel* kernel) : gemm(kernel) {}
  constexpr Implementation(const QuantizeKernel* kernel) : quantize(kernel) {}
  constexpr Implementation(const AttentionKernel* kernel) : attention(kernel) {}

  bool is_here() const { return gemm != nullptr || quantize != nullptr || attention != nullptr; }
};

// What kernels.def says beyond fq_kernel.
struct Entry {
  Implementation kernel;
  int64_t k_multiple, n_multiple;
  const char* group_sizes;
};

#define FQ_KERNEL(op, name, container, layout, lowest, highest, runs_lowest, runs_highest, k, n, groups, instruction) \
  {#op, #name, instruction, FQ_##container, FQ_##layout, lowest, highest, runs_lowest, runs_highest},
const fq_kernel kTable[] = {
#include "kernels.def"
};
#undef FQ_KERNEL

#define FQ_KERNEL(op, name, container, layout, lowest, highest, runs_lowest, runs_highest, k, n, groups, instruction) {&op##_##name, k, n, groups},
const Entry kEntries[] = {
#include "kernels.def"
};
#undef FQ_KERNEL

constexpr int kKernels = sizeof(kTable) / sizeof(kTable[0]);

// The current device. Attributes are asked for once a device and process; that is legal while a stream is captured.
fq_status current_device(Device* device) {
  static std::mutex mutex;
  static Device known[kMaxDevices] = {};
  int index = 0;
  if (const fq_status status = check(cudaGetDevice(&index), "cudaGetDevice"); status != FQ_OK) return status;
  if (index >= kMaxDevices) return fail(FQ_CUDA_ERROR, "device %d is beyond the %d that are supported", index, kMaxDevices);
  const std::lock_guard<std::mutex> lock(mutex);
  if (known[index].capability == 0) {
    int major = 0, minor = 0, multiprocessors = 0, shared_memory = 0;
    const struct {
      cudaDeviceAttr attribute;
      int* value;
    } wanted[] = {{cudaDevAttrComputeCapabilityMajor, &major},
                  {cudaDevAttrComputeCapabilityMinor, &minor},
                  {cudaDevAttrMultiProcessorCount, &multiprocessors},
                  {cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared_memory}};
    for (const auto& item : wanted)
      if (const fq_status status = check(cudaDeviceGetAttribute(item.value, item.attribute, index), "cudaDeviceGetAttribute"); status != FQ_OK)
        return status;
    known[index] = {10 * major + minor, multiprocessors, shared_memory};
  }
  *device = known[index];
  return FQ_OK;
}

bool takes_group(const char* sizes, int64_t size) {
  for (char* end = nullptr;; sizes = end) {
    const long allowed = strtol(sizes, &end, 10);
    if (end == sizes) return false;
    if (allowed == size || (allowed == -1 && size > 0 && size % 32 == 0)) return true;
  }
}

// What a problem is asked about by the table alone.
struct Operands {
  const char* op;
  int32_t container, layout;  // FQ_ANY: the op has none
  int64_t k, n, group_size;   // of the weight, 0 for one scale a channel
};

bool is_of(int index, const char* op) { return strcmp(kTable[index].op, op) == 0; }

const char* container_name(int32_t container) { return container == FQ_INT8 ? "int8" : container == FQ_PACKED ? "packed" : "int32x8"; }

const char* layout_name(int32_t layout) { return layout == FQ_PLAIN ? "plain" : "k128"; }

// Whether the table lets kernel `index` have the problem; where not, the reason is added to `reasons`.
bool admits(int index, const Operands& problem, const Device& device, bool by_name, Text* reasons) {
  const fq_kernel& kernel = kTable[index];
  const Entry& entry = kEntries[index];
  const int lowest = by_name ? kernel.runs_on_lowest : kernel.lowest, highest = by_name ? kernel.runs_on_highest : kernel.highest;
  const int32_t container = problem.container == FQ_INT32X8 ? FQ_PACKED : problem.container;
  if (!entry.kernel.is_here()) {
    reasons->add("is not in this library, which was built for other architectures");
  } else if (device.capability < lowest || device.capability > highest) {
    reasons->add("is for compute capability %d.%d to %d.%d, not %d.%d", lowest / 10, lowest % 10, highest / 10, highest % 10, device.capability / 10,
                 device.capability % 10);
  } else if (kernel.container != FQ_ANY && kernel.container != container) {
    reasons->add("wants container %s, not %s", container_name(kernel.container), container_name(problem.container));
  } else if (kernel.layout != FQ_ANY && kernel.layout != problem.layout) {
    reasons->add("wants weight layout %s, not %s", layout_name(kernel.layout), layout_name(problem.layout));
  } else if (problem.k % entry.k_multiple != 0) {
    reasons->add("wants a k that is a multiple of %lld, not %lld", static_cast<long long>(entry.k_multiple), static_cast<long long>(problem.k));
  } else if (entry.n_multiple != 0 && problem.n % entry.n_multiple != 0) {
    reasons->add("wants an n that is a multiple of %lld, not %lld", static_cast<long long>(entry.n_multiple), static_cast<long long>(problem.n));
  } else if (entry.group_sizes[0] != '\0' && !takes_group(entry.group_sizes, problem.group_size)) {
    reasons->add("wants weight groups of \"%s\" columns (0: whole channels, -1: multiples of 32), not %lld", entry.group_sizes,
                 static_cast<long long>(problem.group_size));
  } else {
    return true;
  }
  return false;
}

// The first kernel of the table that takes the problem, or the one that `variant` names where that is not 0; `fits` asks one kernel.
template <typename Fits>
fq_status choose(const Operands& problem, int32_t variant, const Device& device, Fits fits, int* chosen) {
  Text reasons;
  for (int index = 0; index < kKernels; ++index) {
    if (!is_of(index, problem.op) || (variant != 0 && index != variant - 1)) continue;
    reasons.add("%skernel %s: ", reasons.get()[0] == '\0' ? "" : "; ", kTable[index].name);
    if (!admits(index, problem, device, variant != 0, &reasons)) continue;
    const char* reason = fits(kEntries[index].kernel);
    if (reason == nullptr) {
      *chosen = index;
      return FQ_OK;
    }
    reasons.add("%s", reason);
  }
  return fail(FQ_UNSUPPORTED, "no %s kernel takes this on compute capability %d.%d: %s", problem.op, device.capability / 10, device.capability % 10,
              reasons.get());
}

void check_variant(Arguments* arguments, int32_t variant, const char* op) {
  arguments->range("variant", variant, 0, kKernels);
  if (arguments->ok() && variant != 0)
    arguments->require(is_of(variant - 1, op), "variant is %d, which is %s %s and no %s kernel", variant, kTable[variant - 1].op, kTable[variant - 1].name,
                       op);
}

Arguments check_quantize(const fq_flat_quantize_params* params) {
  Arguments arguments;
  arguments.given("params", params);
  if (!arguments.ok()) return arguments;
  const fq_flat_quantize_params& p = *params;
  arguments.range("rows", p.rows, 0, kMaxSize);
  arguments.range("k", p.k, 1, kMaxSize);
  arguments.range("n1", p.n1, 1, kMaxFactor);
  arguments.range("n2", p.n2, 1, kMaxFactor);
  arguments.require(p.n1 <= 0 || p.n2 <= 0 || p.k % (static_cast<int64_t>(p.n1) * p.n2) == 0, "k is %lld, not a multiple of n1 n2 = %d * %d",
                    static_cast<long long>(p.k), p.n1, p.n2);
  arguments.dtype("dtype", p.dtype);
  arguments.require(p.factor_dtype == FQ_FLOAT || p.factor_dtype == p.dtype, "factor_dtype is %d, neither %d (float) nor dtype, %d", p.factor_dtype, FQ_FLOAT,
                    p.dtype);
  arguments.require(p.bits == 4 || p.bits == 8, "bits is %d, not 4 or 8", p.bits);
  arguments.container(p.container, p.k);
  arguments.require(p.container == FQ_INT8 || p.bits == 4, "container is %d, which holds 4-bit codes, and bits is %d", p.container, p.bits);
  arguments.stride("x_stride", p.x_stride, p.rows, p.k, size_of(p.dtype));
  arguments.require((p.left == nullptr) == (p.right == nullptr), "%s is null and %s is not", p.left == nullptr ? "left" : "right",
                    p.left == nullptr ? "right" : "left");
  arguments.require(p.left != nullptr || (p.n1 == 1 && p.n2 == 1), "left and right are null, which is no transform, and n1 n2 is %d * %d, not 1 * 1", p.n1,
                    p.n2);
  arguments.aligned("left", p.left, size_of(p.factor_dtype));
  arguments.aligned("right", p.right, size_of(p.factor_dtype));
  arguments.aligned("clip_ptr", p.clip_ptr, sizeof(float));
  arguments.require(p.clip_ptr != nullptr || (p.clip > 0 && p.clip <= 1), "clip is %g, not above 0 and at most 1", p.clip);
  check_variant(&arguments, p.variant, "FlatQuantize");
  if (p.rows > 0) {
    arguments.given("x", p.x);
    arguments.given("q", p.q);
    arguments.given("scale", p.scale);
  }
  arguments.aligned("x", p.x, kVector);
  arguments.aligned("q", p.q, kVector);
  arguments.aligned("scale", p.scale, sizeof(float));
  return arguments;
}

fq_status quantize(const fq_flat_quantize_params& params, const Prologue& prologue, fq_stream stream) {
  if (params.rows == 0) return FQ_OK;
  Device device;
  if (const fq_status status = current_device(&device); status != FQ_OK) return status;
  const Operands problem = {"FlatQuantize", params.container, FQ_ANY, params.k, 0, 0};
  const auto fits = [&](const Implementation& kernel) { return kernel.quantize->fits(params, prologue, device); };
  int chosen = 0;
  if (const fq_status status = choose(problem, params.variant, device, fits, &chosen); status != FQ_OK) return status;
  return kEntries[chosen].kernel.quantize->launch(params, prologue, device, stream);
}

Arguments check_gemm(const fq_w4a4_gemm_params* params) {
  Arguments arguments;
  arguments.given("params", params);
  if (!arguments.ok()) return arguments;
  const fq_w4a4_gemm_params& p = *params;
  arguments.range("m", p.m, 0, kMaxSize);
  arguments.range("n", p.n, 16, kMaxSize);
  arguments.multiple("n", p.n, 16);
  arguments.range("k", p.k, 16, kMaxGemmK);
  arguments.multiple("k", p.k, 16);
  arguments.range("groups", p.groups, 1, p.k);
  arguments.require(p.groups <= 0 || p.k % p.groups == 0, "groups is %lld, which does not divide k, %lld", static_cast<long long>(p.groups),
                    static_cast<long long>(p.k));
  arguments.dtype("dtype", p.dtype);
  arguments.container(p.container, p.k);
  arguments.range("layout", p.layout, FQ_PLAIN, FQ_K128);
  arguments.require(p.layout != FQ_K128 || p.k % 128 == 0, "k is %lld: layout %d (k128) orders blocks of 128", static_cast<long long>(p.k), p.layout);
  check_variant(&arguments, p.variant, "W4A4Gemm");
  arguments.require(p.tactic >= 0, "tactic is %d, not 0 or the number of a tile", p.tactic);
  if (p.m > 0) {
    arguments.given("q", p.q);
    arguments.given("scale", p.scale);
    arguments.given("y", p.y);
  }
  arguments.given("w", p.w);
  arguments.given("w_scale", p.w_scale);
  arguments.aligned("q", p.q, kVector);
  arguments.aligned("w", p.w, kVector);
  arguments.aligned("y", p.y, kVector);
  arguments.aligned("scale", p.scale, sizeof(float));
  arguments.aligned("w_scale", p.w_scale, sizeof(float));
  arguments.aligned("bias", p.bias, sizeof(float));
  return arguments;
}

fq_status choose_gemm(const fq_w4a4_gemm_params& params, Device* device, int* chosen) {
  if (const fq_status status = current_device(device); status != FQ_OK) return status;
  const int64_t group_size = params.groups == 1 ? 0 : params.k / params.groups;
  const Operands problem = {"W4A4Gemm", params.container, params.layout, params.k, params.n, group_size};
  const auto fits = [&](const Implementation& kernel) { return kernel.gemm->fits(params, *device); };
  return choose(problem, params.variant, *device, fits, chosen);
}

Arguments check_attention(const fq_decode_attention_params* params) {
  Arguments arguments;
  arguments.given("params", params);
  if (!arguments.ok()) return arguments;
  const fq_decode_attention_params& p = *params;
  arguments.range("batch", p.batch, 0, kMaxSize);
  arguments.range("heads", p.heads, 1, kMaxSize);
  arguments.range("kv_heads", p.kv_heads, 1, kMaxSize);
  arguments.require(p.kv_heads <= 0 || p.heads % p.kv_heads == 0, "heads is %d, not a multiple of kv_heads, %d", p.heads, p.kv_heads);
  arguments.range("head", p.head, 1, kMaxSize);
  arguments.range("capacity", p.capacity, 1, kMaxSize);
  arguments.dtype("dtype", p.dtype);
  const int64_t width = static_cast<int64_t>(p.heads) * p.head, kv_width = static_cast<int64_t>(p.kv_heads) * p.head;
  arguments.stride("q_stride", p.q_stride, p.batch, width, size_of(p.dtype));
  arguments.stride("k_stride", p.k_stride, p.batch, kv_width, size_of(p.dtype));
  arguments.stride("v_stride", p.v_stride, p.batch, kv_width, size_of(p.dtype));
  arguments.require((p.cos == nullptr) == (p.sin == nullptr), "%s is null and %s is not", p.cos == nullptr ? "cos" : "sin",
                    p.cos == nullptr ? "sin" : "cos");
  if (p.cos != nullptr) arguments.range("positions", p.positions, 1, kMaxSize);
  arguments.require(std::isfinite(p.scale), "scale is %g, not a finite number", p.scale);
  arguments.range("cache", p.cache, FQ_CACHE_FLOAT, FQ_CACHE_INT8);
  arguments.range("scales", p.scales, FQ_SCALE_A_TENSOR, FQ_SCALE_A_CHANNEL);
  for (const auto& [name, scale] : {std::pair{"key_scale", p.key_scale}, std::pair{"value_scale", p.value_scale}}) {
    arguments.require((scale != nullptr) == (p.cache == FQ_CACHE_INT8), "%s is %s, and cache is %d", name, scale == nullptr ? "null" : "given", p.cache);
    arguments.aligned(name, scale, p.scales == FQ_SCALE_A_CHANNEL ? 2 * sizeof(float) : sizeof(float));
  }
  check_variant(&arguments, p.variant, "GroupQueryAttention");
  const struct {
    const char* name;
    const void* pointer;
  } operands[] = {{"q", p.q}, {"k", p.k}, {"v", p.v}, {"key", p.key}, {"value", p.value}, {"y", p.y}};
  for (const auto& operand : operands) {
    if (p.batch > 0) arguments.given(operand.name, operand.pointer);
    arguments.aligned(operand.name, operand.pointer, kVector);
  }
  if (p.batch > 0) arguments.given("past", p.past);
  arguments.aligned("past", p.past, sizeof(int32_t));
  arguments.aligned("cos", p.cos, kVector);
  arguments.aligned("sin", p.sin, kVector);
  return arguments;
}

const char* hint(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
      return ": this library was built for other architectures, see fq_build_info";
    case cudaErrorInsufficientDriver:
      return ": the driver is too old for this library, update it";
    default:
      return "";
  }
}

}  // namespace

fq_status fail(fq_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof(last_error), format, arguments);
  va_end(arguments);
  return status;
}

fq_status check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return FQ_OK;
  cudaGetLastError();  // else the next call that asks for errors would find this one
  return fail(FQ_CUDA_ERROR, "%s: %s (%s)%s", what, cudaGetErrorString(error), cudaGetErrorName(error), hint(error));
}

}  // namespace fq

using fq::Arguments;

fq_status fq_flat_quantize(const fq_flat_quantize_params* params, fq_stream stream) {
  const Arguments arguments = fq::check_quantize(params);
  return arguments.ok() ? fq::quantize(*params, {}, stream) : arguments.status();
}

fq_status fq_rms_norm_flat_quantize(const fq_flat_quantize_params* params, const fq_rms_norm_params* norm, fq_stream stream) {
  Arguments arguments = fq::check_quantize(params);
  arguments.given("norm", norm);
  if (!arguments.ok()) return arguments.status();
  arguments.given("gamma", norm->gamma);
  arguments.require(norm->epsilon >= 0 && std::isfinite(norm->epsilon), "epsilon is %g, not a finite number from 0 on", norm->epsilon);
  arguments.require(norm->sum == nullptr || norm->residual != nullptr || params->rows == 0, "sum is wanted and residual is null");
  const struct {
    const char* name;
    const void* pointer;
  } operands[] = {{"gamma", norm->gamma}, {"residual", norm->residual}, {"sum", norm->sum}, {"normed", norm->normed}};
  for (const auto& operand : operands) arguments.aligned(operand.name, operand.pointer, fq::kVector);
  return arguments.ok() ? fq::quantize(*params, {fq::PrologueKind::kRmsNorm, norm, nullptr}, stream) : arguments.status();
}

fq_status fq_silu_mul_flat_quantize(const fq_flat_quantize_params* params, const fq_silu_mul_params* gate, fq_stream stream) {
  Arguments arguments = fq::check_quantize(params);
  arguments.given("gate", gate);
  if (!arguments.ok()) return arguments.status();
  if (params->rows > 0) arguments.given("up", gate->up);
  arguments.aligned("up", gate->up, fq::kVector);
  arguments.stride("up_stride", gate->up_stride, params->rows, params->k, fq::size_of(params->dtype));
  return arguments.ok() ? fq::quantize(*params, {fq::PrologueKind::kSiluMul, nullptr, gate}, stream) : arguments.status();
}

fq_status fq_dequantize(const fq_dequantize_params* params, fq_stream stream) {
  Arguments arguments;
  arguments.given("params", params);
  if (!arguments.ok()) return arguments.status();
  arguments.range("rows", params->rows, 0, fq::kMaxSize);
  arguments.range("k", params->k, 1, fq::kMaxSize);
  arguments.container(params->container, params->k);
  arguments.dtype("dtype", params->dtype);
  if (params->rows > 0) {
    arguments.given("q", params->q);
    arguments.given("scale", params->scale);
    arguments.given("y", params->y);
  }
  arguments.aligned("q", params->q, params->container == FQ_INT32X8 ? sizeof(int32_t) : 1);
  arguments.aligned("scale", params->scale, sizeof(float));
  arguments.aligned("y", params->y, fq::size_of(params->dtype));
  if (!arguments.ok() || params->rows == 0) return arguments.status();
  return fq::launch_dequantize(*params, stream);
}

fq_status fq_w4a4_gemm(const fq_w4a4_gemm_params* params, fq_stream stream) {
  Arguments arguments = fq::check_gemm(params);
  if (!arguments.ok() || params->m == 0) return arguments.status();
  fq::Device device;
  int chosen = 0;
  if (const fq_status status = fq::choose_gemm(*params, &device, &chosen); status != FQ_OK) return status;
  const fq::GemmKernel& kernel = *fq::kEntries[chosen].kernel.gemm;
  arguments.require(params->tactic <= kernel.tactics, "tactic is %d, and kernel %s has 1 to %d", params->tactic, fq::kTable[chosen].name, kernel.tactics);
  return arguments.ok() ? kernel.launch(*params, device, stream) : arguments.status();
}

int32_t fq_w4a4_gemm_tactics(const fq_w4a4_gemm_params* params) {
  if (!fq::check_gemm(params).ok()) return 0;
  fq::Device device;
  int chosen = 0;
  return fq::choose_gemm(*params, &device, &chosen) == FQ_OK ? fq::kEntries[chosen].kernel.gemm->tactics : 0;
}

fq_status fq_decode_attention(const fq_decode_attention_params* params, fq_stream stream) {
  const Arguments arguments = fq::check_attention(params);
  if (!arguments.ok() || params->batch == 0) return arguments.status();
  fq::Device device;
  if (const fq_status status = fq::current_device(&device); status != FQ_OK) return status;
  const fq::Operands problem = {"GroupQueryAttention", fq::FQ_ANY, fq::FQ_ANY, params->head, 0, 0};
  const auto fits = [&](const fq::Implementation& kernel) { return kernel.attention->fits(*params, device); };
  int chosen = 0;
  if (const fq_status status = fq::choose(problem, params->variant, device, fits, &chosen); status != FQ_OK) return status;
  return fq::kEntries[chosen].kernel.attention->launch(*params, device, stream);
}

const char* fq_last_error(void) { return fq::last_error; }

int32_t fq_kernel_count(void) { return fq::kKernels; }

const fq_kernel* fq_kernels(void) { return fq::kTable; }

int32_t fq_abi_version(void) { return FQ_ABI_VERSION; }

const char* fq_build_info(void) {
  return "architectures: " FQ_ARCHITECTURES "\ncompiler: " FQ_COMPILER "\nsources: " FQ_SOURCES;
}
