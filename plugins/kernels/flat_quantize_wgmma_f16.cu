// FlatQuantize for compute capability 9.0: both products on wgmma, a row of x fetched once by the copy engine and never back in device memory.
//
// A row is X [n1, n2]. Z = left^T X: the left operand, left^T, stays in registers for the life of the block, X is read where the copy engine
// put it. T = Z right: a thread's part of Z, rounded to 16 bits, is its part of the left operand, `right` stays in shared memory. T's largest
// magnitude, scale and codes follow in registers, and the codes go straight to device memory: `right` lies in shared memory with its columns
// reordered so that the columns of T that a thread holds are neighbours in memory.
//
// One warpgroup computes 64 rows of Z and T. Where n1 <= 64 each has rows of x of its own, so that one's products run beside another's
// epilogue; where n1 <= 128 two share a row.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <type_traits>

#include "kernel.h"
#include "sm90.cuh"
#include "wgmma.cuh"

namespace fq {
namespace {

using namespace sm90;

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr int kTile = 64;        // rows of a warpgroup's product, and columns of a box of x: 128 bytes
constexpr int kMostStages = 24;  // rows of x in flight
constexpr int kMostWarps = 16;
constexpr int kMostTeams = 4;
constexpr int kAlignment = 1024;  // of what the copy engine swizzles

struct Problem {
  const void* left;
  const void* right;
  const float* clip_ptr;
  float clip;
  uint8_t* q;
  float* scale;
  int rows, n1, n2;
  int stages;
  float qmax;
  bool float_factors, packed;
};

// A kernel's shape: n1 up to kN1, a multiple of 16, and n2 up to kN2; kTeams teams of warpgroups to a block, each with a row of x. kAhead: the
// first product of a team's next row runs under the epilogue of this one.
template <int kN1_, int kN2_, int kTeams_, bool kAhead_>
struct Shape {
  static constexpr int kN1 = kN1_, kN2 = kN2_, kTeams = kTeams_;
  static constexpr bool kAhead = kAhead_;
  static constexpr int kTiles = (kN1 + kTile - 1) / kTile;  // warpgroups of a team
  static constexpr int kThreads = kTeams * kTiles * kWarpgroup;
  static constexpr int kBoxes = (kN2 + kTile - 1) / kTile;
  static constexpr int kBoxBytes = kN1 * kTile * 2;
  static constexpr int kStageBytes = kBoxes * kBoxBytes;
  static constexpr int kLeftSteps = kN1 / 16;   // of the first product along K
  static constexpr int kRightSteps = kN2 / 16;  // of the second
  static constexpr int kRightBytes = kN2 * kN2 * 2;
  static_assert(kN1 % 16 == 0 && kN2 % 32 == 0 && kTeams <= kMostTeams && kThreads <= kMostWarps * kWarp);
};

struct Shared {
  uint64_t full[kMostStages];
  uint32_t largest[2][kMostTeams][8];  // of a warp's part of T, as bits; two rows' worth, so that one barrier a row is enough
  float left_sum[kMostWarps];
  float right_largest[kMostWarps];
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The larger magnitude; NaN where either is NaN.
__device__ __forceinline__ float larger_magnitude(float a, float b) {
  float c;
  asm("{\n.reg .f32 m;\nabs.f32 m, %2;\nmax.NaN.f32 %0, %1, m;\n}\n" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// Bits of floats that are not negative order as the floats do, and NaN is above infinity.
__device__ __forceinline__ uint32_t warp_largest(uint32_t bits) { return __reduce_max_sync(0xFFFFFFFF, bits); }

__device__ __forceinline__ float multiply_add_saturate(float a, float b, float c) {
  float d;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
  return d;
}

// The power of two that takes `bound` below one; 0 where there is none.
__device__ __forceinline__ int exponent_above(float bound) {
  if (!(bound > 0.0f) || !(bound < FLT_MAX)) return 0;
  return max(-100, min(100, ilogbf(bound) + 1));
}

// Descriptor of an operand in shared memory without swizzle: 8 x 16-byte matrices of 128 contiguous bytes; `leading` and `stride` are the
// bytes from one to the next along K and along the rows.
__device__ __forceinline__ uint64_t descriptor_plain(uint32_t address, uint32_t leading, uint32_t stride) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32;
}

// Descriptor of a transposed operand whose rows along K are 128 bytes (64 columns), swizzled by the copy engine; `leading` bytes from 64
// columns to the next.
__device__ __forceinline__ uint64_t descriptor_transposed_128b(uint32_t address, uint32_t leading) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// This thread's part of left^T [64 a tile, 16 a step]: rows `row` and row + 8, columns as Wgmma says; zero outside.
template <typename Factor, int kSteps>
__device__ __forceinline__ void load_left(float (&part)[kSteps][8], const void* factor, int n1, int row, int column) {
  const Factor* left = static_cast<const Factor*>(factor);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int k = 16 * s + 8 * (i / 4) + column + i % 2;
      const int m = row + 8 * (i / 2 % 2);
      part[s][i] = k < n1 && m < n1 ? to_float(left[k * n1 + m]) : 0.0f;
    }
  }
}

// Eight columns of a row of `right`, zero outside.
template <typename Factor>
__device__ __forceinline__ void load_eight(float (&values)[8], const Factor* right, int n2, int row, int column) {
  const bool inside = row < n2 && column < n2;
  uint4 words[sizeof(Factor) / 2];
#pragma unroll
  for (int i = 0; i < int(sizeof(Factor) / 2); ++i)
    words[i] = inside ? __ldg(reinterpret_cast<const uint4*>(right + row * n2 + column) + i) : make_uint4(0, 0, 0, 0);
  const Factor* factors = reinterpret_cast<const Factor*>(words);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = to_float(factors[i]);
}

// Writes right * multiplier to shared memory as the second product reads it and returns the largest magnitude in this thread's part of
// `right`. Of 64 columns in memory (of kN % 64, in the last run), each of a quad's threads takes a quarter: its columns of eight tiles of T.
template <typename Element, typename Factor, int kN, int kThreads>
__device__ __forceinline__ float store_right(uint8_t* shared, const void* factor, int n2, float multiplier) {
  constexpr int kEights = kN / 8;
  float largest = 0.0f;
  for (int task = threadIdx.x; task < kEights * kEights; task += kThreads) {
    const int k = task / kEights, column = task % kEights * 8;
    float values[8][8];
#pragma unroll
    for (int i = 0; i < 8; ++i) load_eight(values[i], static_cast<const Factor*>(factor), n2, 8 * k + i, column);
#pragma unroll
    for (int i = 0; i < 64; ++i) largest = fmaxf(largest, fabsf(values[i / 8][i % 8]));
    const int run = column / 64;
    const int quarter = min(kN - 64 * run, 64) / 4;
    const int thread = column % 64 / quarter, tile = column % 64 % quarter / 2;
    uint8_t* to = shared + (k * kEights + 8 * run + tile) * 128 + thread * 32;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint4 words;
      words.x = pack<Element>(values[0][i] * multiplier, values[1][i] * multiplier);
      words.y = pack<Element>(values[2][i] * multiplier, values[3][i] * multiplier);
      words.z = pack<Element>(values[4][i] * multiplier, values[5][i] * multiplier);
      words.w = pack<Element>(values[6][i] * multiplier, values[7][i] * multiplier);
      *reinterpret_cast<uint4*>(to + i / 2 * 128 + i % 2 * 16) = words;
    }
  }
  return largest;
}

// Four codes, the low bytes of `codes`, in one word.
__device__ __forceinline__ uint32_t four_bytes(const float (&codes)[4]) {
  const uint32_t low = __byte_perm(__float_as_uint(codes[0]), __float_as_uint(codes[1]), 0x0040);
  const uint32_t high = __byte_perm(__float_as_uint(codes[2]), __float_as_uint(codes[3]), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

// Eight codes of two words, one a byte, as nibbles.
__device__ __forceinline__ uint32_t eight_nibbles(uint32_t low, uint32_t high) {
  low &= 0x0F0F0F0F;
  high &= 0x0F0F0F0F;
  return __byte_perm(low | low >> 4, high | high >> 4, 0x6420);
}

// 16, 8 (and half of that, packed) bytes.
template <int kWords>
__device__ __forceinline__ void store_words(uint8_t* to, const uint32_t (&words)[kWords], bool packed) {
  static_assert(kWords == 4 || kWords == 2);
  if (packed) {
    if constexpr (kWords == 4)
      *reinterpret_cast<uint2*>(to) = make_uint2(eight_nibbles(words[0], words[1]), eight_nibbles(words[2], words[3]));
    else
      *reinterpret_cast<uint32_t*>(to) = eight_nibbles(words[0], words[1]);
  } else {
    if constexpr (kWords == 4)
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    else
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  }
}

// How a row's T becomes codes: code = levels * saturate(t * multiplier + offset) + base, rounded by the addition of 1.5 * 2^23 in `base`.
struct Rounding {
  float multiplier, offset, levels, base;
};

// The codes of kWidth / 4 neighbouring columns in each of two rows of T.
template <int kRun, int kWidth, int kRegisters>
__device__ __forceinline__ void store_run(const float (&t)[kRegisters], const Rounding& rounding, uint8_t* const (&rows)[2],
                                          const bool (&inside)[2], int column, bool packed) {
  constexpr int kWords = kWidth / 16;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32_t words[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      float codes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float share = multiply_add_saturate(t[4 * (8 * kRun + 2 * w + i / 2) + 2 * h + i % 2], rounding.multiplier, rounding.offset);
        codes[i] = fmaf(share, rounding.levels, rounding.base);
      }
      words[w] = four_bytes(codes);
    }
    if (inside[h]) store_words(rows[h] + (packed ? column / 2 : column), words, packed);
  }
}

template <int kRun, int kN, int kRegisters>
__device__ __forceinline__ void store_runs(const float (&t)[kRegisters], const Rounding& rounding, uint8_t* const (&rows)[2],
                                           const bool (&inside)[2], int n2, int thread, bool packed) {
  if constexpr (64 * kRun < kN) {
    constexpr int kWidth = kN - 64 * kRun < 64 ? kN - 64 * kRun : 64;
    const int column = 64 * kRun + thread * (kWidth / 4);
    const bool both[2] = {inside[0] && column < n2, inside[1] && column < n2};
    store_run<kRun, kWidth>(t, rounding, rows, both, column, packed);
    store_runs<kRun + 1, kN>(t, rounding, rows, inside, n2, thread, packed);
  }
}

template <typename Element, typename S>
__global__ void __launch_bounds__(S::kThreads, 1) flat_quantize(const __grid_constant__ CUtensorMap x, const Problem problem) {
  constexpr int kRegisters = S::kN2 / 2;
  extern __shared__ __align__(kAlignment) uint8_t shared_memory[];
  uint8_t* const right = shared_memory + problem.stages * S::kStageBytes;
  Shared& shared = *reinterpret_cast<Shared*>(right + S::kRightBytes);

  const int team = threadIdx.x / (S::kTiles * kWarpgroup);
  const int warp = threadIdx.x / kWarp % (4 * S::kTiles);  // of the team
  const int lane = threadIdx.x % kWarp;
  const int tile_row = 16 * warp + lane / 4;  // the first of two, eight apart
  const bool leads = threadIdx.x % (S::kTiles * kWarpgroup) == 0;

  // Rows of x by the number of their turn in this block: teams take turns one after another.
  const int turns = (problem.rows - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
  const auto fetch = [&](int turn, int stage) {
    barrier_expect(&shared.full[stage], S::kStageBytes);
#pragma unroll
    for (int box = 0; box < S::kBoxes; ++box)
      copy_box(shared_memory + stage * S::kStageBytes + box * S::kBoxBytes, &x, &shared.full[stage], box * kTile, 0,
               int(blockIdx.x) + turn * int(gridDim.x), Keep::kFirstOut);
  };
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&x);
    for (int stage = 0; stage < problem.stages; ++stage) barrier_init(&shared.full[stage], 1);
    fence_barrier_init();
    for (int turn = 0; turn < min(turns, problem.stages); ++turn) fetch(turn, turn);
  }

  // The factors, scaled by powers of two: left so that Z is no larger than x, right where its values are beyond fp16's.
  uint32_t left[S::kLeftSteps][4];
  int exponent;
  {
    float part[S::kLeftSteps][8];
    if (problem.float_factors)
      load_left<float>(part, problem.left, problem.n1, tile_row, 2 * (lane % 4));
    else
      load_left<Element>(part, problem.left, problem.n1, tile_row, 2 * (lane % 4));
    const float largest = problem.float_factors ? store_right<Element, float, S::kN2, S::kThreads>(right, problem.right, problem.n2, 1.0f)
                                                : store_right<Element, Element, S::kN2, S::kThreads>(right, problem.right, problem.n2, 1.0f);
    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < S::kLeftSteps * 8; ++i) sums[i / 2 % 2] += fabsf(part[i / 8][i % 8]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sums[h] += __shfl_xor_sync(0xFFFFFFFF, sums[h], 1);
      sums[h] += __shfl_xor_sync(0xFFFFFFFF, sums[h], 2);
    }
    const uint32_t sum = warp_largest(__float_as_uint(fmaxf(sums[0], sums[1])));
    const uint32_t most = warp_largest(__float_as_uint(largest));
    if (lane == 0) {
      shared.left_sum[threadIdx.x / kWarp] = __uint_as_float(sum);
      shared.right_largest[threadIdx.x / kWarp] = __uint_as_float(most);
    }
    __syncthreads();
    float left_sum = 0.0f, right_largest = 0.0f;
#pragma unroll
    for (int w = 0; w < S::kThreads / kWarp; ++w) {
      left_sum = fmaxf(left_sum, shared.left_sum[w]);
      right_largest = fmaxf(right_largest, shared.right_largest[w]);
    }
    exponent = exponent_above(1.001f * left_sum);  // rounding left's values must not take the sum past one
    const float multiplier = exp2f(float(-exponent));
#pragma unroll
    for (int s = 0; s < S::kLeftSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) left[s][i] = pack<Element>(part[s][2 * i] * multiplier, part[s][2 * i + 1] * multiplier);
    }
    if (problem.float_factors && (right_largest > 32768.0f || right_largest < 0.0078125f)) {
      const int right_exponent = exponent_above(right_largest);
      store_right<Element, float, S::kN2, S::kThreads>(right, problem.right, problem.n2, exp2f(float(-right_exponent)));
      exponent += right_exponent;
    }
    fence_async_shared();
    __syncthreads();
  }

  const float power = exp2f(float(exponent));
  const float clip = problem.clip_ptr != nullptr ? *problem.clip_ptr : problem.clip;
  Rounding rounding;
  rounding.levels = 2.0f * problem.qmax + 1.0f;
  rounding.offset = (problem.qmax + 1.0f) / rounding.levels;
  rounding.base = 12582912.0f - (problem.qmax + 1.0f);
  const float power_of_level = power / rounding.levels;

  const uint64_t right_descriptor = descriptor_plain(shared_address(right), S::kN2 / 8 * 128, 128);
  float z[kRegisters], t[kRegisters];

  const auto start_first = [&](int stage) {
    const uint64_t descriptor = descriptor_transposed_128b(shared_address(shared_memory) + stage * S::kStageBytes, S::kBoxBytes);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < S::kLeftSteps; ++s)
      Wgmma<Element, S::kN2>::template run<1>(z, left[s], descriptor + s * (16 * kTile * 2 >> 4), s > 0);
    wgmma_commit();
  };

  int stage = team, phase = 0;
  while (stage >= problem.stages) stage -= problem.stages, phase ^= 1;
  if (S::kAhead && team < turns) {
    barrier_wait(&shared.full[stage], phase);
    start_first(stage);
  }
  int parity = 0;
  for (int turn = team; turn < turns; turn += S::kTeams, parity ^= 1) {
    const int row = int(blockIdx.x) + turn * int(gridDim.x);
    if (!S::kAhead) {
      barrier_wait(&shared.full[stage], phase);
      start_first(stage);
    }
    wgmma_wait<0>();
    settle(z);
    uint32_t rounded[S::kRightSteps][4];
#pragma unroll
    for (int s = 0; s < S::kRightSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) rounded[s][i] = pack<Element>(z[8 * s + 2 * i], z[8 * s + 2 * i + 1]);
    }
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < S::kRightSteps; ++s)
      Wgmma<Element, S::kN2>::template run<0>(t, rounded[s], right_descriptor + s * (2 * S::kN2 / 8 * 128 >> 4), s > 0);
    wgmma_commit();

    const int used = stage;
    stage += S::kTeams;
    while (stage >= problem.stages) stage -= problem.stages, phase ^= 1;
    if (S::kAhead) {
      if (turn + S::kTeams < turns) barrier_wait(&shared.full[stage], phase);
      start_first(stage);  // past the last row: of what lies there, for nothing
      wgmma_wait<1>();
    } else {
      wgmma_wait<0>();
    }
    settle(t);

    float most[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) most[i % 4] = larger_magnitude(most[i % 4], t[i]);
    most[0] = larger_magnitude(larger_magnitude(most[0], most[1]), larger_magnitude(most[2], most[3]));
    const uint32_t warps_largest = warp_largest(__float_as_uint(most[0]));
    if (lane == 0) shared.largest[parity][team][warp] = warps_largest;
    named_barrier(1 + team, S::kTiles * kWarpgroup);
    if (leads && turn + problem.stages < turns) fetch(turn + problem.stages, used);
    uint32_t largest = 0;
#pragma unroll
    for (int w = 0; w < 4 * S::kTiles; ++w) largest = max(largest, shared.largest[parity][team][w]);

    const float step = __fdiv_rn(__fmul_rn(__uint_as_float(largest) * power, clip), problem.qmax);
    const bool zero = step < FLT_MIN;
    const float scale = zero ? 1.0f : step <= FLT_MAX ? step : __uint_as_float(0x7FC00000);
    if (leads) problem.scale[row] = scale;
    rounding.multiplier = zero ? 0.0f : fminf(__fdividef(power_of_level, scale), FLT_MAX);

    const int64_t width = int64_t(problem.n1) * problem.n2;
    const int64_t first = row * width + tile_row * problem.n2;
    const int64_t second = first + 8 * problem.n2;
    uint8_t* const rows[2] = {problem.q + (problem.packed ? first / 2 : first), problem.q + (problem.packed ? second / 2 : second)};
    const bool inside[2] = {tile_row < problem.n1, tile_row + 8 < problem.n1};
    store_runs<0, S::kN2>(t, rounding, rows, inside, problem.n2, lane % 4, problem.packed);
  }
  if (S::kAhead) wgmma_wait<0>();
}

template <typename S>
constexpr int shared_bytes(int stages) {
  return stages * S::kStageBytes + S::kRightBytes + int(sizeof(Shared));
}

template <typename S>
int stages_for(const Device& device) {
  int stages = kMostStages;
  while (stages > 0 && shared_bytes<S>(stages) > device.shared_memory) --stages;
  return stages;
}

// Calls `function` with the shape that takes n1 x n2.
template <typename Function>
auto with_shape(int n1, int n2, const Function& function) {
  if (n2 <= 64) {
    if (n1 <= 32) return function(Shape<32, 64, 4, true>());
    if (n1 <= 64) return function(Shape<64, 64, 4, true>());
  }
  if (n2 <= 128) {
    if (n1 <= 32) return function(Shape<32, 128, 3, false>());
    if (n1 <= 48) return function(Shape<48, 128, 3, false>());
    if (n1 <= 64) return function(Shape<64, 128, 3, false>());
    if (n1 <= 96) return function(Shape<96, 128, 1, true>());
    if (n1 <= 112) return function(Shape<112, 128, 1, true>());
    return function(Shape<128, 128, 1, true>());
  }
  if (n1 <= 64) return function(Shape<64, 224, 2, false>());
  return function(Shape<128, 224, 1, false>());
}

constexpr int kLargestN1 = 128, kLargestN2 = 224;
constexpr int kFewestRows = 64;

const char* fits(const fq_flat_quantize_params& params, const Prologue& prologue, const Device& device) {
  if (prologue.kind != PrologueKind::kNone) return "takes x as it is, without a norm or a gate in front";
  if (params.dtype != FQ_FLOAT16 && params.dtype != FQ_BFLOAT16) return "takes x in float16 or bfloat16";
  if (params.left == nullptr) return "takes a transform, not the quantizer alone";
  if (params.n1 > kLargestN1 || params.n2 > kLargestN2 || params.n2 % 16 != 0) return "takes n1 up to 128 and n2 a multiple of 16 up to 224";
  if (params.k != int64_t(params.n1) * params.n2) return "takes one block: k = n1 n2";
  if (params.rows > INT32_MAX - 65536) return "takes fewer rows";
  if (params.variant == 0 && params.rows < kFewestRows) return "is for 64 rows or more";
  if (with_shape(params.n1, params.n2, [&](auto shape) { return stages_for<decltype(shape)>(device); }) < 1)
    return "takes factors that fit shared memory beside a row of x";
  return nullptr;
}

template <typename Element, typename S>
fq_status launch_shape(const fq_flat_quantize_params& params, Problem problem, const Device& device, cudaStream_t stream) {
  constexpr CUtensorMapDataType kType = std::is_same_v<Element, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t n1 = cuuint64_t(params.n1), n2 = cuuint64_t(params.n2);
  const cuuint64_t row_bytes = params.rows == 1 ? n1 * n2 * 2 : cuuint64_t(params.x_stride) * 2;  // one row's stride need not be aligned
  CUtensorMap map;
  if (const fq_status status = make_tensor_map<3>(&map, params.x, kType, {n2, n1, cuuint64_t(params.rows)}, {n2 * 2, row_bytes},
                                                  {kTile, S::kN1, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
      status != FQ_OK)
    return status;
  problem.stages = stages_for<S>(device);
  const int bytes = shared_bytes<S>(problem.stages);
  const auto kernel = flat_quantize<Element, S>;
  if (const fq_status status = check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
      status != FQ_OK)
    return status;
  const int blocks = problem.rows < device.multiprocessors ? problem.rows : device.multiprocessors;
  kernel<<<blocks, S::kThreads, bytes, stream>>>(map, problem);
  return check(cudaGetLastError(), "flat_quantize");
}

fq_status launch(const fq_flat_quantize_params& params, const Prologue&, const Device& device, cudaStream_t stream) {
  if (params.rows == 0) return FQ_OK;
  Problem problem;
  problem.left = params.left;
  problem.right = params.right;
  problem.clip_ptr = params.clip_ptr;
  problem.clip = params.clip;
  problem.q = static_cast<uint8_t*>(params.q);
  problem.scale = params.scale;
  problem.rows = int(params.rows);
  problem.n1 = params.n1;
  problem.n2 = params.n2;
  problem.stages = 0;
  problem.qmax = params.bits == 4 ? 7.0f : 127.0f;
  problem.float_factors = params.factor_dtype == FQ_FLOAT;
  problem.packed = params.container != FQ_INT8;

  return with_shape(params.n1, params.n2, [&](auto shape) {
    using S = decltype(shape);
    return params.dtype == FQ_FLOAT16 ? launch_shape<__half, S>(params, problem, device, stream)
                                      : launch_shape<__nv_bfloat16, S>(params, problem, device, stream);
  });
}

}  // namespace

const QuantizeKernel FlatQuantize_wgmma_f16 = {fits, launch};

}  // namespace fq
