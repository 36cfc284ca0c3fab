// TensorRT's log, or standard error where the library was not loaded by a TensorRT.
#pragma once

#include <string>

namespace fq::trt {

void log_error(const std::string& message);

}  // namespace fq::trt
