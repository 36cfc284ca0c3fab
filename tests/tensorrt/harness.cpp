// A stand-in for TensorRT that takes plugins of a library through the life that its documentation lays down: made for a build, cloned into
// a network, asked for types, shapes and formats, configured, timed, serialized; made again from that alone, attached to a context, run.
// It holds on to nothing that TensorRT would not: what a call was given is gone, or overwritten, after it.
//
// Compiled to a library that tests call (tests/tensorrt_harness.py); with -DFQ_TENSORRT_SDK on the SDK's own headers.
#include <dlfcn.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "interfaces.h"

namespace {

using namespace nvinfer1;

int32_t major = 0;     // of the TensorRT that this is
std::string messages;  // what was logged since the last look

// --- logger -----------------------------------------------------------------------------------------------------------------------------

#ifdef FQ_TENSORRT_SDK

using SdkLogger = ILogger;
using SdkFinder = ILoggerFinder;

#else

// As in TensorRT 10 and in 11.
struct Unversioned {};
struct Versioned : IVersionedInterface {
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"of the harness", 1, 0}; }
};

template <class Base>
struct LoggerOf : Base {
  enum class Severity : int32_t { kERROR = 1 };
  virtual void log(Severity severity, const char* message) noexcept = 0;
  virtual ~LoggerOf() = default;
};

template <class Base>
struct FinderOf : Base {
  virtual LoggerOf<Base>* findLogger() = 0;
  virtual ~FinderOf() = default;
};

#endif

template <class Interface>
struct Logger final : Interface {
  void log(typename Interface::Severity severity, const char* message) noexcept override {
    const bool is_error = severity == Interface::Severity::kERROR;
    messages += (messages.empty() ? "" : "\n") + std::string(is_error ? "" : "not an error: ") + message;
  }
};

template <class Interface, class LoggerInterface>
struct Finder final : Interface {
  LoggerInterface* findLogger() override {
    static Logger<LoggerInterface> logger;
    return &logger;
  }
};

// Null where TensorRT is of a version whose logger this harness does not have.
void* finder() {
#ifdef FQ_TENSORRT_SDK
  static Finder<SdkFinder, SdkLogger> only;
  return major == NV_TENSORRT_MAJOR ? static_cast<SdkFinder*>(&only) : nullptr;
#else
  static Finder<FinderOf<Unversioned>, LoggerOf<Unversioned>> of_10;
  static Finder<FinderOf<Versioned>, LoggerOf<Versioned>> of_11;
  if (major == 10) return static_cast<FinderOf<Unversioned>*>(&of_10);
  return static_cast<FinderOf<Versioned>*>(&of_11);
#endif
}

// --- expressions ------------------------------------------------------------------------------------------------------------------------

// A dimension: a number, or a text over those of inputs, such as "(x.1 / 2)"; with its value for each of a profile's three shapes.
class Expression final : public IDimensionExpr, apiv::VDimensionExpr {
 public:
  Expression(std::string name, bool is_number, std::vector<int64_t> of)
      : text(std::move(name)), values(std::move(of)), is_number_(is_number) {
    mImpl = this;
  }
  ~Expression() noexcept override = default;

  std::string text;
  std::vector<int64_t> values;

  bool isConstant() const noexcept override { return is_number_; }
  int64_t getConstantValue() const noexcept override { return is_number_ ? values[0] : -1; }
  bool isSizeTensor() const noexcept override { return false; }

 private:
  bool is_number_;
};

class Expressions final : public IExprBuilder, apiv::VExprBuilder {
 public:
  Expressions() { mImpl = this; }
  ~Expressions() noexcept override = default;

  const IDimensionExpr* constant(int64_t value) override { return add(std::to_string(value), true, std::vector<int64_t>(3, value)); }

  const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& first, const IDimensionExpr& second) override {
    if (op != DimensionOperation::kFLOOR_DIV) throw std::runtime_error("the harness divides only");
    const auto &one = static_cast<const Expression&>(first), &two = static_cast<const Expression&>(second);
    std::vector<int64_t> values;
    for (size_t i = 0; i < 3; ++i) values.push_back(one.values[i] / two.values[i]);
    if (one.isConstant() && two.isConstant()) return constant(values[0]);
    return add("(" + one.text + " / " + two.text + ")", false, values);
  }

  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
    throw std::runtime_error("no size tensors");
  }

  const Expression* add(std::string name, bool is_number, std::vector<int64_t> values) {
    all_.push_back(std::make_unique<Expression>(std::move(name), is_number, std::move(values)));
    return all_.back().get();
  }

 private:
  std::vector<std::unique_ptr<Expression>> all_;
};

// --- fields -----------------------------------------------------------------------------------------------------------------------------

// Fields in memory of their own, which is overwritten before it goes.
struct FieldStore {
  struct Item {
    std::string name, data;
    PluginFieldType type;
    int32_t length;
  };
  std::vector<Item> items;

  ~FieldStore() {
    for (Item& item : items) {
      item.name.assign(item.name.size(), '#');
      item.data.assign(item.data.size(), '#');
    }
  }

  template <class Use>
  auto use(Use use) const {
    std::vector<PluginField> fields;
    for (const Item& item : items) fields.emplace_back(item.name.c_str(), item.data.data(), item.type, item.length);
    PluginFieldCollection collection;
    collection.nbFields = static_cast<int32_t>(fields.size());
    collection.fields = fields.data();
    return use(&collection);
  }
};

FieldStore copied(const PluginFieldCollection& fields) {
  FieldStore store;
  for (int32_t i = 0; i < fields.nbFields; ++i) {
    const PluginField& field = fields.fields[i];
    const bool is_known = field.type == PluginFieldType::kINT32 || field.type == PluginFieldType::kFLOAT32;
    if (!is_known || field.length != 1) throw std::runtime_error(std::string("field ") + field.name + " is no int32 or float32");
    store.items.push_back({field.name, std::string(static_cast<const char*>(field.data), 4), field.type, field.length});
  }
  return store;
}

// --- a plugin ---------------------------------------------------------------------------------------------------------------------------

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

template <class Interface>
Interface* capability(IPluginV3& plugin, PluginCapabilityType type, const char* kind) {
  IPluginCapability* const found = plugin.getCapabilityInterface(type);
  require(found != nullptr, std::string("no capability ") + kind);
  const InterfaceInfo info = found->getInterfaceInfo();
  require(std::string(info.kind) == kind && info.major == 1 && info.minor == 0,
          std::string("capability ") + kind + " is another: " + info.kind);
  require(found->getAPILanguage() == APILanguage::kCPP, "a plugin that is not of C++");
  return static_cast<Interface*>(found);
}

struct Plugin {
  std::unique_ptr<IPluginV3> object;
  IPluginV3OneCore* core;
  IPluginV3OneBuild* build;
  IPluginV3OneRuntime* runtime;

  Plugin(IPluginV3* made, const char* what) : object(made) {
    require(made != nullptr, what);
    require(std::string(made->getInterfaceInfo().kind) == "PLUGIN", "not a plugin");
    core = capability<IPluginV3OneCore>(*made, PluginCapabilityType::kCORE, "PLUGIN_V3ONE_CORE");
    build = capability<IPluginV3OneBuild>(*made, PluginCapabilityType::kBUILD, "PLUGIN_V3ONE_BUILD");
    runtime = capability<IPluginV3OneRuntime>(*made, PluginCapabilityType::kRUNTIME, "PLUGIN_V3ONE_RUNTIME");
    require(made->getCapabilityInterface(static_cast<PluginCapabilityType>(7)) == nullptr, "a capability that there is not");
  }

  Plugin clone() const { return Plugin(object->clone(), "clone failed"); }
  Plugin attached() const { return Plugin(runtime->attachToContext(nullptr), "attachToContext failed"); }
};

IPluginCreatorV3One* creator_named(void* library, const std::string& name) {
  const auto get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  require(get != nullptr, "no getCreators");
  int32_t count = 0;
  IPluginCreatorInterface* const* const all = get(count);
  for (int32_t i = 0; i < count; ++i) {
    require(std::string(all[i]->getInterfaceInfo().kind) == "PLUGIN CREATOR_V3ONE", "a creator of another kind");
    auto* const creator = static_cast<IPluginCreatorV3One*>(all[i]);
    if (creator->getPluginName() == name) return creator;
  }
  throw std::runtime_error("no creator " + name);
}

Plugin create(IPluginCreatorV3One* creator, const FieldStore& fields, TensorRTPhase phase) {
  return fields.use(
      [&](const PluginFieldCollection* all) { return Plugin(creator->createPlugin("layer", all, phase), "createPlugin failed"); });
}

}  // namespace

// --- what tests call --------------------------------------------------------------------------------------------------------------------

extern "C" {

struct HarnessField {
  const char* name;
  const void* data;
  int64_t bytes;
  int32_t type, length;
};

struct HarnessTensor {
  const char* name;
  int32_t type;
  Dims dims, shapes[3];  // as the network has it, -1 where it is open; at the profile's min, opt and max
};

// Called before a tactic is timed, with the room it asked for: to make memory, and to set `data` to inputs, outputs and the workspace.
// Called again after it, with data null: to look at the outputs.
using HarnessTimed = void (*)(int32_t tactic, int64_t workspace, void** data);

struct HarnessEngine {
  std::string op, trace;
  FieldStore state;
  int32_t inputs, outputs, tactic;
  int64_t workspace;
};

struct HarnessContext {
  Plugin plugin;
  HarnessEngine& engine;
};

#define HARNESS __attribute__((visibility("default")))

HARNESS const char* harness_messages() {
  static std::string shown;
  shown = std::move(messages);
  messages.clear();
  return shown.c_str();
}

// The version by which the library tells which of the loggers it has been given.
HARNESS int32_t getInferLibMajorVersion() noexcept { return major; }

// Opens a library and gives it the logger of a version; null where it does not open.
HARNESS void* harness_open(const char* path, int32_t version) {
  major = version;
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    messages = dlerror();
    return nullptr;
  }
  const auto set = reinterpret_cast<void (*)(void*)>(dlsym(library, "setLoggerFinder"));
  if (set != nullptr) set(finder());
  return library;
}

HARNESS HarnessEngine* harness_build(void* library, const char* op, const HarnessField* fields, int32_t field_count,
                                     const HarnessTensor* tensors, int32_t tensor_count, HarnessTimed timed, void* stream) try {
  auto engine = std::make_unique<HarnessEngine>();
  std::string& trace = engine->trace;
  const auto note = [&](const std::string& line) { trace += line + "\n"; };
  const auto ok = [&](int32_t code, const char* what) { require(code == 0, std::string(what) + " failed"); };
  IPluginCreatorV3One* const creator = creator_named(library, op);

  // Creation. The network keeps a clone.
  auto made = std::make_unique<Plugin>([&] {
    FieldStore given;
    for (int32_t i = 0; i < field_count; ++i) {
      const auto bytes = static_cast<size_t>(fields[i].bytes);
      given.items.push_back({fields[i].name, std::string(static_cast<const char*>(fields[i].data), bytes),
                             static_cast<PluginFieldType>(fields[i].type), fields[i].length});
    }
    return create(creator, given, TensorRTPhase::kBUILD);
  }());
  Plugin plugin = made->clone();
  made.reset();
  note(std::string("plugin ") + plugin.core->getPluginName() + " " + plugin.core->getPluginVersion() + " " +
       plugin.core->getPluginNamespace());

  // Types and shapes.
  const int32_t outputs = plugin.build->getNbOutputs(), inputs = tensor_count;
  require(outputs > 0 && outputs < 8, "a strange number of outputs");
  std::vector<DataType> in_types, out_types(static_cast<size_t>(outputs));
  for (int32_t i = 0; i < inputs; ++i) in_types.push_back(static_cast<DataType>(tensors[i].type));
  ok(plugin.build->getOutputDataTypes(out_types.data(), outputs, in_types.data(), inputs), "getOutputDataTypes");
  Expressions expressions;
  std::vector<DimsExprs> in_shapes, out_shapes(static_cast<size_t>(outputs));
  for (int32_t i = 0; i < inputs; ++i) {
    DimsExprs shape{};
    shape.nbDims = tensors[i].dims.nbDims;
    for (int32_t j = 0; j < shape.nbDims; ++j) {
      std::vector<int64_t> values;
      for (const Dims& profile : tensors[i].shapes) values.push_back(profile.d[j]);
      const int64_t value = tensors[i].dims.d[j];
      shape.d[j] =
          value >= 0 ? expressions.constant(value) : expressions.add(std::string(tensors[i].name) + "." + std::to_string(j), false, values);
    }
    in_shapes.push_back(shape);
  }
  ok(plugin.build->getOutputShapes(in_shapes.data(), inputs, nullptr, 0, out_shapes.data(), outputs, expressions), "getOutputShapes");

  // Descriptions of all tensors, with the format that a network of strong types has.
  std::vector<DynamicPluginTensorDesc> all;
  for (int32_t i = 0; i < inputs; ++i) {
    DynamicPluginTensorDesc tensor{};
    tensor.desc = {tensors[i].dims, in_types[static_cast<size_t>(i)], TensorFormat::kLINEAR, -1.0f};
    tensor.min = tensors[i].shapes[0];
    tensor.opt = tensors[i].shapes[1];
    tensor.max = tensors[i].shapes[2];
    all.push_back(tensor);
  }
  for (int32_t i = 0; i < outputs; ++i) {
    const DimsExprs& shape = out_shapes[static_cast<size_t>(i)];
    DynamicPluginTensorDesc tensor{};
    tensor.desc = {{}, out_types[static_cast<size_t>(i)], TensorFormat::kLINEAR, -1.0f};
    tensor.desc.dims.nbDims = tensor.min.nbDims = tensor.opt.nbDims = tensor.max.nbDims = shape.nbDims;
    std::string shown;
    for (int32_t j = 0; j < shape.nbDims; ++j) {
      const auto& dimension = static_cast<const Expression&>(*shape.d[j]);
      shown += (j ? ", " : "") + dimension.text;
      tensor.desc.dims.d[j] = dimension.isConstant() ? dimension.values[0] : -1;
      tensor.min.d[j] = dimension.values[0];
      tensor.opt.d[j] = dimension.values[1];
      tensor.max.d[j] = dimension.values[2];
    }
    note("output " + std::to_string(static_cast<int32_t>(tensor.desc.type)) + " [" + shown + "]");
    all.push_back(tensor);
  }

  // Every combination of types and formats that the plugin takes; what comes after the tensor in question is rubbish.
  std::vector<std::string> combinations;
  std::vector<DynamicPluginTensorDesc> asked = all;
  const auto enumerate = [&](const auto& self, int32_t position, const std::string& before) -> void {
    if (position == inputs + outputs) return combinations.push_back(before);
    for (int32_t type = 0; type < 14; ++type) {
      for (int32_t format = 0; format < 14; ++format) {
        for (size_t i = static_cast<size_t>(position) + 1; i < asked.size(); ++i)
          std::memset(static_cast<void*>(&asked[i].desc), 0x5a, sizeof(asked[i].desc));
        PluginTensorDesc& tensor = asked[static_cast<size_t>(position)].desc;
        tensor = all[static_cast<size_t>(position)].desc;
        tensor.type = static_cast<DataType>(type);
        tensor.format = static_cast<TensorFormat>(format);
        if (!plugin.build->supportsFormatCombination(position, asked.data(), inputs, outputs)) continue;
        self(self, position + 1, before + (before.empty() ? "" : " ") + std::to_string(type) + ":" + std::to_string(format));
      }
    }
  };
  enumerate(enumerate, 0, "");
  for (const std::string& combination : combinations) note("formats " + combination);
  require(static_cast<int32_t>(combinations.size()) <= plugin.build->getFormatCombinationLimit(),
          "more combinations than the limit lets be timed");
  for (int32_t i = 0; i < inputs + outputs; ++i) {
    require(plugin.build->supportsFormatCombination(i, all.data(), inputs, outputs), "the network's own types are not supported");
  }

  // Configured, asked for tactics, and each of them timed in a context.
  ok(plugin.build->configurePlugin(all.data(), inputs, all.data() + inputs, outputs), "configurePlugin");
  std::vector<int32_t> tactics(static_cast<size_t>(plugin.build->getNbTactics()));
  ok(plugin.build->getValidTactics(tactics.data(), static_cast<int32_t>(tactics.size())), "getValidTactics");
  std::string shown;
  for (const int32_t tactic : tactics) {
    require(tactic > 0, "a tactic that is not positive");
    shown += " " + std::to_string(tactic);
  }
  note("tactics" + shown);
  engine->workspace = static_cast<int64_t>(plugin.build->getWorkspaceSize(all.data(), inputs, all.data() + inputs, outputs));
  note("workspace " + std::to_string(engine->workspace));
  tactics.insert(tactics.begin(), 0);
  if (timed != nullptr) {
    std::vector<PluginTensorDesc> descriptions;
    for (const DynamicPluginTensorDesc& tensor : all) {
      descriptions.push_back(tensor.desc);
      descriptions.back().dims = tensor.opt;
    }
    for (const int32_t tactic : tactics) {
      Plugin context = plugin.attached();
      ok(context.runtime->setTactic(tactic), "setTactic");
      ok(context.runtime->onShapeChange(descriptions.data(), inputs, descriptions.data() + inputs, outputs), "onShapeChange");
      std::vector<void*> data(static_cast<size_t>(inputs + outputs) + 1);
      timed(tactic, engine->workspace, data.data());
      ok(context.runtime->enqueue(descriptions.data(), descriptions.data() + inputs, data.data(), data.data() + inputs, data.back(),
                                  static_cast<cudaStream_t>(stream)),
         "enqueue");
      timed(tactic, engine->workspace, nullptr);
    }
  }

  // Serialized: the same twice, for the list is made anew by each call.
  const char* const timing_id = plugin.build->getTimingCacheID();
  require(timing_id != nullptr, "no ID for the timing cache");
  note(std::string("timing ") + timing_id);
  note(std::string("metadata ") + plugin.build->getMetadataString());
  engine->state = copied(*plugin.runtime->getFieldsToSerialize());
  const FieldStore again = copied(*plugin.runtime->getFieldsToSerialize());
  for (size_t i = 0; i < engine->state.items.size(); ++i) {
    const FieldStore::Item& item = engine->state.items[i];
    require(item.name == again.items[i].name && item.data == again.items[i].data, "fields differ when they are asked for again");
    if (item.type == PluginFieldType::kINT32) {
      int32_t value = 0;
      std::memcpy(&value, item.data.data(), sizeof(value));
      note("state " + item.name + " int32 " + std::to_string(value));
    } else {
      float value = 0;
      std::memcpy(&value, item.data.data(), sizeof(value));
      note("state " + item.name + " float32 " + std::to_string(value));
    }
  }
  engine->op = op;
  engine->inputs = inputs;
  engine->outputs = outputs;
  engine->tactic = tactics.back();
  return engine.release();
} catch (const std::exception& error) {
  messages = std::string(error.what()) + (messages.empty() ? "" : "\n") + messages;
  return nullptr;
}

// Collections of fields that nobody should hand over, and a phase that there is not; how many there are, where `which` is none of them.
HARNESS int32_t harness_create_malformed(void* library, int32_t which) try {
  const int32_t four = 4;
  const PluginField bits("bits", &four, PluginFieldType::kINT32, 1);
  const PluginField fields[][2] = {{bits, bits},
                                   {PluginField(nullptr, &four, PluginFieldType::kINT32, 1), bits},
                                   {PluginField("bits", nullptr, PluginFieldType::kINT32, 1), bits},
                                   {PluginField("bits", &four, PluginFieldType::kINT32, -1), bits},
                                   {PluginField("packed", &four, static_cast<PluginFieldType>(99), 1), bits}};
  constexpr int32_t kLists = sizeof(fields) / sizeof(fields[0]);
  PluginFieldCollection collection;
  if (which < kLists) {
    collection.nbFields = 2;
    collection.fields = fields[which];
  }
  if (which == kLists) collection.nbFields = 1;
  if (which == kLists + 1) collection.nbFields = -1;
  if (which > kLists + 3) return kLists + 4;
  const auto phase = which == kLists + 3 ? static_cast<TensorRTPhase>(2) : TensorRTPhase::kBUILD;
  const std::unique_ptr<IPluginV3> made(
      creator_named(library, "FlatQuantize")->createPlugin("layer", which == kLists + 2 ? nullptr : &collection, phase));
  require(made == nullptr, "a plugin was made");
  return 0;
} catch (const std::exception& error) {
  messages = error.what();
  return -1;
}

HARNESS const char* harness_trace(const HarnessEngine* engine) { return engine->trace.c_str(); }
HARNESS int64_t harness_workspace(const HarnessEngine* engine) { return engine->workspace; }
HARNESS void harness_free_engine(HarnessEngine* engine) { delete engine; }

// An execution context: a plugin of the engine's state alone, attached. `drop` leaves a field of the state out, as an engine of an older
// library might; `tactic` is one in the place of the engine's, or -1.
HARNESS HarnessContext* harness_context(void* library, HarnessEngine* engine, const char* drop, int32_t tactic) try {
  FieldStore state;
  for (const FieldStore::Item& item : engine->state.items) {
    if (drop == nullptr || item.name != drop) state.items.push_back(item);
  }
  const Plugin loaded = create(creator_named(library, engine->op), state, TensorRTPhase::kRUNTIME);
  auto context = std::make_unique<HarnessContext>(HarnessContext{loaded.attached(), *engine});
  require(context->plugin.runtime->setTactic(tactic != INT32_MIN ? tactic : engine->tactic) == 0, "setTactic failed");
  return context.release();
} catch (const std::exception& error) {
  messages = std::string(error.what()) + (messages.empty() ? "" : "\n") + messages;
  return nullptr;
}

HARNESS void harness_free_context(HarnessContext* context) { delete context; }

// Tensors are inputs, then outputs; data has the workspace behind them. Returns 0, 1 where onShapeChange refused, 2 where enqueue did.
HARNESS int32_t harness_run(HarnessContext* context, const HarnessTensor* tensors, void** data, void* stream) {
  const HarnessEngine& engine = context->engine;
  std::vector<PluginTensorDesc> descriptions;
  for (int32_t i = 0; i < engine.inputs + engine.outputs; ++i) {
    descriptions.push_back({tensors[i].dims, static_cast<DataType>(tensors[i].type), TensorFormat::kLINEAR, -1.0f});
  }
  IPluginV3OneRuntime& runtime = *context->plugin.runtime;
  const PluginTensorDesc* const out = descriptions.data() + engine.inputs;
  if (runtime.onShapeChange(descriptions.data(), engine.inputs, out, engine.outputs) != 0) return 1;
  return runtime.enqueue(descriptions.data(), out, data, data + engine.inputs, data[engine.inputs + engine.outputs],
                         static_cast<cudaStream_t>(stream)) == 0
             ? 0
             : 2;
}

}  // extern "C"
