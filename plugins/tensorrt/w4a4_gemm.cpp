// W4A4Gemm.
#include <algorithm>

#include "op.h"

namespace fq::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::PluginFieldType;

enum Input : size_t { kQ, kScale, kW, kWScale, kBias };

struct Layout {
  const char* name;
  fq_layout number;
  std::vector<int64_t> shape, perm;  // by which the op's function undoes it
};

// fqonnx/ops/layout.py
const std::vector<Layout>& layouts() {
  static const std::vector<Layout> all = {
      {"plain", FQ_PLAIN, {0, -1}, {0, 1}},
      {"k128", FQ_K128, {0, -1, 4, 4, 4, 2}, {0, 1, 3, 5, 2, 4}},
  };
  return all;
}

int32_t layout_of(const Fields& fields) {
  if (!fields.is_build()) return fields.integer("layout", FQ_PLAIN, {FQ_PLAIN, FQ_K128});
  const std::string name = fields.text("layout", "plain");
  std::string names;
  for (const Layout& layout : layouts()) {
    if (name == layout.name) {
      const struct {
        const char* name;
        const std::vector<int64_t>&otherwise, &wanted;
      } parts[] = {{"layout_shape", layouts()[0].shape, layout.shape}, {"layout_perm", layouts()[0].perm, layout.perm}};
      for (const auto& part : parts) {
        const std::vector<int64_t> value = fields.integers(part.name, part.otherwise);
        if (value != part.wanted)
          throw Failure(std::string("field ") + part.name + " is " + text(value) + ", not " + text(part.wanted) + " of layout " + name);
      }
      return layout.number;
    }
    names += std::string(names.empty() ? "" : " or ") + layout.name;
  }
  throw Failure("field layout is " + name + ", not " + names);
}

// A tactic is the number of a kernel's tile and, above it, the width in bits of the count of rows that TensorRT timed it with. For a count
// that is far from it, such as a prompt's where a single token was timed, the kernel chooses by itself.
constexpr int32_t kTileBits = 16;

int32_t width_of(int64_t rows) {
  int32_t width = 0;
  for (; rows > 0; rows >>= 1) ++width;
  return width;
}

int32_t tile_for(int32_t tactic, int64_t rows) {
  const int32_t timed = tactic >> kTileBits;
  return std::abs(width_of(rows) - timed) <= 1 ? tactic & ((1 << kTileBits) - 1) : 0;
}

class Gemm final : public Op {
 public:
  explicit Gemm(const Fields& fields) {
    packed_ = fields.integer("packed", 0, {0, 1});
    layout_ = layout_of(fields);
    dtype_ = fields.integer("dtype", FQ_FLOAT, {FQ_FLOAT, FQ_FLOAT16, FQ_BFLOAT16});
  }

  std::unique_ptr<Op> clone() const override { return std::make_unique<Gemm>(*this); }
  const char* name() const override { return "W4A4Gemm"; }

  const std::vector<Tensor>& inputs() const override {
    static const std::vector<Tensor> all = {{"q", TensorKind::kInt8},
                                            {"scale", TensorKind::kFloat},
                                            {"w", TensorKind::kInt4},
                                            {"w_scale", TensorKind::kFloat},
                                            {"bias", TensorKind::kFloat}};
    return all;
  }

  const std::vector<Tensor>& outputs() const override {
    static const std::vector<Tensor> all = {{"y", TensorKind::kOutput}};
    return all;
  }

  std::vector<StateValue> state() const override { return {{"packed", packed_}, {"layout", layout_}, {"dtype", dtype_}}; }

  DataType output_type() const override {
    return dtype_ == FQ_FLOAT ? DataType::kFLOAT : dtype_ == FQ_FLOAT16 ? DataType::kHALF : DataType::kBF16;
  }

  std::vector<DimsExprs> output_shapes(const DimsExprs* in, nvinfer1::IExprBuilder&) const override {
    if (in[kW].nbDims != 2) throw Failure("w has rank " + std::to_string(in[kW].nbDims) + ", not 2");
    DimsExprs y = in[kQ];
    y.d[y.nbDims - 1] = in[kW].d[0];
    return {y};
  }

  void check(const std::vector<Shape>& in, DataType) const override {
    fq_w4a4_gemm_params params = params_of(in);
    if (!empty(&params)) return;
    trt::check(fq_w4a4_gemm(&params, nullptr));
  }

  std::vector<int32_t> tactics(const std::vector<Shape>& in) const override {
    fq_w4a4_gemm_params params = params_of(in);
    const int32_t timed = width_of(params.m) << kTileBits;
    if (params.m < 0 || !empty(&params)) return {};
    const int32_t count = fq_w4a4_gemm_tactics(&params);
    if (count <= 0) throw Failure(fq_last_error());
    std::vector<int32_t> numbers;
    for (int32_t tile = 1; tile <= count; ++tile) numbers.push_back(timed | tile);
    return numbers;
  }

  void enqueue(const Call& call, int32_t tactic) const override {
    fq_w4a4_gemm_params params = params_of(call.shapes);
    if (params.m == 0) return;
    params.q = call.inputs[kQ];
    params.scale = static_cast<const float*>(call.inputs[kScale]);
    params.w = call.inputs[kW];
    params.w_scale = static_cast<const float*>(call.inputs[kWScale]);
    params.bias = static_cast<const float*>(call.inputs[kBias]);
    params.y = call.outputs[0];
    params.tactic = tile_for(tactic, params.m);
    trt::check(fq_w4a4_gemm(&params, call.stream));
  }

 private:
  // All but the pointers; a size below 0 is not known.
  fq_w4a4_gemm_params params_of(const std::vector<Shape>& in) const {
    const Shape &q = in[kQ], &scale = in[kScale], &w = in[kW], &w_scale = in[kWScale];
    if (w.size() != 2 || w_scale.size() != 2 || differ(w[0], w_scale[0]) || in[kBias].size() != 1 || differ(in[kBias][0], w[0])) {
      throw Failure("w " + text(w) + ", w_scale " + text(w_scale) + " and bias " + text(in[kBias]) + " do not fit");
    }
    bool fits = !q.empty() && scale.size() == q.size() && !differ(scale.back(), 1);
    for (size_t i = 0; fits && i + 1 < q.size(); ++i) fits = !differ(q[i], scale[i]);
    if (!fits || (q.back() >= 0 && differ((packed_ ? 2 : 1) * q.back(), w[1]))) {
      throw Failure("q " + text(q) + " and scale " + text(scale) + " do not fit w " + text(w));
    }
    fq_w4a4_gemm_params params{};
    params.m = product(q, q.size() - 1);
    params.n = w[0];
    params.k = w[1];
    params.groups = w_scale[1];
    params.dtype = dtype_;
    params.container = packed_ ? FQ_PACKED : FQ_INT8;
    params.layout = layout_;
    return params;
  }

  // The same without rows, for the kernels' own checks; false where a size is not known.
  static bool empty(fq_w4a4_gemm_params* params) {
    if (params->n < 0 || params->k < 0 || params->groups < 0) return false;
    params->m = 0;
    params->w = no_data();
    params->w_scale = static_cast<float*>(no_data());
    return true;
  }

  int32_t packed_, layout_, dtype_;
};

std::unique_ptr<Op> make(const Fields& fields) { return std::make_unique<Gemm>(fields); }

}  // namespace

const OpType kW4A4Gemm = {"W4A4Gemm",
                          {{"packed", PluginFieldType::kINT32},
                           {"layout", PluginFieldType::kCHAR},
                           {"layout_shape", PluginFieldType::kINT32},
                           {"layout_perm", PluginFieldType::kINT32},
                           {"dtype", PluginFieldType::kINT32}},
                          {"packed", "layout", "dtype"},
                          make};

}  // namespace fq::trt
