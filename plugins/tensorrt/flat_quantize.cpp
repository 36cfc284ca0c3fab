// FlatQuantize and the ops that end in it.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "op.h"

namespace fq::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimensionOperation;
using nvinfer1::DimsExprs;
using nvinfer1::PluginFieldType;

constexpr int64_t kAlignment = 16;  // bytes: where kernels want rows to begin

enum class Prologue { kNone, kSiluMul, kRmsNorm, kAddRmsNorm };

struct Signature {
  const char* name;
  std::vector<Tensor> inputs, outputs;
  int gamma;  // its number among the inputs; 0: there is none
  int left;   // followed by right and clip
};

const Signature& signature_of(Prologue prologue) {
  constexpr TensorKind kX = TensorKind::kActivation, kFloat = TensorKind::kFloat;
  const Tensor left{"left", kFloat}, right{"right", kFloat}, clip{"clip", kFloat}, q{"q", TensorKind::kInt8}, scale{"scale", kFloat};
  static const Signature signatures[] = {
      {"FlatQuantize", {{"x", kX}, left, right, clip}, {q, scale}, 0, 1},
      {"SiluMulFlatQuantize", {{"gate_up", kX}, left, right, clip}, {q, scale}, 0, 1},
      {"RmsNormFlatQuantize", {{"x", kX}, {"gamma", kX}, left, right, clip}, {q, scale}, 1, 2},
      {"AddRmsNormFlatQuantize", {{"x", kX}, {"residual", kX}, {"gamma", kX}, left, right, clip}, {q, scale, {"sum", kX}}, 2, 3},
  };
  return signatures[static_cast<int>(prologue)];
}

// Columns of an input's rows, each row on a border of 16 bytes: in the input itself, or copied to the workspace where sizes are no
// multiples of it.
struct Rows {
  int64_t first_byte, row_bytes, input_bytes;  // of the columns, and of all of the input's

  bool is_aligned() const { return first_byte % kAlignment == 0 && input_bytes % kAlignment == 0; }
  int64_t pitch() const { return is_aligned() ? input_bytes : (row_bytes + kAlignment - 1) / kAlignment * kAlignment; }
  size_t workspace(int64_t rows) const { return is_aligned() ? 0 : static_cast<size_t>(pitch() * rows); }

  // Where they are; a copy is made at *workspace, which is moved behind it.
  const void* place(const void* input, int64_t rows, char** workspace, fq_stream stream) const {
    const char* const data = static_cast<const char*>(input) + first_byte;
    if (is_aligned()) return data;
    if (*workspace == nullptr)
      throw Failure("no workspace was given for " + std::to_string(rows) + " rows of " + std::to_string(row_bytes) + " bytes");
    char* const copy = *workspace;
    *workspace += this->workspace(rows);
    const auto bytes = [](int64_t count) { return static_cast<size_t>(count); };
    const cudaError_t error =
        cudaMemcpy2DAsync(copy, bytes(pitch()), data, bytes(input_bytes), bytes(row_bytes), bytes(rows), cudaMemcpyDeviceToDevice, stream);
    if (error != cudaSuccess) throw Failure(std::string("copying rows: ") + cudaGetErrorString(error));
    return copy;
  }
};

class Quantizer final : public Op {
 public:
  Quantizer(Prologue prologue, const Fields& fields) : prologue_(prologue) {
    bits_ = fields.integer("bits", 4, {4, 8});
    packed_ = fields.integer("packed", 0, {0, 1});
    if (packed_ == 1 && bits_ != 4) throw Failure("field packed is 1 and field bits is 8: only codes of 4 bits are packed two a byte");
    if (is_gated()) gate_ = fields.integer("gate", 0, {0, 1});
    if (is_normed()) epsilon_ = fields.number("epsilon", 1e-5f);
  }

  std::unique_ptr<Op> clone() const override { return std::make_unique<Quantizer>(*this); }
  const char* name() const override { return signature().name; }
  const std::vector<Tensor>& inputs() const override { return signature().inputs; }
  const std::vector<Tensor>& outputs() const override { return signature().outputs; }

  std::vector<StateValue> state() const override {
    std::vector<StateValue> values = {{"bits", bits_}, {"packed", packed_}};
    if (is_gated()) values.push_back({"gate", gate_});
    if (is_normed()) values.push_back({"epsilon", epsilon_});
    return values;
  }

  std::vector<DimsExprs> output_shapes(const DimsExprs* in, nvinfer1::IExprBuilder& builder) const override {
    const DimsExprs& x = in[0];
    const int32_t last = x.nbDims - 1;
    const auto half = [&](const nvinfer1::IDimensionExpr* dimension, const char* of_what) {
      if (dimension->isConstant() && dimension->getConstantValue() % 2 != 0) {
        throw Failure(std::string(of_what) + " " + std::to_string(dimension->getConstantValue()) + ", an odd number");
      }
      return builder.operation(DimensionOperation::kFLOOR_DIV, *dimension, *builder.constant(2));
    };
    DimsExprs q = x, scale = x;
    if (is_gated()) q.d[last] = half(q.d[last], "the columns of gate_up, which are two halves, are");
    if (packed_) q.d[last] = half(q.d[last], "the codes of a row, which are packed two a byte, are");
    scale.d[last] = builder.constant(1);
    if (prologue_ == Prologue::kAddRmsNorm) return {q, scale, x};
    return {q, scale};
  }

  void check(const std::vector<Shape>& in, DataType type) const override {
    const Problem problem = read(in);
    if (problem.k < 0 || problem.n1 < 0 || problem.n2 < 0) return;
    fq_flat_quantize_params params = params_of(problem, type);
    params.rows = 0;  // the kernels' own checks, and nothing to do
    params.x_stride = params.k;
    params.left = params.right = no_data();
    params.clip = 1;
    enqueue(params, no_data(), params.k, no_data(), nullptr, nullptr, nullptr);
  }

  size_t workspace(const Shape& x, DataType type) const override {
    const int64_t rows = std::max<int64_t>(product(x, x.size() - 1), 0);
    size_t bytes = 0;
    for (const Rows& part : parts(std::max<int64_t>(x.back(), 0), type)) bytes += part.workspace(rows);
    return bytes;
  }

  void enqueue(const Call& call, int32_t) const override {
    const Problem problem = read(call.shapes);
    if (problem.rows == 0) return;
    fq_flat_quantize_params params = params_of(problem, call.type);
    const auto left = static_cast<size_t>(signature().left);
    params.left = call.inputs[left];
    params.right = call.inputs[left + 1];
    params.clip_ptr = static_cast<const float*>(call.inputs[left + 2]);
    params.q = call.outputs[0];
    params.scale = static_cast<float*>(call.outputs[1]);
    char* workspace = static_cast<char*>(call.workspace);
    const std::vector<Rows> rows = parts(call.shapes[0].back(), call.type);
    params.x = rows[0].place(call.inputs[0], params.rows, &workspace, call.stream);
    params.x_stride = rows[0].pitch() / element_size(call.type);
    const void* const up = is_gated() ? rows[1].place(call.inputs[0], params.rows, &workspace, call.stream) : nullptr;
    const void* const gamma = is_normed() ? call.inputs[signature().gamma] : nullptr;
    const bool adds = prologue_ == Prologue::kAddRmsNorm;
    enqueue(params, up, is_gated() ? rows[1].pitch() / element_size(call.type) : 0, gamma, adds ? call.inputs[1] : nullptr,
            adds ? call.outputs[2] : nullptr, call.stream);
  }

 private:
  struct Problem {
    int64_t rows, k, n1, n2;
  };

  const Signature& signature() const { return signature_of(prologue_); }
  bool is_gated() const { return prologue_ == Prologue::kSiluMul; }
  bool is_normed() const { return prologue_ == Prologue::kRmsNorm || prologue_ == Prologue::kAddRmsNorm; }
  static int64_t element_size(DataType type) { return type == DataType::kFLOAT ? 4 : 2; }

  Problem read(const std::vector<Shape>& in) const {
    const auto left = static_cast<size_t>(signature().left), gamma = static_cast<size_t>(signature().gamma);
    const Shape& x = in[0];
    const auto x_text = [&] { return std::string(inputs()[0].name) + " " + text(x); };
    if (x.empty()) throw Failure(x_text() + " has no columns");
    if (is_gated() && x.back() >= 0 && x.back() % 2 != 0) throw Failure(x_text() + " has no two halves of columns");
    const int64_t k = is_gated() && x.back() >= 0 ? x.back() / 2 : x.back();
    for (const size_t factor : {left, left + 1}) {
      if (in[factor].size() != 2 || differ(in[factor][0], in[factor][1])) {
        throw Failure(std::string(inputs()[factor].name) + " " + text(in[factor]) + " is not square");
      }
    }
    if (differ(product(in[left + 2], in[left + 2].size()), 1)) throw Failure("clip " + text(in[left + 2]) + " is not one number");
    if (is_normed() && (in[gamma].size() != 1 || differ(in[gamma][0], k)))
      throw Failure("gamma " + text(in[gamma]) + " does not fit " + x_text());
    if (prologue_ == Prologue::kAddRmsNorm) {
      bool fits = in[1].size() == x.size();
      for (size_t i = 0; fits && i < x.size(); ++i) fits = !differ(in[1][i], x[i]);
      if (!fits) throw Failure("residual " + text(in[1]) + " does not fit " + x_text());
    }
    return {product(x, x.size() - 1), k, in[left][0], in[left + 1][0]};
  }

  fq_flat_quantize_params params_of(const Problem& problem, DataType type) const {
    fq_flat_quantize_params params{};
    params.rows = problem.rows;
    params.k = problem.k;
    params.n1 = static_cast<int32_t>(std::min<int64_t>(problem.n1, INT32_MAX));
    params.n2 = static_cast<int32_t>(std::min<int64_t>(problem.n2, INT32_MAX));
    params.dtype = element_type(type);
    params.factor_dtype = FQ_FLOAT;
    params.bits = bits_;
    params.container = packed_ ? FQ_PACKED : FQ_INT8;
    return params;
  }

  // x, or gate and up.
  std::vector<Rows> parts(int64_t columns, DataType type) const {
    const int64_t bytes = columns * element_size(type);
    if (!is_gated()) return {{0, bytes, bytes}};
    const int64_t half = bytes / 2;
    return {{gate_ * half, half, bytes}, {(1 - gate_) * half, half, bytes}};
  }

  void enqueue(const fq_flat_quantize_params& params, const void* up, int64_t up_stride, const void* gamma, const void* residual, void* sum,
               fq_stream stream) const {
    if (is_gated()) {
      const fq_silu_mul_params gate{up, up_stride};
      return trt::check(fq_silu_mul_flat_quantize(&params, &gate, stream));
    }
    if (!is_normed()) return trt::check(fq_flat_quantize(&params, stream));
    fq_rms_norm_params norm{};
    norm.gamma = gamma;
    norm.residual = residual;
    norm.sum = sum;
    norm.epsilon = epsilon_;
    trt::check(fq_rms_norm_flat_quantize(&params, &norm, stream));
  }

  Prologue prologue_;
  int32_t bits_, packed_, gate_ = 0;
  float epsilon_ = 0;
};

template <Prologue kPrologue>
std::unique_ptr<Op> make(const Fields& fields) {
  return std::make_unique<Quantizer>(kPrologue, fields);
}

constexpr FieldName kBits{"bits", PluginFieldType::kINT32}, kPacked{"packed", PluginFieldType::kINT32},
    kGate{"gate", PluginFieldType::kINT32}, kEpsilon{"epsilon", PluginFieldType::kFLOAT32};

}  // namespace

const OpType kFlatQuantize = {"FlatQuantize", {kBits, kPacked}, {"bits", "packed"}, make<Prologue::kNone>};
const OpType kSiluMulFlatQuantize = {"SiluMulFlatQuantize", {kBits, kPacked, kGate}, {"bits", "packed", "gate"}, make<Prologue::kSiluMul>};
const OpType kRmsNormFlatQuantize = {
    "RmsNormFlatQuantize", {kBits, kPacked, kEpsilon}, {"bits", "packed", "epsilon"}, make<Prologue::kRmsNorm>};
const OpType kAddRmsNormFlatQuantize = {
    "AddRmsNormFlatQuantize", {kBits, kPacked, kEpsilon}, {"bits", "packed", "epsilon"}, make<Prologue::kAddRmsNorm>};

}  // namespace fq::trt
