// A TensorRT engine of fqonnx in plain C++: load plan and plugins, run once, compare.
//
//   deploy_tensorrt PLAN LIBRARY NAME:1x128=FILE... [--expect NAME=FILE]... [--save NAME=FILE]... [--profile N] [--runs N]
//
// PLAN is the engine.plan of a build directory and LIBRARY what `fqonnx plugin path` prints; "-" for an engine that needs none: one of
// TensorRT-RTX, or a version-compatible plan, which has the plugins inside. FILE holds a tensor's raw values, as numpy's `tofile` writes
// them.
// Exit code 0: the outputs are what was expected, to 1 % in relative L2; 1: they are not, or it failed.
//
//   g++ -std=c++17 deploy_tensorrt.cpp -o deploy_tensorrt -I$TENSORRT/include -I$CUDA/include
//       -L$TENSORRT/lib -L$CUDA/lib64 -lnvinfer -lcudart

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr double kLargestError = 0.01;

class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) std::cerr << "TensorRT: " << message << '\n';
  }
};

void require(bool fine, const std::string& otherwise) {
  if (!fine) throw std::runtime_error(otherwise);
}

void check(cudaError_t status, const char* call) {
  require(status == cudaSuccess, std::string(call) + ": " + cudaGetErrorString(status));
}

// Memory of the device, freed with the object.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) : bytes_(bytes) { check(cudaMalloc(&data_, std::max<std::size_t>(bytes, 1)), "cudaMalloc"); }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

class Stream {
 public:
  Stream() { check(cudaStreamCreate(&stream_), "cudaStreamCreate"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  operator cudaStream_t() const { return stream_; }
  void wait() const { check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event() { check(cudaEventCreate(&event_), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  operator cudaEvent_t() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  require(file.good(), "cannot read " + path + ": check the path");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

std::size_t item_size(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kINT64: return 8;
    case nvinfer1::DataType::kFLOAT:
    case nvinfer1::DataType::kINT32: return 4;
    case nvinfer1::DataType::kHALF:
    case nvinfer1::DataType::kBF16: return 2;
    case nvinfer1::DataType::kINT8:
    case nvinfer1::DataType::kUINT8:
    case nvinfer1::DataType::kBOOL: return 1;
    default: throw std::runtime_error("an input or output has a type that this program does not know");
  }
}

std::size_t count(const nvinfer1::Dims& dims) {
  std::size_t total = 1;
  for (int32_t i = 0; i < dims.nbDims; ++i) {
    require(dims.d[i] >= 0, "an output's shape depends on the input's values, which this program does not handle");
    total *= static_cast<std::size_t>(dims.d[i]);
  }
  return total;
}

float from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const auto scaled = [](int digits, int power) { return std::ldexp(static_cast<float>(digits), power); };
  float value = exponent == 0 ? scaled(mantissa, -24) : scaled(mantissa + 1024, exponent - 25);
  if (exponent == 31) value = mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  return bits & 0x8000 ? -value : value;
}

template <typename T>
T item(const char* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

double number(nvinfer1::DataType type, const char* at) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT: return item<float>(at);
    case nvinfer1::DataType::kHALF: return from_half(item<uint16_t>(at));
    case nvinfer1::DataType::kBF16: {
      const uint32_t bits = static_cast<uint32_t>(item<uint16_t>(at)) << 16;
      return item<float>(reinterpret_cast<const char*>(&bits));
    }
    case nvinfer1::DataType::kINT64: return static_cast<double>(item<int64_t>(at));
    case nvinfer1::DataType::kINT32: return item<int32_t>(at);
    case nvinfer1::DataType::kINT8: return item<int8_t>(at);
    default: return item<uint8_t>(at);
  }
}

// |actual - expected| / |expected|; not a number where an element is none.
double relative_error(nvinfer1::DataType type, const std::vector<char>& actual, const std::vector<char>& expected) {
  double error = 0, norm = 0;
  for (std::size_t at = 0; at < expected.size(); at += item_size(type)) {
    const double e = number(type, &expected[at]), d = number(type, &actual[at]) - e;
    error += d * d;
    norm += e * e;
  }
  return error == 0 ? 0 : std::sqrt(error / norm);
}

struct Arguments {
  std::string plan, library;
  std::map<std::string, std::pair<nvinfer1::Dims, std::string>> inputs;
  std::map<std::string, std::string> expected, saved;
  int profile = 0, runs = 1;
};

int positive(const std::string& text, int smallest) {
  char* end = nullptr;
  const long value = std::strtol(text.c_str(), &end, 10);
  require(!text.empty() && *end == '\0' && value >= smallest && value < 1'000'000, "not a number that fits here: " + text);
  return static_cast<int>(value);
}

nvinfer1::Dims dims_of(const std::string& text) {
  nvinfer1::Dims dims{};
  std::stringstream parts(text);
  for (std::string part; std::getline(parts, part, 'x');) {
    require(dims.nbDims < nvinfer1::Dims::MAX_DIMS, "too many dimensions: " + text);
    dims.d[dims.nbDims++] = positive(part, 0);
  }
  return dims;
}

Arguments parse(const std::vector<std::string>& words) {
  require(words.size() >= 2,
          "usage: deploy_tensorrt PLAN LIBRARY NAME:1x128=FILE... [--expect NAME=FILE]... [--save NAME=FILE]... [--profile N] [--runs N]");
  Arguments found{words[0], words[1], {}, {}, {}};
  for (std::size_t i = 2; i < words.size(); ++i) {
    const bool option = words[i].rfind("--", 0) == 0;
    const std::string name = option ? words[i] : "";
    require(!option || i + 1 < words.size(), name + " needs a value");
    const std::string value = words[option ? ++i : i];
    if (name == "--profile" || name == "--runs") {
      (name == "--runs" ? found.runs : found.profile) = positive(value, name == "--runs");
      continue;
    }
    require(!option || name == "--expect" || name == "--save", "unknown option " + name);
    const std::size_t equals = value.find('='), colon = value.rfind(':', equals);
    require(equals != std::string::npos, "write NAME=FILE, not " + value);
    const std::string file = value.substr(equals + 1);
    if (option) {
      (name == "--save" ? found.saved : found.expected)[value.substr(0, equals)] = file;
    } else {
      require(colon != std::string::npos, "write NAME:1x128=FILE, not " + value);
      found.inputs[value.substr(0, colon)] = {dims_of(value.substr(colon + 1, equals - colon - 1)), file};
    }
  }
  return found;
}

// The engine, and what it needs for as long.
struct Loaded {
  std::unique_ptr<nvinfer1::IRuntime> runtime;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;
};

Loaded load(const Arguments& arguments, Logger& logger) {
  Loaded loaded;
  loaded.runtime.reset(nvinfer1::createInferRuntime(logger));
  require(loaded.runtime != nullptr, "TensorRT does not start: check the driver with nvidia-smi");
  if (arguments.library == "-") {
    loaded.runtime->setEngineHostCodeAllowed(true);  // what a version-compatible plan has inside is code
  } else {
    require(loaded.runtime->getPluginRegistry().loadLibrary(arguments.library.c_str()) != nullptr,
            "TensorRT does not take the plugins in " + arguments.library + ": build them with `fqonnx plugin build`");
  }
  const std::vector<char> plan = read_file(arguments.plan);
  loaded.engine.reset(loaded.runtime->deserializeCudaEngine(plan.data(), plan.size()));
  require(loaded.engine != nullptr, "TensorRT does not load " + arguments.plan + ": build it on this GPU, with this version");
  return loaded;
}

int run(const Arguments& arguments) {
  Logger logger;
  const Loaded loaded = load(arguments, logger);
  nvinfer1::ICudaEngine& engine = *loaded.engine;
  std::unique_ptr<nvinfer1::IExecutionContext> context(engine.createExecutionContext());
  require(context != nullptr, "the engine has no room to run: free memory of the GPU");
  const Stream stream;
  require(context->setOptimizationProfileAsync(arguments.profile, stream), "the engine has no such profile: choose another --profile");

  std::map<std::string, std::unique_ptr<Buffer>> buffers;
  std::vector<std::string> outputs;
  for (int32_t i = 0; i < engine.getNbIOTensors(); ++i) {
    const std::string name = engine.getIOTensorName(i);
    if (engine.getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kOUTPUT) {
      outputs.push_back(name);
      continue;
    }
    const auto given = arguments.inputs.find(name);
    require(given != arguments.inputs.end(), "input " + name + " is missing: give " + name + ":1x128=FILE");
    const auto& [dims, path] = given->second;
    const std::vector<char> values = read_file(path);
    const std::size_t bytes = count(dims) * item_size(engine.getTensorDataType(name.c_str()));
    require(values.size() == bytes, path + " has " + std::to_string(values.size()) + " bytes, its shape needs " + std::to_string(bytes));
    require(context->setInputShape(name.c_str(), dims), "the engine's profile does not take this shape of input " + name);
    buffers[name] = std::make_unique<Buffer>(bytes);
    check(cudaMemcpyAsync(buffers[name]->data(), values.data(), bytes, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
    stream.wait();  // before the values on the host go
    require(context->setTensorAddress(name.c_str(), buffers[name]->data()), "input " + name + " cannot be bound");
  }
  for (const std::string& name : outputs) {
    const std::size_t bytes = count(context->getTensorShape(name.c_str())) * item_size(engine.getTensorDataType(name.c_str()));
    buffers[name] = std::make_unique<Buffer>(bytes);
    require(context->setTensorAddress(name.c_str(), buffers[name]->data()), "output " + name + " cannot be bound");
  }
  for (const auto& named : {arguments.expected, arguments.saved}) {
    for (const auto& entry : named) {
      require(std::count(outputs.begin(), outputs.end(), entry.first) == 1, "there is no output " + entry.first);
    }
  }

  const Event begin, end;
  require(context->enqueueV3(stream), "the engine fails");  // the first run of a shape does more than later ones
  check(cudaEventRecord(begin, stream), "cudaEventRecord");
  for (int i = 0; i < arguments.runs; ++i) require(context->enqueueV3(stream), "the engine fails");
  check(cudaEventRecord(end, stream), "cudaEventRecord");
  stream.wait();
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
  std::cout << "a run takes " << milliseconds / static_cast<float>(arguments.runs) << " ms\n";

  bool passed = true;
  for (const std::string& name : outputs) {
    std::vector<char> values(buffers[name]->bytes());
    check(cudaMemcpyAsync(values.data(), buffers[name]->data(), values.size(), cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync");
    stream.wait();
    if (const auto to = arguments.saved.find(name); to != arguments.saved.end()) {
      std::ofstream file(to->second, std::ios::binary);
      file.write(values.data(), static_cast<std::streamsize>(values.size())).flush();
      require(file.good(), "cannot write " + to->second + ": check the path and the disk");
    }
    if (const auto from = arguments.expected.find(name); from != arguments.expected.end()) {
      const std::vector<char> expected = read_file(from->second);
      require(expected.size() == values.size(), from->second + " is not of the size of output " + name);
      const double error = relative_error(engine.getTensorDataType(name.c_str()), values, expected);
      passed = passed && error <= kLargestError;  // not so for what is not a number
      std::cout << name << ": relative L2 " << error << (error <= kLargestError ? "" : ", more than expected") << '\n';
    }
  }
  std::cout << (passed ? "PASSED" : "FAILED") << '\n';
  return passed ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(parse({argv + 1, argv + argc}));
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
}
