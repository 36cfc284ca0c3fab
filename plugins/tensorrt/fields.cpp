#include "fields.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace fq::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr int32_t kLongest = 1024;  // values in a field

std::string name_of(PluginFieldType type) {
  constexpr const char* kNames[] = {"FLOAT16", "FLOAT32", "FLOAT64", "INT8",  "INT16", "INT32", "CHAR",
                                    "DIMS",    "UNKNOWN", "BF16",    "INT64", "FP8",   "INT4",  "FP4"};
  const auto number = static_cast<size_t>(type);
  return number < sizeof(kNames) / sizeof(kNames[0]) ? kNames[number] : std::to_string(static_cast<int32_t>(type));
}

std::string joined(const std::vector<std::string>& words, const char* between) {
  std::string all;
  for (const std::string& word : words) all += (all.empty() ? "" : between) + word;
  return all;
}

// The values of a field in one of two widths: TensorRT's parser has handed over the narrow one so far.
template <class Value, PluginFieldType kNarrow, class Narrow, PluginFieldType kWide, class Wide>
std::vector<Value> read(const PluginField& field) {
  if (field.type != kNarrow && field.type != kWide) {
    throw Failure(std::string("field ") + field.name + " is of type " + name_of(field.type) + ", not " + name_of(kNarrow));
  }
  std::vector<Value> values(static_cast<size_t>(field.length));
  for (size_t i = 0; i < values.size(); ++i) {
    // Copied, for nobody says that data is aligned.
    const auto copy = [&](auto value) {
      std::memcpy(&value, static_cast<const char*>(field.data) + i * sizeof(value), sizeof(value));
      return static_cast<Value>(value);
    };
    values[i] = field.type == kNarrow ? copy(Narrow{}) : copy(Wide{});
  }
  return values;
}

std::vector<int64_t> read_integers(const PluginField& field) {
  return read<int64_t, PluginFieldType::kINT32, int32_t, PluginFieldType::kINT64, int64_t>(field);
}

template <class Value>
Value only(const PluginField& field, const std::vector<Value>& values) {
  if (values.size() == 1) return values[0];
  throw Failure(std::string("field ") + field.name + " has " + std::to_string(values.size()) + " values, not 1");
}

}  // namespace

Fields::Fields(const nvinfer1::PluginFieldCollection* collection, nvinfer1::TensorRTPhase phase, std::vector<const char*> names)
    : phase_(phase) {
  if (phase != nvinfer1::TensorRTPhase::kBUILD && phase != nvinfer1::TensorRTPhase::kRUNTIME) {
    throw Failure("phase is " + std::to_string(static_cast<int32_t>(phase)) + ", not 0 (build) or 1 (runtime)");
  }
  if (collection == nullptr) throw Failure("the collection of fields is null");
  if (collection->nbFields < 0 || (collection->nbFields > 0 && collection->fields == nullptr)) {
    throw Failure("the collection of fields has " + std::to_string(collection->nbFields) + " at " +
                  (collection->fields ? "an address" : "null"));
  }
  for (int32_t i = 0; i < collection->nbFields; ++i) {
    const PluginField& field = collection->fields[i];
    if (field.name == nullptr) throw Failure("field " + std::to_string(i) + " has no name");
    const std::string name = field.name;
    if (std::find(names.begin(), names.end(), name) == names.end()) {
      throw Failure("there is no field " + name + ": fields are " + joined({names.begin(), names.end()}, ", "));
    }
    for (const PluginField* other : fields_) {
      if (name == other->name) throw Failure("field " + name + " is there twice");
    }
    if (field.length < 0 || field.length > kLongest) {
      throw Failure("field " + name + " has " + std::to_string(field.length) + " values, not 0 to " + std::to_string(kLongest));
    }
    if (field.length > 0 && field.data == nullptr)
      throw Failure("field " + name + " has " + std::to_string(field.length) + " values at null");
    fields_.push_back(&field);
  }
}

int32_t Fields::integer(const char* name, int32_t otherwise, std::initializer_list<int32_t> allowed) const {
  const PluginField* const field = find(name);
  if (field == nullptr) return otherwise;
  const int64_t value = only(*field, read_integers(*field));
  std::vector<std::string> choices;
  for (const int32_t choice : allowed) {
    if (value == choice) return choice;
    choices.push_back(std::to_string(choice));
  }
  throw Failure(std::string("field ") + name + " is " + std::to_string(value) + ", not " + joined(choices, " or "));
}

float Fields::number(const char* name, float otherwise) const {
  const PluginField* const field = find(name);
  if (field == nullptr) return otherwise;
  const double value = only(*field, read<double, PluginFieldType::kFLOAT32, float, PluginFieldType::kFLOAT64, double>(*field));
  if (value >= 0 && std::isfinite(static_cast<float>(value))) return static_cast<float>(value);
  throw Failure(std::string("field ") + name + " is " + std::to_string(value) + ", not a finite number from 0 on");
}

std::string Fields::text(const char* name, const char* otherwise) const {
  const PluginField* const field = find(name);
  if (field == nullptr) return otherwise;
  if (field->type != PluginFieldType::kCHAR) {
    throw Failure(std::string("field ") + name + " is of type " + name_of(field->type) + ", not " + name_of(PluginFieldType::kCHAR));
  }
  // With or without a zero at its end.
  return field->length == 0 ? ""
                            : std::string(static_cast<const char*>(field->data),
                                          strnlen(static_cast<const char*>(field->data), static_cast<size_t>(field->length)));
}

std::vector<int64_t> Fields::integers(const char* name, const std::vector<int64_t>& otherwise) const {
  const PluginField* const field = find(name);
  return field == nullptr ? otherwise : read_integers(*field);
}

const PluginField* Fields::find(const char* name) const {
  for (const PluginField* field : fields_) {
    if (std::strcmp(field->name, name) == 0) return field;
  }
  if (is_build()) return nullptr;
  throw Failure(std::string("the engine holds no field ") + name + ": it was built with another version of fqonnx, build it anew");
}

std::string text(const std::vector<int64_t>& values) {
  std::vector<std::string> words;
  for (const int64_t value : values) words.push_back(std::to_string(value));
  return "[" + joined(words, ", ") + "]";
}

}  // namespace fq::trt
