// What one op is to TensorRT; plugin.cpp makes plugins and creators of it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "../kernels/fqonnx.h"
#include "fields.h"

namespace fq::trt {

// Dimensions without memory of their own, for they are looked at in every enqueue. One below 0 is not known yet.
class Shape {
 public:
  explicit Shape(const nvinfer1::Dims& dims) : dims_(dims) {
    if (dims.nbDims < 0 || dims.nbDims > nvinfer1::Dims::MAX_DIMS) throw Failure("a tensor has rank " + std::to_string(dims.nbDims));
  }

  size_t size() const { return static_cast<size_t>(dims_.nbDims); }
  bool empty() const { return dims_.nbDims == 0; }
  int64_t operator[](size_t index) const { return dims_.d[index]; }
  int64_t& operator[](size_t index) { return dims_.d[index]; }
  int64_t back() const { return dims_.d[dims_.nbDims - 1]; }

 private:
  nvinfer1::Dims dims_;
};

inline std::string text(const Shape& shape) {
  std::vector<int64_t> dims;
  for (size_t i = 0; i < shape.size(); ++i) dims.push_back(shape[i]);
  return text(dims);
}

enum class TensorKind { kActivation, kFloat, kInt8, kInt4, kOutput };  // kActivation: of the first input's type; kOutput: of output_type()

struct Tensor {
  const char* name;
  TensorKind kind;
};

struct FieldName {
  const char* name;
  nvinfer1::PluginFieldType type;
};

// A value that an engine keeps of a plugin.
struct StateValue {
  const char* name;
  std::variant<int32_t, float> value;
};

// An enqueue: all dimensions are known and were checked.
struct Call {
  std::vector<Shape> shapes;  // of the inputs
  nvinfer1::DataType type;    // of the first input
  const void* const* inputs;
  void* const* outputs;
  void* workspace;
  fq_stream stream;
};

class Op {
 public:
  virtual ~Op() = default;
  virtual std::unique_ptr<Op> clone() const = 0;
  virtual const char* name() const = 0;
  virtual const std::vector<Tensor>& inputs() const = 0;
  virtual const std::vector<Tensor>& outputs() const = 0;
  virtual std::vector<StateValue> state() const = 0;

  virtual nvinfer1::DataType output_type() const { return nvinfer1::DataType::kFLOAT; }
  virtual std::vector<nvinfer1::DimsExprs> output_shapes(const nvinfer1::DimsExprs* in, nvinfer1::IExprBuilder& builder) const = 0;

  // Throws where these shapes of inputs are none of the op's, or no kernel takes them.
  virtual void check(const std::vector<Shape>& in, nvinfer1::DataType type) const = 0;

  virtual size_t workspace(const Shape& /*first*/, nvinfer1::DataType /*type*/) const { return 0; }

  // What TensorRT may time, beside 0, for inputs of about these shapes on this device.
  virtual std::vector<int32_t> tactics(const std::vector<Shape>& /*in*/) const { return {}; }

  virtual void enqueue(const Call& call, int32_t tactic) const = 0;
};

struct OpType {
  const char* name;
  std::vector<FieldName> fields;   // an ONNX node's attributes
  std::vector<const char*> state;  // names of what an engine keeps
  std::unique_ptr<Op> (*make)(const Fields& fields);
};

extern const OpType kFlatQuantize, kSiluMulFlatQuantize, kRmsNormFlatQuantize, kAddRmsNormFlatQuantize, kW4A4Gemm;

// --- shared by ops ----------------------------------------------------------------------------------------------------------------------

int32_t element_type(nvinfer1::DataType type);  // as fq_dtype; throws where it is no activation's

// The product of the first `count` dimensions; -1 where one is not known.
int64_t product(const Shape& shape, size_t count);

inline bool differ(int64_t one, int64_t other) { return one >= 0 && other >= 0 && one != other; }

void check(fq_status status);

// An address for operands that a call of the kernels only counts.
void* no_data();

}  // namespace fq::trt
