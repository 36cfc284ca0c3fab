// What of TensorRT's interfaces is ABI. Compiled with -fdump-lang-class, which lists every class's size and table of virtual functions; a
// pure one is listed without its name, so that each interface is implemented here. Run, it prints what that leaves out: where members are,
// and the numbers of enumerators.
#include <cstddef>
#include <cstdio>

#include "interfaces.h"
#include "logger_abi.h"

namespace implemented {

using namespace nvinfer1;

struct PluginV3 : IPluginV3 {
  IPluginCapability* getCapabilityInterface(PluginCapabilityType) noexcept override;
  IPluginV3* clone() noexcept override;
};

struct PluginV3OneCore : IPluginV3OneCore {
  AsciiChar const* getPluginName() const noexcept override;
  AsciiChar const* getPluginVersion() const noexcept override;
  AsciiChar const* getPluginNamespace() const noexcept override;
};

struct PluginV3OneBuild : IPluginV3OneBuild {
  int32_t configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) noexcept override;
  int32_t getOutputDataTypes(DataType*, int32_t, DataType const*, int32_t) const noexcept override;
  int32_t getOutputShapes(DimsExprs const*, int32_t, DimsExprs const*, int32_t, DimsExprs*, int32_t, IExprBuilder&) noexcept override;
  bool supportsFormatCombination(int32_t, DynamicPluginTensorDesc const*, int32_t, int32_t) noexcept override;
  int32_t getNbOutputs() const noexcept override;
};

struct PluginV3OneRuntime : IPluginV3OneRuntime {
  int32_t onShapeChange(PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t) noexcept override;
  int32_t enqueue(PluginTensorDesc const*, PluginTensorDesc const*, void const* const*, void* const*, void*,
                  cudaStream_t) noexcept override;
  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override;
  PluginFieldCollection const* getFieldsToSerialize() noexcept override;
};

struct PluginCreatorV3One : IPluginCreatorV3One {
  IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const*, TensorRTPhase) noexcept override;
  PluginFieldCollection const* getFieldNames() noexcept override;
  AsciiChar const* getPluginName() const noexcept override;
  AsciiChar const* getPluginVersion() const noexcept override;
  AsciiChar const* getPluginNamespace() const noexcept override;
};

struct DimensionExpr : apiv::VDimensionExpr {
  bool isConstant() const override;
  int64_t getConstantValue() const override;
  bool isSizeTensor() const override;
};

struct ExprBuilder : apiv::VExprBuilder {
  IDimensionExpr const* constant(int64_t) override;
  IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override;
  IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override;
};

#ifdef FQ_TENSORRT_SDK
#if NV_TENSORRT_MAJOR == 10
struct Logger10 : ILogger {
#else
struct Logger11 : ILogger {
#endif
  void log(Severity, char const*) noexcept override;
};
#if NV_TENSORRT_MAJOR == 10
struct LoggerFinder10 : ILoggerFinder {
#else
struct LoggerFinder11 : ILoggerFinder {
#endif
  ILogger* findLogger() override;
};
#else
struct Logger10 : fq::trt::abi::v10::ILogger {
  void log(fq::trt::abi::Severity, char const*) noexcept override;
};
struct LoggerFinder10 : fq::trt::abi::v10::ILoggerFinder {
  fq::trt::abi::v10::ILogger* findLogger() override;
};
struct Logger11 : fq::trt::abi::v11::ILogger {
  int32_t getAPILanguage() const noexcept override;
  void getInterfaceInfo() const noexcept override;
  void log(fq::trt::abi::Severity, char const*) noexcept override;
};
struct LoggerFinder11 : fq::trt::abi::v11::ILoggerFinder {
  int32_t getAPILanguage() const noexcept override;
  void getInterfaceInfo() const noexcept override;
  fq::trt::abi::v11::ILogger* findLogger() override;
};
#endif

// Where TensorRT's expressions keep the pointers to their functions.
struct DimensionExprPointer : IDimensionExpr {
  static constexpr size_t place() { return offsetof(DimensionExprPointer, mImpl); }
};
struct ExprBuilderPointer : IExprBuilder {
  static constexpr size_t place() { return offsetof(ExprBuilderPointer, mImpl); }
};

}  // namespace implemented

#define PLACE(type, member) std::printf("%s.%s at %zu\n", #type, #member, offsetof(nvinfer1::type, member))
#define NUMBER(type, name) std::printf("%s::%s = %d\n", #type, #name, static_cast<int>(nvinfer1::type::name))

int main() {
  PLACE(Dims, nbDims);
  PLACE(Dims, d);
  PLACE(PluginTensorDesc, dims);
  PLACE(PluginTensorDesc, type);
  PLACE(PluginTensorDesc, format);
  PLACE(PluginTensorDesc, scale);
  PLACE(DynamicPluginTensorDesc, desc);
  PLACE(DynamicPluginTensorDesc, min);
  PLACE(DynamicPluginTensorDesc, max);
  PLACE(DynamicPluginTensorDesc, opt);
  PLACE(PluginField, name);
  PLACE(PluginField, data);
  PLACE(PluginField, type);
  PLACE(PluginField, length);
  PLACE(PluginFieldCollection, nbFields);
  PLACE(PluginFieldCollection, fields);
  PLACE(InterfaceInfo, kind);
  PLACE(InterfaceInfo, major);
  PLACE(InterfaceInfo, minor);
  PLACE(DimsExprs, nbDims);
  PLACE(DimsExprs, d);
  std::printf("IDimensionExpr.mImpl at %zu\n", implemented::DimensionExprPointer::place());
  std::printf("IExprBuilder.mImpl at %zu\n", implemented::ExprBuilderPointer::place());
  NUMBER(DataType, kFLOAT);
  NUMBER(DataType, kHALF);
  NUMBER(DataType, kINT8);
  NUMBER(DataType, kINT32);
  NUMBER(DataType, kBF16);
  NUMBER(DataType, kINT64);
  NUMBER(DataType, kINT4);
  NUMBER(TensorFormat, kLINEAR);
  NUMBER(PluginFieldType, kFLOAT32);
  NUMBER(PluginFieldType, kFLOAT64);
  NUMBER(PluginFieldType, kINT32);
  NUMBER(PluginFieldType, kCHAR);
  NUMBER(PluginFieldType, kUNKNOWN);
  NUMBER(PluginFieldType, kINT64);
  NUMBER(PluginCapabilityType, kCORE);
  NUMBER(PluginCapabilityType, kBUILD);
  NUMBER(PluginCapabilityType, kRUNTIME);
  NUMBER(TensorRTPhase, kBUILD);
  NUMBER(TensorRTPhase, kRUNTIME);
  NUMBER(DimensionOperation, kSUM);
  NUMBER(DimensionOperation, kPROD);
  NUMBER(DimensionOperation, kMAX);
  NUMBER(DimensionOperation, kMIN);
  NUMBER(DimensionOperation, kSUB);
  NUMBER(DimensionOperation, kEQUAL);
  NUMBER(DimensionOperation, kLESS);
  NUMBER(DimensionOperation, kFLOOR_DIV);
  NUMBER(DimensionOperation, kCEIL_DIV);
  NUMBER(APILanguage, kCPP);
}
