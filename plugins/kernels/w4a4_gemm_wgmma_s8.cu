// W4A4Gemm on compute capability 9.0: Y^T = W X^T with wgmma on int8.
//
// The weights are the register operand: layout k128 stores the nibbles such that a thread's 16-byte load is its operands of four k = 32
// steps, unpacked by one shift and two ands as multiples of 16 (undone in the epilogue). The activations are the shared-memory operand, as
// they come. Both arrive through the copy engine, in stages of 128 along K:
//
//   many_tokens   persistent; a producer warpgroup and two consumer warpgroups of 64 or 128 channels each; pairs of blocks share their
//                 tokens by multicast; results leave through shared memory while the next tile's stages are on their way.
//   few_tokens    bound by the weights' way from memory: all blocks at once, K split over the blocks of a cluster, whose integer sums are
//                 added through distributed shared memory: no workspace, and the same bits in any order.
#include "sm90.cuh"
#include "wgmma_s8.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

namespace fq {
namespace {

using namespace sm90;

constexpr int kBlockK = 128;            // of a stage: a row of activations is one 128-byte swizzle row
constexpr int kWeightRow = kBlockK / 2;  // bytes of a stage's row of weights
constexpr int kConsumers = 256;

struct Problem {
  const float* scale;
  const float* w_scale;
  const float* bias;  // or null
  void* y;
  int m, n;
  int steps;  // K / 128; groups where kGrouped
  int dtype;
};

// ---- what both kernels do with a stage ----

// The weights' registers of one stage, unpacked: operands of the four k = 32 steps.
using Operands = uint32_t[4][4];

// 32 nibbles of row `row` and of the row 8 below it.
__device__ __forceinline__ void load_operands(Operands& a, const uint8_t* weights, int row, int quad) {
  const uint8_t* place = weights + row * kWeightRow + quad * 16;
  const uint4 upper = *reinterpret_cast<const uint4*>(place);
  const uint4 lower = *reinterpret_cast<const uint4*>(place + 8 * kWeightRow);
  const uint32_t words[4][2] = {{upper.x, lower.x}, {upper.y, lower.y}, {upper.z, lower.z}, {upper.w, lower.w}};
#pragma unroll
  for (int step = 0; step < 4; ++step)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      a[step][half] = words[step][half] << 4 & 0xf0f0f0f0;
      a[step][2 + half] = words[step][half] & 0xf0f0f0f0;
    }
}

// Keeps the compiler from moving what it does with these registers past this point.
__device__ __forceinline__ void settle(Operands& a) {
#pragma unroll
  for (int step = 0; step < 4; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[step][i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void settle(int32_t (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(sums[i])::"memory");
}

// A stage of the ring in shared memory: weights [kRows, 64 bytes], then activations [kTokens, 128 bytes] in swizzled rows.
template <int kRows, int kTokens>
struct Stage {
  static constexpr int kWeightBytes = kRows * kWeightRow;
  static constexpr int kTokenBytes = kTokens * kBlockK;
  static constexpr int kBytes = kWeightBytes + kTokenBytes;
  static_assert(kWeightBytes % 1024 == 0 && kTokenBytes % 1024 == 0, "swizzled rows repeat every 1,024 bytes");
};

// Where a ring of kStages stands: which stage, and the parity of its barriers.
template <int kStages>
struct Cursor {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Sums of a warpgroup's kTiles x 64 rows by kTokens columns: int32 of the whole product (times 16), or, with a scale per 128 along K, fp32.
template <int kTokens, int kTiles, bool kGrouped>
struct Sums {
  int32_t whole[kTiles][kTokens / 2];
  float scaled[kGrouped ? kTiles : 1][kGrouped ? kTokens / 2 : 1];

  __device__ __forceinline__ float value(int tile, int i) const {
    if constexpr (kGrouped) return scaled[tile][i];
    return __int2float_rn(whole[tile][i] >> 4);
  }
};

// One warpgroup's product over `steps` stages from the ring. `row` is the thread's row in the block of its first tile, `release(stage)`
// gives a stage back, `group_scale(tile, half, step)` is the scale of row + 64 tile + 8 half for that step.
template <int kRows, int kTokens, int kTiles, int kStages, bool kGrouped, typename Release, typename GroupScale>
__device__ __forceinline__ void multiply(Sums<kTokens, kTiles, kGrouped>& sums, Cursor<kStages>& cursor, const uint8_t* ring,
                                         uint64_t* full, int steps, int row, int quad, Release release, GroupScale group_scale) {
  using Stage = Stage<kRows, kTokens>;
  Operands a[2][kTiles];
  const uint32_t ring_address = shared_address(ring);
  if constexpr (kGrouped) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) sums.scaled[tile][i] = 0;
  }
  // The next stage's weights, in the registers of the products before the last: those have read them.
  const auto load = [&](Operands(&operands)[kTiles]) {
    barrier_wait(&full[cursor.stage], cursor.parity);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) load_operands(operands[tile], ring + cursor.stage * Stage::kBytes, row + 64 * tile, quad);
  };
  load(a[0]);
  int previous = -1;
  const auto step = [&](Operands(&now)[kTiles], Operands(&next)[kTiles], int index) {
    const int stage = cursor.stage;
    const uint64_t tokens = descriptor_128b(ring_address + stage * Stage::kBytes + Stage::kWeightBytes);
    // Without this the compiler may move the unpacking past the fence, and fences again.
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      settle(now[tile]);
      settle(sums.whole[tile]);
    }
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)  // the descriptor counts in 16 bytes: 32 codes are two
        WgmmaS8<kTokens>::run(sums.whole[tile], now[tile][j], tokens + 2 * j, j > 0 || (!kGrouped && index > 0));
    wgmma_commit();
    cursor.advance();
    if constexpr (kGrouped) {
      float scales[kTiles][2];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) scales[tile][half] = group_scale(tile, half, index);
      if (index + 1 < steps) load(next);
      wgmma_wait<0>();
      release(stage);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        settle(sums.whole[tile]);
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i)
          sums.scaled[tile][i] = fmaf(__int2float_rn(sums.whole[tile][i]), scales[tile][i / 2 % 2], sums.scaled[tile][i]);
      }
    } else {
      wgmma_wait<1>();  // the step before has read its stage and its registers
      if (previous >= 0) release(previous);
      previous = stage;
      if (index + 1 < steps) load(next);
    }
  };
  int index = 0;
  for (; index + 1 < steps; index += 2) {
    step(a[0], a[1], index);
    step(a[1], a[0], index + 1);
  }
  if (index < steps) step(a[0], a[1], index);
  if constexpr (!kGrouped) {
    wgmma_wait<0>();
    release(previous);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) settle(sums.whole[tile]);
  }
}

// ((sum * w_scale) * scale) + bias, rounded after each: the reference's order.
__device__ __forceinline__ float finish(float sum, float w_scale, float scale, float bias) {
  return __fadd_rn(__fmul_rn(__fmul_rn(sum, w_scale), scale), bias);
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, int dtype) {
  if (dtype == FQ_BFLOAT16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ void store_matrices_transposed(uint32_t address, const uint32_t (&pairs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(pairs[0]), "r"(pairs[1]),
               "r"(pairs[2]), "r"(pairs[3])
               : "memory");
}

// ---- many tokens ----

constexpr int kPair = 2;             // blocks of a cluster: one above the other along the channels, the same tokens
constexpr int kChunk = 64;           // tokens that leave at once
constexpr int kChunkBytes = kChunk * 64 * 2;
constexpr int kTokenTileGroup = 8;   // token tiles that are worked on side by side, for the second-level cache

template <int kTokens, int kTiles, int kStages>
struct ManyTokens {
  static constexpr int kRows = 2 * 64 * kTiles;
  using Stage = Stage<kRows, kTokens>;
  struct Shared {
    alignas(1024) uint8_t ring[kStages * Stage::kBytes];
    alignas(1024) uint8_t out[2][2][kChunkBytes];  // [warpgroup][alternating]
    float scale[2][kTokens];
    uint64_t full[kStages];
    uint64_t empty[kStages];
  };
  static constexpr int kSharedBytes = sizeof(Shared);
};

struct Tile {
  int rows, tokens;  // of the pair of row tiles, of the token tile
};

__device__ __forceinline__ Tile tile_at(int index, int row_pairs, int token_tiles) {
  const int per_group = kTokenTileGroup * row_pairs;
  const int group = index / per_group;
  const int width = min(kTokenTileGroup, token_tiles - group * kTokenTileGroup);
  const int within = index - group * per_group;
  return {within / width, group * kTokenTileGroup + within % width};
}

template <int kTokens, int kTiles, int kStages, bool kGrouped>
__global__ void __launch_bounds__(kConsumers + 128, 1)
    many_tokens(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap y_map,
                const Problem p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Kernel = ManyTokens<kTokens, kTiles, kStages>;
  using Stage = typename Kernel::Stage;
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(raw);
  const int warpgroup = threadIdx.x / 128;
  const uint32_t rank = cluster_rank();
  const int row_pairs = (p.n + kPair * Kernel::kRows - 1) / (kPair * Kernel::kRows);
  const int token_tiles = (p.m + kTokens - 1) / kTokens;
  const int tiles = row_pairs * token_tiles;
  const int clusters = gridDim.x / kPair;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&shared.full[i], 1);
      barrier_init(&shared.empty[i], kPair * kConsumers / 32);
    }
    fence_barrier_init();
  }
  cluster_arrive_relaxed();
  cluster_wait();

  if (warpgroup == 0) {
    lower_registers<40>();
    if (threadIdx.x == 0) {
      prefetch_tensor_map(&w_map);
      prefetch_tensor_map(&q_map);
      Cursor<kStages> cursor;
      cursor.parity = 1;  // a fresh barrier has completed the phase before its first
      for (int index = blockIdx.x / kPair; index < tiles; index += clusters) {
        const Tile tile = tile_at(index, row_pairs, token_tiles);
        const int row = (tile.rows * kPair + int(rank)) * Kernel::kRows;
        const int token = tile.tokens * kTokens + int(rank) * (kTokens / kPair);
        for (int step = 0; step < p.steps; ++step) {
          barrier_wait(&shared.empty[cursor.stage], cursor.parity);
          uint8_t* stage = shared.ring + cursor.stage * Stage::kBytes;
          uint64_t* full = &shared.full[cursor.stage];
          barrier_expect(full, Stage::kBytes);
          copy_box(stage, &w_map, full, step * kWeightRow, row, Keep::kNormal);
          copy_box_to(stage + Stage::kWeightBytes + int(rank) * (Stage::kTokenBytes / kPair), &q_map, full, step * kBlockK, token,
                      (1 << kPair) - 1, Keep::kNormal);
          cursor.advance();
        }
      }
    }
  } else {
    raise_registers<232>();
    const int consumer = warpgroup - 1;
    const int thread = threadIdx.x % 128;
    const int lane = threadIdx.x % 32;
    const int quad = lane % 4;
    const int row_in_warpgroup = thread / 32 * 16 + lane / 4;
    Cursor<kStages> cursor;
    int chunks = 0;
    for (int index = blockIdx.x / kPair; index < tiles; index += clusters) {
      const Tile tile = tile_at(index, row_pairs, token_tiles);
      const int row0 = (tile.rows * kPair + int(rank)) * Kernel::kRows + consumer * 64 * kTiles;
      const int token0 = tile.tokens * kTokens;

      // What the epilogue will want is asked for now.
      float token_scale[(kTokens + 127) / 128];
#pragma unroll
      for (int i = 0; i < kTokens / 128; ++i) {
        const int token = token0 + thread + 128 * i;
        token_scale[i] = token < p.m ? __ldg(p.scale + token) : 0.f;
      }
      float w_scale[kTiles][2], bias[kTiles][2];
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = row0 + 64 * t + row_in_warpgroup + 8 * half;
          w_scale[t][half] = !kGrouped && row < p.n ? __ldg(p.w_scale + row) : 0.0625f;
          bias[t][half] = p.bias != nullptr && row < p.n ? __ldg(p.bias + row) : 0.f;
        }

      Sums<kTokens, kTiles, kGrouped> sums;
      multiply<Kernel::kRows, kTokens, kTiles, kStages, kGrouped>(
          sums, cursor, shared.ring, shared.full, p.steps, consumer * 64 * kTiles + row_in_warpgroup, quad,
          [&](int stage) {
            if (lane < kPair) barrier_arrive_at(&shared.empty[stage], lane);
          },
          [&](int t, int half, int step) {
            const int row = min(row0 + 64 * t + row_in_warpgroup + 8 * half, p.n - 1);
            return __ldg(p.w_scale + size_t(row) * p.steps + step);
          });

#pragma unroll
      for (int i = 0; i < kTokens / 128; ++i) shared.scale[consumer][thread + 128 * i] = token_scale[i];
#pragma unroll
      for (int chunk = 0; chunk < kTokens / kChunk; ++chunk) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          uint8_t* out = shared.out[consumer][chunks++ % 2];
          if (thread == 0) store_wait_read<1>();
          named_barrier(1 + consumer, 128);
#pragma unroll
          for (int j = 0; j < kChunk / 8; j += 2) {  // two octets of tokens
            uint32_t pairs[4];
#pragma unroll
            for (int octet = 0; octet < 2; ++octet) {
              const int column = chunk * kChunk + (j + octet) * 8 + 2 * quad;
              const float2 scale = *reinterpret_cast<const float2*>(&shared.scale[consumer][column]);
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const int i = (chunk * (kChunk / 8) + j + octet) * 4 + 2 * half;
                const float low = finish(sums.value(t, i), w_scale[t][half], scale.x, bias[t][half]);
                const float high = finish(sums.value(t, i + 1), w_scale[t][half], scale.y, bias[t][half]);
                if (p.dtype == FQ_FLOAT) {
                  const int row = row0 + 64 * t + row_in_warpgroup + 8 * half;
                  float* y = static_cast<float*>(p.y) + size_t(token0 + column) * p.n + row;
                  if (row < p.n && token0 + column < p.m) y[0] = low;
                  if (row < p.n && token0 + column + 1 < p.m) y[p.n] = high;
                } else {
                  pairs[2 * octet + half] = pack_pair(low, high, p.dtype);
                }
              }
            }
            if (p.dtype != FQ_FLOAT) {
              // Lane l names row l % 8 of matrix l / 8: a token's eight channels, 16 bytes of its swizzled 128-byte row.
              const int token = (j + lane / 16) * 8 + lane % 8;
              const int piece = thread / 32 * 2 + lane / 8 % 2;
              store_matrices_transposed(shared_address(out) + token * 128 + ((piece ^ (token % 8)) * 16), pairs);
            }
          }
          fence_async_shared();
          named_barrier(1 + consumer, 128);
          if (thread == 0) {
            if (p.dtype != FQ_FLOAT) store_box(&y_map, out, row0 + 64 * t, token0 + chunk * kChunk);
            store_commit();
          }
        }
      }
    }
    if (thread == 0) store_wait_read<0>();
  }
  // A block's barriers and ring must outlive its partner's copies and arrivals.
  cluster_arrive_relaxed();
  cluster_wait();
#endif
}

// ---- few tokens ----

constexpr int kFewRows = 128;
constexpr int kPartialPitch = kFewRows + 4;  // 32-bit words a token: rows of a column fall into different banks

template <int kTokens>
struct FewTokens {
  using Stage = Stage<kFewRows, kTokens>;
  static constexpr int kStages = 100 * 1024 / Stage::kBytes;  // two blocks fit a multiprocessor
  struct Shared {
    alignas(1024) uint8_t ring[kStages * Stage::kBytes];  // afterwards the sums, [kTokens][kPartialPitch]
    float scale[kTokens];
    uint64_t full[kStages];
    uint64_t empty[kStages];
  };
  static_assert(kTokens * kPartialPitch * 4 <= kStages * Stage::kBytes, "the sums take the ring's place");
  static constexpr int kSharedBytes = sizeof(Shared);
};

__device__ __forceinline__ int4 load_from_block(const void* place, uint32_t block) {
  uint32_t address;
  int4 value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(place)), "r"(block));
  asm volatile("ld.shared::cluster.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

template <int kTokens, bool kGrouped>
__global__ void __launch_bounds__(kConsumers + 32, kGrouped && kTokens >= 32 ? 1 : 2)
    few_tokens(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap q_map, const Problem p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Kernel = FewTokens<kTokens>;
  using Stage = typename Kernel::Stage;
  constexpr int kStages = Kernel::kStages;
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(raw);
  const int splits = gridDim.y;  // the cluster
  const int split = blockIdx.y;
  const int row0 = blockIdx.x * kFewRows;
  const int token0 = blockIdx.z * kTokens;
  const int first = p.steps * split / splits;
  const int steps = p.steps * (split + 1) / splits - first;

  if (threadIdx.x == kConsumers) {
    prefetch_tensor_map(&w_map);
    prefetch_tensor_map(&q_map);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&shared.full[i], 1);
      barrier_init(&shared.empty[i], kConsumers / 32);
    }
    fence_barrier_init();
    // The ring is empty: its first copies need no barrier but their own.
    for (int i = 0; i < min(kStages, steps); ++i) {
      uint8_t* stage = shared.ring + i * Stage::kBytes;
      barrier_expect(&shared.full[i], Stage::kBytes);
      copy_box(stage, &w_map, &shared.full[i], (first + i) * kWeightRow, row0, Keep::kFirstOut);
      copy_box(stage + Stage::kWeightBytes, &q_map, &shared.full[i], (first + i) * kBlockK, token0, Keep::kLastOut);
    }
  }
  // What the epilogue will want is asked for now: a thread finishes four neighbouring channels of some tokens.
  const int channel = row0 + threadIdx.x % 32 * 4;
  float4 w_scale = {1.f / 16, 1.f / 16, 1.f / 16, 1.f / 16}, bias = {};
  if (channel < p.n) {
    if (!kGrouped) w_scale = __ldg(reinterpret_cast<const float4*>(p.w_scale + channel));
    if (p.bias != nullptr) bias = __ldg(reinterpret_cast<const float4*>(p.bias + channel));
  }
  if (threadIdx.x < kTokens) shared.scale[threadIdx.x] = token0 + threadIdx.x < p.m ? __ldg(p.scale + token0 + threadIdx.x) : 0.f;
  __syncthreads();

  if (threadIdx.x >= kConsumers) {
    if (threadIdx.x == kConsumers) {
      Cursor<kStages> cursor;
      for (int i = kStages; i < steps; ++i) {
        barrier_wait(&shared.empty[cursor.stage], cursor.parity);
        uint8_t* stage = shared.ring + cursor.stage * Stage::kBytes;
        uint64_t* full = &shared.full[cursor.stage];
        barrier_expect(full, Stage::kBytes);
        copy_box(stage, &w_map, full, (first + i) * kWeightRow, row0, Keep::kFirstOut);
        copy_box(stage + Stage::kWeightBytes, &q_map, full, (first + i) * kBlockK, token0, Keep::kLastOut);
        cursor.advance();
      }
    }
    __syncwarp();
  } else {
    const int lane = threadIdx.x % 32;
    const int quad = lane % 4;
    const int row = threadIdx.x / 32 * 16 + lane / 4;
    Cursor<kStages> cursor;
    Sums<kTokens, 1, kGrouped> sums;
    multiply<kFewRows, kTokens, 1, kStages, kGrouped>(
        sums, cursor, shared.ring, shared.full, steps, row, quad,
        [&](int stage) {
          if (lane == 0) barrier_arrive(&shared.empty[stage]);
        },
        [&](int, int half, int step) {
          return __ldg(p.w_scale + size_t(min(row0 + row + 8 * half, p.n - 1)) * p.steps + first + step);
        });
    named_barrier(1, kConsumers);  // both warpgroups have read the ring for the last time
    auto* partial = reinterpret_cast<int32_t*>(shared.ring);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int token = i / 4 * 8 + quad * 2 + i % 2;
      int32_t value = sums.whole[0][i] >> 4;
      if constexpr (kGrouped) value = __float_as_int(sums.scaled[0][i]);
      partial[token * kPartialPitch + row + i / 2 % 2 * 8] = value;
    }
  }
  if (splits > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }

  if (threadIdx.x < kConsumers) {
    const int tokens = min(kTokens, p.m - token0);
    for (int i = split * kConsumers + threadIdx.x; i < tokens * 32; i += splits * kConsumers) {
      const int token = i / 32;
      const auto* place = reinterpret_cast<const int32_t*>(shared.ring) + token * kPartialPitch + i % 32 * 4;
      float4 sum;
      if (splits == 1) {
        const int4 v = *reinterpret_cast<const int4*>(place);
        sum = kGrouped ? make_float4(__int_as_float(v.x), __int_as_float(v.y), __int_as_float(v.z), __int_as_float(v.w))
                       : make_float4(__int2float_rn(v.x), __int2float_rn(v.y), __int2float_rn(v.z), __int2float_rn(v.w));
      } else if constexpr (kGrouped) {
        sum = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int block = 0; block < splits; ++block) {  // always in this order: the same bits each time
          const int4 v = load_from_block(place, block);
          sum = make_float4(sum.x + __int_as_float(v.x), sum.y + __int_as_float(v.y), sum.z + __int_as_float(v.z), sum.w + __int_as_float(v.w));
        }
      } else {
        int4 v = load_from_block(place, 0);
        for (int block = 1; block < splits; ++block) {
          const int4 other = load_from_block(place, block);
          v = make_int4(v.x + other.x, v.y + other.y, v.z + other.z, v.w + other.w);
        }
        sum = make_float4(__int2float_rn(v.x), __int2float_rn(v.y), __int2float_rn(v.z), __int2float_rn(v.w));
      }
      if (channel >= p.n) continue;
      const float scale = shared.scale[token];
      const float y[4] = {finish(sum.x, w_scale.x, scale, bias.x), finish(sum.y, w_scale.y, scale, bias.y),
                          finish(sum.z, w_scale.z, scale, bias.z), finish(sum.w, w_scale.w, scale, bias.w)};
      const size_t at = size_t(token0 + token) * p.n + channel;
      if (p.dtype == FQ_FLOAT) {
        *reinterpret_cast<float4*>(static_cast<float*>(p.y) + at) = make_float4(y[0], y[1], y[2], y[3]);
      } else {
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.y) + at) =
            make_uint2(pack_pair(y[0], y[1], p.dtype), pack_pair(y[2], y[3], p.dtype));
      }
    }
  }
  if (splits > 1) {  // the others may still be reading this block's sums
    cluster_arrive();
    cluster_wait();
  }
#endif
}

// ---- host ----

constexpr const char* kName = "W4A4Gemm wgmma_s8";

struct Launch {
  dim3 grid, cluster;
  int threads, shared_bytes;
};

template <typename Kernel, typename... Arguments>
fq_status launch_kernel(Kernel* kernel, const Launch& launch, cudaStream_t stream, const Arguments&... arguments) {
  // Once a kernel and process would do, but devices may differ: it costs a fraction of a microsecond.
  if (const fq_status status = check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes), kName))
    return status;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {launch.cluster.x, launch.cluster.y, launch.cluster.z};
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid;
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return check(cudaLaunchKernelEx(&config, kernel, arguments...), kName);
}

Problem problem_of(const fq_w4a4_gemm_params& p) {
  return {p.scale, p.w_scale, p.bias, p.y, int(p.m), int(p.n), int(p.k / kBlockK), p.dtype};
}

Matrix weights_of(const fq_w4a4_gemm_params& p) {
  return {p.w, uint64_t(p.n), uint64_t(p.k / 2), uint64_t(p.k / 2), CU_TENSOR_MAP_DATA_TYPE_UINT8, 1};
}

Matrix codes_of(const fq_w4a4_gemm_params& p) {
  return {p.q, uint64_t(p.m), uint64_t(p.k), uint64_t(p.k), CU_TENSOR_MAP_DATA_TYPE_UINT8, 1};
}

template <int kTokens, int kTiles, int kStages, bool kGrouped>
fq_status launch_many(const fq_w4a4_gemm_params& p, const Device& device, cudaStream_t stream) {
  using Kernel = ManyTokens<kTokens, kTiles, kStages>;
  static_assert(Kernel::kSharedBytes <= 227 * 1024, "more than a multiprocessor has");
  CUtensorMap w_map, q_map, y_map = {};
  if (const fq_status status = make_tensor_map(&w_map, weights_of(p), Kernel::kRows, kWeightRow, CU_TENSOR_MAP_SWIZZLE_NONE)) return status;
  if (const fq_status status = make_tensor_map(&q_map, codes_of(p), kTokens / kPair, kBlockK, CU_TENSOR_MAP_SWIZZLE_128B)) return status;
  if (p.dtype != FQ_FLOAT) {
    const Matrix y = {p.y, uint64_t(p.m), uint64_t(p.n), uint64_t(p.n) * 2, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2};
    if (const fq_status status = make_tensor_map(&y_map, y, kChunk, 64, CU_TENSOR_MAP_SWIZZLE_128B)) return status;
  }
  const int64_t row_pairs = (p.n + kPair * Kernel::kRows - 1) / (kPair * Kernel::kRows);
  const int64_t clusters = std::min<int64_t>(row_pairs * ((p.m + kTokens - 1) / kTokens), device.multiprocessors / kPair);
  const Launch launch = {dim3(unsigned(clusters * kPair)), dim3(kPair, 1, 1), kConsumers + 128, Kernel::kSharedBytes};
  return launch_kernel(many_tokens<kTokens, kTiles, kStages, kGrouped>, launch, stream, w_map, q_map, y_map, problem_of(p));
}

template <int kTokens, bool kGrouped>
fq_status launch_few(const fq_w4a4_gemm_params& p, const Device& device, cudaStream_t stream) {
  using Kernel = FewTokens<kTokens>;
  CUtensorMap w_map, q_map;
  if (const fq_status status = make_tensor_map(&w_map, weights_of(p), kFewRows, kWeightRow, CU_TENSOR_MAP_SWIZZLE_NONE)) return status;
  if (const fq_status status = make_tensor_map(&q_map, codes_of(p), kTokens, kBlockK, CU_TENSOR_MAP_SWIZZLE_128B)) return status;
  const int64_t row_tiles = (p.n + kFewRows - 1) / kFewRows, token_tiles = (p.m + kTokens - 1) / kTokens, steps = p.k / kBlockK;
  // Enough blocks to keep nearly every multiprocessor asking for weights; more than that costs more adding up than it gains.
  int64_t splits = 1;
  while (splits < 8 && row_tiles * token_tiles * splits * 10 < device.multiprocessors * 9 && steps >= 4 * splits) splits *= 2;
  const Launch launch = {dim3(unsigned(row_tiles), unsigned(splits), unsigned(token_tiles)), dim3(1, unsigned(splits), 1), kConsumers + 32,
                         Kernel::kSharedBytes};
  return launch_kernel(few_tokens<kTokens, kGrouped>, launch, stream, w_map, q_map, problem_of(p));
}

template <bool kGrouped>
fq_status launch_few_tokens(const fq_w4a4_gemm_params& p, const Device& device, cudaStream_t stream) {
  if (p.m <= 8) return launch_few<8, kGrouped>(p, device, stream);
  if (p.m <= 16) return launch_few<16, kGrouped>(p, device, stream);
  if (p.m <= 32) return launch_few<32, kGrouped>(p, device, stream);
  return launch_few<64, kGrouped>(p, device, stream);
}

enum Tactic { kFew = 1, kMany256x128, kMany128x256, kMany128x128, kTactics = kMany128x128 };

// Time in the units of a 128 x 128 tile of the tensor cores: waves of tiles, each with a share for its beginning and its end.
int choose(const fq_w4a4_gemm_params& p, const Device& device) {
  if (p.m <= 64) return kFew;
  if (p.groups > 1) return kMany128x128;
  const auto cost = [&](int64_t rows, int64_t tokens, double overhead) {
    const int64_t tiles = (p.n + 2 * rows - 1) / (2 * rows) * ((p.m + tokens - 1) / tokens);
    const int64_t clusters = device.multiprocessors / kPair;
    return double((tiles + clusters - 1) / clusters) * (double(rows * tokens) / (128 * 128) + overhead);
  };
  const double big = cost(256, 128, 0.1), wide = cost(128, 256, 0.1), small = cost(128, 128, 0.25);
  if (small < std::min(big, wide)) return kMany128x128;
  return big <= wide ? kMany256x128 : kMany128x256;
}

const char* fits(const fq_w4a4_gemm_params& p, const Device& device) {
  if (device.capability != 90) return "it needs compute capability 9.0";
  if (p.container != FQ_INT8) return "it takes the int8 container";
  if (p.layout != FQ_K128) return "it takes weight layout k128";
  if (p.k % kBlockK != 0) return "it takes multiples of 128 as K";
  if (p.groups != 1 && p.k / p.groups != kBlockK) return "it takes a scale per channel or per group of 128";
  return nullptr;
}

fq_status launch(const fq_w4a4_gemm_params& p, const Device& device, cudaStream_t stream) {
  const int tactic = p.tactic != 0 ? p.tactic : choose(p, device);
  if (p.groups > 1) return tactic == kFew ? launch_few_tokens<true>(p, device, stream) : launch_many<128, 1, 6, true>(p, device, stream);
  switch (tactic) {
    case kFew:
      return launch_few_tokens<false>(p, device, stream);
    case kMany256x128:
      return launch_many<128, 2, 5, false>(p, device, stream);
    case kMany128x256:
      return launch_many<256, 1, 4, false>(p, device, stream);
    default:
      return launch_many<128, 1, 7, false>(p, device, stream);
  }
}

}  // namespace

const GemmKernel W4A4Gemm_wgmma_s8 = {fits, launch, kTactics};

}  // namespace fq
