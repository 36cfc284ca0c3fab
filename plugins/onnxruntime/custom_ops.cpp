// ONNX Runtime's custom ops of domain fqonnx for its CUDA provider, over the C API of kernels/fqonnx.h.
//
// A model carries the same ops as local functions. Where this library is registered its schema stands before the function: ONNX Runtime
// runs the kernel, and refuses the model where none fits; it does not go back to the function.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../kernels/fqonnx.h"

namespace fq::ort {
namespace {

// What is used of the interface is in every version from this one on, so that one library serves all of them.
constexpr uint32_t kApiVersion = 21;
static_assert(ORT_API_VERSION >= kApiVersion, "the headers of ONNX Runtime are older than 1.21");

constexpr const char* kDomain = "fqonnx";
constexpr const char* kProvider = "CUDAExecutionProvider";

using Shape = std::vector<int64_t>;

struct Failure : std::runtime_error {
  explicit Failure(const std::string& message, OrtErrorCode code = ORT_INVALID_ARGUMENT) : std::runtime_error(message), code(code) {}
  OrtErrorCode code;
};

std::string text(const Shape& shape) {
  std::string joined = "[";
  for (size_t i = 0; i < shape.size(); ++i) joined += (i ? ", " : "") + std::to_string(shape[i]);
  return joined + "]";
}

int64_t product(const Shape& shape, size_t count) {
  int64_t size = 1;
  for (size_t i = 0; i < count; ++i) size *= shape[i];
  return size;
}

void require(bool holds, const char* message) {
  if (!holds) throw Failure(message);
}

// Takes the status's message over into an exception.
void check(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return;
  Failure failure(api.GetErrorMessage(status), api.GetErrorCode(status));
  api.ReleaseStatus(status);
  throw failure;
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw Failure(std::string(what) + ": " + cudaGetErrorString(error), ORT_EP_FAIL);
}

void check(fq_status status, const char* op) {
  if (status == FQ_OK) return;
  throw Failure(std::string(op) + ": " + fq_last_error(), status == FQ_INVALID_ARGUMENT ? ORT_INVALID_ARGUMENT : ORT_EP_FAIL);
}

// The border to ONNX Runtime: no exception passes it.
template <class F>
OrtStatus* guarded(const OrtApi& api, F&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return api.CreateStatus(failure.code, failure.what());
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_FAIL, error.what());
  }
}

// ONNX's number of a float type as the interface's.
ONNXTensorElementDataType element_type(int64_t dtype) {
  switch (dtype) {
    case FQ_FLOAT:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case FQ_FLOAT16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case FQ_BFLOAT16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
  }
  throw Failure("W4A4Gemm: attribute dtype is 1, 10 or 16, not " + std::to_string(dtype));
}

// --- tensors --------------------------------------------------------------------------------------------------------------------------

using ShapeInfo = std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)>;

Shape shape_of(const OrtApi& api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api, api.GetTensorTypeAndShape(value, &info));
  const ShapeInfo owner(info, api.ReleaseTensorTypeAndShapeInfo);
  size_t rank = 0;
  check(api, api.GetDimensionsCount(info, &rank));
  Shape shape(rank);
  check(api, api.GetDimensions(info, shape.data(), rank));
  return shape;
}

template <class T>
const T* data_of(const OrtApi& api, const OrtValue* value) {
  void* data = nullptr;  // the interface has no const form; nothing is written through it
  check(api, api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  return static_cast<const T*>(data);
}

// One call of a kernel: its inputs, outputs and stream.
class Call {
 public:
  Call(const OrtApi& api, OrtKernelContext* context) : api_(api), context_(context) {}

  const OrtValue* input(size_t index) const {
    const OrtValue* value = nullptr;
    check(api_, api_.KernelContext_GetInput(context_, index, &value));
    return value;
  }

  template <class T>
  const T* data(size_t index) const {
    return data_of<T>(api_, input(index));
  }

  OrtValue* output(size_t index, const Shape& shape) const {
    OrtValue* value = nullptr;
    check(api_, api_.KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value));
    return value;
  }

  template <class T>
  T* output(size_t index, const Shape& shape) const {
    void* data = nullptr;
    check(api_, api_.GetTensorMutableData(output(index, shape), &data));
    return static_cast<T*>(data);
  }

  fq_stream stream() const {
    void* stream = nullptr;
    check(api_, api_.KernelContext_GetGPUComputeStream(context_, &stream));
    return static_cast<fq_stream>(stream);
  }

  const OrtApi& api() const { return api_; }
  OrtKernelContext* context() const { return context_; }

 private:
  const OrtApi& api_;
  OrtKernelContext* context_;
};

// Columns of an input's rows, each row on a border of 16 bytes as kernels read them: in the input itself, or a copy where sizes are no
// multiples of it.
class AlignedRows {
 public:
  AlignedRows(const Call& call, size_t index, int64_t rows, size_t row_bytes) : AlignedRows(call, index, rows, row_bytes, 0, row_bytes) {}

  // `row_bytes` from `first_byte` on of rows of `input_bytes`.
  AlignedRows(const Call& call, size_t index, int64_t rows, size_t row_bytes, size_t first_byte, size_t input_bytes)
      : api_(call.api()), data_(call.data<char>(index) + first_byte), pitch_(input_bytes) {
    constexpr size_t kAlignment = 16;
    if (first_byte % kAlignment == 0 && input_bytes % kAlignment == 0) return;
    pitch_ = (row_bytes + kAlignment - 1) / kAlignment * kAlignment;
    const OrtMemoryInfo* place = nullptr;  // the input's
    check(api_, api_.GetTensorMemoryInfo(call.input(index), &place));
    check(api_, api_.KernelContext_GetAllocator(call.context(), place, &allocator_));
    OrtStatus* status = api_.KernelContext_GetScratchBuffer(call.context(), place, pitch_ * rows, &copy_);
    const cudaError_t error =
        status == nullptr ? cudaMemcpy2DAsync(copy_, pitch_, data_, input_bytes, row_bytes, rows, cudaMemcpyDeviceToDevice, call.stream())
                          : cudaSuccess;
    if (status != nullptr || error != cudaSuccess) release();
    check(api_, status);
    check(error, "copying rows");
    data_ = copy_;
  }
  AlignedRows(const AlignedRows&) = delete;
  AlignedRows& operator=(const AlignedRows&) = delete;
  ~AlignedRows() { release(); }

  const void* data() const { return data_; }
  size_t pitch() const { return pitch_; }  // bytes from row to row

 private:
  // The buffer belongs to the call's stream: whoever gets it next comes after the work that reads it.
  void release() {
    if (copy_ != nullptr) allocator_->Free(allocator_, copy_);
    if (allocator_ != nullptr) api_.ReleaseAllocator(allocator_);
  }

  const OrtApi& api_;
  const void* data_;
  size_t pitch_;
  OrtAllocator* allocator_ = nullptr;
  void* copy_ = nullptr;
};

// --- a node, when its kernel is made --------------------------------------------------------------------------------------------------

class Node {
 public:
  Node(const OrtApi& api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  // Attributes that a node leaves out have the defaults of the op's function.
  int64_t integer(const char* name, int64_t otherwise) const {
    int64_t value = 0;
    return present(api_.KernelInfoGetAttribute_int64(info_, name, &value)) ? value : otherwise;
  }

  float number(const char* name, float otherwise) const {
    float value = 0;
    return present(api_.KernelInfoGetAttribute_float(info_, name, &value)) ? value : otherwise;
  }

  std::string string(const char* name, const char* otherwise) const {
    size_t size = 0;
    if (!present(api_.KernelInfoGetAttribute_string(info_, name, nullptr, &size))) return otherwise;
    std::string value(size, '\0');
    check(api_, api_.KernelInfoGetAttribute_string(info_, name, value.data(), &size));
    value.resize(size ? size - 1 : 0);  // without the terminating zero
    return value;
  }

  Shape integers(const char* name, const Shape& otherwise) const {
    size_t size = 0;
    if (!present(api_.KernelInfoGetAttributeArray_int64(info_, name, nullptr, &size))) return otherwise;
    Shape values(size);
    check(api_, api_.KernelInfoGetAttributeArray_int64(info_, name, values.data(), &size));
    return values;
  }

  bool flag(const char* name) const {
    const int64_t value = integer(name, 0);
    if (value != 0 && value != 1) throw Failure(std::string("attribute ") + name + " is 0 or 1, not " + std::to_string(value));
    return value == 1;
  }

  // Every op of the domain names the version of its meaning.
  void require_version() const {
    const std::string version = string("plugin_version", "1");
    if (version == "1") return;
    throw Failure("the node is of version " + version + " of the fqonnx ops, this library knows 1: build the library anew");
  }

  // The tensor of an input that is an initializer; null where it is computed.
  const OrtValue* constant(size_t index) const {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(api_, api_.KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value));
    return is_constant ? value : nullptr;
  }

  ONNXTensorElementDataType output_type(size_t index) const {
    OrtTypeInfo* info = nullptr;
    check(api_, api_.KernelInfo_GetOutputTypeInfo(info_, index, &info));
    const std::unique_ptr<OrtTypeInfo, decltype(api_.ReleaseTypeInfo)> owner(info, api_.ReleaseTypeInfo);
    const OrtTensorTypeAndShapeInfo* tensor = nullptr;  // the type's
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    check(api_, api_.CastTypeInfoToTensorInfo(info, &tensor));
    check(api_, api_.GetTensorElementType(tensor, &type));
    return type;
  }

  OrtAllocator* allocator() const {
    OrtAllocator* allocator = nullptr;
    check(api_, api_.KernelInfoGetAllocator(info_, OrtMemTypeDefault, &allocator));
    return allocator;
  }

 private:
  bool present(OrtStatus* status) const {
    if (status == nullptr) return true;
    api_.ReleaseStatus(status);
    return false;
  }

  const OrtApi& api_;
  const OrtKernelInfo* info_;
};

// Device memory from the session's own allocator, so that its memory limit and device hold for it.
class DeviceBuffer {
 public:
  DeviceBuffer(const OrtApi& api, const Node& node, const std::vector<uint16_t>& values) : api_(api), allocator_(node.allocator()) {
    const size_t bytes = values.size() * sizeof(uint16_t);
    data_ = allocator_->Alloc(allocator_, bytes);
    const cudaError_t error = data_ ? cudaMemcpy(data_, values.data(), bytes, cudaMemcpyHostToDevice) : cudaErrorMemoryAllocation;
    if (error != cudaSuccess) release();
    check(error, "copying a factor");
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() { release(); }

  const void* data() const { return data_; }

 private:
  void release() {
    if (data_ != nullptr) allocator_->Free(allocator_, data_);
    api_.ReleaseAllocator(allocator_);
  }

  const OrtApi& api_;
  OrtAllocator* allocator_;
  void* data_ = nullptr;
};

// --- FlatQuantize and the ops that end in it ---------------------------------------------------------------------------------------------

int32_t factor_size(const char* op, const Shape& shape, const char* which) {
  if (shape.size() != 2 || shape[0] != shape[1]) throw Failure(std::string(op) + ": " + which + " is square, not " + text(shape));
  return static_cast<int32_t>(shape[0]);
}

std::vector<float> read_factor(const OrtApi& api, const OrtValue* value, int32_t size) {
  std::vector<float> values(static_cast<size_t>(size) * size);
  // The provider keeps initializers on the device; before that they are in host memory, which the direction "default" tells apart.
  check(cudaMemcpy(values.data(), data_of<float>(api, value), values.size() * sizeof(float), cudaMemcpyDefault), "reading a factor");
  return values;
}

// Rounded to a 16-bit type; empty where a value leaves its range.
std::vector<uint16_t> round_factor(const std::vector<float>& values, int32_t dtype) {
  std::vector<uint16_t> rounded;
  rounded.reserve(values.size());
  for (const float value : values) {
    const bool half = dtype == FQ_FLOAT16;
    if (half && std::isinf(__half2float(__float2half_rn(value)))) return {};
    rounded.push_back(half ? __half_as_ushort(__float2half_rn(value)) : __bfloat16_as_ushort(__float2bfloat16_rn(value)));
  }
  return rounded;
}

// What these ops share: the attributes, the outputs q and scale, and the inputs left, right and clip; left is number `first_factor`.
class Quantizer {
 public:
  Quantizer(const OrtApi& api, const OrtKernelInfo* info, const char* op, int32_t dtype, size_t first_factor)
      : api_(api), op_(op), dtype_(dtype), left_(first_factor), right_(first_factor + 1), clip_(first_factor + 2) {
    const Node node(api, info);
    node.require_version();
    bits_ = static_cast<int32_t>(node.integer("bits", 4));
    if (bits_ != 4 && bits_ != 8) throw Failure(std::string(op) + ": attribute bits is 4 or 8, not " + std::to_string(bits_));
    packed_ = node.flag("packed");
    if (packed_ && bits_ != 4) throw Failure(std::string(op) + ": 8-bit codes cannot be packed two a byte");
    keep_constant_factors(node);
    constant_inputs_ = node.constant(left_) != nullptr && node.constant(right_) != nullptr && node.constant(clip_) != nullptr;
  }

  size_t element_size() const { return dtype_ == FQ_FLOAT ? sizeof(float) : sizeof(uint16_t); }

  // Everything but x, for rows of this shape, q and scale allocated.
  fq_flat_quantize_params prepare(const Call& call, const Shape& x) const {
    const int64_t k = x.back();
    if (packed_ && k % 2 != 0) throw Failure(std::string(op_) + ": an odd number of codes cannot be packed two a byte");
    Shape q = x, scale = x;
    q.back() = packed_ ? k / 2 : k;
    scale.back() = 1;

    fq_flat_quantize_params params{};
    params.q = call.output<void>(0, q);
    params.scale = call.output<float>(1, scale);
    params.clip_ptr = call.data<float>(clip_);
    params.rows = product(x, x.size() - 1);
    params.k = k;
    params.dtype = dtype_;
    params.bits = bits_;
    params.container = packed_ ? FQ_PACKED : FQ_INT8;
    params.factor_dtype = FQ_FLOAT;
    params.constant_factors = constant_inputs_;  // initializers, which nobody writes
    if (constant_) {
      params.n1 = constant_->n1;
      params.n2 = constant_->n2;
      if (constant_->left) {
        params.left = constant_->left->data();
        params.right = constant_->right->data();
        params.factor_dtype = dtype_;
      } else if (!constant_->identity) {
        params.left = call.data<float>(left_);
        params.right = call.data<float>(right_);
      }
    } else {
      params.n1 = factor_size(op_, shape_of(api_, call.input(left_)), "left");
      params.n2 = factor_size(op_, shape_of(api_, call.input(right_)), "right");
      params.left = call.data<float>(left_);
      params.right = call.data<float>(right_);
    }
    return params;
  }

  void set_x(fq_flat_quantize_params* params, const AlignedRows& x) const {
    params->x = x.data();
    params->x_stride = static_cast<int64_t>(x.pitch() / element_size());
  }

 private:
  // Factors that are initializers: rounded to x's type here, once, and not in every call. fp32 stays where x is fp32 or a value would not
  // fit.
  struct Factors {
    int32_t n1, n2;
    bool identity = false;  // [[1]] and [[1]]: no transform
    std::unique_ptr<DeviceBuffer> left, right;
  };

  void keep_constant_factors(const Node& node) {
    const OrtValue *left = node.constant(left_), *right = node.constant(right_);
    if (left == nullptr || right == nullptr) return;
    constant_.emplace();
    constant_->n1 = factor_size(op_, shape_of(api_, left), "left");
    constant_->n2 = factor_size(op_, shape_of(api_, right), "right");
    const bool scalars = constant_->n1 == 1 && constant_->n2 == 1;
    if (dtype_ == FQ_FLOAT && !scalars) return;
    const std::vector<float> left_values = read_factor(api_, left, constant_->n1), right_values = read_factor(api_, right, constant_->n2);
    constant_->identity = scalars && left_values[0] == 1.0f && right_values[0] == 1.0f;
    if (dtype_ == FQ_FLOAT || constant_->identity) return;
    const std::vector<uint16_t> left_rounded = round_factor(left_values, dtype_), right_rounded = round_factor(right_values, dtype_);
    if (left_rounded.empty() || right_rounded.empty()) return;
    constant_->left = std::make_unique<DeviceBuffer>(api_, node, left_rounded);
    constant_->right = std::make_unique<DeviceBuffer>(api_, node, right_rounded);
  }

  const OrtApi& api_;
  const char* op_;
  int32_t dtype_, bits_;
  size_t left_, right_, clip_;
  bool packed_, constant_inputs_;
  std::optional<Factors> constant_;
};

enum FlatQuantizeInput : size_t { kX, kFlatQuantizeFactors };

class FlatQuantize {
 public:
  FlatQuantize(const OrtApi& api, const OrtKernelInfo* info, int32_t dtype)
      : api_(api), quantizer_(api, info, "FlatQuantize", dtype, kFlatQuantizeFactors) {}

  void compute(OrtKernelContext* context) const {
    const Call call(api_, context);
    const Shape x = shape_of(api_, call.input(kX));
    require(!x.empty(), "FlatQuantize: x has rank 1 or more");
    fq_flat_quantize_params params = quantizer_.prepare(call, x);
    if (params.rows == 0) return;
    const AlignedRows aligned(call, kX, params.rows, params.k * quantizer_.element_size());
    quantizer_.set_x(&params, aligned);
    check(fq_flat_quantize(&params, call.stream()), "FlatQuantize");
  }

 private:
  const OrtApi& api_;
  Quantizer quantizer_;
};

enum SiluMulFlatQuantizeInput : size_t { kGateUp, kSiluMulFactors };

class SiluMulFlatQuantize {
 public:
  SiluMulFlatQuantize(const OrtApi& api, const OrtKernelInfo* info, int32_t dtype)
      : api_(api), quantizer_(api, info, "SiluMulFlatQuantize", dtype, kSiluMulFactors) {
    const int64_t gate = Node(api, info).integer("gate", 0);
    if (gate != 0 && gate != 1) throw Failure("SiluMulFlatQuantize: attribute gate is 0 or 1, not " + std::to_string(gate));
    gate_is_second_ = gate == 1;
  }

  void compute(OrtKernelContext* context) const {
    const Call call(api_, context);
    Shape h = shape_of(api_, call.input(kGateUp));
    require(!h.empty(), "SiluMulFlatQuantize: gate_up has rank 1 or more");
    require(h.back() % 2 == 0, "SiluMulFlatQuantize: gate_up has an even number of columns");
    h.back() /= 2;
    fq_flat_quantize_params params = quantizer_.prepare(call, h);
    if (params.rows == 0) return;
    const size_t half = params.k * quantizer_.element_size();
    const AlignedRows gate(call, kGateUp, params.rows, half, gate_is_second_ ? half : 0, 2 * half);
    const AlignedRows up(call, kGateUp, params.rows, half, gate_is_second_ ? 0 : half, 2 * half);
    quantizer_.set_x(&params, gate);
    const fq_silu_mul_params factor{up.data(), static_cast<int64_t>(up.pitch() / quantizer_.element_size())};
    check(fq_silu_mul_flat_quantize(&params, &factor, call.stream()), "SiluMulFlatQuantize");
  }

 private:
  const OrtApi& api_;
  Quantizer quantizer_;
  bool gate_is_second_;
};

enum RmsNormInput : size_t { kNormed, kGamma, kRmsNormFactors };
enum AddRmsNormInput : size_t { kSummand, kResidual, kAddGamma, kAddRmsNormFactors };
constexpr size_t kSumOutput = 2;

// RmsNormFlatQuantize, and with the sum before it AddRmsNormFlatQuantize.
template <bool kAdds>
class RmsNormFlatQuantize {
 public:
  static constexpr const char* kName = kAdds ? "AddRmsNormFlatQuantize" : "RmsNormFlatQuantize";
  static constexpr size_t kGammaInput = kAdds ? size_t{kAddGamma} : size_t{kGamma};

  RmsNormFlatQuantize(const OrtApi& api, const OrtKernelInfo* info, int32_t dtype)
      : api_(api),
        quantizer_(api, info, kName, dtype, kAdds ? size_t{kAddRmsNormFactors} : size_t{kRmsNormFactors}),
        epsilon_(Node(api, info).number("epsilon", 1e-5f)),
        constant_gamma_(Node(api, info).constant(kGammaInput) != nullptr) {}

  void compute(OrtKernelContext* context) const {
    const Call call(api_, context);
    const Shape x = shape_of(api_, call.input(0)), gamma = shape_of(api_, call.input(kGammaInput));
    if (x.empty() || gamma != Shape{x.back()}) {
      throw Failure(std::string(kName) + ": gamma " + text(gamma) + " does not fit rows of " + text(x));
    }
    fq_rms_norm_params norm{};
    if constexpr (kAdds) {
      const Shape residual = shape_of(api_, call.input(kResidual));
      if (residual != x) throw Failure(std::string(kName) + ": residual " + text(residual) + " does not fit " + text(x));
      norm.residual = call.data<void>(kResidual);
      norm.sum = call.output<void>(kSumOutput, x);
    }
    norm.gamma = call.data<void>(kGammaInput);
    norm.epsilon = epsilon_;
    fq_flat_quantize_params params = quantizer_.prepare(call, x);
    if (params.rows == 0) return;
    if (!constant_gamma_) params.constant_factors = 0;
    const AlignedRows aligned(call, 0, params.rows, params.k * quantizer_.element_size());
    quantizer_.set_x(&params, aligned);
    check(fq_rms_norm_flat_quantize(&params, &norm, call.stream()), kName);
  }

 private:
  const OrtApi& api_;
  Quantizer quantizer_;
  float epsilon_;
  bool constant_gamma_;
};

// --- W4A4Gemm -------------------------------------------------------------------------------------------------------------------------

enum W4A4GemmInput : size_t { kQ, kScale, kW, kWScale, kBias, kW4A4GemmInputs };

struct NamedLayout {
  const char* name;
  fq_layout layout;
  Shape shape, perm;  // by which the op's function undoes it
};

// fqonnx/ops/layout.py
const std::vector<NamedLayout>& layouts() {
  static const std::vector<NamedLayout> all = {
      {"plain", FQ_PLAIN, {0, -1}, {0, 1}},
      {"k128", FQ_K128, {0, -1, 4, 4, 4, 2}, {0, 1, 3, 5, 2, 4}},
  };
  return all;
}

int32_t layout_of(const Node& node) {
  const std::string name = node.string("layout", "plain");
  std::string names;
  for (const NamedLayout& layout : layouts()) {
    if (name == layout.name) {
      const Shape shape = node.integers("layout_shape", layouts()[0].shape), perm = node.integers("layout_perm", layouts()[0].perm);
      require(shape == layout.shape && perm == layout.perm, "W4A4Gemm: attributes layout_shape and layout_perm are not the layout's");
      return layout.layout;
    }
    names += std::string(names.empty() ? "" : ", ") + layout.name;
  }
  throw Failure("W4A4Gemm: unknown weight layout " + name + ": this library knows " + names);
}

class W4A4Gemm {
 public:
  W4A4Gemm(const OrtApi& api, const OrtKernelInfo* info, int32_t) : api_(api) {
    const Node node(api, info);
    node.require_version();
    packed_ = node.flag("packed");
    layout_ = layout_of(node);
    dtype_ = static_cast<int32_t>(node.integer("dtype", FQ_FLOAT));
    require(node.output_type(0) == element_type(dtype_), "W4A4Gemm: attribute dtype is not the type that the model states for its output");
    const OrtValue *w = node.constant(kW), *w_scale = node.constant(kWScale), *bias = node.constant(kBias);
    if (w == nullptr || w_scale == nullptr || bias == nullptr) return;
    weight_ = checked(shape_of(api, w), shape_of(api, w_scale), shape_of(api, bias));
  }

  void compute(OrtKernelContext* context) const {
    const Call call(api_, context);
    const auto shape = [&](size_t index) { return shape_of(api_, call.input(index)); };
    const Weight weight = weight_ ? *weight_ : checked(shape(kW), shape(kWScale), shape(kBias));
    Shape y = shape(kQ);
    const Shape scale = shape(kScale);
    require(!y.empty(), "W4A4Gemm: q has rank 1 or more");
    const int64_t rows = product(y, y.size() - 1);
    if ((packed_ ? 2 : 1) * y.back() != weight.k || scale.empty() || scale.back() != 1 || product(scale, scale.size()) != rows) {
      throw Failure("W4A4Gemm: q " + text(y) + " and scale " + text(scale) + " do not fit a weight of " + text({weight.n, weight.k}));
    }
    y.back() = weight.n;

    fq_w4a4_gemm_params params{};
    params.y = call.output<void>(0, y);
    if (rows == 0) return;
    params.q = call.data<void>(kQ);
    params.scale = call.data<float>(kScale);
    params.w = call.data<void>(kW);
    params.w_scale = call.data<float>(kWScale);
    params.bias = call.data<float>(kBias);
    params.m = rows;
    params.n = weight.n;
    params.k = weight.k;
    params.groups = weight.groups;
    params.dtype = dtype_;
    params.container = packed_ ? FQ_PACKED : FQ_INT8;
    params.layout = layout_;
    params.constant_weights = weight_.has_value();  // initializers, which nobody writes
    check(fq_w4a4_gemm(&params, call.stream()), "W4A4Gemm");
  }

 private:
  struct Weight {
    int64_t n, k, groups;
  };

  static Weight checked(const Shape& w, const Shape& w_scale, const Shape& bias) {
    if (w.size() != 2 || w_scale.size() != 2 || w_scale[0] != w[0] || w_scale[1] < 1 || w[1] % w_scale[1] || bias != Shape{w[0]}) {
      throw Failure("W4A4Gemm: w " + text(w) + ", w_scale " + text(w_scale) + " and bias " + text(bias) + " do not fit");
    }
    return {w[0], w[1], w_scale[1]};
  }

  const OrtApi& api_;
  int32_t dtype_, layout_;
  bool packed_;
  std::optional<Weight> weight_;
};

// --- GroupQueryAttention --------------------------------------------------------------------------------------------------------------

// An operator of ONNX Runtime's own, called from within a custom one.
class NativeOp {
 public:
  using Attributes = std::vector<std::unique_ptr<OrtOpAttr, void (*)(OrtOpAttr*)>>;

  NativeOp(const OrtApi& api, const OrtKernelInfo* info, const char* name, std::vector<const char*> type_names,
           const std::vector<ONNXTensorElementDataType>& types, const Attributes& attributes, int inputs, int outputs)
      : api_(api) {
    std::vector<const OrtOpAttr*> plain;
    for (const auto& attribute : attributes) plain.push_back(attribute.get());
    check(api, api.CreateOp(info, name, "com.microsoft", 1, type_names.data(), types.data(), static_cast<int>(types.size()), plain.data(),
                            static_cast<int>(plain.size()), inputs, outputs, &op_));
  }
  NativeOp(const NativeOp&) = delete;
  NativeOp& operator=(const NativeOp&) = delete;
  ~NativeOp() { api_.ReleaseOp(op_); }

  void run(const Call& call, const std::vector<const OrtValue*>& inputs, const std::vector<OrtValue*>& outputs) const {
    check(api_, api_.InvokeOp(call.context(), op_, inputs.data(), static_cast<int>(inputs.size()), outputs.data(), static_cast<int>(outputs.size())));
  }

  static void add(const OrtApi& api, Attributes* attributes, const char* name, int64_t value) {
    add(api, attributes, name, &value, ORT_OP_ATTR_INT);
  }
  static void add(const OrtApi& api, Attributes* attributes, const char* name, float value) {
    add(api, attributes, name, &value, ORT_OP_ATTR_FLOAT);
  }
  static void add(const OrtApi& api, Attributes* attributes, const char* name, const std::string& value) {
    add(api, attributes, name, value.c_str(), ORT_OP_ATTR_STRING, static_cast<int>(value.size()));
  }

 private:
  static void add(const OrtApi& api, Attributes* attributes, const char* name, const void* value, OrtOpAttrType type, int length = 1) {
    OrtOpAttr* attribute = nullptr;
    check(api, api.CreateOpAttr(name, value, length, type, &attribute));
    attributes->emplace_back(attribute, api.ReleaseOpAttr);
  }

  const OrtApi& api_;
  OrtOp* op_ = nullptr;
};

enum GroupQueryAttentionInput : size_t {
  kQuery,
  kKey,
  kValue,
  kPastKey,
  kPastValue,
  kSequenceLengths,
  kTotalLength,
  kCos,
  kSin,
  kKeyScale,
  kValueScale,
  kGroupQueryAttentionInputs
};
enum GroupQueryAttentionOutput : size_t { kAttended, kPresentKey, kPresentValue };

// com.microsoft.GroupQueryAttention whose steps of one token are a kernel's of this library; prompts are ONNX Runtime's own, and steps that the
// kernel is not made for. Keys and values are stored as Stored: in the type of the query, or int8.
template <typename Stored>
class GroupQueryAttention {
 public:
  static constexpr const char* kName = "GroupQueryAttention";
  static constexpr bool kInt8 = sizeof(Stored) == 1;

  GroupQueryAttention(const OrtApi& api, const OrtKernelInfo* info, int32_t dtype) : api_(api), dtype_(dtype) {
    const Node node(api, info);
    node.require_version();
    heads_ = node.integer("num_heads", 0);
    kv_heads_ = node.integer("kv_num_heads", 0);
    if (heads_ < 1 || kv_heads_ < 1 || heads_ % kv_heads_ != 0) {
      throw Failure("GroupQueryAttention: attributes num_heads and kv_num_heads are " + std::to_string(heads_) + " and " + std::to_string(kv_heads_));
    }
    scale_ = node.number("scale", 0.0f);
    rotary_ = node.flag("do_rotary");
    interleaved_ = node.flag("rotary_interleaved");
    NativeOp::Attributes attributes;
    NativeOp::add(api, &attributes, "num_heads", heads_);
    NativeOp::add(api, &attributes, "kv_num_heads", kv_heads_);
    NativeOp::add(api, &attributes, "scale", scale_);
    NativeOp::add(api, &attributes, "do_rotary", int64_t{rotary_});
    NativeOp::add(api, &attributes, "rotary_interleaved", int64_t{interleaved_});
    const std::string scales = node.string("k_quant_type", "NONE");
    const bool known = kInt8 ? scales == "PER_TENSOR" || scales == "PER_CHANNEL" : scales == "NONE";
    if (!known || node.string("v_quant_type", "NONE") != scales || node.integer("kv_cache_bit_width", 0) != (kInt8 ? 8 : 0)) {
      throw Failure("GroupQueryAttention: attributes k_quant_type, v_quant_type and kv_cache_bit_width do not say how the cache is stored: "
                    "int8 is PER_TENSOR or PER_CHANNEL, both alike, and 8");
    }
    scale_a_channel_ = scales == "PER_CHANNEL";
    if (kInt8) {
      NativeOp::add(api, &attributes, "k_quant_type", scales);
      NativeOp::add(api, &attributes, "v_quant_type", scales);
      NativeOp::add(api, &attributes, "kv_cache_bit_width", int64_t{8});
    }
    const auto type = element_type(dtype);
    native_ = std::make_unique<NativeOp>(
        api, info, kName, std::vector<const char*>{"T", "T_CACHE", "T_KV_SCALE", "M"},
        std::vector<ONNXTensorElementDataType>{type, kInt8 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 : type, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                                               ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
        attributes, kInt8 ? kNativeScale + 2 : kNativeScale, 3);
  }

  void compute(OrtKernelContext* context) const {
    const Call call(api_, context);
    std::vector<const OrtValue*> inputs;
    for (size_t i = 0; i < (kInt8 ? kGroupQueryAttentionInputs : kKeyScale); ++i) inputs.push_back(call.input(i));
    const Shape query = shape_of(api_, inputs[kQuery]), past = shape_of(api_, inputs[kPastKey]);
    const bool packed = inputs[kKey] == nullptr;
    require(query.size() == 3 && past.size() == 4 && past == shape_of(api_, inputs[kPastValue]) && past[1] == kv_heads_ && past[0] == query[0] &&
                packed == (inputs[kValue] == nullptr),
            "GroupQueryAttention: query [batch, tokens, width] and past_key and past_value [batch, kv_num_heads, tokens, head] do not fit");
    const int64_t head = past[3], width = heads_ * head;
    require(query[2] == (packed ? width + 2 * kv_heads_ * head : width), "GroupQueryAttention: query is not as wide as its heads");
    const int64_t total = *call.data<int32_t>(kTotalLength);  // in host memory
    Shape present = past;
    present[2] = std::max(total, past[2]);
    const std::vector<OrtValue*> outputs = {call.output(kAttended, {query[0], query[1], width}), call.output(kPresentKey, present),
                                            call.output(kPresentValue, present)};
    if (!is_step(query, head, inputs)) {
      inputs.insert(inputs.begin() + kKeyScale, kNativeScale - kKeyScale, nullptr);  // of position_ids, attention_bias and head_sink
      return native_->run(call, inputs, outputs);
    }

    fq_decode_attention_params params{};
    const size_t element = sizeof(uint16_t);
    const char* const q = data_of<char>(api_, inputs[kQuery]);
    params.q = q;
    params.k = packed ? q + width * element : data_of<char>(api_, inputs[kKey]);
    params.v = packed ? q + (width + kv_heads_ * head) * element : data_of<char>(api_, inputs[kValue]);
    params.q_stride = query[2];
    params.k_stride = params.v_stride = packed ? query[2] : kv_heads_ * head;
    if (rotary_) {
      params.cos = data_of<char>(api_, inputs[kCos]);
      params.sin = data_of<char>(api_, inputs[kSin]);
      params.positions = shape_of(api_, inputs[kCos])[0];
    }
    params.past = data_of<int32_t>(api_, inputs[kSequenceLengths]);
    params.key = cache(call, inputs[kPastKey], past, outputs[kPresentKey], present);
    params.value = cache(call, inputs[kPastValue], past, outputs[kPresentValue], present);
    params.y = const_cast<char*>(data_of<char>(api_, outputs[kAttended]));
    if (kInt8) {
      const int64_t scales = scale_a_channel_ ? kv_heads_ * head : 1;
      for (const size_t index : {kKeyScale, kValueScale}) {
        const Shape shape = inputs[index] == nullptr ? Shape{0} : shape_of(api_, inputs[index]);
        if (product(shape, shape.size()) != scales) {
          throw Failure("GroupQueryAttention: k_scale and v_scale have " + std::to_string(scales) + " values, not " + text(shape));
        }
      }
      params.cache = FQ_CACHE_INT8;
      params.scales = scale_a_channel_ ? FQ_SCALE_A_CHANNEL : FQ_SCALE_A_TENSOR;
      params.key_scale = data_of<float>(api_, inputs[kKeyScale]);
      params.value_scale = data_of<float>(api_, inputs[kValueScale]);
    }
    params.batch = query[0];
    params.capacity = present[2];
    params.longest = total;
    params.heads = static_cast<int32_t>(heads_);
    params.kv_heads = static_cast<int32_t>(kv_heads_);
    params.head = static_cast<int32_t>(head);
    params.dtype = dtype_;
    params.scale = scale_ != 0.0f ? scale_ : 1.0f / std::sqrt(static_cast<float>(head));
    check(fq_decode_attention(&params, call.stream()), kName);
  }

 private:
  // Whether fq_decode_attention takes it.
  bool is_step(const Shape& query, int64_t head, const std::vector<const OrtValue*>& inputs) const {
    if (query[1] != 1 || (head != 64 && head != 128)) return false;
    if (!rotary_) return true;
    if (interleaved_ || inputs[kCos] == nullptr || inputs[kSin] == nullptr) return false;
    const Shape cos = shape_of(api_, inputs[kCos]);
    return cos.size() == 2 && cos[1] == head / 2 && cos == shape_of(api_, inputs[kSin]);
  }

  // The cache that the step writes to: `present`, with what was in `past`, where the two are not the same memory.
  void* cache(const Call& call, const OrtValue* past, const Shape& past_shape, const OrtValue* present, const Shape& present_shape) const {
    const char* const from = data_of<char>(api_, past);
    char* const to = const_cast<char*>(data_of<char>(api_, present));
    const size_t row = past_shape[3] * sizeof(Stored), past_bytes = past_shape[2] * row;
    if (from != to && past_bytes > 0) {
      check(cudaMemcpy2DAsync(to, present_shape[2] * row, from, past_bytes, past_bytes, product(past_shape, 2), cudaMemcpyDeviceToDevice,
                              call.stream()),
            "copying the cache");
    }
    return to;
  }

  static constexpr int kNativeScale = 12;  // its input k_scale; v_scale follows

  const OrtApi& api_;
  int32_t dtype_;
  int64_t heads_, kv_heads_;
  float scale_;
  bool rotary_, interleaved_, scale_a_channel_;
  std::unique_ptr<NativeOp> native_;
};

// --- shapes and types, when a model is loaded -----------------------------------------------------------------------------------------

struct Dim {
  int64_t value = -1;
  std::string symbol;
};

// Names for sizes that nothing is known of: a name may stand once only, for equal names are equal sizes.
Dim unknown_dim() {
  static std::atomic<uint64_t> count{0};
  return {-1, "fqonnx_dim_" + std::to_string(count++)};
}

class Inference {
 public:
  Inference(const OrtApi& api, OrtShapeInferContext* context) : api_(api), context_(context) {}

  // Empty where the rank is not known: none of the inputs asked for is a scalar.
  std::vector<Dim> input(size_t index) const {
    OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's
    check(api_, api_.ShapeInferContext_GetInputTypeShape(context_, index, &info));
    size_t rank = 0;
    check(api_, api_.GetDimensionsCount(info, &rank));
    Shape values(rank);
    std::vector<const char*> symbols(rank);
    check(api_, api_.GetDimensions(info, values.data(), rank));
    check(api_, api_.GetSymbolicDimensions(info, symbols.data(), rank));
    std::vector<Dim> dims;
    for (size_t i = 0; i < rank; ++i) {
      const bool named = symbols[i] != nullptr && *symbols[i] != '\0';
      dims.push_back(named ? Dim{-1, symbols[i]} : values[i] >= 0 ? Dim{values[i], ""} : unknown_dim());
    }
    return dims;
  }

  ONNXTensorElementDataType input_type(size_t index) const {
    OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    check(api_, api_.ShapeInferContext_GetInputTypeShape(context_, index, &info));
    check(api_, api_.GetTensorElementType(info, &type));
    return type;
  }

  int64_t integer(const char* name, int64_t otherwise) const {
    const OrtOpAttr* attribute = nullptr;
    int64_t value = 0;
    size_t size = 0;
    OrtStatus* status = api_.ShapeInferContext_GetAttribute(context_, name, &attribute);
    if (status != nullptr) {
      api_.ReleaseStatus(status);
      return otherwise;
    }
    check(api_, api_.ReadOpAttr(attribute, ORT_OP_ATTR_INT, &value, sizeof(value), &size));
    return value;
  }

  void output(size_t index, const std::vector<Dim>& dims, ONNXTensorElementDataType type) const {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api_, api_.CreateTensorTypeAndShapeInfo(&info));
    const ShapeInfo owner(info, api_.ReleaseTensorTypeAndShapeInfo);
    Shape values;
    std::vector<const char*> symbols;
    for (const Dim& dim : dims) {
      values.push_back(dim.value);
      symbols.push_back(dim.symbol.c_str());
    }
    check(api_, api_.SetTensorElementType(info, type));
    check(api_, api_.SetDimensions(info, values.data(), values.size()));
    check(api_, api_.SetSymbolicDimensions(info, symbols.data(), symbols.size()));
    check(api_, api_.ShapeInferContext_SetOutputTypeShape(context_, index, info));
  }

 private:
  const OrtApi& api_;
  OrtShapeInferContext* context_;
};

void infer_quantized(const Inference& inference, std::vector<Dim> dims) {
  std::vector<Dim> scale = dims;
  scale.back() = {1, ""};
  if (inference.integer("packed", 0) == 1) dims.back() = dims.back().value >= 0 ? Dim{dims.back().value / 2, ""} : unknown_dim();
  inference.output(0, dims, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8);
  inference.output(1, scale, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
}

void infer_flat_quantize(const Inference& inference) {  // and RmsNormFlatQuantize, whose first input is quantized too
  const std::vector<Dim> dims = inference.input(kX);
  if (!dims.empty()) infer_quantized(inference, dims);
}

void infer_add_rms_norm_flat_quantize(const Inference& inference) {
  const std::vector<Dim> dims = inference.input(kSummand);
  if (dims.empty()) return;
  infer_quantized(inference, dims);
  inference.output(kSumOutput, dims, inference.input_type(kSummand));
}

void infer_silu_mul_flat_quantize(const Inference& inference) {
  std::vector<Dim> dims = inference.input(kGateUp);
  if (dims.empty()) return;
  dims.back() = dims.back().value >= 0 ? Dim{dims.back().value / 2, ""} : unknown_dim();
  infer_quantized(inference, dims);
}

void infer_w4a4_gemm(const Inference& inference) {
  std::vector<Dim> dims = inference.input(kQ);
  const std::vector<Dim> w = inference.input(kW);
  if (dims.empty()) return;  // a type cannot be told without a shape: the model's own statement of it holds
  dims.back() = w.size() == 2 ? w[0] : unknown_dim();
  inference.output(0, dims, element_type(inference.integer("dtype", FQ_FLOAT)));
}

void infer_group_query_attention(const Inference& inference) {
  std::vector<Dim> attended = inference.input(kQuery), present = inference.input(kPastKey);
  if (attended.size() != 3 || present.size() != 4) return;
  const ONNXTensorElementDataType type = inference.input_type(kQuery), stored = inference.input_type(kPastKey);
  const int64_t heads = inference.integer("num_heads", 0), head = present[3].value;
  attended[2] = head >= 0 ? Dim{heads * head, ""} : unknown_dim();
  present[2] = unknown_dim();
  inference.output(kAttended, attended, type);
  inference.output(kPresentKey, present, stored);
  inference.output(kPresentValue, present, stored);
}

// --- registration ---------------------------------------------------------------------------------------------------------------------

using Types = std::vector<ONNXTensorElementDataType>;

// One signature of an op.
struct Op : OrtCustomOp {
  const OrtApi* api;
  const char* name;
  int32_t dtype;  // of the first input, by which all but W4A4Gemm have several
  Types inputs, outputs;
  void (*infer)(const Inference&);
  uint32_t optional_inputs = 0, host_inputs = 0;  // a bit for each that may be left out, that is read in host memory
};

const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

template <class Kernel>
struct Instance {
  const OrtApi& api;
  Kernel kernel;
};

template <class Kernel>
std::unique_ptr<Op> signature(const OrtApi& api, const char* name, int32_t dtype, Types inputs, Types outputs,
                              void (*infer)(const Inference&)) {
  auto op = std::make_unique<Op>();
  static_cast<OrtCustomOp&>(*op) = OrtCustomOp{};
  op->version = kApiVersion;
  op->api = &api;
  op->name = name;
  op->dtype = dtype;
  op->inputs = std::move(inputs);
  op->outputs = std::move(outputs);
  op->infer = infer;
  op->GetName = [](const OrtCustomOp* op) { return self(op).name; };
  op->GetExecutionProviderType = [](const OrtCustomOp*) { return kProvider; };
  op->GetInputTypeCount = [](const OrtCustomOp* op) { return self(op).inputs.size(); };
  op->GetInputType = [](const OrtCustomOp* op, size_t index) { return self(op).inputs[index]; };
  op->GetOutputTypeCount = [](const OrtCustomOp* op) { return self(op).outputs.size(); };
  op->GetOutputType = [](const OrtCustomOp* op, size_t index) { return self(op).outputs[index]; };
  op->GetInputCharacteristic = [](const OrtCustomOp* op, size_t index) {
    return self(op).optional_inputs >> index & 1 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  };
  op->GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op->GetInputMemoryType = [](const OrtCustomOp* op, size_t index) {
    return self(op).host_inputs >> index & 1 ? OrtMemTypeCPUInput : OrtMemTypeDefault;
  };
  op->CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return guarded(*api, [&] { *kernel = new Instance<Kernel>{*api, Kernel(*api, info, self(op).dtype)}; });
  };
  op->KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const auto& instance = *static_cast<const Instance<Kernel>*>(kernel);
    return guarded(instance.api, [&] { instance.kernel.compute(context); });
  };
  op->KernelDestroy = [](void* kernel) { delete static_cast<Instance<Kernel>*>(kernel); };
  op->InferOutputShapeFn = [](const OrtCustomOp* op, OrtShapeInferContext* context) {
    return guarded(*self(op).api, [&] { self(op).infer(Inference(*self(op).api, context)); });
  };
  return op;
}

// What a session refers to for as long as it lives: made once for each ONNX Runtime in the process, and never freed.
struct Registration {
  explicit Registration(const OrtApi& api) {
    constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, kInt8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8,
                   kInt4 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4, kByAttribute = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    check(api, api.CreateCustomOpDomain(kDomain, &domain));
    for (const int32_t dtype : {FQ_FLOAT, FQ_FLOAT16, FQ_BFLOAT16}) {
      const auto x = element_type(dtype);
      add(api, signature<FlatQuantize>(api, "FlatQuantize", dtype, {x, kFloat, kFloat, kFloat}, {kInt8, kFloat}, infer_flat_quantize));
      add(api, signature<SiluMulFlatQuantize>(api, "SiluMulFlatQuantize", dtype, {x, kFloat, kFloat, kFloat}, {kInt8, kFloat},
                                              infer_silu_mul_flat_quantize));
      add(api, signature<RmsNormFlatQuantize<false>>(api, RmsNormFlatQuantize<false>::kName, dtype, {x, x, kFloat, kFloat, kFloat},
                                                     {kInt8, kFloat}, infer_flat_quantize));
      add(api, signature<RmsNormFlatQuantize<true>>(api, RmsNormFlatQuantize<true>::kName, dtype, {x, x, x, kFloat, kFloat, kFloat},
                                                    {kInt8, kFloat, x}, infer_add_rms_norm_flat_quantize));
    }
    add_attention<uint16_t>(api, FQ_FLOAT16, element_type(FQ_FLOAT16));
    add_attention<uint16_t>(api, FQ_BFLOAT16, element_type(FQ_BFLOAT16));
    add_attention<int8_t>(api, FQ_FLOAT16, kInt8);
    // Signatures that differ in the output alone would be told apart by their order: the first one's type would be inferred for all.
    add(api, signature<W4A4Gemm>(api, "W4A4Gemm", 0, {kInt8, kFloat, kInt4, kFloat, kFloat}, {kByAttribute}, infer_w4a4_gemm));
  }

  template <typename Stored>
  void add_attention(const OrtApi& api, int32_t dtype, ONNXTensorElementDataType stored) {
    constexpr auto kInt32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    const auto x = element_type(dtype);
    using Kernel = GroupQueryAttention<Stored>;
    auto op = signature<Kernel>(api, Kernel::kName, dtype, {x, x, x, stored, stored, kInt32, kInt32, x, x, kFloat, kFloat}, {x, stored, stored},
                                infer_group_query_attention);
    op->optional_inputs = 1 << kKey | 1 << kValue | 1 << kCos | 1 << kSin | 1 << kKeyScale | 1 << kValueScale;
    op->host_inputs = 1 << kTotalLength;
    // The caches stay where they are when ONNX Runtime is free to choose.
    op->GetMayInplace = [](int** inputs, int** outputs) {
      *inputs = new int[2]{kPastKey, kPastValue};
      *outputs = new int[2]{kPresentKey, kPresentValue};
      return size_t{2};
    };
    op->ReleaseMayInplace = [](int* inputs, int* outputs) {
      delete[] inputs;
      delete[] outputs;
    };
    add(api, std::move(op));
  }

  void add(const OrtApi& api, std::unique_ptr<Op> op) {
    check(api, api.CustomOpDomain_Add(domain, op.get()));
    ops.push_back(std::move(op));
  }

  OrtCustomOpDomain* domain = nullptr;
  std::vector<std::unique_ptr<Op>> ops;
};

OrtCustomOpDomain* domain_for(const OrtApi& api) {
  static std::mutex mutex;
  static auto* const registrations = new std::map<const OrtApi*, Registration>;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = registrations->find(&api);
  if (found == registrations->end()) found = registrations->emplace(&api, api).first;
  return found->second.domain;
}

// Asking an older ONNX Runtime for the interface would make it print an error of its own. "1.31.1" has versions 1 to 31 of it.
bool is_too_old(const char* version) {
  unsigned major = 0, minor = 0;
  return std::sscanf(version, "%u.%u", &major, &minor) != 2 || major < 1 || (major == 1 && minor < kApiVersion);
}

}  // namespace
}  // namespace fq::ort

// What ONNX Runtime calls in the library given to SessionOptions.register_custom_ops_library.
extern "C" FQ_API OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace fq::ort;
  const char* const version = base->GetVersionString();
  const OrtApi* const api = is_too_old(version) ? nullptr : base->GetApi(kApiVersion);
  if (api == nullptr) {
    const std::string number = std::to_string(kApiVersion);
    const std::string message = "fqonnx's kernels need version " + number + " of ONNX Runtime's interface, which " + version +
                                " does not have: install onnxruntime-gpu 1." + number + " or newer";
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, message.c_str());
  }
  return guarded(*api, [&] { check(*api, api->AddCustomOpDomain(options, domain_for(*api))); });
}
