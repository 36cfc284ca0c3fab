// What a plugin is made from: the attributes of an ONNX node when an engine is built, what the plugin gave to serialize when one is loaded.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "interfaces.h"

namespace fq::trt {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws where a field is of no known name, stands twice, or is not whole; `names` are all there may be.
class Fields {
 public:
  Fields(const nvinfer1::PluginFieldCollection* collection, nvinfer1::TensorRTPhase phase, std::vector<const char*> names);

  bool is_build() const { return phase_ == nvinfer1::TensorRTPhase::kBUILD; }

  // A node may leave attributes out, which then have the default of the op's function. An engine holds all.
  int32_t integer(const char* name, int32_t otherwise, std::initializer_list<int32_t> allowed) const;
  float number(const char* name, float otherwise) const;
  std::string text(const char* name, const char* otherwise) const;
  std::vector<int64_t> integers(const char* name, const std::vector<int64_t>& otherwise) const;

 private:
  const nvinfer1::PluginField* find(const char* name) const;

  std::vector<const nvinfer1::PluginField*> fields_;
  nvinfer1::TensorRTPhase phase_;
};

// "[2, 3]"
std::string text(const std::vector<int64_t>& values);

}  // namespace fq::trt
