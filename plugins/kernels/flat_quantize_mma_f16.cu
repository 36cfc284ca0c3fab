// FlatQuantize for every GPU from compute capability 8.0 on, every pair of factors, type, container and prologue: t = L^T X R with
// mma.sync.
//
// A warp computes strips of 16 or 32 rows of t. Y = L^T X first: its accumulators, rounded to 16 bits, are in the very registers that the
// second product Y R wants as its left operand (as in FlashAttention's P V), so that nothing but codes and scales leaves the warp. All of a
// row's t stays in registers until its largest magnitude is known. A team of warps holds one row; teams of a block share the factors in
// shared memory and know nothing of each other, so that one team's loads hide behind another's products.
//
// fp16 and bf16 are multiplied as they are. fp32 is split into two bf16 (16 bits of significand, the range of fp32) and multiplied three
// times.
#include <algorithm>
#include <type_traits>

#include "cluster.cuh"
#include "kernel.h"
#include "launch.cuh"
#include "mma.cuh"
#include "pairs.cuh"

namespace fq {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxTeams = 12;
constexpr int kExchange = 2 * kWarp;                   // values that a team exchanges at a time, twice
constexpr int kSlots = 2 * kExchange * sizeof(float);  // bytes of shared memory of a team, with what its warps keep
constexpr int kVector = 8;                             // elements that are handled together where n2 allows
constexpr float kSmallestScale = 0x1p-126f;
constexpr float kRound = 0x1.8p23f;  // v + kRound has round_half_even(v) in its low bits
constexpr unsigned kFull = 0xffffffffu;

// What every kernel of this file is told.
struct Problem {
  const void* x;
  const void* left;
  const void* right;
  const float* clip_ptr;
  unsigned char* q;
  float* scale;
  const void* second;  // residual or up
  const void* gamma;
  void* sum;
  void* normed;
  int64_t x_stride, second_stride, q_stride;  // q_stride in bytes
  int rows, k, n1, n2, blocks;
  PrologueKind kind;
  bool factors_are_float, packed;
  bool constant_factors;  // and clip_ptr, gamma: they may be read before the work ahead is done
  float clip, epsilon, qmax, inverse_k, inverse_range;  // inverse_range: 1 / (2 qmax + 1)
};

// How the transform's work is cut; see plan().
struct Plan {
  int strips;             // of a block of n1 x n2 columns, each a warp's
  int team_warps, teams;  // warps that share a row; rows a block of threads has at once
  int blocks_per_round;   // blocks of the row that a team has at once
  int rounds_per_block;   // above 1: a block has more strips than a team has warps
  int rounds, passes;     // 1 pass: t stays in registers; 2: once for the row's maximum, once for its codes
  int stages;             // of x in shared memory
  int n1_padded, left_pitch;
  uint32_t team_magic;               // divides by team_warps
  uint32_t chunks_magic;             // divides by the vectors (or elements) of n2
  uint32_t left_magic, right_magic;  // divide by the vectors of a factor's row
  bool asynchronous, vector;
  int left_bytes, right_bytes, stage_bytes, codes_bytes;  // parts of shared memory; one plane of left and right, one stage of all planes
};

// threadIdx.x, read anew wherever it is asked for: the compiler does not keep what follows from it in registers, which a strip is made of.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// ---- numbers ----

template <typename X>
constexpr int kPlanes = std::is_same<X, float>::value ? 2 : 1;

// Lines of x that are in shared memory at once where the factors are not, in all planes.
constexpr int kSliceLines = 64;

// Two values as operands of the tensor cores. The first bf16 of an fp32 is cut off, not rounded, so that the largest fp32 stays finite.
template <typename X>
__device__ __forceinline__ void split(float low, float high, uint32_t (&planes)[kPlanes<X>]) {
  if constexpr (kPlanes<X> == 1) {
    planes[0] = pack<X>(low, high);
  } else {
    planes[0] = __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
    planes[1] = pack<__nv_bfloat16>(low - __uint_as_float(planes[0] << 16), high - __uint_as_float(planes[0] & 0xffff0000u));
  }
}

template <typename X>
__device__ __forceinline__ float to_float(X value) {
  if constexpr (std::is_same<X, __half>::value) {
    return __half2float(value);
  } else if constexpr (std::is_same<X, __nv_bfloat16>::value) {
    return __bfloat162float(value);
  } else {
    return value;
  }
}

template <typename X>
__device__ __forceinline__ X from_float(float value) {
  if constexpr (std::is_same<X, __half>::value) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same<X, __nv_bfloat16>::value) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

template <typename X>
__device__ __forceinline__ float rounded(float value) {
  return to_float(from_float<X>(value));
}

template <typename X>
__device__ __forceinline__ void unpack_vector(const uint4& raw, float* values) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same<X, __half>::value) {
      const float2 pair = unpack<X>(words[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    } else if constexpr (std::is_same<X, __nv_bfloat16>::value) {  // by itself: unpack takes up to eight registers more here
      values[2 * i] = __uint_as_float(words[i] << 16);
      values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      values[i] = __uint_as_float(words[i]);
    }
  }
}

// kCount adjacent values, 1 or kVector; kVector of them begin at a multiple of 16 bytes.
template <typename X, int kCount>
__device__ __forceinline__ void load(const X* source, float (&values)[kCount]) {
  if constexpr (kCount == 1) {
    values[0] = to_float(*source);
  } else {
    const uint4* vectors = reinterpret_cast<const uint4*>(source);
    unpack_vector<X>(vectors[0], values);
    if constexpr (std::is_same<X, float>::value) unpack_vector<X>(vectors[1], values + 4);
  }
}

template <typename X, int kCount>
__device__ __forceinline__ void store(X* target, const float (&values)[kCount]) {
  if constexpr (kCount == 1) {
    *target = from_float<X>(values[0]);
  } else if constexpr (std::is_same<X, float>::value) {
    reinterpret_cast<float4*>(target)[0] = make_float4(values[0], values[1], values[2], values[3]);
    reinterpret_cast<float4*>(target)[1] = make_float4(values[4], values[5], values[6], values[7]);
  } else {
    *reinterpret_cast<uint4*>(target) = make_uint4(pack<X>(values[0], values[1]), pack<X>(values[2], values[3]),
                                                   pack<X>(values[4], values[5]), pack<X>(values[6], values[7]));
  }
}

// The larger, NaN if one is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Magnitudes as integers are ordered as numbers are, with NaN above infinity.
__device__ __forceinline__ float warp_max(float magnitude) { return __uint_as_float(__reduce_max_sync(kFull, __float_as_uint(magnitude))); }

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kFull, value, distance);
  return value;
}

__device__ __forceinline__ float clip_of(const Problem& p) { return p.clip_ptr != nullptr ? *p.clip_ptr : p.clip; }

struct PowerOfTwo {
  float value, inverse;
};

// What fp16 holds Y in units of: the power of two that takes the strip's largest magnitude to 2^14 .. 2^15. So Y cannot overflow, whatever
// x and the factors are, and loses nothing but the rounding to 11 bits (what is 2^-29 times the largest and below vanishes). Undone in the
// scale, exactly.
template <typename X>
__device__ __forceinline__ PowerOfTwo power_of_two(float largest) {
  if constexpr (!std::is_same<X, __half>::value) return {1.0f, 1.0f};
  const int exponent = min(max(static_cast<int>(__float_as_uint(largest) >> 23), 127 - 100), 127 + 100);
  return {__uint_as_float(static_cast<uint32_t>(exponent - 14) << 23),
          __uint_as_float(static_cast<uint32_t>(127 + 127 + 14 - exponent) << 23)};
}

struct RowScale {
  float scale, reciprocal;  // the reciprocal is 0 where all codes are
};

__device__ __forceinline__ RowScale row_scale(float largest, float clip, float qmax) {
  const float step = __fdiv_rn(__fmul_rn(largest, clip), qmax);
  if (!(step < INFINITY)) return {__uint_as_float(0x7fc00000u), 0.0f};
  if (step < kSmallestScale) return {1.0f, 0.0f};
  return {step, __frcp_rn(step)};
}

// Codes by two multiply-adds: the first, which saturates, takes -qmax - 1 .. qmax to 0 .. 1, the second goes back and rounds.
struct Coder {
  float factor, offset, range, back;

  // The code is in the low bits.
  __device__ __forceinline__ uint32_t bits(float t) const {
    return __float_as_uint(fmaf(__saturatef(fmaf(t, factor, offset)), range, back));
  }
};

// `unit` is what t's values are multiples of.
__device__ __forceinline__ Coder make_coder(const Problem& p, float reciprocal, float unit) {
  const float range = 2.0f * p.qmax + 1.0f;
  return {reciprocal * unit * p.inverse_range, (p.qmax + 1.0f) * p.inverse_range, range, kRound - p.qmax - 1.0f};
}

__device__ __forceinline__ uint32_t four_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// Eight codes of a byte each as eight nibbles.
__device__ __forceinline__ uint32_t eight_nibbles(uint32_t low, uint32_t high) {
  low &= 0x0f0f0f0fu;
  high &= 0x0f0f0f0fu;
  return __byte_perm(low | low >> 4, high | high >> 4, 0x6420);
}

// ---- prologues ----

// Relative error below 2^-18.
__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }

// x of kCount columns from `column` on, the residual added.
template <typename X, int kCount>
__device__ __forceinline__ void load_input(const Problem& p, int row, int column, float (&values)[kCount]) {
  load<X>(static_cast<const X*>(p.x) + row * p.x_stride + column, values);
  if (p.kind == PrologueKind::kRmsNorm && p.second != nullptr) {
    float residual[kCount];
    load<X>(static_cast<const X*>(p.second) + row * p.second_stride + column, residual);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = rounded<X>(values[i] + residual[i]);
  }
}

// What is transformed, h of kCount columns. `inverse_rms` was found by a pass over the row that wrote `sum`, which may be in the place of x
// or residual: the sum is read back.
template <typename X, int kCount>
__device__ __forceinline__ void load_transformed(const Problem& p, int row, int column, float inverse_rms, bool write, float (&h)[kCount]) {
  if (p.kind == PrologueKind::kRmsNorm) {
    if (p.sum != nullptr) {
      load<X>(static_cast<const X*>(p.sum) + static_cast<int64_t>(row) * p.k + column, h);
    } else {
      load_input<X>(p, row, column, h);
    }
    float gamma[kCount];
    load<X>(static_cast<const X*>(p.gamma) + column, gamma);
#pragma unroll
    for (int i = 0; i < kCount; ++i) h[i] = rounded<X>(gamma[i] * (h[i] * inverse_rms));
    if (write && p.normed != nullptr) store<X>(static_cast<X*>(p.normed) + static_cast<int64_t>(row) * p.k + column, h);
    return;
  }
  load<X>(static_cast<const X*>(p.x) + row * p.x_stride + column, h);
  if (p.kind == PrologueKind::kSiluMul) {
    float up[kCount];
    load<X>(static_cast<const X*>(p.second) + row * p.second_stride + column, up);
#pragma unroll
    for (int i = 0; i < kCount; ++i) h[i] = rounded<X>(silu(h[i]) * up[i]);
  }
}

// This thread's part of the sum of squares, one of `threads`; writes `sum`.
template <typename X, int kCount>
__device__ __forceinline__ float sum_of_squares(const Problem& p, int row, int thread, int threads) {
  float total = 0.0f;
#pragma unroll 2
  for (int column = thread * kCount; column < p.k; column += threads * kCount) {
    float values[kCount];
    load_input<X>(p, row, column, values);
    if (p.sum != nullptr) store<X>(static_cast<X*>(p.sum) + static_cast<int64_t>(row) * p.k + column, values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) total = fmaf(values[i], values[i], total);
  }
  return total;
}

__device__ __forceinline__ float inverse_root(const Problem& p, float squares) {
  return __frcp_rn(__fsqrt_rn(squares * p.inverse_k + p.epsilon));
}

// ---- teams of warps ----

struct Kept {
  float inverse_rms, largest, reciprocal, y_unit;  // of the row; of what was seen of it; 1 / its scale; what Y's values are multiples of
};

struct Team {
  int index, warps, member;
  float* slots;
  int parity = 0;

  __device__ __forceinline__ void sync() const {
    if (warps == 1) {
      __syncwarp();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(index + 1), "r"(warps * kWarp) : "memory");
    }
  }

  // A value of each warp, seen by all. Two sets of slots in turn: a set is written again only after a barrier that follows its reading.
  __device__ __forceinline__ float exchange(float value) {
    const int lane = threadIdx.x % kWarp;
    if (warps == 1) {
      __syncwarp();
      return lane == 0 ? value : 0.0f;
    }
    parity ^= kWarp;
    if (lane == 0) slots[parity + member] = value;
    sync();
    return lane < warps ? slots[parity + lane] : 0.0f;
  }

  // What this warp keeps from strip to strip.
  __device__ __forceinline__ volatile Kept& kept() const { return reinterpret_cast<Kept*>(slots + kExchange)[member]; }

  __device__ __forceinline__ float max(float magnitude) { return warp_max(exchange(warp_max(magnitude))); }
  __device__ __forceinline__ float sum(float value) { return warp_sum(exchange(warp_sum(value))); }
};

template <typename X>
__device__ __forceinline__ float find_inverse_rms(const Problem& p, int row, bool vector, Team* team) {
  const int thread = team->member * kWarp + threadIdx.x % kWarp, threads = team->warps * kWarp;
  const float part = vector ? sum_of_squares<X, kVector>(p, row, thread, threads) : sum_of_squares<X, 1>(p, row, thread, threads);
  return inverse_root(p, team->sum(part));
}

// ---- tensor cores ----

// As load_matrices, transposed: lane 4 g + t receives rows 2t and 2t + 1 of column g.
__device__ __forceinline__ void load_transposed(uint32_t (&registers)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

// fp16 or bf16, K = 16: a[0..3] are (row g, K 2t, 2t + 1), (g + 8, 2t ..), (g, 2t + 8 ..), (g + 8, 2t + 8 ..); b0 and b1 are column g, K 2t
// .. and 2t + 8 ...
template <typename X>
__device__ __forceinline__ void multiply_16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same<X, __half>::value) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Of planes: what the low parts of both operands give together is below the rounding of the low parts and left out.
template <typename X, int kSize>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[kPlanes<X>][4], const uint32_t (&b)[kPlanes<X>][kSize],
                                         int first, int second) {
  if constexpr (kPlanes<X> == 2) {
    multiply_16<X>(sum, a[1], b[0][first], b[0][second]);
    multiply_16<X>(sum, a[0], b[1][first], b[1][second]);
  }
  multiply_16<X>(sum, a[0], b[0][first], b[0][second]);
}

// ---- factors ----

// Exact for numbers below 2^32 / divisor; see magic_of().
__device__ __forceinline__ int divide(int number, uint32_t magic) {
  return magic == 0 ? number : static_cast<int>(__umulhi(static_cast<uint32_t>(number), magic));
}

constexpr int kGroup = 8;  // tiles of 8 columns whose codes are stored together: 16 adjacent ones by each thread
constexpr int kGroupColumns = 8 * kGroup;

// kVector entries of a factor of n x n, zeros outside it.
template <typename X>
__device__ __forceinline__ void load_factor(const Problem& p, const void* factor, int n, bool vector, int row, int column,
                                            float (&values)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = 0.0f;
  if (row >= n) return;
  const auto load_as = [&](auto* entries) {
    entries += row * n + column;
    if (vector) {
      if (column < n) load(entries, values);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (column + i < n) values[i] = to_float(entries[i]);
    }
  };
  if (std::is_same<X, float>::value || p.factors_are_float) {
    load_as(static_cast<const float*>(factor));
  } else {
    load_as(static_cast<const X*>(factor));
  }
}

// kVector values as operands.
template <typename X>
__device__ __forceinline__ void split(const float (&values)[kVector], uint32_t (&words)[kPlanes<X>][kVector / 2]) {
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    uint32_t pair[kPlanes<X>];
    split<X>(values[2 * i], values[2 * i + 1], pair);
#pragma unroll
    for (int part = 0; part < kPlanes<X>; ++part) words[part][i] = pair[part];
  }
}

__device__ __forceinline__ void store_16(unsigned char* target, const uint32_t (&words)[4]) {
  *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ bool is_vector(const void* factor, int n) {
  return n % kVector == 0 && reinterpret_cast<uintptr_t>(factor) % 16 == 0;
}

// Puts both factors into shared memory as operands of X's kind, zeros around them. Asynchronous where no conversion is needed: one commit.
// Entries are rounded to fp16 for fp16 x: they are meant to be of moderate size.
template <typename X>
__device__ __forceinline__ void stage_factors(const Problem& p, const Plan& plan, int left_columns, int size, int pitch,
                                              unsigned char* left, unsigned char* right) {
#pragma unroll 1
  for (int which = 0; which < 2; ++which) {
    const bool is_left = which == 0;
    const void* factor = is_left ? p.left : p.right;
    const int n = is_left ? p.n1 : p.n2, rows = is_left ? plan.n1_padded : size, chunks = (is_left ? left_columns : size) / kVector;
    const int line = is_left ? plan.left_pitch : pitch, plane = is_left ? plan.left_bytes : plan.right_bytes;
    const uint32_t magic = is_left ? plan.left_magic : plan.right_magic;
    unsigned char* target = is_left ? left : right;
    const bool vector = is_vector(factor, n);
    if (vector && kPlanes<X> == 1 && !p.factors_are_float) {
#pragma unroll 4
      for (int unit = threadIdx.x; unit < rows * chunks; unit += blockDim.x) {
        const int row = divide(unit, magic), chunk = unit - row * chunks;
        const bool inside = row < n && chunk * kVector < n;
        copy_16(to_shared(target) + row * line + chunk * 16,
                static_cast<const uint16_t*>(factor) + (inside ? row * n + chunk * kVector : 0), inside);
      }
    } else {
#pragma unroll 4
      for (int unit = threadIdx.x; unit < rows * chunks; unit += blockDim.x) {
        const int row = divide(unit, magic), column = (unit - row * chunks) * kVector;
        float values[kVector];
        load_factor<X>(p, factor, n, vector, row, column, values);
        uint32_t words[kPlanes<X>][kVector / 2];
        split<X>(values, words);
#pragma unroll
        for (int part = 0; part < kPlanes<X>; ++part) store_16(target + part * plane + row * line + 2 * column, words[part]);
      }
    }
  }
  commit_copies();
}

// ---- rows of x ----

// Where a line of the round's blocks is in the stage: each block begins at a multiple of 16 lines.
__device__ __forceinline__ int place(const Problem& p, const Plan& plan, int line) {
  return plan.n1_padded == p.n1 || plan.blocks_per_round == 1 ? line : line + line / p.n1 * (plan.n1_padded - p.n1);
}

// Fills a stage with `lines` lines of the row's blocks x n1, from `first_line` on, asynchronously: one commit.
template <int kPitch>
__device__ __forceinline__ void copy_rows(const Problem& p, const Plan& plan, const Team& team, int row, int first_line, int lines,
                                          uint32_t stage) {
  const int chunks = p.n2 / kVector, units = lines * chunks, threads = team.warps * kWarp;
  const uint16_t* source = static_cast<const uint16_t*>(p.x) + row * p.x_stride + first_line * p.n2;
#pragma unroll 4
  for (int unit = team.member * kWarp + threadIdx.x % kWarp; unit < units; unit += threads) {
    const int line = divide(unit, plan.chunks_magic);
    copy_16(stage + place(p, plan, line) * kPitch + (unit - line * chunks) * 16, source + unit * kVector, true);
  }
  commit_copies();
}

// Fills a stage through registers, for prologues, fp32 and odd sizes: `lines` lines of the row's count x n1, from `first_line` on.
template <typename X, int kCount, int kBatch>
__device__ __forceinline__ void fill_rows(const Problem& p, const Plan& plan, const Team& team, int row, int first_line, int lines,
                                          int pitch, float inverse_rms, bool write, unsigned char* stage) {
  const int units = lines * p.n2 / kCount, threads = team.warps * kWarp, plane = plan.stage_bytes / kPlanes<X>;
#pragma unroll 1
  for (int begin = team.member * kWarp + threadIdx.x % kWarp; begin < units; begin += kBatch * threads) {
    float h[kBatch][kCount];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int unit = begin + i * threads;
      if (unit < units) load_transformed<X>(p, row, first_line * p.n2 + unit * kCount, inverse_rms, write, h[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int unit = begin + i * threads;
      if (unit >= units) break;
      const int line = divide(unit, plan.chunks_magic), column = (unit - line * (p.n2 / kCount)) * kCount;
      unsigned char* target = stage + place(p, plan, line) * pitch + 2 * column;
      if constexpr (kCount == 1) {
        uint32_t words[kPlanes<X>];
        split<X>(h[i][0], 0.0f, words);
#pragma unroll
        for (int part = 0; part < kPlanes<X>; ++part)
          *reinterpret_cast<uint16_t*>(target + part * plane) = static_cast<uint16_t>(words[part]);
      } else {
        uint32_t words[kPlanes<X>][kVector / 2];
        split<X>(h[i], words);
#pragma unroll
        for (int part = 0; part < kPlanes<X>; ++part) store_16(target + part * plane, words[part]);
      }
    }
  }
}

template <typename X, int kBatch>
__device__ __forceinline__ void fill(const Problem& p, const Plan& plan, const Team& team, int row, int first_line, int lines, int pitch,
                                     float inverse_rms, bool write, unsigned char* stage) {
  if (plan.vector) {
    fill_rows<X, kVector, kBatch>(p, plan, team, row, first_line, lines, pitch, inverse_rms, write, stage);
  } else {
    fill_rows<X, 1, 1>(p, plan, team, row, first_line, lines, pitch, inverse_rms, write, stage);
  }
}

// ---- factors straight from global memory, where shared memory does not hold them ----

// Operand a of rows `first_row`.. of L^T, K from `k` on.
template <typename X>
__device__ __forceinline__ void fetch_left(const Problem& p, int first_row, int k, uint32_t (&a)[kPlanes<X>][4]) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const auto entry = [&](int row, int column) {
    if (row >= p.n1 || column >= p.n1) return 0.0f;
    const int at = row * p.n1 + column;
    return std::is_same<X, float>::value || p.factors_are_float ? static_cast<const float*>(p.left)[at]
                                                                : to_float(static_cast<const X*>(p.left)[at]);
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int m = first_row + g + i % 2 * 8, at = k + 2 * t + i / 2 * 8;
    uint32_t words[kPlanes<X>];
    split<X>(entry(at, m), entry(at + 1, m), words);
#pragma unroll
    for (int part = 0; part < kPlanes<X>; ++part) a[part][i] = words[part];
  }
}

// Operands b of a group of tiles, K from `k` on: of four lines of 8 adjacent columns, place g of tile j is column 8 g + j.
template <typename X>
__device__ __forceinline__ void fetch_right(const Problem& p, bool vector, int k, int first_column, uint32_t (&b)[kGroup][kPlanes<X>][2]) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float first[kVector], second[kVector];
    load_factor<X>(p, p.right, p.n2, vector, k + 8 * i + 2 * t, first_column + kVector * g, first);
    load_factor<X>(p, p.right, p.n2, vector, k + 8 * i + 2 * t + 1, first_column + kVector * g, second);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      uint32_t words[kPlanes<X>];
      split<X>(first[j], second[j], words);
#pragma unroll
      for (int part = 0; part < kPlanes<X>; ++part) b[j][part][i] = words[part];
    }
  }
}

// ---- the transform ----

// A strip's place in its row.
struct Strip {
  int block, first_row;
  bool active;
};

// The quad's words: lane t receives word t of lanes 0 to 3.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = (t & distance) != 0;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int low = distance == 1 ? 2 * pair : pair, high = low + distance;
      const uint32_t received = __shfl_xor_sync(kFull, upper ? words[low] : words[high], distance);
      words[low] = upper ? received : words[low];
      words[high] = upper ? words[high] : received;
    }
  }
}

// Codes of one strip and one group of columns: half 0 is row g of the tile, half 1 row g + 8. A thread gets 16 adjacent ones: dealt out so
// by fetch_right (kDealt), or exchanged within the quad.
template <bool kDealt>
__device__ __forceinline__ void make_codes(const float (&t)[kGroup][4], int half, const Coder& coder, uint32_t (&words)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t bits[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = 4 * i + j;
      bits[j] = coder.bits(kDealt ? t[at % kGroup][2 * half + at / kGroup] : t[at / 2][2 * half + at % 2]);
    }
    words[i] = four_bytes(bits[0], bits[1], bits[2], bits[3]);
  }
  if constexpr (!kDealt) {
    transpose_quad(words);
    const uint32_t from[4] = {words[0], words[1], words[2], words[3]};
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = __byte_perm(from[i % 2 * 2], from[i % 2 * 2 + 1], i / 2 == 0 ? 0x5410 : 0x7632);
  }
}

// Codes of a round that its strips left in shared memory, a byte each, to the row. Strips are kRows lines of kPitch bytes one after
// another.
template <int kRows, int kPitch>
__device__ __forceinline__ void copy_codes(const Problem& p, const Plan& plan, const Team& team, int row, int first, int count,
                                           const unsigned char* codes) {
  const int thread = team.member * kWarp + threadIdx.x % kWarp, threads = team.warps * kWarp;
  unsigned char* target = p.q + row * p.q_stride;
  const auto find = [&](int at) {
    const int line = divide(at / (plan.vector ? kVector : 1), plan.chunks_magic), block = plan.blocks_per_round > 1 ? line / p.n1 : 0;
    const int m = line - block * p.n1;
    return codes + (block * plan.strips + m / kRows) * (kRows * kPitch) + m % kRows * kPitch + at - line * p.n2;
  };
  if (plan.vector) {
    for (int at = thread * kVector; at < count; at += threads * kVector) {
      const uint2 words = *reinterpret_cast<const uint2*>(find(at));
      if (p.packed) {
        *reinterpret_cast<uint32_t*>(target + (first + at) / 2) = eight_nibbles(words.x, words.y);
      } else {
        *reinterpret_cast<uint2*>(target + first + at) = words;
      }
    }
  } else if (p.packed) {
    // A round may begin in the middle of a byte: the round before, of the same team, left the other half.
    for (int byte = first / 2 + thread; 2 * byte < first + count; byte += threads) {
      const int low = 2 * byte - first;
      const int value = low >= 0 ? *find(low) & 15 : target[byte];
      target[byte] = static_cast<unsigned char>(value | (low + 1 < count ? *find(low + 1) << 4 : 0));
    }
  } else {
    for (int at = thread; at < count; at += threads) target[first + at] = *find(at);
  }
}

// kTilesN: tiles of 8 that hold n2 columns; kTilesM: tiles of 16 rows in a strip; kParts: parts in which t's columns are computed, above 1
// where registers do not hold them all; kDirect: the factors are read from global memory where they are needed, and x a slice of n1 at a
// time.
template <typename X, int kTilesN, int kTilesM, int kParts, int kWarps, bool kDirect>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    transform_quantize(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
  let_next_begin();
  constexpr int kPitch = kTilesN * 16 + 16;  // an odd number of 16 bytes: the 8 rows of a matrix are in different banks
  constexpr int kCodesPitch = kTilesN * 8 + 16;
  constexpr int kPart = kTilesN / kParts;
  constexpr int kStripRows = 16 * kTilesM;
  constexpr int kSlice = kSliceLines / kPlanes<X>;
  static_assert(kPart % kGroup == 0, "a group of tiles is computed together");
  extern __shared__ __align__(16) unsigned char memory[];

  static_assert(kWarps <= kMaxTeams && kWarps * sizeof(Kept) <= kSlots - kExchange * sizeof(float), "a team's shared memory");
  unsigned char* left = memory + kMaxTeams * kSlots;
  unsigned char* right = left + kPlanes<X> * plan.left_bytes;
  unsigned char* stages = right + kPlanes<X> * plan.right_bytes;

  Team team = {};
  int lane = 0;
  const auto find_place = [&](uint32_t zero) {
    const int thread = thread_index() + static_cast<int>(zero), warp = thread / kWarp;
    lane = thread % kWarp;
    team.index = divide(warp, plan.team_magic);
    team.warps = plan.team_warps;
    team.member = warp - team.index * plan.team_warps;
    team.slots = reinterpret_cast<float*>(memory + team.index * kSlots);
  };
  find_place(0);
  const bool idle = team.index >= plan.teams;  // helps with the factors only
  const auto stage_of_team = [&] { return stages + team.index * plan.stages * plan.stage_bytes; };
  const auto codes_of_team = [&] { return stages + plan.teams * plan.stages * plan.stage_bytes + team.index * plan.codes_bytes; };
  const int first_row = blockIdx.x * plan.teams + team.index;

  // A round of a pass over a row.
  struct Item {
    int row, step;

    __device__ __forceinline__ int pass(const Plan& plan) const { return step < plan.rounds ? 0 : 1; }
    __device__ __forceinline__ int round(const Plan& plan) const { return step < plan.rounds ? step : step - plan.rounds; }
  };
  const auto advance = [&](Item& item) {
    if (++item.step < plan.rounds * plan.passes) return;
    item.step = 0;
    item.row += gridDim.x * plan.teams;
  };
  const auto first_block = [&](int round) {
    return plan.rounds_per_block > 1 ? round / plan.rounds_per_block : round * plan.blocks_per_round;
  };
  const auto block_count = [&](int round) { return min(plan.blocks_per_round, p.blocks - first_block(round)); };
  const auto copy = [&](const Item& item, int place) {
    if (item.row < p.rows) {
      copy_rows<kPitch>(p, plan, team, item.row, first_block(item.round(plan)) * p.n1, block_count(item.round(plan)) * p.n1,
                        to_shared(stage_of_team()) + place * plan.stage_bytes);
    } else {
      commit_copies();
    }
  };
  // The item that is `distance` after `item`, which is in stage `used`.
  const auto copy_ahead = [&](Item item, int used, int distance) {
    for (int i = 0; i < distance; ++i) advance(item);
    used += distance;
    copy(item, used < plan.stages ? used : used - plan.stages);
  };

  // Padding is written once: rows below n1 and columns beside n2 stay zero.
  if (plan.n1_padded != p.n1 || kTilesN * 8 != p.n2) {
    uint4* words = reinterpret_cast<uint4*>(stages);
    for (int i = threadIdx.x; i < plan.teams * plan.stages * plan.stage_bytes / 16; i += blockDim.x) words[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
  }
  if constexpr (!kDirect) {
    if (plan.asynchronous && !idle)
      for (int i = 0; i < max(plan.stages - 1, 1); ++i) copy_ahead({first_row, 0}, 0, i);
    stage_factors<X>(p, plan, plan.strips * kStripRows, kTilesN * 8, kPitch, left, right);
    wait_for_copies<0>();
    __syncthreads();
  }
  if (idle) return;

  team.kept().largest = 0.0f;
  int used = 0;  // stage that is computed from

#pragma unroll 1
  for (Item item = {first_row, 0}; item.row < p.rows; advance(item)) {
    find_place(0);
    const int block0 = first_block(item.round(plan));
    if (p.kind == PrologueKind::kRmsNorm && item.pass(plan) == 0 && item.round(plan) == 0)
      team.kept().inverse_rms = find_inverse_rms<X>(p, item.row, plan.vector, &team);
    const float inverse_rms = team.kept().inverse_rms;
    if constexpr (!kDirect) {
      if (plan.asynchronous) {
        if (plan.stages == 3) {
          wait_for_copies<1>();
        } else {
          wait_for_copies<0>();
        }
        team.sync();
        if (plan.stages > 1) copy_ahead(item, used, plan.stages - 1);
      } else {
        team.sync();  // all are done with what the stage held
        fill<X, std::is_same<X, float>::value ? 2 : 4>(p, plan, team, item.row, block0 * p.n1, block_count(item.round(plan)) * p.n1, kPitch,
                                                       inverse_rms, item.pass(plan) == 0, stage_of_team());
        team.sync();
      }
    }

    const auto find_strip = [&]() -> Strip {
      const int block0 = first_block(item.round(plan));
      if (plan.rounds_per_block > 1) {
        const int index = item.round(plan) % plan.rounds_per_block * plan.team_warps + team.member;
        return {block0, index * kStripRows, index < plan.strips};
      }
      const int block = block0 + team.member / plan.strips;
      return {block, team.member % plan.strips * kStripRows, block < block0 + plan.blocks_per_round && block < p.blocks};
    };
    const Strip strip = find_strip();

    // Y = L^T X, as operands of the second product.
    uint32_t y[kTilesM][kTilesN / 2][kPlanes<X>][4];
    {
      float sums[kTilesM][kTilesN][4] = {};
      const int plane = plan.stage_bytes / kPlanes<X>;
      const uint32_t a_from = to_shared(left) + (lane % 8 + lane / 16 * 8) * plan.left_pitch + (strip.first_row + lane / 8 % 2 * 8) * 2;
      const uint32_t b_from = to_shared(stage_of_team()) + used * plan.stage_bytes + (strip.block - block0) * plan.n1_padded * kPitch +
                              lane % 16 * kPitch + lane / 16 * 16;
      int slice = 0;  // first line that the stage holds
#pragma unroll 1
      for (int k = 0; k < plan.n1_padded; k += 16) {
        if constexpr (kDirect) {
          if (k % kSlice == 0) {
            slice = k;
            team.sync();
            const int lines = min(p.n1 - k, kSlice);
            fill<X, 1>(p, plan, team, item.row, block0 * p.n1 + k, lines, kPitch, inverse_rms, item.pass(plan) == 0, stage_of_team());
            if (lines < kSlice && p.n1 > kSlice) {  // what is left of the slice before
              const int words = (plan.n1_padded - p.n1) * kPitch / 16;
#pragma unroll
              for (int part = 0; part < kPlanes<X>; ++part)
                for (int i = team.member * kWarp + lane; i < words; i += team.warps * kWarp)
                  reinterpret_cast<uint4*>(stage_of_team() + part * plane + lines * kPitch)[i] = make_uint4(0, 0, 0, 0);
            }
            team.sync();
          }
        }
        if (!strip.active) continue;
        uint32_t a[kTilesM][kPlanes<X>][4];
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
          if constexpr (kDirect) {
            fetch_left<X>(p, strip.first_row + 16 * i, k, a[i]);
          } else {
#pragma unroll
            for (int part = 0; part < kPlanes<X>; ++part)
              load_transposed(a[i][part], a_from + part * plan.left_bytes + k * plan.left_pitch + i * 32);
          }
        }
#pragma unroll
        for (int j = 0; j < kTilesN; j += 2) {
          uint32_t b[kPlanes<X>][4];
#pragma unroll
          for (int part = 0; part < kPlanes<X>; ++part) load_transposed(b[part], b_from + part * plane + (k - slice) * kPitch + j * 16);
#pragma unroll
          for (int i = 0; i < kTilesM; ++i) {
            multiply<X>(sums[i][j], a[i], b, 0, 1);
            multiply<X>(sums[i][j + 1], a[i], b, 2, 3);
          }
        }
      }
      PowerOfTwo unit = {1.0f, 1.0f};
      if constexpr (std::is_same<X, __half>::value) {
        float magnitude = 0.0f;
#pragma unroll
        for (int i = 0; i < kTilesM * kTilesN * 4; ++i) magnitude = max_or_nan(magnitude, fabsf((&sums[0][0][0])[i]));
        unit = power_of_two<X>(warp_max(magnitude));
      }
      team.kept().y_unit = unit.value;
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
#pragma unroll
        for (int j = 0; j < kTilesN / 2; ++j)
#pragma unroll
          for (int word = 0; word < 4; ++word) {
            const float (&pair)[4] = sums[i][2 * j + word / 2];
            uint32_t words[kPlanes<X>];
            split<X>(pair[word % 2 * 2] * unit.inverse, pair[word % 2 * 2 + 1] * unit.inverse, words);
#pragma unroll
            for (int part = 0; part < kPlanes<X>; ++part) y[i][j][part][word] = words[part];
          }
    }
    if constexpr (!kDirect) {
      if (plan.asynchronous && plan.stages == 1) {
        team.sync();
        copy_ahead(item, 0, 1);
      }
    }

    if constexpr (!kDirect) {
      if (++used >= plan.stages) used = 0;
    }

#pragma unroll 1
    for (int part_index = 0; part_index < kParts; ++part_index) {
      // t = Y R
      float t[kTilesM][kPart][4] = {};
      if (strip.active) {
        const uint32_t b_from = to_shared(right) + lane % 16 * kPitch + lane / 16 * 16 + part_index * kPart * 16;
#pragma unroll
        for (int step = 0; step < kTilesN / 2; ++step) {
          if constexpr (kDirect) {
            if (step * 16 >= p.n2) break;
            const bool vector = is_vector(p.right, p.n2);
#pragma unroll
            for (int group = 0; group < kPart / kGroup; ++group) {
              const int column = (part_index * kPart / kGroup + group) * kGroupColumns;
              if (column >= p.n2) break;
              uint32_t b[kGroup][kPlanes<X>][2];
              fetch_right<X>(p, vector, 16 * step, column, b);
#pragma unroll
              for (int j = 0; j < kGroup; ++j)
#pragma unroll
                for (int i = 0; i < kTilesM; ++i) multiply<X>(t[i][group * kGroup + j], y[i][step], b[j], 0, 1);
            }
          } else {
#pragma unroll
            for (int j = 0; j < kPart; j += 2) {
              uint32_t b[kPlanes<X>][4];
#pragma unroll
              for (int part = 0; part < kPlanes<X>; ++part)
                load_transposed(b[part], b_from + part * plan.right_bytes + step * 16 * kPitch + j * 16);
#pragma unroll
              for (int i = 0; i < kTilesM; ++i) {
                multiply<X>(t[i][j], y[i][step], b, 0, 1);
                multiply<X>(t[i][j + 1], y[i][step], b, 2, 3);
              }
            }
          }
        }
      }

      find_place(__float_as_uint(max_or_nan(fabsf(t[0][0][0]), fabsf(t[0][0][1]))) >> 31);  // a magnitude's sign: not before t is there
      const float y_unit = team.kept().y_unit;
      if (item.pass(plan) == 0) {
        float magnitude = 0.0f;
#pragma unroll
        for (int i = 0; i < kTilesM * kPart * 4; ++i) magnitude = max_or_nan(magnitude, fabsf((&t[0][0][0])[i]));
        float largest = max_or_nan(team.kept().largest, warp_max(magnitude) * y_unit);
        if (item.round(plan) == plan.rounds - 1 && part_index == kParts - 1) {
          const RowScale scale = row_scale(team.max(largest), clip_of(p), p.qmax);
          if (team.member == 0 && lane == 0) p.scale[item.row] = scale.scale;
          team.kept().reciprocal = scale.reciprocal;
          largest = 0.0f;
        }
        __syncwarp();  // all lanes have read it
        team.kept().largest = largest;
      }
      if (item.pass(plan) == plan.passes - 1) {
        const Coder coder = make_coder(p, team.kept().reciprocal, y_unit);
        uint32_t words[kTilesM][2][kPart / kGroup][4];
#pragma unroll
        for (int i = 0; i < kTilesM; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int group = 0; group < kPart / kGroup; ++group)
              make_codes<kDirect>(reinterpret_cast<const float (&)[kGroup][4]>(t[i][group * kGroup]), half, coder, words[i][half][group]);
        const int column = part_index * kPart * 8 + lane % 4 * 16;
        const auto for_each = [&](auto&& function) {
#pragma unroll
          for (int i = 0; i < kTilesM; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
              for (int group = 0; group < kPart / kGroup; ++group)
                function(16 * i + 8 * half + lane / 4, column + group * kGroupColumns, words[i][half][group]);
        };
        const Strip place = find_strip();
        if (plan.codes_bytes > 0) {
          unsigned char* own_codes = codes_of_team() + team.member * kStripRows * kCodesPitch;
          for_each([&](int line, int at, const uint32_t (&run)[4]) { store_16(own_codes + line * kCodesPitch + at, run); });
        } else if (place.active) {
          const int from = place.block * p.n1 + place.first_row;
          unsigned char* target = p.q + item.row * p.q_stride;
          const int lines = p.n1 - place.first_row;
          if (p.packed) {
            for_each([&](int line, int at, const uint32_t (&run)[4]) {
              if (line < lines && at < p.n2)
                *reinterpret_cast<uint2*>(target + ((from + line) * p.n2 + at) / 2) =
                    make_uint2(eight_nibbles(run[0], run[1]), eight_nibbles(run[2], run[3]));
            });
          } else {
            for_each([&](int line, int at, const uint32_t (&run)[4]) {
              if (line < lines && at < p.n2) store_16(target + (from + line) * p.n2 + at, run);
            });
          }
        }
      }
    }

    if (plan.codes_bytes > 0 && item.pass(plan) == plan.passes - 1) {
      const int line = plan.rounds_per_block > 1 ? item.round(plan) % plan.rounds_per_block * plan.team_warps * kStripRows : 0;
      const int lines = plan.rounds_per_block > 1 ? min(plan.team_warps * kStripRows, p.n1 - line) : block_count(item.round(plan)) * p.n1;
      team.sync();
      copy_codes<kStripRows, kCodesPitch>(p, plan, team, item.row, (first_block(item.round(plan)) * p.n1 + line) * p.n2, lines * p.n2,
                                          codes_of_team());
      team.sync();
    }
  }
}

// ---- the transform of few rows ----

// A row is spread over a cluster of blocks: what counts is how soon the last code is out. A block has some strips of n1, its warps share
// the columns; Y goes through shared memory, and each step is short enough for a kernel of a few hundred instructions.
struct Split {
  int blocks, strips;            // of a row; of a block
  int warp_columns, pair_shift;  // warps side by side; 1 where a warp has two pairs of tiles, not one
  int n1_padded, n2_padded, pitch, left_pitch, left_bytes, x_bytes;
  uint32_t chunks_magic, padded_magic, left_magic;
};

constexpr int kSplitWarps = 8;
constexpr int kSplitItems = 4;  // pieces of 16 x 16 that a warp has at most
constexpr int kMaxCluster = 8;

// Has `count` values on their way to the L2 cache.
template <typename X>
__device__ __forceinline__ void prefetch(const void* values, int64_t first, int count) {
  constexpr int kLine = 128;
  const char* from = reinterpret_cast<const char*>(static_cast<const X*>(values) + first);
  for (int at = threadIdx.x * kLine; at < count * static_cast<int>(sizeof(X)); at += kSplitWarps * kWarp * kLine)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
}

// Columns `first_column`.. of a factor of n x n, zeros outside it.
template <typename X>
__device__ __forceinline__ void stage_columns(const Problem& p, const void* factor, int n, int rows, int first_column, int columns,
                                              uint32_t magic, int pitch, unsigned char* target) {
  const int chunks = columns / kVector;
  const bool vector = is_vector(factor, n);
  if (vector && !p.factors_are_float) {
#pragma unroll 4
    for (int unit = threadIdx.x; unit < rows * chunks; unit += kSplitWarps * kWarp) {
      const int row = divide(unit, magic), chunk = unit - row * chunks, column = first_column + chunk * kVector;
      const bool inside = row < n && column < n;
      copy_16(to_shared(target) + row * pitch + chunk * 16, static_cast<const uint16_t*>(factor) + (inside ? row * n + column : 0), inside);
    }
  } else {
#pragma unroll 4
    for (int unit = threadIdx.x; unit < rows * chunks; unit += kSplitWarps * kWarp) {
      const int row = divide(unit, magic), chunk = unit - row * chunks;
      float values[kVector];
      load_factor<X>(p, factor, n, vector, row, first_column + chunk * kVector, values);
      uint32_t words[1][kVector / 2];
      split<X>(values, words);
      store_16(target + row * pitch + chunk * 16, words[0]);
    }
  }
}

template <typename X>
__global__ void __launch_bounds__(kSplitWarps* kWarp)
    split_quantize(const __grid_constant__ Problem p, const __grid_constant__ Split plan) {
  let_next_begin();
  if (!p.constant_factors) wait_for_work_before();
  constexpr int kThreads = kSplitWarps * kWarp;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ __align__(16) unsigned char slots[kSlots];
  __shared__ float maxima[kMaxCluster * kSplitWarps];  // of the cluster's warps
  __shared__ uint32_t y_largest;
  unsigned char* left = memory;
  unsigned char* x = left + plan.left_bytes;
  unsigned char* right = x + plan.x_bytes;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int row = blockIdx.x / plan.blocks, rank = blockIdx.x % plan.blocks, first_line = rank * plan.strips * 16;
  Team team = {0, kSplitWarps, warp, reinterpret_cast<float*>(slots)};

  // Everything is asked for at once; constant factors while x is still being made.
  stage_columns<X>(p, p.left, p.n1, plan.n1_padded, first_line, plan.strips * 16, plan.left_magic, plan.left_pitch, left);
  stage_columns<X>(p, p.right, p.n2, plan.n2_padded, 0, plan.n2_padded, plan.padded_magic, plan.pitch, right);
  if (p.gamma != nullptr) prefetch<X>(p.gamma, 0, p.k);
  wait_for_work_before();
  const int chunks = p.n2 / kVector, units = p.n1 * chunks;
  const auto place_of = [&](int unit) {
    const int line = divide(unit, plan.chunks_magic);
    return x + line * plan.pitch + (unit - line * chunks) * 16;
  };
  if (p.kind == PrologueKind::kNone) {
    const uint16_t* source = static_cast<const uint16_t*>(p.x) + row * p.x_stride;
#pragma unroll 4
    for (int unit = threadIdx.x; unit < units; unit += kThreads) copy_16(to_shared(place_of(unit)), source + unit * kVector, true);
  } else {
    prefetch<X>(p.x, row * p.x_stride, p.k);
    if (p.second != nullptr) prefetch<X>(p.second, row * p.second_stride, p.k);
  }
  commit_copies();
  if (threadIdx.x == 0) y_largest = 0;
  if (plan.n1_padded != p.n1 || plan.n2_padded != p.n2) {
    const int padded_chunks = plan.n2_padded / kVector;
    for (int unit = threadIdx.x; unit < plan.n1_padded * padded_chunks; unit += kThreads) {
      const int line = divide(unit, plan.padded_magic), chunk = unit - line * padded_chunks;
      if (line >= p.n1 || chunk >= chunks) *reinterpret_cast<uint4*>(x + line * plan.pitch + chunk * 16) = make_uint4(0, 0, 0, 0);
    }
  }
  if (p.kind == PrologueKind::kSiluMul) {
#pragma unroll 4
    for (int unit = threadIdx.x; unit < units; unit += kThreads) {
      float h[kVector];
      load_transformed<X>(p, row, unit * kVector, 0.0f, false, h);
      store<X>(reinterpret_cast<X*>(place_of(unit)), h);
    }
  }
  float total = 0.0f;
  if (p.kind == PrologueKind::kRmsNorm) {
#pragma unroll 4
    for (int unit = threadIdx.x; unit < units; unit += kThreads) {
      float values[kVector];
      load_input<X>(p, row, unit * kVector, values);
      store<X>(reinterpret_cast<X*>(place_of(unit)), values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) total = fmaf(values[i], values[i], total);
    }
  }
  if (plan.blocks > 1) cluster_arrive();
  bool arrived = plan.blocks == 1;  // all blocks of the cluster have begun, and have read what `sum` may be in the place of
  if (p.kind == PrologueKind::kRmsNorm) {
    const float inverse_rms = inverse_root(p, team.sum(total));
    if (p.sum != nullptr && !arrived) {
      cluster_wait();
      arrived = true;
    }
#pragma unroll 2
    for (int unit = threadIdx.x; unit < units; unit += kThreads) {
      X* place = reinterpret_cast<X*>(place_of(unit));
      float values[kVector], gamma[kVector];
      load<X>(place, values);
      load<X>(static_cast<const X*>(p.gamma) + unit * kVector, gamma);
      const int64_t at = static_cast<int64_t>(row) * p.k + unit * kVector;
      const bool writes = unit / kThreads % plan.blocks == rank;  // the blocks take turns
      if (p.sum != nullptr && writes) store<X>(static_cast<X*>(p.sum) + at, values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = gamma[i] * (values[i] * inverse_rms);
      store<X>(place, values);
      if (p.normed != nullptr && writes) store<X>(static_cast<X*>(p.normed) + at, values);
    }
  }
  wait_for_copies<0>();
  __syncthreads();

  // Pieces of 16 x 16 of this warp: strip and pair of tiles.
  const int warp_rows = kSplitWarps / plan.warp_columns;
  const int warp_column = warp % plan.warp_columns, warp_row = warp / plan.warp_columns;
  const auto strip_of = [&](int item) { return warp_row + (item >> plan.pair_shift) * warp_rows; };
  const auto pair_of = [&](int item) { return warp_column + (item & plan.pair_shift) * plan.warp_columns; };
  bool has[kSplitItems];
#pragma unroll
  for (int i = 0; i < kSplitItems; ++i)
    has[i] = strip_of(i) < plan.strips && first_line + strip_of(i) * 16 < p.n1 && pair_of(i) * 16 < plan.n2_padded;

  // Y = L^T X
  float sums[kSplitItems][2][4] = {};
  const uint32_t a_from = to_shared(left) + (lane % 8 + lane / 16 * 8) * plan.left_pitch + lane / 8 % 2 * 16;
  const uint32_t b_at = lane % 16 * plan.pitch + lane / 16 * 16;
#pragma unroll 2
  for (int k = 0; k < plan.n1_padded; k += 16) {
#pragma unroll
    for (int i = 0; i < kSplitItems; ++i) {
      if (!has[i]) continue;
      uint32_t a[4], b[4];
      load_transposed(a, a_from + k * plan.left_pitch + strip_of(i) * 32);
      load_transposed(b, to_shared(x) + b_at + k * plan.pitch + pair_of(i) * 32);
      multiply_16<X>(sums[i][0], a, b[0], b[1]);
      multiply_16<X>(sums[i][1], a, b[2], b[3]);
    }
  }
  float magnitude = 0.0f;
  if constexpr (std::is_same<X, __half>::value) {
#pragma unroll
    for (int i = 0; i < kSplitItems * 8; ++i) magnitude = max_or_nan(magnitude, fabsf((&sums[0][0][0])[i]));
    magnitude = warp_max(magnitude);
    if (lane == 0) atomicMax(&y_largest, __float_as_uint(magnitude));
  }
  __syncthreads();  // x has been read, too: Y takes its place
  const PowerOfTwo unit_of_y = power_of_two<X>(__uint_as_float(y_largest));
#pragma unroll
  for (int i = 0; i < kSplitItems; ++i) {
    if (!has[i]) continue;
    unsigned char* target = x + (strip_of(i) * 16 + lane / 4) * plan.pitch + pair_of(i) * 32 + lane % 4 * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      *reinterpret_cast<uint32_t*>(target + j / 2 * 16 + j % 2 * 8 * plan.pitch) =
          pack<X>(sums[i][j / 2][j % 2 * 2] * unit_of_y.inverse, sums[i][j / 2][j % 2 * 2 + 1] * unit_of_y.inverse);
  }
  __syncthreads();

  // t = Y R
  float t[kSplitItems][2][4] = {};
  const uint32_t y_from = to_shared(x) + lane % 16 * plan.pitch + lane / 16 * 16;
#pragma unroll 2
  for (int k = 0; k < plan.n2_padded; k += 16) {
#pragma unroll
    for (int i = 0; i < kSplitItems; ++i) {
      if (!has[i]) continue;
      uint32_t a[4], b[4];
      load_matrices(a, y_from + strip_of(i) * 16 * plan.pitch + k * 2);
      load_transposed(b, to_shared(right) + b_at + k * plan.pitch + pair_of(i) * 32);
      multiply_16<X>(t[i][0], a, b[0], b[1]);
      multiply_16<X>(t[i][1], a, b[2], b[3]);
    }
  }
  magnitude = 0.0f;
#pragma unroll
  for (int i = 0; i < kSplitItems * 8; ++i) magnitude = max_or_nan(magnitude, fabsf((&t[0][0][0])[i]));
  float largest = warp_max(magnitude) * unit_of_y.value;
  if (plan.blocks == 1) {
    largest = team.max(largest);
  } else {
    if (!arrived) cluster_wait();
    if (lane < plan.blocks) write_to_block(maxima[rank * kSplitWarps + warp], lane, largest);
    cluster_arrive();
    cluster_wait();
    const int count = plan.blocks * kSplitWarps;
    largest = max_or_nan(lane < count ? maxima[lane] : 0.0f, lane + kWarp < count ? maxima[lane + kWarp] : 0.0f);
    largest = warp_max(largest);
  }
  const RowScale scale = row_scale(largest, clip_of(p), p.qmax);
  if (rank == 0 && threadIdx.x == 0) p.scale[row] = scale.scale;
  const Coder coder = make_coder(p, scale.reciprocal, unit_of_y.value);
  unsigned char* target = p.q + row * p.q_stride;
#pragma unroll
  for (int i = 0; i < kSplitItems; ++i) {
    if (!has[i]) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int m = first_line + strip_of(i) * 16 + lane / 4 + j % 2 * 8, column = pair_of(i) * 16 + j / 2 * 8 + lane % 4 * 2;
      if (m >= p.n1 || column >= p.n2) continue;
      const uint32_t low = coder.bits(t[i][j / 2][j % 2 * 2]), high = coder.bits(t[i][j / 2][j % 2 * 2 + 1]);
      const int at = m * p.n2 + column;
      if (p.packed) {
        target[at / 2] = static_cast<unsigned char>((low & 15) | high << 4);
      } else {
        *reinterpret_cast<uint16_t*>(target + at) = static_cast<uint16_t>(__byte_perm(low, high, 0x0040));
      }
    }
  }
}

// ---- no transform ----

constexpr int kPlainElements = 32;  // of a thread, kept in registers
constexpr int kPlainThreads = 256, kPlainMaxThreads = 512;

// v / scale rounded as a division rounds, then to the nearest even: what is left of v after the product with the reciprocal corrects it.
__device__ __forceinline__ uint32_t exact_code(float v, RowScale scale, float qmax) {
  const float estimate = v * scale.reciprocal;
  const float quotient = fmaf(fmaf(-estimate, scale.scale, v), scale.reciprocal, estimate);
  return __float_as_uint(fminf(fmaxf(quotient + kRound, kRound - qmax - 1.0f), kRound + qmax));
}

// Factors of 1 x 1, if there are any.
template <typename X>
__device__ __forceinline__ float2 plain_factors(const Problem& p) {
  if (p.left == nullptr) return {1.0f, 1.0f};
  if (p.factors_are_float) return {*static_cast<const float*>(p.left), *static_cast<const float*>(p.right)};
  return {to_float(*static_cast<const X*>(p.left)), to_float(*static_cast<const X*>(p.right))};
}

// Codes of kCount columns of a thread; the whole warp comes here, also where `inside` is false.
template <int kCount>
__device__ __forceinline__ void store_plain(const Problem& p, int row, int column, bool inside, const float (&h)[kCount], RowScale scale) {
  unsigned char* target = p.q + row * p.q_stride + (p.packed ? column / 2 : column);
  uint32_t bits[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) bits[i] = exact_code(h[i], scale, p.qmax);
  if constexpr (kCount == 1) {
    if (p.packed) {  // the code of an odd column is with the next lane
      const uint32_t neighbour = __shfl_down_sync(kFull, bits[0], 1);
      if (inside && column % 2 == 0) *target = static_cast<unsigned char>((bits[0] & 15) | neighbour << 4);
    } else if (inside) {
      *target = static_cast<unsigned char>(bits[0]);
    }
  } else if (inside) {
    const uint32_t words[2] = {four_bytes(bits[0], bits[1], bits[2], bits[3]), four_bytes(bits[4], bits[5], bits[6], bits[7])};
    if (p.packed) {
      *reinterpret_cast<uint32_t*>(target) = eight_nibbles(words[0], words[1]);
    } else {
      *reinterpret_cast<uint2*>(target) = make_uint2(words[0], words[1]);
    }
  }
}

template <typename X, int kCount>
struct alignas(sizeof(X) * kCount < 16 ? sizeof(X) * kCount : 16) Vector {
  X values[kCount];
};

// The largest magnitude, NaN if there is one, found in pairs of 16 bits: as integers, they are ordered as numbers are, with NaN on top.
template <typename X, int kCount, int kKept>
__device__ __forceinline__ float largest_of(const Vector<X, kCount> (&kept)[kKept]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kKept; ++i)
#pragma unroll
    for (int j = 0; j < kCount / 2; ++j) largest = __vmaxu2(largest, reinterpret_cast<const uint32_t*>(kept[i].values)[j] & 0x7fff7fffu);
  const uint16_t bits = static_cast<uint16_t>(max(largest & 0xffffu, largest >> 16));
  return to_float(reinterpret_cast<const X&>(bits));
}

// A team of warps a row, kCount adjacent columns a thread: kVector, or 1 where k is no multiple of it. kKept of them stay in registers;
// rows that are longer than these are read twice.
template <typename X, int kCount>
__global__ void __launch_bounds__(kPlainMaxThreads, std::is_same<X, float>::value ? 1 : 2)
    plain_quantize(const __grid_constant__ Problem p, int team_warps) {
  let_next_begin();
  constexpr int kKept = kCount == 1 ? kPlainElements / 4 : kPlainElements / kCount;
  __shared__ __align__(16) unsigned char slots[kPlainThreads / kWarp * kSlots];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  Team team = {warp / team_warps, team_warps, warp % team_warps, reinterpret_cast<float*>(slots + warp / team_warps * kSlots)};
  const int row = blockIdx.x * (blockDim.x / kWarp / team_warps) + team.index;
  if (row >= p.rows) return;
  const int step = team_warps * kWarp * kCount, first = (team.member * kWarp + lane) * kCount;
  float inverse_rms = 0.0f, largest = 0.0f;
  if (p.kind == PrologueKind::kRmsNorm) inverse_rms = find_inverse_rms<X>(p, row, kCount == kVector, &team);
  const float2 factors = plain_factors<X>(p);

  const auto multiply = [&](float (&h)[kCount]) {  // in the reference's order
    if (p.left == nullptr) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) h[i] = __fmul_rn(factors.x, __fmul_rn(h[i], factors.y));
  };
  const auto read = [&](int column, bool write, float (&h)[kCount]) {
    load_transformed<X>(p, row, column, inverse_rms, write, h);
    multiply(h);
  };
  const auto measure = [&](const float (&h)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) largest = max_or_nan(largest, fabsf(h[i]));
  };
  Vector<X, kCount> kept[kKept];  // h is of type X
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    float h[kCount] = {};
    if (first + i * step < p.k) load_transformed<X>(p, row, first + i * step, inverse_rms, true, h);
    store<X>(kept[i].values, h);
  }
  if (!std::is_same<X, float>::value && kCount > 1 && p.left == nullptr) {
    largest = largest_of(kept);
  } else {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      float h[kCount];
      load<X>(kept[i].values, h);
      multiply(h);
      measure(h);
    }
  }
#pragma unroll 1
  for (int column = first + kKept * step; column < p.k; column += step) {
    float more[kCount];
    read(column, true, more);
    measure(more);
  }
  const RowScale scale = row_scale(team.max(largest), clip_of(p), p.qmax);
  if (team.member == 0 && lane == 0) p.scale[row] = scale.scale;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (i * step >= p.k) break;
    float h[kCount];
    load<X>(kept[i].values, h);
    multiply(h);
    store_plain(p, row, first + i * step, first + i * step < p.k, h, scale);
  }
#pragma unroll 1
  for (int start = kKept * step; start < p.k; start += step) {
    const int column = start + first;
    float more[kCount] = {};
    if (column < p.k) read(column, false, more);
    store_plain(p, row, column, column < p.k, more, scale);
  }
}

// ---- host ----

// A compiled form of transform_quantize.
struct Form {
  int tiles_n, tiles_m, parts, warps;
  bool direct;
  void (*kernel)(Problem, Plan);
};

template <typename X, int kTilesN, int kTilesM, int kParts, int kWarps, bool kDirect>
constexpr Form form() {
  return {kTilesN, kTilesM, kParts, kWarps, kDirect, transform_quantize<X, kTilesN, kTilesM, kParts, kWarps, kDirect>};
}

// In the order of choice: the first that holds n2 columns and fits shared memory. The last takes everything.
const Form kHalfForms[] = {form<__half, 8, 2, 1, 12, false>(), form<__half, 16, 2, 1, 8, false>(), form<__half, 32, 1, 4, 8, true>()};
const Form kBfloatForms[] = {form<__nv_bfloat16, 8, 2, 1, 12, false>(), form<__nv_bfloat16, 16, 2, 1, 8, false>(),
                             form<__nv_bfloat16, 32, 1, 4, 8, true>()};
const Form kFloatForms[] = {form<float, 16, 1, 1, 8, false>(), form<float, 32, 1, 4, 8, true>()};

int divided(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

uint32_t magic_of(int divisor) { return static_cast<uint32_t>((0x100000000ull + divisor - 1) / divisor); }  // 0 for 1

bool is_plain(const fq_flat_quantize_params& params) { return params.n1 == 1 && params.n2 == 1; }

// How the form would do the problem, if shared memory allows.
bool plan_form(const Form& form, const fq_flat_quantize_params& params, const Prologue& prologue, const Device& device, Plan* plan,
               int* shared) {
  const int planes = params.dtype == FQ_FLOAT ? 2 : 1, block = params.n1 * params.n2, blocks = static_cast<int>(params.k / block);
  if (form.tiles_n * 8 < params.n2) return false;
  plan->strips = divided(params.n1, 16 * form.tiles_m);
  plan->rounds_per_block = divided(plan->strips, form.warps);
  plan->blocks_per_round = form.direct ? 1 : std::min(std::max(form.warps / plan->strips, 1), blocks);
  plan->team_warps = std::min(plan->blocks_per_round * plan->strips, form.warps);
  plan->rounds = plan->rounds_per_block > 1 ? blocks * plan->rounds_per_block : divided(blocks, plan->blocks_per_round);
  plan->passes = plan->rounds == 1 && form.parts == 1 ? 1 : 2;
  plan->vector = params.n2 % kVector == 0;
  const int chunks = plan->vector ? params.n2 / kVector : params.n2;
  plan->team_magic = magic_of(plan->team_warps);
  plan->chunks_magic = magic_of(chunks);
  plan->left_magic = magic_of(plan->strips * form.tiles_m * 2);
  plan->right_magic = magic_of(form.tiles_n);
  plan->asynchronous = plan->vector && params.dtype != FQ_FLOAT && prologue.kind == PrologueKind::kNone && !form.direct;
  plan->n1_padded = divided(params.n1, 16) * 16;
  plan->left_pitch = plan->strips * form.tiles_m * 32 + 16;
  const int pitch = form.tiles_n * 16 + 16;
  plan->left_bytes = form.direct ? 0 : plan->n1_padded * plan->left_pitch;
  plan->right_bytes = form.direct ? 0 : form.tiles_n * 8 * pitch;
  plan->stage_bytes =
      planes * plan->blocks_per_round * (form.direct ? std::min(plan->n1_padded, kSliceLines / planes) : plan->n1_padded) * pitch;
  // Runs of 16 codes are stored by the threads that have them; where they do not end with rows of n2, codes meet in shared memory.
  plan->codes_bytes = params.n2 % 16 == 0 ? 0 : plan->team_warps * 16 * form.tiles_m * (form.tiles_n * 8 + 16);

  // As many rows at once as fit, but rather fewer whose next rows are loaded meanwhile.
  const int fixed = kMaxTeams * kSlots + planes * (plan->left_bytes + plan->right_bytes);
  const int spread = divided(params.rows, device.multiprocessors);  // few rows: one a multiprocessor
  double best = 0;
  for (int teams = std::min(form.warps / plan->team_warps, spread); teams > 0; --teams) {
    for (int stages = plan->asynchronous ? 3 : 1; stages > 0; --stages) {
      const int64_t bytes = fixed + static_cast<int64_t>(teams) * (static_cast<int64_t>(stages) * plan->stage_bytes + plan->codes_bytes);
      const double worth = teams * (stages > 1 ? 1.0 : 0.7);
      if (bytes > device.shared_memory || worth <= best) continue;
      best = worth;
      plan->teams = teams;
      plan->stages = stages;
      *shared = static_cast<int>(bytes);
    }
  }
  return best > 0;
}

const Form* choose_form(const fq_flat_quantize_params& params, const Prologue& prologue, const Device& device, Plan* plan, int* shared) {
  const auto first = [&](const Form* forms, int count) -> const Form* {
    for (int i = 0; i < count; ++i)
      if (plan_form(forms[i], params, prologue, device, plan, shared)) return &forms[i];
    return nullptr;
  };
  if (params.dtype == FQ_FLOAT16) return first(kHalfForms, sizeof(kHalfForms) / sizeof(Form));
  if (params.dtype == FQ_BFLOAT16) return first(kBfloatForms, sizeof(kBfloatForms) / sizeof(Form));
  return first(kFloatForms, sizeof(kFloatForms) / sizeof(Form));
}

const char* fits(const fq_flat_quantize_params& params, const Prologue& prologue, const Device& device) {
  Plan plan;
  int shared = 0;
  return is_plain(params) || choose_form(params, prologue, device, &plan, &shared) != nullptr
             ? nullptr
             : "needs more shared memory than this device has";
}

Problem describe(const fq_flat_quantize_params& params, const Prologue& prologue, const Device& device) {
  Problem p = {};
  p.x = params.x;
  p.left = params.left;
  p.right = params.right;
  p.clip_ptr = params.clip_ptr;
  p.q = static_cast<unsigned char*>(params.q);
  p.scale = params.scale;
  p.rows = static_cast<int>(params.rows);
  p.x_stride = params.x_stride;
  p.packed = params.container != FQ_INT8;
  p.q_stride = p.packed ? params.k / 2 : params.k;
  p.k = static_cast<int>(params.k);
  p.n1 = params.n1;
  p.n2 = params.n2;
  p.blocks = static_cast<int>(params.k / (params.n1 * params.n2));
  p.factors_are_float = params.factor_dtype == FQ_FLOAT;
  p.constant_factors = params.constant_factors != 0 && device.capability >= 90;
  p.clip = params.clip;
  p.qmax = params.bits == 4 ? 7.0f : 127.0f;
  p.inverse_k = 1.0f / static_cast<float>(params.k);
  p.inverse_range = 1.0f / (2.0f * p.qmax + 1.0f);
  p.kind = prologue.kind;
  if (prologue.norm != nullptr) {
    p.second = prologue.norm->residual;
    p.second_stride = params.k;
    p.gamma = prologue.norm->gamma;
    p.sum = prologue.norm->residual != nullptr ? prologue.norm->sum : nullptr;
    p.normed = prologue.norm->normed;
    p.epsilon = prologue.norm->epsilon;
  }
  if (prologue.gate != nullptr) {
    p.second = prologue.gate->up;
    p.second_stride = prologue.gate->up_stride;
  }
  return p;
}

fq_status launch_plain(const fq_flat_quantize_params& params, const Problem& problem, const Device& device, cudaStream_t stream) {
  const int most = kPlainMaxThreads / kWarp, few = params.rows <= 2 * device.multiprocessors ? 4 : 1;
  const int wanted = divided(params.k, kWarp * kPlainElements / few);  // a row's latency counts where there are few of them
  int team_warps = 1;
  while (team_warps < wanted && team_warps < most) team_warps *= 2;
  const int threads = std::max(kPlainThreads, team_warps * kWarp), teams = threads / kWarp / team_warps;
  const bool vector = params.k % kVector == 0;
  const auto kernel = params.dtype == FQ_FLOAT16    ? vector ? plain_quantize<__half, kVector> : plain_quantize<__half, 1>
                      : params.dtype == FQ_BFLOAT16 ? vector ? plain_quantize<__nv_bfloat16, kVector> : plain_quantize<__nv_bfloat16, 1>
                      : vector                      ? plain_quantize<float, kVector>
                                                    : plain_quantize<float, 1>;
  kernel<<<divided(params.rows, teams), threads, 0, stream>>>(problem, team_warps);
  return check(cudaGetLastError(), "launch of plain_quantize");
}

// Whether, and how, the rows are few enough to spread each over several blocks.
bool plan_split(const fq_flat_quantize_params& params, const Device& device, Split* plan, int* shared) {
  if (params.dtype == FQ_FLOAT || params.n2 % kVector != 0 || params.k != params.n1 * params.n2) return false;
  const int strips = divided(params.n1, 16), pairs = divided(params.n2, 16), most = device.capability >= 90 ? kMaxCluster : 1;
  plan->warp_columns = 1;
  while (plan->warp_columns < pairs && plan->warp_columns < kSplitWarps) plan->warp_columns *= 2;
  plan->pair_shift = pairs > plan->warp_columns ? 1 : 0;
  plan->blocks = 0;
  for (int each = divided(strips, most); each <= strips; ++each) {
    const int blocks = divided(strips, each);
    if (divided(each, kSplitWarps / plan->warp_columns) << plan->pair_shift > kSplitItems) break;
    if (params.rows * blocks > 2 * device.multiprocessors) continue;
    plan->blocks = blocks;
    plan->strips = divided(strips, blocks);
    if (params.rows * blocks * 4 <= device.multiprocessors * 3) break;  // clusters do not fill every multiprocessor
  }
  if (plan->blocks == 0) return false;
  plan->n1_padded = strips * 16;
  plan->n2_padded = pairs * 16;
  plan->pitch = plan->n2_padded * 2 + 16;
  plan->left_pitch = plan->strips * 32 + 16;
  plan->left_bytes = plan->n1_padded * plan->left_pitch;
  plan->x_bytes = plan->n1_padded * plan->pitch;
  plan->chunks_magic = magic_of(params.n2 / kVector);
  plan->padded_magic = magic_of(plan->n2_padded / kVector);
  plan->left_magic = magic_of(plan->strips * 2);
  const int fixed = 2048;  // at most what the kernel has besides
  *shared = plan->left_bytes + plan->x_bytes + plan->n2_padded * plan->pitch;
  return *shared + fixed <= device.shared_memory;
}

fq_status launch_split(const fq_flat_quantize_params& params, const Problem& problem, const Split& plan, int shared, cudaStream_t stream) {
  const auto kernel = params.dtype == FQ_FLOAT16 ? split_quantize<__half> : split_quantize<__nv_bfloat16>;
  const Launch launch = {dim3(static_cast<unsigned>(params.rows * plan.blocks)), dim3(static_cast<unsigned>(plan.blocks)), kSplitWarps * kWarp,
                         shared, problem.constant_factors};
  return launch_kernel("FlatQuantize mma_f16", kernel, launch, stream, problem, plan);
}

fq_status launch(const fq_flat_quantize_params& params, const Prologue& prologue, const Device& device, cudaStream_t stream) {
  const Problem problem = describe(params, prologue, device);
  if (is_plain(params)) return launch_plain(params, problem, device, stream);
  int shared = 0;
  Split split = {};
  if (plan_split(params, device, &split, &shared)) return launch_split(params, problem, split, shared, stream);
  Plan plan = {};
  const Form* form = choose_form(params, prologue, device, &plan, &shared);
  const cudaError_t error = cudaFuncSetAttribute(form->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return check(error, "cudaFuncSetAttribute");
  const int blocks = std::min(divided(params.rows, plan.teams), device.multiprocessors);
  form->kernel<<<blocks, form->warps * kWarp, shared, stream>>>(problem, plan);
  return check(cudaGetLastError(), "launch of transform_quantize");
}

}  // namespace

const QuantizeKernel FlatQuantize_mma_f16 = {fits, launch};

}  // namespace fq
