// wgmma.mma_async.m64nNk16.f32 of fp16 or bf16 (PTX ISA 9.0, section 9.7.15.5), one specialization a type and an N.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fq::sm90 {

// d += a . b, or d = a . b where `accumulate` is 0: a 64 x 16 in registers or behind a descriptor of shared memory, b 16 x kN behind one.
// kTransposed: the operand lies in shared memory with K as the outer index (MN-major), else with K contiguous (K-major). Thread (warp w,
// lane 4 g + t) holds of d the rows 16 w + g and 16 w + g + 8: d[4 j + 2 h + e] is row 16 w + g + 8 h, column 8 j + 2 t + e; of a the pairs
// a[h + 2 i]: the same rows, columns 8 i + 2 t and 8 i + 2 t + 1: what it holds of a product is its part of the next one's left operand.
template <typename Element, int kN>
struct Wgmma;

// Keeps the compiler from reading results before the wait that this follows.
template <int kRegisters>
__device__ __forceinline__ void settle(float (&d)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Numbers and constraints of d, each N's behind those of the one before it.
#define FQ_D8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FQ_NUMBERS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23" \
  ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FQ_D_64 FQ_D8(0), FQ_D8(8), FQ_D8(16), FQ_D8(24)
#define FQ_NUMBERS_96 \
  FQ_NUMBERS_64 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FQ_D_96 FQ_D_64, FQ_D8(32), FQ_D8(40)
#define FQ_NUMBERS_112 \
  FQ_NUMBERS_96 \
  ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FQ_D_112 FQ_D_96, FQ_D8(48)
#define FQ_NUMBERS_128 \
  FQ_NUMBERS_112 \
  ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FQ_D_128 FQ_D_112, FQ_D8(56)
#define FQ_NUMBERS_224 \
  FQ_NUMBERS_128 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87" \
  ", %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define FQ_D_224 FQ_D_128, FQ_D8(64), FQ_D8(72), FQ_D8(80), FQ_D8(88), FQ_D8(96), FQ_D8(104)

// kRegisters is kN / 2; p0 to p6 are the numbers of the operands behind d.
#define FQ_WGMMA(Element, type, kN, kRegisters, p0, p1, p2, p3, p4, p5, p6) \
template <> \
struct Wgmma<Element, kN> { \
  template <int kTransposedB> \
  __device__ __forceinline__ static void run(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, int accumulate) { \
    asm volatile( \
        "{\n" \
        ".reg .pred p;\n" \
        "setp.ne.b32 p, %" #p5 ", 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." #type "." #type " {" FQ_NUMBERS_##kN "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 \
        "}, %" #p4 ", p, 1, 1, %" #p6 ";\n" \
        "}\n" \
        : FQ_D_##kN \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposedB)); \
  } \
 \
  template <int kTransposedA, int kTransposedB> \
  __device__ __forceinline__ static void run(float (&d)[kRegisters], uint64_t a, uint64_t b, int accumulate) { \
    asm volatile( \
        "{\n" \
        ".reg .pred p;\n" \
        "setp.ne.b32 p, %" #p2 ", 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." #type "." #type " {" FQ_NUMBERS_##kN "}, %" #p0 ", %" #p1 ", p, 1, 1, %" #p3 \
        ", %" #p4 ";\n" \
        "}\n" \
        : FQ_D_##kN \
        : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposedA), "n"(kTransposedB)); \
  } \
};
#define FQ_WGMMA_OF(kN, kRegisters, ...) \
  FQ_WGMMA(__half, f16, kN, kRegisters, __VA_ARGS__) \
  FQ_WGMMA(__nv_bfloat16, bf16, kN, kRegisters, __VA_ARGS__)

FQ_WGMMA_OF(64, 32, 32, 33, 34, 35, 36, 37, 38)
FQ_WGMMA_OF(96, 48, 48, 49, 50, 51, 52, 53, 54)
FQ_WGMMA_OF(112, 56, 56, 57, 58, 59, 60, 61, 62)
FQ_WGMMA_OF(128, 64, 64, 65, 66, 67, 68, 69, 70)
FQ_WGMMA_OF(224, 112, 112, 113, 114, 115, 116, 117, 118)

#undef FQ_NUMBERS_64
#undef FQ_D_64
#undef FQ_NUMBERS_96
#undef FQ_D_96
#undef FQ_NUMBERS_112
#undef FQ_D_112
#undef FQ_NUMBERS_128
#undef FQ_D_128
#undef FQ_NUMBERS_224
#undef FQ_D_224
#undef FQ_D8
#undef FQ_WGMMA
#undef FQ_WGMMA_OF

}  // namespace fq::sm90
