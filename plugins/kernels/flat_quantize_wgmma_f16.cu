// FlatQuantize for compute capability 9.0: both products on wgmma, a row of x fetched once by the copy engine, codes written once.
//
// A row is X [n1, n2]. Z = left^T X: both operands in shared memory, X where the copy engine put it. T = Z right: a thread's part of Z,
// rounded to 16 bits, is its part of the left operand. T's largest magnitude, scale and codes follow in registers, and the codes go from
// there to device memory: `right` lies in shared memory with its columns reordered so that a thread's columns of T are neighbours.
//
// A product's rows are those of its warpgroups, a multiple of 64. Where n1 is far from one, T^T = right^T X^T left is computed instead: its
// rows are n2, and its columns may be any multiple of 8. Its codes are transposed on their way through shared memory.
//
// One warpgroup computes 64 rows of Z and T. One of them, or two where n1 > 64, are a team that works on a row of x; teams take turns, so
// that one's products run beside another's epilogue. Where n1 <= 32 a team works on two rows at once: X is then one above the other and
// left^T stands twice on the diagonal.
//
// Where T is not finite or very small it is computed again, with care: Z may have left fp16's range, or the other row may hold the NaN.
//
// A norm or a gate in front is applied to the row in shared memory.
#include <algorithm>
#include <cfloat>
#include <type_traits>

#include "kernel.h"
#include "launch.cuh"
#include "pairs.cuh"
#include "sm90.cuh"
#include "wgmma.cuh"

namespace fq {
namespace {

using namespace sm90;

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr int kTile = 64;                // rows of a warpgroup's product, and columns of a box of x
constexpr int kBoxRow = 2 * kTile;       // bytes
constexpr int kMostStages = 24;          // rows of x in flight
constexpr int kMostWarps = 16;
constexpr int kMostTeams = 4;
constexpr int kTeamBarrier = 1;          // the first of the named barriers of teams
constexpr int kAlignment = 1024;         // of what the copy engine swizzles
constexpr int kLower = -12, kLift = 14;  // exponents of what Z is multiplied by where it is too large or too small for fp16
constexpr uint32_t kSmall = 0x3A800000;  // 2^-10, as bits: below it, parts of Z may lose digits
constexpr uint32_t kAllLanes = 0xFFFFFFFF;

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
  float levels, offset, base, quarter_of_level;  // see Rounding
  bool float_factors, packed;
  bool constant_factors;  // and clip_ptr, gamma: they may be read before the work ahead is done

  // What is in front of the transform.
  const void* gamma;
  void* sum;
  void* normed;
  float epsilon;
  bool second;  // whether there is a second operand: residual, up
};

// A kernel's shape: n1 up to kN1, a multiple of 16, and n2 up to kN2; kRows rows of x at once, kTeams teams to a block. kLeftInRegisters:
// left^T stays in registers, where there is no room for it in shared memory. kTransposed: it computes T^T. The products are named as if it
// did not: where it does, their left operand is right^T and their right one is left.
template <int kN1_, int kN2_, int kRows_, int kTeams_, bool kLeftInRegisters_ = false, bool kTransposed_ = false>
struct Shape {
  static constexpr int kN1 = kN1_, kN2 = kN2_, kRows = kRows_, kTeams = kTeams_;
  static constexpr bool kLeftInRegisters = kLeftInRegisters_, kTransposed = kTransposed_;
  static constexpr bool kRehearses = kTeams == 1 && !kLeftInRegisters;  // finds room beside the product before it, see with_shape()
  static constexpr int kM = kTransposed ? kN2 : kRows * kN1;            // rows of the products, and K of the first
  static constexpr int kN = kTransposed ? kN1 : kN2;                    // columns of the products, and K of the second
  static constexpr int kTiles = (kM + kTile - 1) / kTile;               // warpgroups of a team
  static constexpr int kTeamThreads = kTiles * kWarpgroup;
  static constexpr int kTeamWarps = kTeamThreads / kWarp;
  static constexpr int kRowWarps = kTeamWarps / kRows;  // that work on one row of x
  static constexpr int kThreads = kTeams * kTeamThreads;
  static constexpr int kBoxes = (kN2 + kTile - 1) / kTile;
  static constexpr int kBoxBytes = kRows * kN1 * kBoxRow;
  static constexpr int kStageBytes = kBoxes * kBoxBytes;
  static constexpr int kLeftSteps = kM / 16;   // of the first product along K
  static constexpr int kRightSteps = kN / 16;  // of the second
  static constexpr int kFactorBoxBytes = kM * kBoxRow;
  static constexpr int kLeftBytes = kLeftInRegisters ? 0 : kTiles * kFactorBoxBytes;
  static constexpr int kRightBytes = kN * kN * 2;
  // As measured: else 2 to 6 % slower at 2,048 rows, here 3 to 6 % faster.
  static constexpr bool kWholeStores = kRows == 1 && kN2 > 64 && (kTiles == 1 || kTeams == 1);
  static constexpr int kCodeBytes = kTransposed ? kN1 * kN2 : 0;  // of a team, on their way to memory
  static_assert(kN1 % 16 == 0 && kN2 % 32 == 0 && kTiles <= kBoxes && kTeams <= kMostTeams && kThreads <= kMostWarps * kWarp);
  static_assert(kRows == 1 || (kM == kTile && kN1 == 16 * kRowWarps));
  static_assert(!kTransposed || (kRows == 1 && kN2 == kBoxRow && kCodeBytes % kAlignment == 0 && !kLeftInRegisters));
};

struct Shared {
  uint64_t full[kMostStages];
  uint64_t gamma;
  alignas(16) uint32_t largest[2][kMostTeams][8];  // of a warp's part of T, as bits; two rows' worth, so that one barrier a row is enough
  uint32_t largest_factor[2][kMostWarps];          // of left and right, as bits
  float squares[kMostTeams][8];                    // a warp's sum of squares
  uint32_t not_finite[kMostTeams][2];              // whether a row of x holds NaN or Inf, while it is computed with care
};

// The larger magnitude; NaN where either is NaN.
__device__ __forceinline__ float larger_magnitude(float a, float b) {
  float c;
  asm("{\n.reg .f32 m;\nabs.f32 m, %2;\nmax.NaN.f32 %0, %1, m;\n}\n" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// Bits of floats that are not negative order as the floats do, and NaN is above infinity.
__device__ __forceinline__ uint32_t warp_largest(uint32_t bits) { return __reduce_max_sync(kAllLanes, bits); }

__device__ __forceinline__ float multiply_add_saturate(float a, float b, float c) {
  float d;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
  return d;
}

// The exponent of the power of two above `bound`, a finite positive number; 0 otherwise.
__device__ __forceinline__ int exponent_above(float bound) {
  return bound > 0.0f && bound <= FLT_MAX ? (__float_as_int(bound) >> 23) - 126 : 0;
}

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// 1 / value to the last bit or two; of what is normal itself.
__device__ __forceinline__ float reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// Four 8 x 8 matrices of 16-bit values, transposed; each lane has the address of a row of 16 bytes.
__device__ __forceinline__ void load_transposed(uint32_t (&registers)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
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

// Eight neighbouring values of a factor, as they are in memory.
template <typename Factor>
struct Eight {
  uint4 words[sizeof(Factor) / 2];

  __device__ __forceinline__ void load(const Factor* from, bool inside) {
#pragma unroll
    for (int i = 0; i < int(sizeof(Factor) / 2); ++i)
      words[i] = inside ? __ldg(reinterpret_cast<const uint4*>(from) + i) : make_uint4(0, 0, 0, 0);
  }

  // The first `count` of them from an address that need not be aligned to 16 bytes, zero for the others.
  __device__ __forceinline__ void load_some(const Factor* from, int count) {
    Factor values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = i < count ? from[i] : Factor(0.0f);
#pragma unroll
    for (int i = 0; i < int(sizeof(Factor) / 2); ++i) words[i] = reinterpret_cast<const uint4*>(values)[i];
  }

  __device__ __forceinline__ Factor value(int i) const { return reinterpret_cast<const Factor*>(words)[i]; }
  __device__ __forceinline__ uint32_t bits(int i) const { return reinterpret_cast<const uint16_t*>(words)[i]; }

  __device__ __forceinline__ float largest() const {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(value(i)));
    return most;
  }
};

// Two values as one word of Element.
template <typename Element, typename Factor>
__device__ __forceinline__ uint32_t pair_of_values(Factor low, Factor high) {
  if constexpr (std::is_same_v<Element, Factor>)
    return uint32_t(reinterpret_cast<const uint16_t&>(low)) | uint32_t(reinterpret_cast<const uint16_t&>(high)) << 16;
  else
    return pack<Element>(low, high);
}
template <typename Element, typename Factor>
__device__ __forceinline__ uint32_t pair_of(const Eight<Factor>& low, int i, const Eight<Factor>& high, int j) {
  if constexpr (std::is_same_v<Element, Factor>)
    return low.bits(i) | high.bits(j) << 16;
  else
    return pack<Element>(low.value(i), high.value(j));
}

// Where the factors lie in shared memory, in bytes. Left: as the copy engine would put it, in boxes of 64 columns with swizzled rows.
template <typename S>
__device__ __forceinline__ int left_offset(int k, int m) {
  return m / kTile * S::kFactorBoxBytes + k * kBoxRow + (m % kTile / 8 ^ k % 8) * 16 + m % 8 * 2;
}

// Right: in matrices of eight columns by 16 bytes along K, the columns reordered: of 64 columns in memory (of kN2 % 64, in the last run)
// each of a quad's threads takes a quarter, its columns of eight tiles of T.
template <typename S>
__device__ __forceinline__ int right_offset(int k, int n) {
  const int run = n / 64, quarter = min(S::kN2 - 64 * run, 64) / 4;
  const int thread = n % 64 / quarter, tile = n % 64 % quarter / 2;
  return (k / 8 * (S::kN2 / 8) + 8 * run + tile) * 128 + thread * 32 + n % 2 * 16 + k % 8 * 2;
}

// Transposed, right is what left is else: rows of T^T that a thread holds, eight apart, are neighbours in memory.
template <typename S>
__device__ __forceinline__ int transposed_right_offset(int k, int n) {
  return left_offset<S>(k, n / 16 * 16 + n % 2 * 8 + n % 16 / 2);
}
template <typename S>
__device__ __forceinline__ int transposed_left_offset(int k, int m) {
  return (k / 8 * (S::kN / 8) + m / 8) * 128 + m % 8 * 16 + k % 8 * 2;
}

template <typename Factor>
struct alignas(2 * sizeof(Factor)) Pair {
  Factor a, b;
};

// Leaves the largest magnitudes that a warp's threads have met in left and in right.
__device__ __forceinline__ void note_largest(Shared& shared, const float (&largest)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t warps_largest = warp_largest(__float_as_uint(largest[i]));
    if (threadIdx.x % kWarp == 0) shared.largest_factor[i][threadIdx.x / kWarp] = warps_largest;
  }
}

// Brings both factors to shared memory, zero where they are smaller than the shape. `then` is called once this thread's first loads are on
// their way. Leaves the largest magnitudes of fp32 factors in shared.largest_factor.
template <typename Element, typename Factor, typename S, typename Then>
__device__ __forceinline__ void store_factors(uint8_t* to_left, uint8_t* to_right, Shared& shared, const Problem& problem,
                                              const Then& then) {
  constexpr int kChunks = 8 * S::kTiles;  // of eight columns, in a row of left
  constexpr int kLeftTasks = (S::kM * kChunks + S::kThreads - 1) / S::kThreads;
  constexpr int kEights = S::kN2 / 8;
  constexpr int kRightTasks = (kEights * kEights + S::kThreads - 1) / S::kThreads;
  // Tasks of a thread whose values are in registers at once: all of them, so that there is one latency to wait for; but where one team has a
  // multiprocessor's share of registers, one.
  constexpr int kLeftAtOnce = S::kRehearses ? 1 : kLeftTasks;
  constexpr int kRightAtOnce = !S::kRehearses && sizeof(Factor) == 2 ? kRightTasks : 1;
  constexpr int kLeftRounds = kLeftTasks / kLeftAtOnce, kRightRounds = kRightTasks / kRightAtOnce;
  const Factor* const left = static_cast<const Factor*>(problem.left);
  const Factor* const right = static_cast<const Factor*>(problem.right);
  const int n1 = problem.n1, n2 = problem.n2;
  const bool vectors = n1 % 8 == 0 && reinterpret_cast<uintptr_t>(left) % 16 == 0;
  const bool right_vectors = reinterpret_cast<uintptr_t>(right) % 16 == 0;
  float largest[2] = {0.0f, 0.0f};

#pragma unroll 1
  for (int round = 0; round < (kLeftRounds > kRightRounds ? kLeftRounds : kRightRounds); ++round) {
    Eight<Factor> chunks[kLeftAtOnce];
    Eight<Factor> rows[kRightAtOnce][8];
#pragma unroll
    for (int i = 0; i < kLeftAtOnce; ++i) {
      const int task = threadIdx.x + (round * kLeftAtOnce + i) * S::kThreads, k = task / kChunks, m = task % kChunks * 8;
      const int block_k = S::kRows == 1 ? k : k % S::kN1, block_m = S::kRows == 1 ? m : m % S::kN1;
      const bool inside = k - block_k == m - block_m && block_k < n1 && block_m < n1;
      if (vectors)
        chunks[i].load(left + block_k * n1 + block_m, inside);
      else
        chunks[i].load_some(left + block_k * n1 + block_m, inside ? n1 - block_m : 0);
    }
#pragma unroll
    for (int j = 0; j < kRightAtOnce; ++j) {
      const int task = threadIdx.x + (round * kRightAtOnce + j) * S::kThreads, k = task / kEights * 8, column = task % kEights * 8;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool inside = k < n2 && column < n2;  // n2 is a multiple of 16
        if (right_vectors)
          rows[j][i].load(right + (k + i) * n2 + column, inside);
        else
          rows[j][i].load_some(right + (k + i) * n2 + column, inside ? 8 : 0);
      }
    }
    if (round == 0) then();
#pragma unroll
    for (int i = 0; i < kLeftAtOnce; ++i) {
      const int task = threadIdx.x + (round * kLeftAtOnce + i) * S::kThreads, k = task / kChunks, m = task % kChunks * 8;
      if (k >= S::kM) break;
      uint4 words;
      words.x = pair_of<Element>(chunks[i], 0, chunks[i], 1);
      words.y = pair_of<Element>(chunks[i], 2, chunks[i], 3);
      words.z = pair_of<Element>(chunks[i], 4, chunks[i], 5);
      words.w = pair_of<Element>(chunks[i], 6, chunks[i], 7);
      *reinterpret_cast<uint4*>(to_left + left_offset<S>(k, m)) = words;
      if constexpr (sizeof(Factor) == 4) largest[0] = fmaxf(largest[0], chunks[i].largest());
    }
#pragma unroll
    for (int j = 0; j < kRightAtOnce; ++j) {
      const int task = threadIdx.x + (round * kRightAtOnce + j) * S::kThreads, k = task / kEights * 8, column = task % kEights * 8;
      if (k >= S::kN2) break;
      uint8_t* const to = to_right + right_offset<S>(k, column);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        uint4 words;
        words.x = pair_of<Element>(rows[j][0], i, rows[j][1], i);
        words.y = pair_of<Element>(rows[j][2], i, rows[j][3], i);
        words.z = pair_of<Element>(rows[j][4], i, rows[j][5], i);
        words.w = pair_of<Element>(rows[j][6], i, rows[j][7], i);
        *reinterpret_cast<uint4*>(to + i / 2 * 128 + i % 2 * 16) = words;
        if constexpr (sizeof(Factor) == 4) largest[1] = fmaxf(largest[1], rows[j][i].largest());
      }
    }
  }
  if constexpr (sizeof(Factor) == 4) note_largest(shared, largest);
}

// The same, transposed.
template <typename Element, typename Factor, typename S, typename Then>
__device__ __forceinline__ void store_factors_transposed(uint8_t* to_left, uint8_t* to_right, Shared& shared, const Problem& problem,
                                                         const Then& then) {
  constexpr int kRuns = S::kN2 / 16;  // of sixteen columns, in a row of right
  constexpr int kRightTasks = (S::kN2 * kRuns + S::kThreads - 1) / S::kThreads;
  constexpr int kPairs = S::kN1 / 2;  // of columns of left, eight rows of which are a task
  constexpr int kLeftTasks = (S::kN1 / 8 * kPairs + S::kThreads - 1) / S::kThreads;
  const Factor* const left = static_cast<const Factor*>(problem.left);
  const Factor* const right = static_cast<const Factor*>(problem.right);
  const int n1 = problem.n1, n2 = problem.n2;
  const bool pairs = n1 % 2 == 0 && reinterpret_cast<uintptr_t>(left) % sizeof(Pair<Factor>) == 0;
  const bool vectors = reinterpret_cast<uintptr_t>(right) % 16 == 0;
  Eight<Factor> runs[kRightTasks][2];
  Pair<Factor> rows[kLeftTasks][8];
#pragma unroll
  for (int i = 0; i < kRightTasks; ++i) {
    const int task = threadIdx.x + i * S::kThreads, k = task / kRuns, column = task % kRuns * 16;
    const bool inside = k < n2 && column < n2;  // n2 is a multiple of 16
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (vectors)
        runs[i][j].load(right + k * n2 + column + 8 * j, inside);
      else
        runs[i][j].load_some(right + k * n2 + column + 8 * j, inside ? 8 : 0);
    }
  }
#pragma unroll
  for (int i = 0; i < kLeftTasks; ++i) {
    const int task = threadIdx.x + i * S::kThreads, k = task / kPairs * 8, m = task % kPairs * 2;
    const Factor* const from = left + k * n1 + m;
    const Factor zero = Factor(0.0f);
    if (pairs) {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        rows[i][j] = k + j < n1 && m < n1 ? *reinterpret_cast<const Pair<Factor>*>(from + j * n1) : Pair<Factor>{zero, zero};
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        rows[i][j].a = k + j < n1 && m < n1 ? from[j * n1] : zero;
        rows[i][j].b = k + j < n1 && m + 1 < n1 ? from[j * n1 + 1] : zero;
      }
    }
  }
  then();
  float largest[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kRightTasks; ++i) {
    const int task = threadIdx.x + i * S::kThreads, k = task / kRuns, column = task % kRuns * 16;
    if (k >= S::kN2) break;
    const Eight<Factor>&a = runs[i][0], &b = runs[i][1];
    *reinterpret_cast<uint4*>(to_right + transposed_right_offset<S>(k, column)) = make_uint4(
        pair_of<Element>(a, 0, a, 2), pair_of<Element>(a, 4, a, 6), pair_of<Element>(b, 0, b, 2), pair_of<Element>(b, 4, b, 6));
    *reinterpret_cast<uint4*>(to_right + transposed_right_offset<S>(k, column + 1)) = make_uint4(
        pair_of<Element>(a, 1, a, 3), pair_of<Element>(a, 5, a, 7), pair_of<Element>(b, 1, b, 3), pair_of<Element>(b, 5, b, 7));
    if constexpr (sizeof(Factor) == 4) largest[1] = fmaxf(largest[1], fmaxf(a.largest(), b.largest()));
  }
#pragma unroll
  for (int i = 0; i < kLeftTasks; ++i) {
    const int task = threadIdx.x + i * S::kThreads, k = task / kPairs * 8, m = task % kPairs * 2;
    if (k >= S::kN1) break;
    uint4 a, b;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      (&a.x)[j] = pair_of_values<Element>(rows[i][2 * j].a, rows[i][2 * j + 1].a);
      (&b.x)[j] = pair_of_values<Element>(rows[i][2 * j].b, rows[i][2 * j + 1].b);
    }
    *reinterpret_cast<uint4*>(to_left + transposed_left_offset<S>(k, m)) = a;
    *reinterpret_cast<uint4*>(to_left + transposed_left_offset<S>(k, m + 1)) = b;
    if constexpr (sizeof(Factor) == 4)
#pragma unroll
      for (int j = 0; j < 8; ++j) largest[0] = fmaxf(largest[0], fmaxf(fabsf(rows[i][j].a), fabsf(rows[i][j].b)));
  }
  if constexpr (sizeof(Factor) == 4) note_largest(shared, largest);
}

// The same for fp32 factors that are not in fp16's range, times powers of two.
template <typename S>
__device__ void store_scaled_factors(uint8_t* to_left, uint8_t* to_right, const Problem& problem, float left_multiplier,
                                     float right_multiplier) {
  const float* const left = static_cast<const float*>(problem.left);
  const float* const right = static_cast<const float*>(problem.right);
#pragma unroll 1
  for (int i = threadIdx.x; i < problem.n1 * problem.n1; i += S::kThreads) {
    for (int row = 0; row < S::kRows; ++row) {
      const int k = row * S::kN1 + i / problem.n1, m = row * S::kN1 + i % problem.n1;
      const int offset = S::kTransposed ? transposed_left_offset<S>(k, m) : left_offset<S>(k, m);
      *reinterpret_cast<__half*>(to_left + offset) = __float2half_rn(left[i] * left_multiplier);
    }
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < problem.n2 * problem.n2; i += S::kThreads) {
    const int k = i / problem.n2, n = i % problem.n2, offset = S::kTransposed ? transposed_right_offset<S>(k, n) : right_offset<S>(k, n);
    *reinterpret_cast<__half*>(to_right + offset) = __float2half_rn(right[i] * right_multiplier);
  }
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

// In assembly: of an ordinary store of 16 bytes the compiler (13.0) makes two of 8, each of which writes half of its sectors.
__device__ __forceinline__ void store_vector(uint8_t* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void store_vector(uint8_t* to, uint32_t a, uint32_t b) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(a), "r"(b) : "memory");
}

// 16, 8 (and half of that, packed) bytes. kWhole: as one store each.
template <bool kWhole, int kWords>
__device__ __forceinline__ void store_words(uint8_t* to, const uint32_t (&words)[kWords], bool packed) {
  static_assert(kWords == 4 || kWords == 2);
  if (packed) {
    if constexpr (kWords == 4)
      *reinterpret_cast<uint2*>(to) = make_uint2(eight_nibbles(words[0], words[1]), eight_nibbles(words[2], words[3]));
    else
      *reinterpret_cast<uint32_t*>(to) = eight_nibbles(words[0], words[1]);
  } else if constexpr (kWhole) {
    if constexpr (kWords == 4)
      store_vector(to, words[0], words[1], words[2], words[3]);
    else
      store_vector(to, words[0], words[1]);
  } else {
    if constexpr (kWords == 4)
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    else
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  }
}

// How T becomes codes: code = levels * saturate(t * multiplier + offset) + base, rounded by the addition of 1.5 * 2^23 in `base`.
struct Rounding {
  float multiplier, offset, levels, base;
};

// The codes of kWidth / 4 neighbouring columns in each of two rows.
template <int kRun, int kWidth, bool kWhole, int kRegisters>
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
      if constexpr (kWhole) asm volatile("" : "+r"(words[w]));  // else the arithmetic is there twice, before each way of storing
    }
    if (inside[h]) store_words<kWhole>(rows[h] + (packed ? column / 2 : column), words, packed);
  }
}

template <int kRun, int kN, bool kWhole, int kRegisters>
__device__ __forceinline__ void store_runs(const float (&t)[kRegisters], const Rounding& rounding, uint8_t* const (&rows)[2],
                                           const bool (&inside)[2], int n2, int thread, bool packed) {
  if constexpr (64 * kRun < kN) {
    constexpr int kWidth = kN - 64 * kRun < 64 ? kN - 64 * kRun : 64;
    const int column = 64 * kRun + thread * (kWidth / 4);
    const bool both[2] = {inside[0] && column < n2, inside[1] && column < n2};
    store_run<kRun, kWidth, kWhole>(t, rounding, rows, both, column, packed);
    store_runs<kRun + 1, kN, kWhole>(t, rounding, rows, inside, n2, thread, packed);
  }
}

// Four 8 x 8 matrices of 16-bit values, or two, transposed; each lane has the address of a row of 16 bytes.
__device__ __forceinline__ void store_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ void store_transposed(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

// A warp's codes of T^T to a row of codes in shared memory, as the copy engine takes it: lines of 128 bytes, swizzled.
template <typename S, int kRegisters>
__device__ __forceinline__ void store_codes_transposed(const float (&t)[kRegisters], const Rounding& rounding, uint32_t to, int warp,
                                                       int lane) {
  const uint32_t address = to + lane * kBoxRow + (warp ^ lane % 8) * 16;
#pragma unroll
  for (int j = 0; j < S::kN1 / 8; j += 4) {
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4 && j + w < S::kN1 / 8; ++w) {
      float codes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float share = multiply_add_saturate(t[4 * (j + w) + i / 2 + i % 2 * 2], rounding.multiplier, rounding.offset);
        codes[i] = fmaf(share, rounding.levels, rounding.base);
      }
      words[w] = four_bytes(codes);
    }
    if (j + 4 <= S::kN1 / 8)
      store_transposed(address + j * 8 * kBoxRow, words[0], words[1], words[2], words[3]);
    else
      store_transposed(address + j * 8 * kBoxRow, words[0], words[1]);
  }
}

__device__ __forceinline__ void store_box(const CUtensorMap* map, const void* from, int32_t column, int32_t row, int32_t plane) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(shared_address(from)),
               "r"(column), "r"(row), "r"(plane)
               : "memory");
}

// Until all but the newest kPending committed stores are done.
template <int kPending>
__device__ __forceinline__ void store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ float silu(float value) {
  return value * reciprocal(1.0f + exp2f(-1.44269504f * value));
}

// One of the rows' values, without indexing registers.
template <typename Value, int kRows>
__device__ __forceinline__ Value of_row(const Value (&values)[kRows], int row) {
  return kRows == 1 || row == 0 ? values[0] : values[kRows - 1];
}

// Where 16 bytes of a stage are in memory, in elements from the beginning of x as a contiguous matrix; negative where they are padding.
template <typename S>
__device__ __forceinline__ int64_t place_of(const Problem& problem, int vector, int group) {
  const int line = vector / 8 % S::kM, chunk = vector % 8 ^ line % 8;
  const int column = vector / (8 * S::kM) * kTile + chunk * 8;
  const int64_t row = int64_t(group) * S::kRows + (S::kRows == 1 ? 0 : line / S::kN1);
  const int line_of_row = S::kRows == 1 ? line : line % S::kN1;
  if (row >= problem.rows || line_of_row >= problem.n1 || column >= problem.n2) return -1;
  return (row * problem.n1 + line_of_row) * problem.n2 + column;
}

// x = silu(x) * up in a stage, where up follows x.
template <typename Element, typename S>
__device__ __forceinline__ void apply_gate(uint8_t* stage) {
  uint4* const x = reinterpret_cast<uint4*>(stage);
  const uint4* const up = reinterpret_cast<const uint4*>(stage + S::kStageBytes);
#pragma unroll 2
  for (int i = threadIdx.x % S::kTeamThreads; i < S::kStageBytes / 16; i += S::kTeamThreads) {
    uint4 values = x[i];
    const uint4 factors = up[i];
    uint32_t* const pairs = &values.x;
    const uint32_t* const others = &factors.x;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 gate = unpack<Element>(pairs[j]), by = unpack<Element>(others[j]);
      pairs[j] = pack<Element>(silu(gate.x) * by.x, silu(gate.y) * by.y);
    }
    x[i] = values;
  }
}

// x = gamma * (x / rms(x)) in a stage, after the residual that follows x was added to it; writes what is wanted of both to device memory.
// gamma lies in shared memory as a row of x does, for each of the rows at once. The loops stay loops: where rows are few, code is fetched
// for as long as it runs.
template <typename Element, typename S>
__device__ __forceinline__ void apply_norm(uint8_t* stage, const uint8_t* gamma, const Problem& problem, float (&squares)[8], int group,
                                           int team) {
  uint4* const x = reinterpret_cast<uint4*>(stage);
  const uint4* const residual = reinterpret_cast<const uint4*>(stage + S::kStageBytes);
  const uint4* const gammas = reinterpret_cast<const uint4*>(gamma);
  constexpr int kVectors = S::kStageBytes / 16;
  static_assert(kVectors % S::kTeamThreads == 0 && S::kTeamThreads / 8 <= S::kN1);  // the threads of a step work on one row of x
  const int thread = threadIdx.x % S::kTeamThreads, warp = thread / kWarp;
  const auto part_of = [](int vector) { return S::kRows == 1 ? 0 : vector / 8 % S::kM / S::kN1; };
  const auto write = [&](void* matrix, int vector, const uint4& values) {
    if (matrix == nullptr) return;
    if (const int64_t place = place_of<S>(problem, vector, group); place >= 0)
      *reinterpret_cast<uint4*>(static_cast<Element*>(matrix) + place) = values;
  };

  float sums[S::kRows] = {};
#pragma unroll 2
  for (int i = thread; i < kVectors; i += S::kTeamThreads) {
    uint4 values = x[i];
    uint32_t* const pairs = &values.x;
    if (problem.second) {
      const uint4 added = residual[i];
      const uint32_t* const others = &added.x;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 a = unpack<Element>(pairs[j]), b = unpack<Element>(others[j]);
        pairs[j] = pack<Element>(a.x + b.x, a.y + b.y);
      }
      x[i] = values;
      write(problem.sum, i, values);
    }
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 value = unpack<Element>(pairs[j]);
      sum = fmaf(value.x, value.x, fmaf(value.y, value.y, sum));
    }
#pragma unroll
    for (int part = 0; part < S::kRows; ++part) sums[part] += part_of(i) == part ? sum : 0.0f;
  }
#pragma unroll
  for (int part = 0; part < S::kRows; ++part) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sums[part] += __shfl_xor_sync(kAllLanes, sums[part], lanes);
    if (thread % kWarp == 0) squares[part * S::kTeamWarps + warp] = sums[part];
  }
  named_barrier(kTeamBarrier + team, S::kTeamThreads);
  float inverse[S::kRows];
#pragma unroll
  for (int part = 0; part < S::kRows; ++part) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < S::kTeamWarps; ++w) sum += squares[part * S::kTeamWarps + w];
    const bool present = S::kRows == 1 || group * S::kRows + part < problem.rows;  // of a row that is not, all stays zero
    inverse[part] = present ? __frcp_rn(__fsqrt_rn(sum / float(problem.n1 * problem.n2) + problem.epsilon)) : 0.0f;
  }
#pragma unroll 2
  for (int i = thread; i < kVectors; i += S::kTeamThreads) {
    const float by = of_row(inverse, part_of(i));
    uint4 values = x[i];
    const uint4 factors = gammas[i];
    uint32_t* const pairs = &values.x;
    const uint32_t* const others = &factors.x;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 value = unpack<Element>(pairs[j]), factor = unpack<Element>(others[j]);
      pairs[j] = pack<Element>(factor.x * (value.x * by), factor.y * (value.y * by));
    }
    x[i] = values;
    write(problem.normed, i, values);
  }
}

// Bytes of a row of x in shared memory, with the second operand beside it.
template <typename S, PrologueKind kKind>
constexpr int kStageBytesOf = kKind == PrologueKind::kNone ? S::kStageBytes : 2 * S::kStageBytes;

template <typename S, PrologueKind kKind>
constexpr int kGammaBytesOf = kKind == PrologueKind::kRmsNorm ? S::kStageBytes : 0;

// The exponent of what Z is to be multiplied by, given the one that it was and the largest magnitude of T that came of it, as bits.
template <bool kHalf>
__device__ __forceinline__ int next_lift(int lift, uint32_t largest, int attempt) {
  if (largest >= 0x7F800000) return lift > 0 ? 0 : lift + kLower;
  if (kHalf && attempt == 0 && largest < kSmall) return kLift;
  return lift;
}

// Sets the rows of x in a stage that hold NaN or Inf to zero and returns which they were; all threads of the team call it.
template <typename S>
__device__ __forceinline__ uint32_t clear_not_finite(uint8_t* stage, uint32_t (&not_finite)[2], uint32_t exponent_mask, int team) {
  static_assert(S::kRows <= 2);
  constexpr int kWords = S::kStageBytes / 4;
  const auto row_of = [](int word) { return word * 4 % S::kBoxBytes / (S::kN1 * kBoxRow); };
  uint32_t* const words = reinterpret_cast<uint32_t*>(stage);
  const int thread = threadIdx.x % S::kTeamThreads;
  if (thread < 2) not_finite[thread] = 0;
  named_barrier(kTeamBarrier + team, S::kTeamThreads);
#pragma unroll 1
  for (int i = thread; i < kWords; i += S::kTeamThreads) {
    const uint32_t low = exponent_mask & 0xFFFF, high = exponent_mask & 0xFFFF0000;
    if ((words[i] & low) == low || (words[i] & high) == high) not_finite[row_of(i)] = 1;
  }
  named_barrier(kTeamBarrier + team, S::kTeamThreads);
  const uint32_t found = not_finite[0] | not_finite[1] << 1;
#pragma unroll 1
  for (int i = thread; i < kWords; i += S::kTeamThreads)
    if (found >> row_of(i) & 1) words[i] = 0;
  fence_async_shared();
  named_barrier(kTeamBarrier + team, S::kTeamThreads);
  return found;
}

// `second` is the map of residual or up; `third` of gamma, or of codes where T^T is computed.
template <typename Element, typename S, PrologueKind kKind>
__global__ void __launch_bounds__(S::kThreads, S::kRehearses ? 512 / S::kThreads : 1)
    flat_quantize(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap second,
                  const __grid_constant__ CUtensorMap third, const Problem problem) {
  constexpr int kStageBytes = kStageBytesOf<S, kKind>;
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  constexpr int kRegisters = S::kN / 2;
  constexpr uint32_t kInfinity = 0x7F800000;
  extern __shared__ __align__(kAlignment) uint8_t shared_memory[];
  uint8_t* const after_stages = shared_memory + problem.stages * kStageBytes;
  uint8_t* const gammas = after_stages;
  uint8_t* const left = S::kLeftInRegisters ? after_stages - kStageBytes : after_stages + kGammaBytesOf<S, kKind>;
  uint8_t* const codes = after_stages + kGammaBytesOf<S, kKind> + S::kLeftBytes;
  uint8_t* const right = codes + S::kTeams * S::kCodeBytes;
  const int team = threadIdx.x / S::kTeamThreads;
  let_next_begin();
  if (!problem.constant_factors) wait_for_work_before();
  Shared& shared = *reinterpret_cast<Shared*>(right + S::kRightBytes);
  const int warp = threadIdx.x / kWarp % S::kTeamWarps;
  const int lane = threadIdx.x % kWarp;

  // Rows of x, or pairs of them, by the number of their turn in this block.
  const int groups = (problem.rows + S::kRows - 1) / S::kRows;
  const int turns = (groups - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
  const auto group_of = [](int turn) { return int(blockIdx.x) + turn * int(gridDim.x); };
  const auto fetch = [&](int turn, int stage) {
    const bool both = kKind != PrologueKind::kNone && problem.second;
    barrier_expect(&shared.full[stage], both ? 2 * S::kStageBytes : S::kStageBytes);
    uint8_t* const to = shared_memory + stage * kStageBytes;
#pragma unroll
    for (int box = 0; box < S::kBoxes; ++box) {
      const int row = group_of(turn) * S::kRows;
      copy_box(to + box * S::kBoxBytes, &x, &shared.full[stage], box * kTile, 0, row, Keep::kFirstOut);
      if (both) copy_box(to + S::kStageBytes + box * S::kBoxBytes, &second, &shared.full[stage], box * kTile, 0, row, Keep::kFirstOut);
    }
  };
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int stage = 0; stage < problem.stages; ++stage) barrier_init(&shared.full[stage], 1);
    barrier_init(&shared.gamma, 1);
    fence_barrier_init();
    if constexpr (kKind == PrologueKind::kRmsNorm) {
      barrier_expect(&shared.gamma, S::kStageBytes);
#pragma unroll
      for (int box = 0; box < S::kBoxes; ++box)
#pragma unroll
        for (int part = 0; part < S::kRows; ++part)
          copy_box(gammas + box * S::kBoxBytes + part * S::kN1 * kBoxRow, &third, &shared.gamma, box * kTile, 0, 0, Keep::kLastOut);
    }
  }
  const float clip = problem.clip_ptr != nullptr ? *problem.clip_ptr : problem.clip;

  // The factors are asked for before x: what is asked for later comes later. Constant ones are in place before x is there.
  const int early_stages = S::kLeftInRegisters ? problem.stages - 1 : problem.stages;  // the last one holds left for a while
  const auto fetch_first = [&] {
    if (threadIdx.x == 0) {
#pragma unroll 1
      for (int turn = 0; turn < min(turns, early_stages); ++turn) fetch(turn, turn);
    }
  };
  const auto once_asked_for = [&] {
    if (!problem.constant_factors) fetch_first();
  };
  if constexpr (S::kTransposed) {
    if (problem.float_factors)
      store_factors_transposed<Element, float, S>(right, left, shared, problem, once_asked_for);
    else
      store_factors_transposed<Element, Element, S>(right, left, shared, problem, once_asked_for);
  } else {
    if (problem.float_factors)
      store_factors<Element, float, S>(left, right, shared, problem, once_asked_for);
    else
      store_factors<Element, Element, S>(left, right, shared, problem, once_asked_for);
  }
  // A kernel's code comes from memory while it runs, which is most of what a single turn would wait for. So where x is not there yet, one turn
  // runs first on what the stage happens to hold, for a row that does not exist: it writes nothing.
  bool rehearsal = S::kRehearses && problem.constant_factors && turns == 1;
  if (problem.constant_factors && !rehearsal) {
    wait_for_work_before();
    fetch_first();
  }
  fence_async_shared();
  __syncthreads();
  float power = 1.0f;  // that fp32 factors were divided by to be in fp16's range
  if (kHalf && problem.float_factors) {
    uint32_t largest[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < S::kThreads / kWarp; ++i) {
      largest[0] = max(largest[0], shared.largest_factor[0][i]);
      largest[1] = max(largest[1], shared.largest_factor[1][i]);
    }
    const auto awkward = [](uint32_t bits) { return __uint_as_float(bits) > 32768.0f || __uint_as_float(bits) < 0.0078125f; };
    if (awkward(largest[0]) || awkward(largest[1])) {
      const int left_exponent = exponent_above(__uint_as_float(largest[0])), right_exponent = exponent_above(__uint_as_float(largest[1]));
      store_scaled_factors<S>(S::kTransposed ? right : left, S::kTransposed ? left : right, problem, power_of_two(-left_exponent),
                              power_of_two(-right_exponent));
      power = power_of_two(max(-126, min(127, left_exponent + right_exponent)));
      fence_async_shared();
      __syncthreads();
    }
  }
  uint32_t in_registers[S::kLeftInRegisters ? S::kLeftSteps : 1][4];
  if constexpr (S::kLeftInRegisters) {
    const int chunk = 2 * (warp % 4) + lane / 8 % 2;
    const uint32_t address =
        shared_address(left) + warp / 4 * S::kFactorBoxBytes + (lane / 16 * 8 + lane % 8) * kBoxRow + (chunk ^ lane % 8) * 16;
#pragma unroll
    for (int s = 0; s < S::kLeftSteps; ++s) load_transposed(in_registers[s], address + s * 16 * kBoxRow);
    fence_async_shared();
    __syncthreads();
    if (threadIdx.x == 0 && turns >= problem.stages) fetch(problem.stages - 1, problem.stages - 1);
  }

  const int part = S::kRows == 1 ? 0 : warp / S::kRowWarps;  // which of the rows at once is this warp's
  const int warp_row = 16 * (warp % S::kRowWarps);           // of T
  const int row = warp_row + lane / 4;                       // the first of this thread's two, eight apart
  const bool inside[2] = {row < problem.n1, row + 8 < problem.n1};
  const int rows_of_t = S::kTransposed ? problem.n2 : problem.n1;
  const bool leads = threadIdx.x % S::kTeamThreads == 0;
  const int width = problem.packed ? problem.n1 * problem.n2 / 2 : problem.n1 * problem.n2;  // of a row's codes, in bytes
  const float least = problem.qmax * FLT_MIN;

  Rounding rounding;
  rounding.levels = problem.levels;
  rounding.offset = problem.offset;
  rounding.base = problem.base;

  const uint64_t left_descriptor = descriptor_transposed_128b(shared_address(left) + warp / 4 * S::kFactorBoxBytes, S::kFactorBoxBytes);
  const uint64_t right_descriptor = descriptor_plain(shared_address(right), S::kN / 8 * 128, 128);

  int stage = team, phase = 0, parity = 0;
  int attempt = rehearsal ? 2 : 0;  // at this turn's rows
  int lift[S::kRows] = {};  // the exponent of what Z is multiplied by before it is rounded, for each of the rows at once
  uint32_t not_finite = 0;  // a bit for each of them that holds NaN or Inf, known from the second attempt on
#pragma unroll 1
  for (int turn = team; turn < turns;) {
    while (stage >= problem.stages) stage -= problem.stages, phase ^= 1;
    uint8_t* const x_stage = shared_memory + stage * kStageBytes;
    const uint64_t x_descriptor =
        S::kTransposed ? descriptor_128b(shared_address(x_stage)) : descriptor_transposed_128b(shared_address(x_stage), S::kBoxBytes);
    const int group = rehearsal ? groups : group_of(turn);
    if constexpr (kKind == PrologueKind::kRmsNorm) barrier_wait(&shared.gamma, 0);
    if (!rehearsal) barrier_wait(&shared.full[stage], phase);
    if constexpr (kKind != PrologueKind::kNone) {
      if (attempt == 0 || rehearsal) {
        if constexpr (kKind == PrologueKind::kSiluMul)
          apply_gate<Element, S>(x_stage);
        else
          apply_norm<Element, S>(x_stage, gammas, problem, shared.squares[team], group, team);
        fence_async_shared();
        named_barrier(kTeamBarrier + team, S::kTeamThreads);
      }
    }

    float z[kRegisters], t[kRegisters];
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < S::kLeftSteps; ++s) {
      constexpr int kStep = 16 * kBoxRow >> 4;
      if constexpr (S::kTransposed)
        Wgmma<Element, S::kN>::template run<1, 0>(z, left_descriptor + s * kStep, x_descriptor + (s / 4 * S::kBoxBytes + s % 4 * 32 >> 4),
                                                  s > 0);
      else if constexpr (S::kLeftInRegisters)
        Wgmma<Element, S::kN>::template run<1>(z, in_registers[s], x_descriptor + s * kStep, s > 0);
      else
        Wgmma<Element, S::kN>::template run<1, 1>(z, left_descriptor + s * kStep, x_descriptor + s * kStep, s > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    settle(z);

    // Unconditional where left is in registers: with a branch here, the compiler (13.0) gives them away after this product.
    if (S::kLeftInRegisters || attempt > 0) {
      const float factor = power_of_two(of_row(lift, part));
#pragma unroll
      for (int i = 0; i < kRegisters; ++i) z[i] *= factor;
    }
    uint32_t rounded[S::kRightSteps][4];
#pragma unroll
    for (int s = 0; s < S::kRightSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) rounded[s][i] = pack<Element>(z[8 * s + 2 * i], z[8 * s + 2 * i + 1]);
    }
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < S::kRightSteps; ++s)
      Wgmma<Element, S::kN>::template run<0>(t, rounded[s], right_descriptor + s * (2 * (S::kN / 8) * 128 >> 4), s > 0);
    wgmma_commit();
    wgmma_wait<0>();
    settle(t);

    float most[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (warp_row < rows_of_t) {
#pragma unroll
      for (int i = 0; i < kRegisters; ++i) most[i % 4] = larger_magnitude(most[i % 4], t[i]);
    }
    const uint32_t warps_largest =
        warp_largest(__float_as_uint(larger_magnitude(larger_magnitude(most[0], most[1]), larger_magnitude(most[2], most[3]))));
    if (lane == 0) shared.largest[parity][team][warp] = warps_largest;
    if (S::kTransposed && leads) store_wait_read<0>();  // the codes' place is free
    named_barrier(kTeamBarrier + team, S::kTeamThreads);
    uint32_t largest[S::kRows] = {};
#pragma unroll
    for (int w = 0; w < S::kTeamWarps; ++w) largest[w / S::kRowWarps] = max(largest[w / S::kRowWarps], shared.largest[parity][team][w]);
    parity ^= 1;
    if (attempt < 2) {
      bool again = false, infinite = false;
#pragma unroll
      for (int r = 0; r < S::kRows; ++r) {
        const int next = next_lift<kHalf>(lift[r], largest[r], attempt);
        again |= next != lift[r];
        infinite |= largest[r] >= kInfinity;
        lift[r] = next;
      }
      if (again) {
        if (S::kRows > 1 && attempt == 0 && infinite) {
          not_finite = clear_not_finite<S>(x_stage, shared.not_finite[team], kHalf ? 0x7C007C00 : 0x7F807F80, team);
#pragma unroll
          for (int r = 0; r < S::kRows; ++r) lift[r] = not_finite != 0 ? 0 : lift[r];  // of one that was infinite for another's sake
        }
        ++attempt;
        continue;
      }
    }
    if (leads && turn + problem.stages < turns) fetch(turn + problem.stages, stage);
    const uint32_t bits = not_finite >> part & 1 ? 0x7FC00000 : of_row(largest, part);

    // step < FLT_MIN just where the product it is the quotient of is below FLT_MIN qmax; the codes need no exact quotient.
    const float of_t = power * power_of_two(-of_row(lift, part));  // what T was divided by
    const float product = __fmul_rn(__uint_as_float(bits) * of_t, clip);
    const bool zero = product < least;
    rounding.multiplier = zero ? 0.0f : reciprocal(0.25f * product) * problem.quarter_of_level * of_t;
    const int64_t index = int64_t(group) * S::kRows + part;
    const bool present = index < problem.rows;
    if (warp % S::kRowWarps == 0 && lane == 0 && present) {
      const float step = __fdiv_rn(product, problem.qmax);
      problem.scale[index] = zero ? 1.0f : step <= FLT_MAX ? step : __uint_as_float(0x7FC00000);
    }
    if constexpr (S::kTransposed) {
      uint8_t* const place = codes + team * S::kCodeBytes;
      if (warp_row < rows_of_t) store_codes_transposed<S>(t, rounding, shared_address(place), warp, lane);
      fence_async_shared();
      if (warp == 0) {
        named_barrier(kTeamBarrier + kMostTeams + team, S::kTeamThreads);
        if (leads) {
          store_box(&third, place, 0, 0, group);
          store_commit();
        }
      } else {
        named_barrier_arrive(kTeamBarrier + kMostTeams + team, S::kTeamThreads);
      }
    } else if (warp_row < problem.n1 && present) {
      uint8_t* const first = problem.q + index * width;
      const int offset = row * problem.n2, next = 8 * problem.n2;
      uint8_t* const rows[2] = {first + (problem.packed ? offset / 2 : offset),
                                first + (problem.packed ? (offset + next) / 2 : offset + next)};
      store_runs<0, S::kN2, S::kWholeStores>(t, rounding, rows, inside, problem.n2, lane % 4, problem.packed);
    }
    attempt = 0;
    not_finite = 0;
    if (rehearsal) {
      rehearsal = false;
      wait_for_work_before();
      fetch_first();
    } else {
      turn += S::kTeams;
      stage += S::kTeams;
    }
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) lift[r] = 0;
  }
  if (S::kTransposed && leads) store_wait<0>();
}

template <typename S, PrologueKind kKind>
constexpr int shared_bytes(int stages) {
  return stages * kStageBytesOf<S, kKind> + kGammaBytesOf<S, kKind> + S::kLeftBytes + S::kRightBytes + S::kTeams * S::kCodeBytes +
         int(sizeof(Shared));
}

// As many for each team: who waits for a stage is then who emptied it, so that nobody can take one arrival of rows for the next.
template <typename S, PrologueKind kKind>
int stages_for(const Device& device) {
  int stages = kMostStages / S::kTeams * S::kTeams;
  while (stages > 0 && shared_bytes<S, kKind>(stages) > device.shared_memory) stages -= S::kTeams;
  return stages;
}

// Calls `function` with the shape that takes n1 x n2, a transposed one where there is one and it is wanted; where kFew, with one team that
// works on one row at a time: it finds room beside the product before it, and its factors are in place when x is.
template <PrologueKind kKind, bool kFew, typename Function>
auto with_shape(int n1, int n2, bool transposed, const Function& function) {
  constexpr int kFour = kFew ? 1 : 4, kPair = kFew ? 1 : 2;
  if constexpr (kKind != PrologueKind::kSiluMul) {
    if (n2 <= 64 && n1 <= 32) return function(Shape<32, 64, kPair, kFour>());
    if (n2 <= 64 && n1 <= 64) return function(Shape<64, 64, 1, kFour>());
  }
  if constexpr (kKind == PrologueKind::kNone) {
    if (n2 > 128 && n1 <= 64) return function(Shape<64, 224, 1, 2>());
    if (n2 > 128) return function(Shape<128, 224, 1, 1, true>());
  }
  if (n1 <= 32) return function(Shape<32, 128, kPair, kFour>());
  if (n1 <= 48) return function(Shape<48, 128, 1, kFour>());
  if constexpr (kKind != PrologueKind::kRmsNorm) {
    if (n1 > 112) return function(Shape<128, 128, 1, 2>());
    if (n1 > 96) return function(Shape<112, 128, 1, 2>());
    if (n1 > 64 && transposed) return function(Shape<96, 128, 1, 2, false, true>());
    if (n1 > 64) return function(Shape<96, 128, 1, 2>());
  }
  return function(Shape<64, 128, 1, kFour>());
}

constexpr int kLargestN1 = 128, kLargestN2 = 224;
constexpr int kLargestNormN1 = 64, kLargestPrologueN2 = 128;
constexpr int kFewRows = 32;  // that leave room for more than a block to a multiprocessor, and have one turn
constexpr int kTransposedRows = 1024;  // from which on it is faster, though its factors take longer to lay out
constexpr int kSharedMemory = 232448;  // that compute capability 9.0 has for a block

const char* fits(const fq_flat_quantize_params& params, const Prologue& prologue, const Device& device) {
  if (params.dtype != FQ_FLOAT16 && params.dtype != FQ_BFLOAT16) return "takes x in float16 or bfloat16";
  if (params.left == nullptr) return "takes a transform, not the quantizer alone";
  if (params.n1 > kLargestN1 || params.n2 > kLargestN2 || params.n2 % 16 != 0)
    return "takes n1 up to 128 and n2 a multiple of 16 up to 224";
  if (prologue.kind != PrologueKind::kNone && params.n2 > kLargestPrologueN2) return "takes a norm or a gate with n2 up to 128";
  if (prologue.kind == PrologueKind::kRmsNorm && params.n1 > kLargestNormN1) return "takes a norm with n1 up to 64";
  if (params.k != int64_t(params.n1) * params.n2) return "takes one block: k = n1 n2";
  if (params.rows > INT32_MAX - 65536) return "takes fewer rows";
  if (device.shared_memory < kSharedMemory) return "needs the shared memory of compute capability 9.0";
  return nullptr;
}

template <typename Element, typename S>
fq_status make_row_map(CUtensorMap* map, const fq_flat_quantize_params& params, const void* data, int64_t stride, int64_t rows, uint32_t at_once) {
  constexpr CUtensorMapDataType kType =
      std::is_same_v<Element, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t n1 = cuuint64_t(params.n1), n2 = cuuint64_t(params.n2);
  const cuuint64_t row_bytes = rows == 1 ? n1 * n2 * 2 : cuuint64_t(stride) * 2;  // one row's stride need not be aligned
  return make_tensor_map<3>(map, data, kType, {n2, n1, cuuint64_t(rows)}, {n2 * 2, row_bytes}, {kTile, S::kN1, at_once},
                            CU_TENSOR_MAP_SWIZZLE_128B);
}

template <typename Element, typename S, PrologueKind kKind>
fq_status launch_shape(const fq_flat_quantize_params& params, const Prologue& prologue, Problem problem, const Device& device,
                       cudaStream_t stream) {
  CUtensorMap x, second = {}, third = {};
  const auto make_map = [&](CUtensorMap* map, const void* data, int64_t stride) {
    return make_row_map<Element, S>(map, params, data, stride, params.rows, S::kRows);
  };
  if (const fq_status status = make_map(&x, params.x, params.x_stride)) return status;
  const void* other = nullptr;
  int64_t stride = params.k;
  if (kKind == PrologueKind::kRmsNorm) other = prologue.norm->residual;
  if (kKind == PrologueKind::kSiluMul) other = prologue.gate->up, stride = prologue.gate->up_stride;
  problem.second = other != nullptr;
  if (problem.second)
    if (const fq_status status = make_map(&second, other, stride)) return status;
  if (kKind == PrologueKind::kRmsNorm)
    if (const fq_status status = make_row_map<Element, S>(&third, params, prologue.norm->gamma, params.k, 1, 1)) return status;

  if (S::kTransposed) {
    const cuuint64_t n1 = cuuint64_t(params.n1), n2 = cuuint64_t(params.n2);
    if (const fq_status status = make_tensor_map<3>(&third, problem.q, CU_TENSOR_MAP_DATA_TYPE_UINT8, {n2, n1, cuuint64_t(params.rows)},
                                                    {n2, n1 * n2}, {S::kN2, S::kN1, 1}, CU_TENSOR_MAP_SWIZZLE_128B))
      return status;
  }

  static_assert(shared_bytes<S, kKind>(S::kLeftInRegisters ? 2 : S::kTeams) <= kSharedMemory, "there is room for x");
  const int groups = (problem.rows + S::kRows - 1) / S::kRows;
  const int blocks = groups < device.multiprocessors ? groups : device.multiprocessors;
  // No more than are used: the next kernel may find room beside this one.
  const int turns = (groups + blocks - 1) / blocks + (S::kLeftInRegisters ? 1 : 0);
  problem.stages = std::min(stages_for<S, kKind>(device), turns);
  const Launch launch = {dim3(unsigned(blocks)), dim3(1), S::kThreads, shared_bytes<S, kKind>(problem.stages), problem.constant_factors};
  return launch_kernel("FlatQuantize wgmma_f16", flat_quantize<Element, S, kKind>, launch, stream, x, second, third, problem);
}

template <PrologueKind kKind>
fq_status launch_kind(const fq_flat_quantize_params& params, const Prologue& prologue, const Problem& problem, const Device& device,
                      cudaStream_t stream) {
  const auto launch = [&](auto shape) {
    using S = decltype(shape);
    return params.dtype == FQ_FLOAT16 ? launch_shape<__half, S, kKind>(params, prologue, problem, device, stream)
                                      : launch_shape<__nv_bfloat16, S, kKind>(params, prologue, problem, device, stream);
  };
  // Factors that are not constant are waited for: the more threads bring them the better, unless they come for two rows at once.
  const bool few = params.rows <= kFewRows && (params.constant_factors || params.n1 <= 32);
  const bool transposed = params.rows >= kTransposedRows && !problem.packed;
  return few ? with_shape<kKind, true>(params.n1, params.n2, transposed, launch)
             : with_shape<kKind, false>(params.n1, params.n2, transposed, launch);
}

fq_status launch(const fq_flat_quantize_params& params, const Prologue& prologue, const Device& device, cudaStream_t stream) {
  if (params.rows == 0) return FQ_OK;
  Problem problem = {};
  problem.left = params.left;
  problem.right = params.right;
  problem.clip_ptr = params.clip_ptr;
  problem.clip = params.clip;
  problem.q = static_cast<uint8_t*>(params.q);
  problem.scale = params.scale;
  problem.rows = int(params.rows);
  problem.n1 = params.n1;
  problem.n2 = params.n2;
  problem.qmax = params.bits == 4 ? 7.0f : 127.0f;
  problem.levels = 2.0f * problem.qmax + 1.0f;
  problem.offset = (problem.qmax + 1.0f) / problem.levels;
  problem.base = 12582912.0f - (problem.qmax + 1.0f);
  problem.quarter_of_level = 0.25f * problem.qmax / problem.levels;
  problem.float_factors = params.factor_dtype == FQ_FLOAT;
  problem.constant_factors = params.constant_factors != 0;
  problem.packed = params.container != FQ_INT8;
  if (prologue.kind == PrologueKind::kRmsNorm) {
    problem.gamma = prologue.norm->gamma;
    problem.sum = prologue.norm->sum;
    problem.normed = prologue.norm->normed;
    problem.epsilon = prologue.norm->epsilon;
    return launch_kind<PrologueKind::kRmsNorm>(params, prologue, problem, device, stream);
  }
  if (prologue.kind == PrologueKind::kSiluMul) return launch_kind<PrologueKind::kSiluMul>(params, prologue, problem, device, stream);
  return launch_kind<PrologueKind::kNone>(params, prologue, problem, device, stream);
}

}  // namespace

const QuantizeKernel FlatQuantize_wgmma_f16 = {fits, launch};

}  // namespace fq
