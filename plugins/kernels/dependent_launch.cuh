// Programmatic dependent launch (CUDA C++ programming guide, section of that name): a kernel may let the next one on its stream begin, and
// one that was launched so waits itself before it touches what the work before it makes. From compute capability 9.0 on; else nothing.
#pragma once

namespace fq {

// The next kernel may begin where there is room, once every block has said so. It says nothing about this kernel's writes.
__device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until what the stream held before this kernel is done and its writes are seen; at once where the kernel was launched in the ordinary way.
__device__ __forceinline__ void wait_for_work_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace fq
