// W4A4Gemm on compute capability 9.0: Y^T = W X^T with wgmma on int8.
//
// The weights are the register operand: layout k128 stores the nibbles such that a thread's 16-byte load is its operands of four k = 32
// steps, unpacked by one shift and two ands as multiples of 16 (undone in the epilogue). The activations are the shared-memory operand, as
// they come. Both arrive through the copy engine, in stages of 128 along K:
//
//   many_tokens   persistent; a producer warpgroup and two consumer warpgroups of 64 or 128 channels each; pairs of blocks share their
//                 tokens by multicast; results leave through shared memory while the next tile's stages are on their way. With a scale per
//                 group, the sums of 64 tokens are scaled while the products of the next 64 are under way.
//   few_tokens    bound by the weights' way from memory: all blocks at once, a tile of 64 channels a warpgroup; warpgroups that are left take
//                 K in turn, and where it pays K is split over the blocks of a cluster, whose integer sums are added through distributed
//                 shared memory: no workspace, and the same bits in any order.

#include <algorithm>
#include <type_traits>

#include "cluster.cuh"
#include "kernel.h"
#include "launch.cuh"
#include "pairs.cuh"
#include "sm90.cuh"
#include "wgmma_s8.cuh"

namespace fq {
namespace {

using namespace sm90;

constexpr int kBlockK = 128;            // what the layout orders: a row of activations is one 128-byte swizzle row
constexpr int kWeightRow = kBlockK / 2;  // bytes of a row of weights in a block of K
constexpr int kConsumers = 256;
constexpr uint32_t kFull = 0xffffffffu;

struct Problem {
  const float* scale;
  const float* w_scale;
  const float* bias;  // or null
  void* y;
  int m, n;
  int steps;  // K / 128; groups where kGrouped
  int dtype;
  bool constant_weights;
};

// How the blocks of few_tokens share out a product: `rows` channels each, and of K `stages` stages, the first `longer` blocks of a cluster
// one more; `ring` stages fit into shared memory.
struct Parts {
  int rows, stages, longer, ring;
};

// ---- what both kernels do with a stage ----

// The weights' registers of one stage, unpacked: operands of the four k = 32 steps.
using Operands = uint32_t[4][4];

// A thread's 32 nibbles at `place` and those of the row 8 below, in rows of kPitch bytes.
template <int kPitch>
__device__ __forceinline__ void load_operands(Operands& a, const uint8_t* place) {
  const uint4 upper = *reinterpret_cast<const uint4*>(place);
  const uint4 lower = *reinterpret_cast<const uint4*>(place + 8 * kPitch);
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

// Stages in shared memory: weights, then activations [kBlocks][kTokens, 128 bytes] in swizzled rows. kRun blocks of K of a row of weights lie
// beside each other: [kBlocks / kRun][rows, 64 kRun bytes], and rows of 128 bytes are swizzled as well.
template <int kTokens, int kBlocks, int kRun>
struct Ring {
  static constexpr int kPitch = kRun * kWeightRow;
  static constexpr int kTokenBytes = kTokens * kBlockK;  // of one block of K
  static_assert(kTokenBytes % 1024 == 0, "swizzled rows repeat every 1,024 bytes");
  static_assert(kBlocks % kRun == 0, "whole runs");
  uint8_t* base;
  int rows, stages;  // rows: a multiple of 16

  __host__ __device__ static constexpr int bytes(int rows) { return kBlocks * (rows * kWeightRow + kTokenBytes); }
  __device__ __forceinline__ uint8_t* weights(int stage, int run) const { return base + stage * bytes(rows) + run * rows * kPitch; }
  __device__ __forceinline__ uint8_t* tokens(int stage, int block) const {
    return base + stage * bytes(rows) + kBlocks * rows * kWeightRow + block * kTokenBytes;
  }
};

// Where a ring stands: which stage, and the parity of its barriers.
struct Cursor {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
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

// One warpgroup's product over the `steps` stages of a ring, a block of K each; a stage is given back when the next one's products are under
// way, so that the tensor cores never wait. `row` is the thread's row in the stage of its first tile, `release(stage)` gives a stage back.
template <int kTokens, int kTiles, typename Ring, typename Release>
__device__ __forceinline__ void multiply(Sums<kTokens, kTiles, false>& sums, Cursor& cursor, const Ring& ring, uint64_t* full, int steps, int row,
                                         int quad, Release release) {
  Operands a[2][kTiles];
  const auto load = [&](Operands(&operands)[kTiles]) {
    barrier_wait(&full[cursor.stage], cursor.parity);
    const uint8_t* place = ring.weights(cursor.stage, 0) + row * kWeightRow + quad * 16;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) load_operands<kWeightRow>(operands[tile], place + 64 * tile * kWeightRow);
  };
  load(a[0]);
  int previous = -1;  // the stage whose products may still be reading
  const auto step = [&](Operands(&now)[kTiles], Operands(&next)[kTiles], int index) {
    const int stage = cursor.stage;
    const uint64_t tokens = descriptor_128b(shared_address(ring.tokens(stage, 0)));
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
        WgmmaS8<kTokens>::run(sums.whole[tile], now[tile][j], tokens + 2 * j, j > 0 || index > 0);
    wgmma_commit();
    cursor.advance(ring.stages);
    wgmma_wait<1>();  // the step before has read its stage and its registers
    if (previous >= 0) release(previous);
    previous = stage;
    if (index + 1 < steps) load(next);
  };
  int index = 0;
  for (; index + 1 < steps; index += 2) {
    step(a[0], a[1], index);
    step(a[1], a[0], index + 1);
  }
  if (index < steps) step(a[0], a[1], index);
  wgmma_wait<0>();
  release(previous);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) settle(sums.whole[tile]);
}

// The same with a scale per block of K, for one tile of many tokens, 64 at a time: while the sums of some are scaled and added, the products of the
// next 64 are under way. Two blocks of K a turn of the loop, at the end of which nothing is: sums on their way across it would be copied.
template <int kTokens, typename Ring, typename Release, typename GroupScale>
__device__ __forceinline__ void multiply_scaled(Sums<kTokens, 1, true>& sums, Cursor& cursor, const Ring& ring, uint64_t* full, int steps, int row,
                                                int quad, Release release, GroupScale group_scale) {
  constexpr int kPart = 64, kParts = kTokens / kPart;
  Operands a[2];
  int32_t whole[2][kPart / 2];
  auto& scaled = sums.scaled[0];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) scaled[i] = 0;
  float scales[2][2] = {{group_scale(0, 0), group_scale(1, 0)}, {}};
  const auto load = [&](Operands& operands) {
    barrier_wait(&full[cursor.stage], cursor.parity);
    load_operands<kWeightRow>(operands, ring.weights(cursor.stage, 0) + row * kWeightRow + quad * 16);
  };
  const auto begin = [&](Operands& operands, int32_t(&sum)[kPart / 2], int stage, int part) {
    const uint64_t tokens = descriptor_128b(shared_address(ring.tokens(stage, 0)) + part * kPart * kBlockK);
    settle(operands);
    settle(sum);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) WgmmaS8<kPart>::run(sum, operands[j], tokens + 2 * j, j > 0);
    wgmma_commit();
  };
  const auto take = [&](auto blocks, int index) {
    constexpr int kBlocks = decltype(blocks)::value, kAll = kBlocks * kParts;
    int stage[2] = {cursor.stage, 0};
    begin(a[0], whole[0], stage[0], 0);
    begin(a[0], whole[1], stage[0], 1);
    cursor.advance(ring.stages);
    if constexpr (kBlocks == 2) {
      stage[1] = cursor.stage;
#pragma unroll
      for (int half = 0; half < 2; ++half) scales[1][half] = group_scale(half, index + 1);
      load(a[1]);
      cursor.advance(ring.stages);
    }
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
      if (i + 1 < kAll)
        wgmma_wait<1>();
      else
        wgmma_wait<0>();
      if (i % kParts == kParts - 1) release(stage[i / kParts]);
      settle(whole[i % 2]);
#pragma unroll
      for (int k = 0; k < kPart / 2; ++k) {
        float& sum = scaled[i % kParts * (kPart / 2) + k];
        sum = fmaf(__int2float_rn(whole[i % 2][k]), scales[i / kParts][k / 2 % 2], sum);
      }
      if (i + 2 < kAll) begin(a[(i + 2) / kParts], whole[i % 2], stage[(i + 2) / kParts], (i + 2) % kParts);
      if (kBlocks == 2 && i + 3 == kAll && index + 2 < steps) {  // nothing wants the first block's operands and scales any more
#pragma unroll
        for (int half = 0; half < 2; ++half) scales[0][half] = group_scale(half, index + 2);
        load(a[0]);
      }
    }
  };
  load(a[0]);
  int index = 0;
#pragma unroll 1
  for (; index + 1 < steps; index += 2) take(std::integral_constant<int, 2>(), index);
  if (index < steps) take(std::integral_constant<int, 1>(), index);
}

// One warpgroup's part of the product over `stages` stages: of each, kMine blocks of K from `first_block` on, for kTiles tiles of which the
// thread's first row is `row`. A stage is given back as soon as it has been read: memory fills the ring. What a warp does besides unpacking
// counts, for four of them share a scheduler: hence the straight line over a stage. `group_scale(tile, half, stage, block)` is the scale of
// row + 64 tile + 8 half.
template <int kMine, int kTokens, int kTiles, bool kGrouped, typename Ring, typename Release, typename GroupScale>
__device__ __forceinline__ void multiply_few(Sums<kTokens, kTiles, kGrouped>& sums, const Ring& ring, uint64_t* full, int stages,
                                             int first_block, int row, int quad, Release release, GroupScale group_scale) {
  static_assert(Ring::kPitch == 2 * kWeightRow, "swizzled rows of two blocks");
  constexpr int kSteps = kMine * kTiles;  // of a stage: a tile's block of K each
  Operands a[2];
  Cursor cursor;
  // Of the thread's 16 bytes in a run: swizzled, and of the first block's half. A warp's rows of the last tile exist or not.
  const int piece = ((quad | first_block % 2 * 4) ^ row % 8) * 16;
  const int last_row = row + 64 * (kTiles - 1) < ring.rows ? row + 64 * (kTiles - 1) : row % 8;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      if constexpr (kGrouped)
        sums.scaled[tile][i] = 0;
      else
        sums.whole[tile][i] = 0;
    }
  const auto load = [&](Operands& operands, int step) {
    const int tile = step % kTiles, block = step / kTiles;
    const int at = (tile == kTiles - 1 ? last_row : row + 64 * tile) * Ring::kPitch + (piece ^ block % 2 * kWeightRow);
    load_operands<Ring::kPitch>(operands, ring.weights(cursor.stage, (first_block + block) / 2) + at);
  };
  const auto take = [&](Operands& first, Operands& second, int index) {
    const int stage = cursor.stage;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int tile = step % kTiles, block = step / kTiles;
      Operands& now = step % 2 == 0 ? first : second;
      Operands& next = step % 2 == 0 ? second : first;
      int32_t(&whole)[kTokens / 2] = sums.whole[kGrouped ? 0 : tile];
      float scales[2];
      if constexpr (kGrouped) {
        scales[0] = group_scale(tile, 0, index, block);
        scales[1] = group_scale(tile, 1, index, block);
      }
      const uint64_t tokens = descriptor_128b(shared_address(ring.tokens(stage, first_block + block)));
      settle(now);
      settle(whole);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j) WgmmaS8<kTokens>::run(whole, now[j], tokens + 2 * j, !kGrouped || j > 0);
      wgmma_commit();
      if (step + 1 < kSteps) {
        wgmma_wait<1>();  // the step before has read its registers
        load(next, step + 1);
      } else {
        // What is there already is unpacked beside these products; else they are done first, and their stage on its way back.
        cursor.advance(ring.stages);
        const bool more = index + 1 < stages;
        const bool there = more && __all_sync(kFull, barrier_test(&full[cursor.stage], cursor.parity));
        wgmma_wait<1>();
        if (there) load(next, 0);
        wgmma_wait<0>();
        release(stage);
        if (more && !there) {
          barrier_wait(&full[cursor.stage], cursor.parity);
          load(next, 0);
        }
      }
      if constexpr (kGrouped) {
        wgmma_wait<0>();
        settle(whole);
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i)
          sums.scaled[tile][i] = fmaf(__int2float_rn(whole[i]), scales[i / 2 % 2], sums.scaled[tile][i]);
      }
    }
  };
  if (stages == 0) return;  // K has fewer than one for each block of the cluster
  barrier_wait(&full[0], 0);
  load(a[0], 0);
  if constexpr (kSteps % 2 == 0) {
#pragma unroll 1
    for (int index = 0; index < stages; ++index) take(a[0], a[1], index);
  } else {
#pragma unroll 1
    for (int index = 0; index < stages; index += 2) {
      take(a[0], a[1], index);
      if (index + 1 < stages) take(a[1], a[0], index + 1);
    }
  }
  if constexpr (!kGrouped) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) settle(sums.whole[tile]);
  }
}

// ((sum * w_scale) * scale) + bias, rounded after each: the reference's order.
__device__ __forceinline__ float finish(float sum, float w_scale, float scale, float bias) {
  return __fadd_rn(__fmul_rn(__fmul_rn(sum, w_scale), scale), bias);
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, int dtype) {
  return dtype == FQ_BFLOAT16 ? pack<__nv_bfloat16>(low, high) : pack<__half>(low, high);
}

__device__ __forceinline__ void store_matrices_transposed(uint32_t address, const uint32_t (&pairs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(pairs[0]), "r"(pairs[1]),
               "r"(pairs[2]), "r"(pairs[3])
               : "memory");
}

__device__ __forceinline__ void store_matrices_transposed(uint32_t address, uint32_t first, uint32_t second) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(first), "r"(second) : "memory");
}

// ---- many tokens ----

constexpr int kPair = 2;             // blocks of a cluster: one above the other along the channels, the same tokens
constexpr int kChunk = 64;           // tokens that leave at once
constexpr int kChunkBytes = kChunk * 64 * 2;
constexpr int kTokenTileGroup = 8;   // token tiles that are worked on side by side, for the second-level cache

template <int kTokens, int kTiles, int kStages>
struct ManyTokens {
  static constexpr int kRows = 2 * 64 * kTiles;
  static constexpr int kStageBytes = Ring<kTokens, 1, 1>::bytes(kRows);
  struct Shared {
    alignas(1024) uint8_t ring[kStages * kStageBytes];
    alignas(1024) uint8_t out[2][2][kChunkBytes];  // [warpgroup][alternating]
    float scale[2][kTokens];
    uint64_t full[kStages];
    uint64_t empty[kStages];
  };
  static constexpr int kSharedBytes = sizeof(Shared);
};

// How many there are.
struct Tiles {
  int row_pairs, tokens;
};

struct Tile {
  int rows, tokens;  // of the pair of row tiles, of the token tile
};

__device__ __forceinline__ Tile tile_at(int index, const Tiles& tiles) {
  const int per_group = kTokenTileGroup * tiles.row_pairs;
  const int group = index / per_group;
  const int width = min(kTokenTileGroup, tiles.tokens - group * kTokenTileGroup);
  const int within = index - group * per_group;
  return {within / width, group * kTokenTileGroup + within % width};
}

template <int kTokens, int kTiles, int kStages, bool kGrouped>
__global__ void __launch_bounds__(kConsumers + 128, 1)
    many_tokens(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap y_map,
                const Problem p, const Tiles tiles) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  static_assert(!kGrouped || kTiles == 1, "the integer and the fp32 sums of one tile fill the registers");
  using Kernel = ManyTokens<kTokens, kTiles, kStages>;
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(raw);
  const Ring<kTokens, 1, 1> ring = {shared.ring, Kernel::kRows, kStages};
  const int warpgroup = threadIdx.x / 128;
  const uint32_t rank = cluster_rank();
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
    lower_registers<24>();
    if (threadIdx.x == 0) {
      prefetch_tensor_map(&w_map);
      prefetch_tensor_map(&q_map);
      Cursor cursor;
      cursor.parity = 1;  // a fresh barrier has completed the phase before its first
      for (int index = blockIdx.x / kPair; index < tiles.row_pairs * tiles.tokens; index += clusters) {
        const Tile tile = tile_at(index, tiles);
        const int row = (tile.rows * kPair + int(rank)) * Kernel::kRows;
        const int token = tile.tokens * kTokens + int(rank) * (kTokens / kPair);
        for (int step = 0; step < p.steps; ++step) {
          barrier_wait(&shared.empty[cursor.stage], cursor.parity);
          uint64_t* full = &shared.full[cursor.stage];
          barrier_expect(full, Kernel::kStageBytes);
          copy_box(ring.weights(cursor.stage, 0), &w_map, full, step * kWeightRow, row, Keep::kNormal);
          copy_box_to(ring.tokens(cursor.stage, 0) + int(rank) * (ring.kTokenBytes / kPair), &q_map, full, step * kBlockK, token,
                      (1 << kPair) - 1, Keep::kNormal);
          cursor.advance(kStages);
        }
      }
    }
  } else {
    raise_registers<240>();
    const int consumer = warpgroup - 1;
    const int thread = threadIdx.x % 128;
    const int lane = threadIdx.x % 32;
    const int quad = lane % 4;
    const int row_in_warpgroup = thread / 32 * 16 + lane / 4;
    Cursor cursor;
    int chunks = 0;
    for (int index = blockIdx.x / kPair; index < tiles.row_pairs * tiles.tokens; index += clusters) {
      const Tile tile = tile_at(index, tiles);
      const int row0 = (tile.rows * kPair + int(rank)) * Kernel::kRows + consumer * 64 * kTiles;
      const int token0 = tile.tokens * kTokens;

      // What the epilogue will want is asked for now, where there are registers for it.
      float token_scale[(kTokens + 127) / 128];
      float w_scale[kTiles][2], bias[kTiles][2];
      const auto ask = [&] {
#pragma unroll
        for (int i = 0; i < (kTokens + 127) / 128; ++i) {
          const int token = token0 + thread + 128 * i;
          token_scale[i] = token < p.m ? __ldg(p.scale + token) : 0.f;
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = row0 + 64 * t + row_in_warpgroup + 8 * half;
            w_scale[t][half] = !kGrouped && row < p.n ? __ldg(p.w_scale + row) : 0.0625f;
            bias[t][half] = p.bias != nullptr && row < p.n ? __ldg(p.bias + row) : 0.f;
          }
      };
      if constexpr (!kGrouped) ask();

      Sums<kTokens, kTiles, kGrouped> sums;
      const auto release = [&](int stage) {
        if (lane < kPair) barrier_arrive_at(&shared.empty[stage], lane);
      };
      const int row = consumer * 64 * kTiles + row_in_warpgroup;
      if constexpr (kGrouped) {
        const float* const group_scales = p.w_scale + size_t(min(row0 + row_in_warpgroup, p.n - 9)) * p.steps;  // beyond N: of any row
        multiply_scaled(sums, cursor, ring, shared.full, p.steps, row, quad, release,
                        [&](int half, int step) { return __ldg(group_scales + (half * 8 * p.steps + step)); });
      } else {
        multiply(sums, cursor, ring, shared.full, p.steps, row, quad, release);
      }

      if constexpr (kGrouped) ask();
#pragma unroll
      for (int i = 0; i < (kTokens + 127) / 128; ++i)
        if (thread + 128 * i < kTokens) shared.scale[consumer][thread + 128 * i] = token_scale[i];
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

// Four warpgroups, for what a stage costs between its arrival and its release is latency; two where their sums would not fit the registers.
template <int kTokens, bool kGrouped>
constexpr int kFewWarpgroups = kGrouped && kTokens == 64 ? 2 : 4;

// How many of them share a tile and take its blocks of K in turn: as many as there are registers (and shared memory) for their sums.
template <int kTokens, int kTiles, bool kGrouped>
constexpr int few_slots() {
  if (kFewWarpgroups<kTokens, kGrouped> % kTiles == 0) return kFewWarpgroups<kTokens, kGrouped> / kTiles;
  constexpr int kAll = kFewWarpgroups<kTokens, kGrouped>, kMostTokens = kGrouped && kTokens < 64 ? 32 : 64;  // of a warpgroup, in all tiles
  int slots = kAll;
  while (kTokens * kTiles * slots > kMostTokens * kAll) slots /= 2;
  return slots;
}

// More than the memory's latency asks for; what is left of a multiprocessor lets the quantizer before stay while the weights come in.
constexpr int kFewRing = 144 * 1024;

// Blocks of `rows` channels, at most 64 kTiles and more than 64 (kTiles - 1).
template <int kTokens, int kTiles, bool kGrouped>
struct FewTokens {
  static constexpr int kWarpgroups = kFewWarpgroups<kTokens, kGrouped>;
  static constexpr int kConsumers = 128 * kWarpgroups;
  static constexpr int kRows = 64 * kTiles;
  static constexpr int kSlots = few_slots<kTokens, kTiles, kGrouped>();
  static constexpr int kOwnTiles = kTiles * kSlots / kWarpgroups;  // of a warpgroup
  static constexpr int kMine = kOwnTiles == 1 && (kSlots == 1 || kTokens <= 16) ? 2 : 1;  // blocks of a stage that a warpgroup takes
  static constexpr int kBlocks = kSlots * kMine;
  static constexpr int kRun = 2;  // blocks of K: 128 bytes of a row at once, for memory and the banks of shared memory
  using Ring = fq::Ring<kTokens, kBlocks, kRun>;
  static constexpr int kPitch = kRows + 4;  // 32-bit words a token: rows of a column fall into different banks
  static constexpr int kMostStages = 16;
  struct Sums {
    int32_t own[kSlots * kTokens * kPitch];
    int32_t others[kSlots * kTokens * kPitch];  // [other block][slot][tokens that this block finishes][kPitch]
  };
  struct Shared {
    union {
      alignas(1024) uint8_t ring[kFewRing];
      Sums sums;  // when nothing is in the ring any more
    };
    float scale[kTokens];
    alignas(16) float w_scale[kRows];
    alignas(16) float bias[kRows];
    uint64_t full[kMostStages];
    uint64_t empty[kMostStages];
    uint64_t arrived;  // the others' sums
  };
  static constexpr int kSharedBytes = sizeof(Shared);
  static_assert(kOwnTiles * kWarpgroups == kTiles * kSlots, "whole tiles");
  static_assert(2 * Ring::bytes(kRows) <= kFewRing && sizeof(Sums) <= kFewRing, "room for two stages, and for the sums");
  static_assert(kOwnTiles * kTokens / 8 * (kConsumers * 16 + kWarpgroups * 1024) <= kFewRing, "and for the slots' parts and results");
  static_assert(kRows <= kConsumers, "a thread a channel");
};

// Grid: row tiles of `rows`, splits of K (the cluster), token tiles.
template <int kTokens, int kTiles, bool kGrouped>
__global__ void __launch_bounds__(128 * kFewWarpgroups<kTokens, kGrouped> + 32, 1)
    few_tokens(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap q_map, const Problem p, const Parts parts) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Kernel = FewTokens<kTokens, kTiles, kGrouped>;
  constexpr int kBlocks = Kernel::kBlocks, kSlots = Kernel::kSlots, kConsumers = Kernel::kConsumers;
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(raw);
  const int rows = parts.rows;
  const typename Kernel::Ring ring = {shared.ring, rows, parts.ring};
  const int splits = gridDim.y;
  const int split = blockIdx.y;
  const int row0 = blockIdx.x * rows;
  const int token0 = blockIdx.z * kTokens;
  const int first = split * parts.stages + min(split, parts.longer);
  const int stages = parts.stages + (split < parts.longer);

  const auto fill_weights = [&](int i, int stage) {
    barrier_expect(&shared.full[stage], ring.bytes(rows));
#pragma unroll
    for (int run = 0; run < kBlocks / Kernel::kRun; ++run)
      copy_box(ring.weights(stage, run), &w_map, &shared.full[stage], ((first + i) * kBlocks + run * Kernel::kRun) * kWeightRow, row0,
               Keep::kFirstOut);
  };
  const auto fill_tokens = [&](int i, int stage) {
    copy_box(ring.tokens(stage, 0), &q_map, &shared.full[stage], 0, token0, (first + i) * kBlocks, Keep::kLastOut);
  };
  let_next_begin();
  if (!p.constant_weights) wait_for_work_before();
  if (threadIdx.x == kConsumers) {
    for (int i = 0; i < ring.stages; ++i) barrier_init(&shared.full[i], 1);
    fence_barrier_init();
    // An empty ring: nothing to wait for. Weights that nobody writes are on their way while the work before makes the tokens.
    for (int i = 0; i < min(ring.stages, stages); ++i) fill_weights(i, i);
    for (int i = 0; i < ring.stages; ++i) barrier_init(&shared.empty[i], kConsumers / 32);
    barrier_init(&shared.arrived, 1);
    fence_barrier_init();
    wait_for_work_before();
    for (int i = 0; i < min(ring.stages, stages); ++i) fill_tokens(i, i);
  }
  __syncthreads();

  if (threadIdx.x >= kConsumers) {
    if (kGrouped && threadIdx.x > kConsumers) {
      // The scales would come from memory one line after the other, each when it is wanted.
      const int lines = (min(stages * kBlocks, p.steps - first * kBlocks) + 31) / 32;
      for (int i = threadIdx.x - kConsumers - 1; i < rows * lines; i += 31)
        prefetch_second_level(p.w_scale + size_t(min(row0 + i / lines, p.n - 1)) * p.steps + first * kBlocks + i % lines * 32);
    }
    if (threadIdx.x == kConsumers) {
      Cursor cursor;
      for (int i = ring.stages; i < stages; ++i) {
        barrier_wait(&shared.empty[cursor.stage], cursor.parity);
        fill_weights(i, cursor.stage);
        fill_tokens(i, cursor.stage);
        cursor.advance(ring.stages);
      }
    }
    __syncwarp();
    if (splits > 1) {
      cluster_arrive_relaxed();
      cluster_wait();
      cluster_arrive_relaxed();
      cluster_wait();
    }
    return;
  }

  // What the epilogue will want is asked for now.
  if (threadIdx.x < Kernel::kRows) {
    const int channel = row0 + threadIdx.x;
    const bool exists = int(threadIdx.x) < rows && channel < p.n;
    shared.w_scale[threadIdx.x] = !kGrouped && exists ? __ldg(p.w_scale + channel) : 1.f / 16;
    shared.bias[threadIdx.x] = p.bias != nullptr && exists ? __ldg(p.bias + channel) : 0.f;
  }
  wait_for_work_before();
  if (threadIdx.x < kTokens) shared.scale[threadIdx.x] = token0 + threadIdx.x < p.m ? __ldg(p.scale + token0 + threadIdx.x) : 0.f;

  const int lane = threadIdx.x % 32;
  const int quad = lane % 4;
  const int slot = threadIdx.x / 128 % kSlots;
  // Rows 0, 4, 1, 5, 2, 6, 3, 7 in place of 0 to 7: of neighbours among these, swizzled, the same block lies in different banks.
  const int row = threadIdx.x / 128 / kSlots * Kernel::kOwnTiles * 64 + threadIdx.x % 128 / 32 * 16 + lane / 8 + lane / 4 % 2 * 4;
  Sums<kTokens, Kernel::kOwnTiles, kGrouped> sums;
  multiply_few<Kernel::kMine>(
      sums, ring, shared.full, stages, slot * Kernel::kMine, row, quad,
      [&](int stage) {
        if (lane == 0) barrier_arrive(&shared.empty[stage]);
      },
      [&](int tile, int half, int stage, int block) {
        const int group = (first + stage) * kBlocks + slot * Kernel::kMine + block;
        return __ldg(p.w_scale + size_t(min(row0 + row + 64 * tile + 8 * half, p.n - 1)) * p.steps + min(group, p.steps - 1));
      });

  if (splits == 1) {
    // Eight tokens of a tile are a unit. Slots add their sums up in shared memory, each for its units; 16-bit results leave through shared memory
    // too, a line of 64 channels at a time.
    constexpr int kOctets = kTokens / 8, kUnits = Kernel::kOwnTiles * kOctets;
    constexpr int kParts = kSlots == 1 ? 0 : kUnits * kConsumers;
    constexpr int kUnitBytes = 8 * 128;
    int4* const sums_of = reinterpret_cast<int4*>(shared.ring);  // [unit][thread]
    const int warpgroup = threadIdx.x / 128;
    uint8_t* const lines = shared.ring + kParts * 16 + warpgroup * kUnits * kUnitBytes;  // [unit][token][64 channels, swizzled]
    const int tile0 = warpgroup / kSlots * Kernel::kOwnTiles;
    const auto part = [&](int unit) {
      const int tile = unit / kOctets, i = unit % kOctets * 4;
      if constexpr (kGrouped)
        return make_int4(__float_as_int(sums.scaled[tile][i]), __float_as_int(sums.scaled[tile][i + 1]), __float_as_int(sums.scaled[tile][i + 2]),
                         __float_as_int(sums.scaled[tile][i + 3]));
      else
        return make_int4(sums.whole[tile][i], sums.whole[tile][i + 1], sums.whole[tile][i + 2], sums.whole[tile][i + 3]);
    };
    const auto finish_unit = [&](int unit, const int4& sum) {
      const int own = row + unit / kOctets * 64, octet = unit % kOctets * 8;
      const auto value = [&](int whole) {
        if constexpr (kGrouped) return __int_as_float(whole);
        return __int2float_rn(whole >> 4);
      };
      const float2 scale = *reinterpret_cast<const float2*>(shared.scale + octet + 2 * quad);
      float y[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float w_scale = shared.w_scale[own + 8 * half], bias = shared.bias[own + 8 * half];
        y[half][0] = finish(value(half == 0 ? sum.x : sum.z), w_scale, scale.x, bias);
        y[half][1] = finish(value(half == 0 ? sum.y : sum.w), w_scale, scale.y, bias);
      }
      if (p.dtype == FQ_FLOAT) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = token0 + octet + 2 * quad + i % 2, channel = own + i / 2 * 8;
          if (token < p.m && channel < rows && row0 + channel < p.n) static_cast<float*>(p.y)[size_t(token) * p.n + row0 + channel] = y[i / 2][i % 2];
        }
      } else {
        const int token = lane % 8, piece = threadIdx.x % 128 / 32 * 2 + lane / 8 % 2;
        store_matrices_transposed(shared_address(lines) + unit * kUnitBytes + token * 128 + (piece ^ token) * 16,
                                  pack_pair(y[0][0], y[0][1], p.dtype), pack_pair(y[1][0], y[1][1], p.dtype));
      }
    };
    named_barrier(1, kConsumers);  // all have read the ring for the last time, and the scales are there
    if constexpr (kSlots == 1) {
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) finish_unit(unit, part(unit));
    } else {
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) sums_of[unit * kConsumers + threadIdx.x] = part(unit);
      named_barrier(1, kConsumers);
      const int4* const first_slot = sums_of + threadIdx.x - slot * 128;
#pragma unroll 1
      for (int unit = slot; unit < kUnits; unit += kSlots) {
        int4 v[kSlots];
#pragma unroll
        for (int of = 0; of < kSlots; ++of) v[of] = first_slot[unit * kConsumers + of * 128];
#pragma unroll
        for (int of = 1; of < kSlots; ++of) {
          if constexpr (kGrouped) {
            v[0].x = __float_as_int(__int_as_float(v[0].x) + __int_as_float(v[of].x));
            v[0].y = __float_as_int(__int_as_float(v[0].y) + __int_as_float(v[of].y));
            v[0].z = __float_as_int(__int_as_float(v[0].z) + __int_as_float(v[of].z));
            v[0].w = __float_as_int(__int_as_float(v[0].w) + __int_as_float(v[of].w));
          } else {
            v[0] = make_int4(v[0].x + v[of].x, v[0].y + v[of].y, v[0].z + v[of].z, v[0].w + v[of].w);
          }
        }
        finish_unit(unit, v[0]);
      }
    }
    if (p.dtype == FQ_FLOAT) return;
    named_barrier(2 + warpgroup, 128);
    const int piece = threadIdx.x % 8, token_in_unit = threadIdx.x % 64 / 8;
#pragma unroll 1
    for (int unit = slot + threadIdx.x % 128 / 64 * kSlots; unit < kUnits; unit += 2 * kSlots) {
      const int channel = (tile0 + unit / kOctets) * 64 + piece * 8, token = token0 + unit % kOctets * 8 + token_in_unit;
      if (channel >= rows || row0 + channel >= p.n || token >= p.m) continue;
      const uint4 v = *reinterpret_cast<const uint4*>(lines + unit * kUnitBytes + token_in_unit * 128 + (piece ^ token_in_unit) * 16);
      // Channels 0, 4, 1, 5, 2, 6, 3, 7 to their order.
      *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.y) + size_t(token) * p.n + row0 + channel) =
          make_uint4(__byte_perm(v.x, v.y, 0x5410), __byte_perm(v.z, v.w, 0x5410), __byte_perm(v.x, v.y, 0x7632), __byte_perm(v.z, v.w, 0x7632));
    }
    return;
  }

  named_barrier(1, kConsumers);  // all have read the ring for the last time
  cluster_arrive_relaxed();
#pragma unroll
  for (int tile = 0; tile < Kernel::kOwnTiles; ++tile)
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      int32_t value;
      if constexpr (kGrouped)
        value = __float_as_int(sums.scaled[tile][i]);
      else
        value = sums.whole[tile][i] >> 4;
      shared.sums.own[(slot * kTokens + i / 4 * 8 + quad * 2 + i % 2) * Kernel::kPitch + row + 64 * tile + i / 2 % 2 * 8] = value;
    }
  // Every block of the cluster finishes some of the tokens: their sums go there.
  const int share = kTokens / splits;
  const uint32_t share_bytes = share * Kernel::kPitch * 4;
  fence_async_shared();
  named_barrier(1, kConsumers);
  cluster_wait();  // the others have read their rings too
  if (threadIdx.x == 0) {
    barrier_expect(&shared.arrived, (splits - 1) * kSlots * share_bytes);
#pragma unroll 1
    for (int i = 0; i < splits * kSlots; ++i) {
      const int to = i / kSlots, of = i % kSlots;
      if (to != split)
        copy_to_block(shared.sums.others + ((split < to ? split : split - 1) * kSlots + of) * share * Kernel::kPitch,
                      shared.sums.own + (of * kTokens + to * share) * Kernel::kPitch, share_bytes, &shared.arrived, to);
    }
  }
  __syncwarp();
  barrier_wait(&shared.arrived, 0);
  cluster_arrive_relaxed();

  // A thread finishes four neighbouring channels of some tokens.
  constexpr int kQuads = Kernel::kRows / 4, kAtOnce = kConsumers / kQuads;
  const int channel = threadIdx.x % kQuads * 4;
  const bool channel_exists = channel < rows && row0 + channel < p.n;
  const float4 w_scale = *reinterpret_cast<const float4*>(shared.w_scale + channel);
  const float4 bias = *reinterpret_cast<const float4*>(shared.bias + channel);
  const int tokens = min(kTokens, p.m - token0);
#pragma unroll 1
  for (int i = threadIdx.x < kAtOnce * kQuads ? threadIdx.x / kQuads : share; i < share; i += kAtOnce) {
    const int token = split * share + i;
    if (token >= tokens || !channel_exists) break;
    float4 sum = {};
    int4 whole = {};
#pragma unroll 1
    for (int block = 0; block < splits; ++block) {  // always in this order: the same bits each time, for fp32 too
      const int32_t* place =
          channel + (block == split ? shared.sums.own + token * Kernel::kPitch
                                    : shared.sums.others + ((block > split ? block - 1 : block) * kSlots * share + i) * Kernel::kPitch);
      const int next = (block == split ? kTokens : share) * Kernel::kPitch;
      int4 v[kSlots];
#pragma unroll
      for (int of = 0; of < kSlots; ++of) v[of] = *reinterpret_cast<const int4*>(place + of * next);
#pragma unroll
      for (int of = 0; of < kSlots; ++of) {
        if constexpr (kGrouped)
          sum = make_float4(sum.x + __int_as_float(v[of].x), sum.y + __int_as_float(v[of].y), sum.z + __int_as_float(v[of].z),
                            sum.w + __int_as_float(v[of].w));
        else
          whole = make_int4(whole.x + v[of].x, whole.y + v[of].y, whole.z + v[of].z, whole.w + v[of].w);
      }
    }
    if constexpr (!kGrouped)
      sum = make_float4(__int2float_rn(whole.x), __int2float_rn(whole.y), __int2float_rn(whole.z), __int2float_rn(whole.w));
    const float scale = shared.scale[token];
    const float y[4] = {finish(sum.x, w_scale.x, scale, bias.x), finish(sum.y, w_scale.y, scale, bias.y),
                        finish(sum.z, w_scale.z, scale, bias.z), finish(sum.w, w_scale.w, scale, bias.w)};
    const size_t at = size_t(token0 + token) * p.n + row0 + channel;
    if (p.dtype == FQ_FLOAT)
      *reinterpret_cast<float4*>(static_cast<float*>(p.y) + at) = make_float4(y[0], y[1], y[2], y[3]);
    else
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.y) + at) = make_uint2(pack_pair(y[0], y[1], p.dtype), pack_pair(y[2], y[3], p.dtype));
  }
  __syncwarp();
  cluster_wait();  // this block's sums have arrived where they go
#endif
}

// ---- host ----

constexpr const char* kName = "W4A4Gemm wgmma_s8";

Problem problem_of(const fq_w4a4_gemm_params& p) {
  return {p.scale, p.w_scale, p.bias, p.y, int(p.m), int(p.n), int(p.k / kBlockK), p.dtype, p.constant_weights != 0};
}

Matrix weights_of(const fq_w4a4_gemm_params& p) {
  return {p.w, uint64_t(p.n), uint64_t(p.k / 2), uint64_t(p.k / 2), CU_TENSOR_MAP_DATA_TYPE_UINT8, 1};
}

Matrix codes_of(const fq_w4a4_gemm_params& p) {
  return {p.q, uint64_t(p.m), uint64_t(p.k), uint64_t(p.k), CU_TENSOR_MAP_DATA_TYPE_UINT8, 1};
}

// A map for boxes of some rows' bytes in some blocks of K, which leave one block after the other.
fq_status make_blocks_map(CUtensorMap* map, const Matrix& matrix, uint32_t block_bytes, uint32_t rows, uint32_t blocks,
                          CUtensorMapSwizzle swizzle) {
  return make_tensor_map<3>(map, matrix.data, matrix.type, {block_bytes, matrix.rows, matrix.columns / block_bytes},
                            {matrix.row_bytes, block_bytes}, {block_bytes, rows, blocks}, swizzle);
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
  const Tiles tiles = {int((p.n + kPair * Kernel::kRows - 1) / (kPair * Kernel::kRows)), int((p.m + kTokens - 1) / kTokens)};
  const int64_t clusters = std::min<int64_t>(int64_t(tiles.row_pairs) * tiles.tokens, device.multiprocessors / kPair);
  const Launch launch = {dim3(unsigned(clusters * kPair)), dim3(kPair, 1, 1), kConsumers + 128, Kernel::kSharedBytes, false};
  return launch_kernel(kName, many_tokens<kTokens, kTiles, kStages, kGrouped>, launch, stream, w_map, q_map, y_map, problem_of(p), tiles);
}

// How few_tokens shares out the work: blocks of `rows` channels (a multiple of 16) and a `splits`-th of K; `cost` in bytes of weights that a
// multiprocessor takes in meanwhile: from memory, or with the tokens from the second-level cache, kSecond times as fast; and in the time that it
// takes to unpack whole tiles, to add up and to run a second wave.
struct Shares {
  int rows, splits;
  double cost;
};

Shares share_out(const fq_w4a4_gemm_params& p, int tokens, int most_rows, int splits, int multiprocessors) {
  constexpr double kUnpack = 900, kSecond = 1.7, kWave = 60e3;  // fitted to measurements
  const int64_t steps = p.k / kBlockK, token_tiles = (p.m + tokens - 1) / tokens;
  // Clusters of more than two lose the multiprocessors that do not make up one in their part of the chip.
  const int64_t blocks = std::max<int64_t>(1, (splits > 2 ? multiprocessors * 9 / 10 : multiprocessors) / splits / token_tiles);
  int64_t waves = 0, rows = most_rows + 1;
  while (rows > most_rows) {
    ++waves;
    rows = ((p.n + blocks * waves - 1) / (blocks * waves) + 15) / 16 * 16;
  }
  const double weights = rows * 64., all = weights + tokens * 128.;
  const double step = std::max(weights, all / kSecond) + double((rows + 63) / 64) * kUnpack;
  const double add_up = splits == 1 ? 0 : (splits == 2 ? 10e3 : splits == 4 ? 70e3 : 160e3) + 8. * double(tokens * rows);
  return {int(rows), splits, step * double((steps + splits - 1) / splits) * double(waves) + add_up + kWave * double(waves - 1)};
}

constexpr int kMostSplits = 8;

template <int kTokens, int kTiles, bool kGrouped>
fq_status launch_few_rows(const fq_w4a4_gemm_params& p, Shares shares, cudaStream_t stream) {
  using Kernel = FewTokens<kTokens, kTiles, kGrouped>;
  CUtensorMap w_map, q_map;
  if (const fq_status status = make_tensor_map(&w_map, weights_of(p), shares.rows, Kernel::Ring::kPitch, CU_TENSOR_MAP_SWIZZLE_128B,
                                                CU_TENSOR_MAP_L2_PROMOTION_NONE))
    return status;
  if (const fq_status status = make_blocks_map(&q_map, codes_of(p), kBlockK, kTokens, Kernel::kBlocks, CU_TENSOR_MAP_SWIZZLE_128B))
    return status;
  const Launch launch = {dim3(unsigned((p.n + shares.rows - 1) / shares.rows), unsigned(shares.splits), unsigned((p.m + kTokens - 1) / kTokens)),
                         dim3(1, unsigned(shares.splits), 1), Kernel::kConsumers + 32, Kernel::kSharedBytes, p.constant_weights != 0};
  const int stages = (int(p.k / kBlockK) + Kernel::kBlocks - 1) / Kernel::kBlocks;  // beyond K there are zeros
  const Parts parts = {shares.rows, stages / shares.splits, stages % shares.splits,
                       std::min(kFewRing / Kernel::Ring::bytes(shares.rows), Kernel::kMostStages)};
  return launch_kernel(kName, few_tokens<kTokens, kTiles, kGrouped>, launch, stream, w_map, q_map, problem_of(p), parts);
}

template <int kTokens, bool kGrouped>
fq_status launch_few(const fq_w4a4_gemm_params& p, const Device& device, int splits, cudaStream_t stream) {
  constexpr int kMostTiles = kFewWarpgroups<kTokens, kGrouped>;
  Shares shares = share_out(p, kTokens, 64 * kMostTiles, 1, device.multiprocessors);
  for (int more = 2; more <= std::min(kMostSplits, splits != 0 ? splits : kMostSplits) && p.k / kBlockK >= 4 * more; more *= 2) {
    const Shares other = share_out(p, kTokens, 64 * kMostTiles, more, device.multiprocessors);
    if (splits != 0 || other.cost < shares.cost) shares = other;
  }
  const int tiles = (shares.rows + 63) / 64;
  if (tiles == 1) return launch_few_rows<kTokens, 1, kGrouped>(p, shares, stream);
  if (tiles == 2) return launch_few_rows<kTokens, 2, kGrouped>(p, shares, stream);
  if constexpr (kMostTiles > 2) {
    if constexpr (few_slots<kTokens, 3, kGrouped>() == kMostTiles)
      if (tiles == 3) return launch_few_rows<kTokens, 3, kGrouped>(p, shares, stream);
    return launch_few_rows<kTokens, 4, kGrouped>(p, shares, stream);
  }
  return fail(FQ_UNSUPPORTED, "%s: %d channels to a block", kName, shares.rows);
}

template <bool kGrouped>
fq_status launch_few_tokens(const fq_w4a4_gemm_params& p, const Device& device, int splits, cudaStream_t stream) {  // 0: from the shape
  if (p.m <= 8) return launch_few<8, kGrouped>(p, device, splits, stream);
  if (p.m <= 16) return launch_few<16, kGrouped>(p, device, splits, stream);
  if (p.m <= 32) return launch_few<32, kGrouped>(p, device, splits, stream);
  return launch_few<64, kGrouped>(p, device, splits, stream);
}

// 1 to 4: few tokens with K in at most 1, 2, 4 or 8 parts; the others are tiles of channels x tokens, with groups all of them 128x128: two sets
// of sums leave little room.
enum Tactic { kFew1 = 1, kFew8 = 4, kMany256x128, kMany128x256, kMany128x128, kTactics = kMany128x128 };

// Time in the units of a 128 x 128 tile of the tensor cores: waves of tiles, each with a share for its beginning and its end.
Tactic choose_tile(const fq_w4a4_gemm_params& p, const Device& device) {
  const auto cost = [&](int64_t rows, int64_t tokens, double overhead) {
    const int64_t tiles = (p.n + 2 * rows - 1) / (2 * rows) * ((p.m + tokens - 1) / tokens);
    const int64_t clusters = device.multiprocessors / kPair;
    return double((tiles + clusters - 1) / clusters) * (double(rows * tokens) / (128 * 128) + overhead);
  };
  const double big = cost(256, 128, 0.1), wide = cost(128, 256, 0.1), small = cost(128, 128, 0.15);
  if (small < std::min(big, wide)) return kMany128x128;
  if (big != wide) return big < wide ? kMany256x128 : kMany128x256;
  return p.m > 4096 ? kMany256x128 : kMany128x256;  // as measured
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
  constexpr int64_t kMostFew = 64 * 65535;  // token tiles are the grid's third dimension
  if ((p.tactic != 0 && p.tactic <= kFew8 && p.m <= kMostFew) || (p.tactic == 0 && p.m <= 64)) {
    const int splits = p.tactic != 0 ? 1 << (p.tactic - kFew1) : 0;
    return p.groups > 1 ? launch_few_tokens<true>(p, device, splits, stream) : launch_few_tokens<false>(p, device, splits, stream);
  }
  if (p.groups > 1) return launch_many<128, 1, 6, true>(p, device, stream);
  switch (p.tactic != 0 ? p.tactic : choose_tile(p, device)) {
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
