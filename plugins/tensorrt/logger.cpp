// TensorRT hands its logger over by setLoggerFinder. Of all that is used here its interface alone differs between TensorRT 10 and 11. Which
// of the two it is follows from the version of the library that it belongs to, so that one libfqonnx.so serves both, and both in one
// process.
#include "logger.h"

#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstdint>
#include <cstdio>

#include "../kernels/fqonnx.h"
#include "logger_abi.h"

namespace fq::trt {
namespace {

std::atomic<void*> finder_of_10{nullptr}, finder_of_11{nullptr};

// The major version of the TensorRT that an object is of, by the library of its table of virtual functions; 0 where that does not tell.
int32_t version_of(const void* object) {
  const void* const functions = *static_cast<const void* const*>(object);
  Dl_info where{};
  link_map* library = nullptr;
  if (dladdr1(functions, &where, reinterpret_cast<void**>(&library), RTLD_DL_LINKMAP) == 0 || library == nullptr) return 0;
  void* const handle = dlopen(library->l_name, RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) return 0;
  const auto version = reinterpret_cast<int32_t (*)()>(dlsym(handle, "getInferLibMajorVersion"));
  const int32_t major = version == nullptr ? 0 : version();
  dlclose(handle);
  return major;
}

template <class Finder>
bool log_by(void* finder, const std::string& message) {
  auto* const logger = finder == nullptr ? nullptr : static_cast<Finder*>(finder)->findLogger();
  if (logger != nullptr) logger->log(abi::Severity::kERROR, message.c_str());
  return logger != nullptr;
}

}  // namespace

void log_error(const std::string& message) {
  const std::string line = "fqonnx: " + message;
  const bool logged_by_11 = log_by<abi::v11::ILoggerFinder>(finder_of_11, line),
             logged_by_10 = log_by<abi::v10::ILoggerFinder>(finder_of_10, line);
  if (!logged_by_11 && !logged_by_10) std::fprintf(stderr, "%s\n", line.c_str());
}

}  // namespace fq::trt

// What TensorRT calls when it loads the library; null takes the finder back.
extern "C" FQ_API void setLoggerFinder(void* finder) {
  using namespace fq::trt;
  const int32_t major = finder == nullptr ? 0 : version_of(finder);
  if (finder == nullptr || major >= 11) finder_of_11 = finder;
  if (finder == nullptr || major == 10) finder_of_10 = finder;
}
