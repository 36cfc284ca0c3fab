// Launches with clusters, large shared memory and programmatic dependence.
//
// Programmatic dependent launch (CUDA C++ programming guide, section of that name): a kernel may let the next one on its stream begin, and
// one that was launched so waits itself before it touches what the work before it makes. From compute capability 9.0 on; else nothing.
#pragma once

#include <cuda_runtime_api.h>

#include "kernel.h"

namespace fq {

// The next kernel may begin where there is room, once every block has said so. It says nothing about this kernel's writes.
__device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until what the stream held before this kernel is done and its writes are seen; at once where the kernel was launched in the ordinary way.
// A kernel that may begin early calls it in every block, also where a block has nothing to wait for: the kernel after it relies on that.
__device__ __forceinline__ void wait_for_work_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

struct Launch {
  dim3 grid, cluster;
  int threads, shared_bytes;
  bool waits_itself;  // may begin while the work before on the stream is not done; from compute capability 9.0 on
};

// `name` begins the message of a failure.
template <typename... Parameters, typename... Arguments>
fq_status launch_kernel(const char* name, void (*kernel)(Parameters...), const Launch& launch, cudaStream_t stream,
                        const Arguments&... arguments) {
  // At every launch: the attributes are the current device's, and nothing is kept between calls. A multiprocessor cannot give a block more
  // shared memory than it was set to for the first one that it holds, so that kernels could not overlap without the second attribute.
  if (const fq_status status = check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes), name))
    return status;
  if (const fq_status status =
          check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared), name))
    return status;
  cudaLaunchAttribute attributes[2];
  int count = 0;
  if (launch.cluster.x * launch.cluster.y * launch.cluster.z > 1) {
    cudaLaunchAttribute& attribute = attributes[count++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = launch.cluster.x;
    attribute.val.clusterDim.y = launch.cluster.y;
    attribute.val.clusterDim.z = launch.cluster.z;
  }
  if (launch.waits_itself) {
    cudaLaunchAttribute& attribute = attributes[count++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid;
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = static_cast<unsigned>(count);
  return check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace fq
