// TensorRT's logger and what hands it over, as they are in TensorRT 10 and from 11 on, where they begin with the functions of
// IVersionedInterface.
#pragma once

#include <cstdint>

// In no unnamed namespace: nothing of ours derives from these, from which the compiler would then conclude that nothing at all does.
namespace fq::trt::abi {

enum class Severity : int32_t { kERROR = 1 };

namespace v10 {

class ILogger {
 public:
  virtual void log(Severity severity, const char* message) noexcept = 0;
  virtual ~ILogger() = default;
};

class ILoggerFinder {
 public:
  virtual ILogger* findLogger() = 0;

 protected:
  virtual ~ILoggerFinder() = default;
};

}  // namespace v10

namespace v11 {

class IVersionedInterface {
 public:
  virtual int32_t getAPILanguage() const noexcept = 0;
  virtual void getInterfaceInfo() const noexcept = 0;  // its place alone matters
  virtual ~IVersionedInterface() noexcept = default;
};

class ILogger : public IVersionedInterface {
 public:
  virtual void log(Severity severity, const char* message) noexcept = 0;
};

class ILoggerFinder : public IVersionedInterface {
 public:
  virtual ILogger* findLogger() = 0;
};

}  // namespace v11
}  // namespace fq::trt::abi
