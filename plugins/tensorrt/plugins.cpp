// The fqonnx ops as plugins of TensorRT: IPluginV3 with its three capabilities, a creator each, and the entry points by which TensorRT's
// registry finds them. No exception leaves this file: what fails is logged in one line and told by the value returned.
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "logger.h"
#include "op.h"

namespace fq::trt {

namespace {

std::string name_of(nvinfer1::DataType type) {
  constexpr const char* kNames[] = {"FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "FP8", "BF16", "INT64", "INT4", "FP4", "E8M0"};
  const auto number = static_cast<size_t>(type);
  return number < sizeof(kNames) / sizeof(kNames[0]) ? kNames[number] : std::to_string(static_cast<int32_t>(type));
}

}  // namespace

int32_t element_type(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      return FQ_FLOAT;
    case nvinfer1::DataType::kHALF:
      return FQ_FLOAT16;
    case nvinfer1::DataType::kBF16:
      return FQ_BFLOAT16;
    default:
      throw Failure("activations are of type " + name_of(type) + ", not FLOAT, HALF or BF16");
  }
}

int64_t product(const Shape& shape, size_t count) {
  int64_t size = 1;
  for (size_t i = 0; i < count; ++i) {
    if (shape[i] < 0) return -1;
    size *= shape[i];
  }
  return size;
}

void check(fq_status status) {
  if (status != FQ_OK) throw Failure(fq_last_error());
}

void* no_data() {
  alignas(256) static char nothing[256];
  return nothing;
}

namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr const char* kNamespace = "fqonnx";
constexpr const char* kVersion = "1";

std::string message_of(const std::exception_ptr& thrown) {
  try {
    std::rethrow_exception(thrown);
  } catch (const std::exception& error) {
    return error.what();
  } catch (...) {
    return "an unknown exception";
  }
}

// What `body` returns, or `otherwise` where it throws, with the message in the log.
template <class Result, class Body>
Result guarded(const std::string& who, Result otherwise, Body&& body) noexcept {
  try {
    return body();
  } catch (...) {
    try {
      log_error(who + ": " + message_of(std::current_exception()));
    } catch (...) {
      // Nobody is left to tell.
    }
    return otherwise;
  }
}

// "FlatQuantize (name of the layer)"
std::string title(const char* op, const char* layer) {
  return layer == nullptr || *layer == '\0' ? op : std::string(op) + " (" + layer + ")";
}

std::string value_text(const std::variant<int32_t, float>& value) {
  if (std::holds_alternative<int32_t>(value)) return std::to_string(std::get<int32_t>(value));
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%.9g", static_cast<double>(std::get<float>(value)));
  return digits;
}

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(std::unique_ptr<Op> op, std::string name) : op_(std::move(op)), title_(std::move(name)) {
    for (const StateValue& item : op_->state())
      metadata_ += (metadata_.empty() ? "" : " ") + std::string(item.name) + "=" + value_text(item.value);
    // Tiles are those of these kernels: what was timed with others is not theirs.
    const char* const sources = std::strstr(fq_build_info(), "sources: ");
    timing_id_ = metadata_ + " " + (sources == nullptr ? "" : sources);
  }

  Plugin(const Plugin& other) : Plugin(other.op_->clone(), other.title_) {
    tactic_ = other.tactic_;
    tactics_ = other.tactics_;
  }
  Plugin& operator=(const Plugin&) = delete;

  // --- IPluginV3

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  nvinfer1::IPluginV3* clone() noexcept override {
    return guarded<nvinfer1::IPluginV3*>(title_, nullptr, [&] { return new Plugin(*this); });
  }

  // --- core

  const char* getPluginName() const noexcept override { return op_->name(); }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  // --- build

  int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(op_->outputs().size()); }

  int32_t getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs, int32_t input_count) const noexcept override {
    return guarded(title_, 1, [&] {
      check_counts(input_count, output_count);
      if (op_->inputs()[0].kind == TensorKind::kActivation) element_type(inputs[0]);  // throws
      for (size_t i = 0; i < op_->inputs().size(); ++i) {
        if (inputs[i] == type_of(op_->inputs()[i].kind, inputs[0])) continue;
        throw Failure(std::string("input ") + op_->inputs()[i].name + " is of type " + name_of(inputs[i]) + ", not " +
                      name_of(type_of(op_->inputs()[i].kind, inputs[0])));
      }
      for (size_t i = 0; i < op_->outputs().size(); ++i) outputs[i] = type_of(op_->outputs()[i].kind, inputs[0]);
      return 0;
    });
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*, int32_t shape_input_count,
                          nvinfer1::DimsExprs* outputs, int32_t output_count, nvinfer1::IExprBuilder& builder) noexcept override {
    return guarded(title_, 1, [&] {
      check_counts(input_count, output_count);
      if (shape_input_count != 0) throw Failure(std::to_string(shape_input_count) + " inputs are shape tensors, not 0");
      if (inputs[0].nbDims < 1)
        throw Failure(std::string("input ") + op_->inputs()[0].name + " has rank " + std::to_string(inputs[0].nbDims) + ", not 1 or more");
      const std::vector<nvinfer1::DimsExprs> shapes = op_->output_shapes(inputs, builder);
      for (size_t i = 0; i < shapes.size(); ++i) outputs[i] = shapes[i];
      return 0;
    });
  }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t input_count,
                                 int32_t output_count) noexcept override {
    return guarded(title_, false, [&] {
      check_counts(input_count, output_count);
      if (position < 0 || position >= input_count + output_count) throw Failure("there is no tensor " + std::to_string(position));
      const PluginTensorDesc& tensor = tensors[position].desc;
      if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
      const Tensor& described = position < input_count ? op_->inputs()[static_cast<size_t>(position)]
                                                       : op_->outputs()[static_cast<size_t>(position - input_count)];
      if (position == 0 && described.kind == TensorKind::kActivation) return is_activation(tensor.type);
      return tensor.type == type_of(described.kind, tensors[0].desc.type);
    });
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t input_count, const DynamicPluginTensorDesc*,
                          int32_t output_count) noexcept override {
    return guarded(title_, 1, [&] {
      check_counts(input_count, output_count);
      std::vector<Shape> declared, expected;
      for (int32_t i = 0; i < input_count; ++i) {
        declared.emplace_back(in[i].desc.dims);
        expected.push_back(declared.back());
        for (size_t j = 0; j < expected.back().size(); ++j) {
          if (expected.back()[j] < 0) expected.back()[j] = in[i].opt.d[j];
        }
      }
      op_->check(declared, in[0].desc.type);
      op_->check(expected, in[0].desc.type);
      tactics_ = op_->tactics(expected);
      return 0;
    });
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t input_count, const DynamicPluginTensorDesc*,
                          int32_t output_count) const noexcept override {
    return guarded<size_t>(title_, 0, [&] {
      check_counts(input_count, output_count);
      return op_->workspace(Shape(in[0].max), in[0].desc.type);
    });
  }

  int32_t getNbTactics() noexcept override { return static_cast<int32_t>(tactics_.size()); }

  int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override {
    return guarded(title_, 1, [&] {
      if (count != getNbTactics())
        throw Failure("room for " + std::to_string(count) + " tactics, and there are " + std::to_string(getNbTactics()));
      for (size_t i = 0; i < tactics_.size(); ++i) tactics[i] = tactics_[i];
      return 0;
    });
  }

  const char* getTimingCacheID() noexcept override { return timing_id_.c_str(); }
  const char* getMetadataString() noexcept override { return metadata_.c_str(); }

  // One linear layout for each type of activation.
  int32_t getFormatCombinationLimit() noexcept override { return op_->inputs()[0].kind == TensorKind::kActivation ? 3 : 1; }

  // --- runtime

  int32_t setTactic(int32_t tactic) noexcept override {
    return guarded(title_, 1, [&] {
      if (tactic < 0) throw Failure("tactic is " + std::to_string(tactic) + ", not 0 or more");
      tactic_ = tactic;
      return 0;
    });
  }

  int32_t onShapeChange(const PluginTensorDesc* in, int32_t input_count, const PluginTensorDesc*, int32_t output_count) noexcept override {
    return guarded(title_, 1, [&] {
      check_counts(input_count, output_count);
      op_->check(shapes_of(in), in[0].type);
      return 0;
    });
  }

  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    return guarded(title_, 1, [&] {
      op_->enqueue({shapes_of(in), in[0].type, inputs, outputs, workspace, stream}, tactic_);
      return 0;
    });
  }

  // Nothing is held for a context: the kernels keep no state.
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    return guarded<const PluginFieldCollection*>(title_, nullptr, [&] {
      state_ = op_->state();
      fields_.clear();
      for (const StateValue& item : state_) {
        const bool is_integer = std::holds_alternative<int32_t>(item.value);
        const void* const data = is_integer ? static_cast<const void*>(&std::get<int32_t>(item.value)) : &std::get<float>(item.value);
        fields_.emplace_back(item.name, data, is_integer ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32, 1);
      }
      collection_.nbFields = static_cast<int32_t>(fields_.size());
      collection_.fields = fields_.data();
      return &collection_;
    });
  }

 private:
  static bool is_activation(DataType type) { return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16; }

  DataType type_of(TensorKind kind, DataType first) const {
    switch (kind) {
      case TensorKind::kActivation:
        return first;
      case TensorKind::kInt8:
        return DataType::kINT8;
      case TensorKind::kInt4:
        return DataType::kINT4;
      case TensorKind::kOutput:
        return op_->output_type();
      default:
        return DataType::kFLOAT;
    }
  }

  void check_counts(int32_t inputs, int32_t outputs) const {
    if (inputs == static_cast<int32_t>(op_->inputs().size()) && outputs == getNbOutputs()) return;
    throw Failure(std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs, not " +
                  std::to_string(op_->inputs().size()) + " and " + std::to_string(getNbOutputs()));
  }

  std::vector<Shape> shapes_of(const PluginTensorDesc* in) const {
    std::vector<Shape> shapes;
    shapes.reserve(op_->inputs().size());
    for (size_t i = 0; i < op_->inputs().size(); ++i) shapes.emplace_back(in[i].dims);
    return shapes;
  }

  std::unique_ptr<Op> op_;
  std::string title_, metadata_, timing_id_;
  int32_t tactic_ = 0;
  std::vector<int32_t> tactics_;
  // What getFieldsToSerialize returned last.
  std::vector<StateValue> state_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_;
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(const OpType& type) : type_(type) {
    for (const FieldName& field : type.fields) fields_.emplace_back(field.name, nullptr, field.type, 1);
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
  }
  Creator(const Creator&) = delete;
  Creator& operator=(const Creator&) = delete;

  nvinfer1::IPluginV3* createPlugin(const char* name, const PluginFieldCollection* collection,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    return guarded<nvinfer1::IPluginV3*>(type_.name, nullptr, [&]() -> nvinfer1::IPluginV3* {
      const std::string who = title(type_.name, name);
      return guarded<nvinfer1::IPluginV3*>(who, nullptr, [&] {
        const Fields fields(collection, phase, phase == nvinfer1::TensorRTPhase::kRUNTIME ? type_.state : names());
        return new Plugin(type_.make(fields), who);
      });
    });
  }

  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return type_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  std::vector<const char*> names() const {
    std::vector<const char*> all;
    for (const FieldName& field : type_.fields) all.push_back(field.name);
    return all;
  }

  const OpType& type_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_;
};

}  // namespace
}  // namespace fq::trt

// The creators are never freed: TensorRT's registry may look at them while the process ends.
extern "C" FQ_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  using namespace fq::trt;
  static nvinfer1::IPluginCreatorInterface* const all[] = {new Creator(kFlatQuantize), new Creator(kSiluMulFlatQuantize),
                                                           new Creator(kRmsNormFlatQuantize), new Creator(kAddRmsNormFlatQuantize),
                                                           new Creator(kW4A4Gemm)};
  count = static_cast<int32_t>(sizeof(all) / sizeof(all[0]));
  return all;
}
