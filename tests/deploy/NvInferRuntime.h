// What samples/deploy_tensorrt.cpp uses of TensorRT's runtime, as functions of the host: an engine that doubles its input ``x`` of half
// precision into ``y`` of fp32, for rows of eight. For a test of the program where TensorRT is not: it is neither its ABI nor its code.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "cuda_runtime_api.h"

namespace nvinfer1 {

enum class DataType : int32_t { kFLOAT, kHALF, kINT8, kINT32, kBOOL, kUINT8, kFP8, kBF16, kINT64, kINT4 };
enum class TensorIOMode : int32_t { kNONE, kINPUT, kOUTPUT };

struct Dims {
  static constexpr int32_t MAX_DIMS = 8;
  int32_t nbDims;
  int64_t d[MAX_DIMS];
};

class ILogger {
 public:
  enum class Severity : int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };
  virtual ~ILogger() = default;
  virtual void log(Severity severity, const char* message) noexcept = 0;
};

class IExecutionContext {
 public:
  bool setOptimizationProfileAsync(int32_t index, cudaStream_t) { return index == 0; }
  bool setInputShape(const char*, const Dims& dims) {
    shape_ = dims;
    return dims.nbDims == 2 && dims.d[1] == 8;
  }
  Dims getTensorShape(const char*) const { return shape_; }
  bool setTensorAddress(const char* name, void* data) {
    (std::string(name) == "x" ? x_ : y_) = data;
    return true;
  }
  bool enqueueV3(cudaStream_t) {
    for (int64_t i = 0; i < shape_.d[0] * shape_.d[1]; ++i) {
      // Doubling a normal number of half precision is one more in its exponent; the test has no others.
      const uint16_t half = static_cast<uint16_t*>(x_)[i];
      const uint32_t magnitude = half & 0x7fff;
      const uint32_t bits = (half & 0x8000u) << 16 | (magnitude ? (magnitude << 13) + ((127u - 15u + 1u) << 23) : 0u);
      std::memcpy(static_cast<float*>(y_) + i, &bits, sizeof(bits));
    }
    return true;
  }

 private:
  Dims shape_{};
  void* x_ = nullptr;
  void* y_ = nullptr;
};

class ICudaEngine {
 public:
  IExecutionContext* createExecutionContext() { return new IExecutionContext; }
  int32_t getNbIOTensors() const { return 2; }
  const char* getIOTensorName(int32_t index) const { return index ? "y" : "x"; }
  TensorIOMode getTensorIOMode(const char* name) const { return *name == 'x' ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT; }
  DataType getTensorDataType(const char* name) const { return *name == 'x' ? DataType::kHALF : DataType::kFLOAT; }
};

class IPluginRegistry {
 public:
  void* loadLibrary(const char* path) { return std::string(path) == "libfqonnx.so" ? this : nullptr; }
};

class IRuntime {
 public:
  explicit IRuntime(ILogger& logger) : logger_(logger) {}
  void setEngineHostCodeAllowed(bool) {}
  IPluginRegistry& getPluginRegistry() { return registry_; }
  ICudaEngine* deserializeCudaEngine(const void* plan, std::size_t size) {
    if (std::string(static_cast<const char*>(plan), size) == "plan") return new ICudaEngine;
    logger_.log(ILogger::Severity::kERROR, "the version tag does not match");
    return nullptr;
  }

 private:
  ILogger& logger_;
  IPluginRegistry registry_;
};

inline IRuntime* createInferRuntime(ILogger& logger) { return new IRuntime(logger); }

}  // namespace nvinfer1
