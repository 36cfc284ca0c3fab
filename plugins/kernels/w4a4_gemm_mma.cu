// W4A4Gemm with warp matrix products (mma.sync), for every device from compute capability 8.0 on: mma_s8 and mma_s4.
//
// A block computes a tile of tokens x channels. Its warps form one or more teams, each of which takes every so many-th panel of 128 codes
// of K through a pipeline of asynchronous copies of its own, so that a team of one warp never waits for another; the teams' sums meet in
// shared memory at the end. Tokens are the rows of the product (operand A), channels its columns (operand B).
//
// int4 weights become int8 operands, times 16, with a shift and two ands: a word holds the codes k .. k + 7, of which the low nibbles of
// its bytes become the four of one register and the high nibbles those of the other. Sums are exact, so that any order of K will do as
// long as it is the same for both operands: for the plain layout lane t of a quad takes k = 8t .. 8t + 7 of each 32, and the activations'
// even and odd bytes are parted; the layout k128 is in the order of ldmatrix already.

#include <algorithm>
#include <type_traits>

#include "kernel.h"
#include "mma.cuh"
#include "pairs.cuh"

namespace fq {
namespace {

constexpr int kPanel = 128;  // codes of K
constexpr int kBand = 16;    // tiles of tokens that share a tile of channels while it is in L2

// Scales of the weights: one a channel, one for a multiple of 128 codes of K, or one for a multiple of 32.
enum class Scales { kChannel, kPanels, kSteps };

struct Arguments {
  const uint8_t* q;
  const uint8_t* w;
  const float* scale;
  const float* w_scale;
  const float* bias;
  void* y;
  int64_t m, n;
  int k, groups, group_size, dtype;
  float groups_per_panel;  // 128 / group_size
  int token_tiles, channel_tiles;
};

// ---- operands: how the codes lie in a panel and become registers ----

// Offset of 16 bytes in rows of 128 or 64 bytes: the chunks of 8 neighbouring rows lie in 8 different groups of banks, and for rows of 128
// bytes the pairs of chunks of 4 neighbouring rows do as well, which is what 8-byte loads want.
template <int kRowBytes>
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  if constexpr (kRowBytes == 128) {
    return row * 128 + ((chunk ^ (((row & 3) << 1) | ((row >> 2) & 1))) << 4);
  } else {
    static_assert(kRowBytes == 64);
    return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4);
  }
}

// Operands of one product step.
template <int kRowTiles, int kColumnTiles, int kWords>
struct Fragment {
  uint32_t a[kRowTiles][4];
  uint32_t b[kColumnTiles][kWords];
};

// int8 activations and plain int4 weights.
struct PlainInt8 {
  static constexpr int kActivationBytes = 128;  // of a row of a panel
  static constexpr int kWeightBytes = 64;
  static constexpr int kSteps = 4;
  static constexpr int kWords = 1;  // of weights, for a step and 8 channels
  static constexpr int kWeightCopy = 16;  // bytes that every row of weights begins at a multiple of
  static constexpr float kUnit = 1.0f / 16;

  template <int kRowTiles, int kColumnTiles>
  struct Reader {
    using Operands = Fragment<kRowTiles, kColumnTiles, kWords>;

    uint32_t activations, weights;  // this lane's offsets

    __device__ Reader(int row, int column, int lane)
        : activations(swizzled<128>(row + lane / 4, lane % 4 / 2) + lane % 2 * 8), weights(swizzled<64>(column + lane, 0)) {
      static_assert(kColumnTiles % 4 == 0);
    }

    __device__ __forceinline__ void load(Operands& to, uint32_t panel, uint32_t weight_panel, int step) {
      const uint32_t row = panel + (activations ^ (step * 32));
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        load_8(to.a[i][0], to.a[i][2], row + i * 16 * 128);
        load_8(to.a[i][1], to.a[i][3], row + i * 16 * 128 + 8 * 128);
      }
      const uint32_t column = weight_panel + (weights ^ (step * 16));
#pragma unroll
      for (int i = 0; i < kColumnTiles; i += 4) {
        uint32_t words[4];
        load_matrices(words, column + i * 8 * 64);
#pragma unroll
        for (int j = 0; j < 4; ++j) to.b[i + j][0] = words[j];
      }
    }
  };

  template <class Operands>
  static __device__ __forceinline__ void prepare(Operands& operands) {
    for (auto& a : operands.a) {
      const uint32_t row[2] = {a[0], a[1]}, next[2] = {a[2], a[3]};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[half] = __byte_perm(row[half], next[half], 0x6420);
        a[half + 2] = __byte_perm(row[half], next[half], 0x7531);
      }
    }
  }

  static __device__ __forceinline__ void multiply(int32_t (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[1]) {
    multiply_s8(sum, a, (b[0] << 4) & 0xf0f0f0f0u, b[0] & 0xf0f0f0f0u);
  }
};

// The same where K is 16 more than a multiple of 32, so that every other row of weights begins in the middle of 16 bytes.
struct UnalignedInt8 : PlainInt8 {
  static constexpr int kWeightCopy = 8;
};

// int8 activations and int4 weights in the layout k128: the 16 bytes of lane t of a quad are its operands of the panel's four steps.
struct BlockedInt8 : PlainInt8 {
  template <int kRowTiles, int kColumnTiles>
  struct Reader {
    using Operands = Fragment<kRowTiles, kColumnTiles, kWords>;

    uint32_t activations, weights;
    uint32_t words[kColumnTiles][4];

    __device__ Reader(int row, int column, int lane)
        : activations(swizzled<128>(row + lane % 16, lane / 16)), weights(swizzled<64>(column + lane / 4, lane % 4)) {}

    __device__ __forceinline__ void load(Operands& to, uint32_t panel, uint32_t weight_panel, int step) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) load_matrices(to.a[i], panel + (activations ^ (step * 32)) + i * 16 * 128);
#pragma unroll
      for (int i = 0; i < kColumnTiles; ++i) {
        if (step == 0) load_16(words[i], weight_panel + weights + i * 8 * 64);
        to.b[i][0] = words[i][step];
      }
    }
  };

  template <class Operands>
  static __device__ __forceinline__ void prepare(Operands&) {}
};

// Packed int4 activations and plain int4 weights: no unpacking at all.
struct PlainInt4 {
  static constexpr int kActivationBytes = 64;
  static constexpr int kWeightBytes = 64;
  static constexpr int kSteps = 2;
  static constexpr int kWords = 2;
  static constexpr int kWeightCopy = 16;
  static constexpr float kUnit = 1;

  template <int kRowTiles, int kColumnTiles>
  struct Reader {
    using Operands = Fragment<kRowTiles, kColumnTiles, kWords>;

    uint32_t activations, weights;

    __device__ Reader(int row, int column, int lane)
        : activations(swizzled<64>(row + lane % 16, lane / 16)), weights(swizzled<64>(column + lane / 16 * 8 + lane % 8, lane / 8 % 2)) {
      static_assert(kColumnTiles % 2 == 0);
    }

    __device__ __forceinline__ void load(Operands& to, uint32_t panel, uint32_t weight_panel, int step) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) load_matrices(to.a[i], panel + (activations ^ (step * 32)) + i * 16 * 64);
#pragma unroll
      for (int i = 0; i < kColumnTiles; i += 2) {
        uint32_t words[4];
        load_matrices(words, weight_panel + (weights ^ (step * 32)) + i * 8 * 64);
#pragma unroll
        for (int j = 0; j < 4; ++j) to.b[i + j / 2][j % 2] = words[j];
      }
    }
  };

  template <class Operands>
  static __device__ __forceinline__ void prepare(Operands&) {}

  static __device__ __forceinline__ void multiply(int32_t (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    multiply_s4(sum, a, b[0], b[1]);
  }
};

// ---- tiles ----

// Tiles of a block: kTeams teams of kWarpRows x kWarpColumns warps, each with kRowTiles x kColumnTiles products of 16 tokens x 8 channels.
template <int kRowTiles_, int kColumnTiles_, int kWarpRows_, int kWarpColumns_, int kTeams_, int kStages_, int kBlocks_ = 1>
struct Tile {
  static constexpr int kRowTiles = kRowTiles_, kColumnTiles = kColumnTiles_, kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr int kTeams = kTeams_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // on a multiprocessor, where shared memory allows it
  static constexpr int kWarpTokens = 16 * kRowTiles, kWarpChannels = 8 * kColumnTiles;
  static constexpr int kTokens = kWarpTokens * kWarpRows, kChannels = kWarpChannels * kWarpColumns;
  static constexpr int kTeamThreads = 32 * kWarpRows * kWarpColumns, kThreads = kTeamThreads * kTeams;
};

template <class Op, class Tile, Scales kScales>
struct Memory {
  static constexpr int kActivations = Tile::kTokens * Op::kActivationBytes;  // bytes of a panel
  static constexpr int kWeights = Tile::kChannels * Op::kWeightBytes;
  static constexpr int kStage = kActivations + kWeights + (kScales == Scales::kPanels ? Tile::kChannels * 4 : 0);
  static constexpr int kTeam = kStage * Tile::kStages;
  // Sums on their way to y, with rows that are 8 apart modulo 32 banks.
  static constexpr int kPitch = (Tile::kTeams == 1 ? Tile::kWarpChannels : Tile::kChannels) + 8;
  static constexpr int kPart = (Tile::kTeams == 1 ? 16 : Tile::kTokens) * kPitch;  // words of a warp, or of a team where there are several
  static constexpr int kParts = 4 * kPart * (Tile::kTeams == 1 ? Tile::kThreads / 32 : Tile::kTeams);
  static constexpr int kBytes = kTeam * Tile::kTeams > kParts ? kTeam * Tile::kTeams : kParts;
};

// A team's copies of kRows rows of a panel. Rows beyond the last and codes beyond K are zeros.
template <int kRows, int kRowBytes, int kThreads, int kCopyBytes>
struct Copier {
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kCopies = kRows * kChunks / kThreads;
  static_assert(kRows * kChunks % kThreads == 0 && kCopies <= 32);

  const uint8_t* source;     // of this thread's first copy
  uint32_t rows_inside = 0;  // a bit a copy

  // `pitch`: bytes from row to row; `rows`: how many there are from the first on.
  __device__ Copier(const uint8_t* first, int64_t rows, int pitch, int thread)
      : source(first + row(thread, 0) * pitch + thread % kChunks * 16) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) rows_inside |= static_cast<uint32_t>(row(thread, i) < rows) << i;
  }

  static __device__ __forceinline__ int row(int thread, int i) { return thread / kChunks + i * (kThreads / kChunks); }

  // One of kParts parts of the copies. `begin`: bytes from a row's start to the panel.
  template <int kParts>
  __device__ __forceinline__ void copy(uint32_t target, int begin, int pitch, int thread, int part) const {
    const int chunk = thread % kChunks, left = pitch - begin - chunk * 16;
    const uint32_t inside = left > 0 ? rows_inside : 0;
    const int step = kThreads / kChunks * pitch;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (i * kParts / kCopies != part) continue;
      const uint32_t to = target + swizzled<kRowBytes>(row(thread, i), chunk);
      const uint8_t* const from = source + begin + i * step;
      if constexpr (kCopyBytes == 16) {
        copy_16(to, from, inside & (1u << i));
      } else {
        copy_8(to, from, inside & (1u << i));
        copy_8(to + 8, from + 8, left > 8 && inside & (1u << i));
      }
    }
  }
};

// ---- sums to y ----

template <int kCount>
__device__ __forceinline__ void store(void* y, int64_t index, int dtype, const float (&values)[kCount]) {
  static_assert(kCount == 2 || kCount == 8);
  if (dtype == FQ_FLOAT) {
    float* to = static_cast<float*>(y) + index;
    if constexpr (kCount == 2) {
      *reinterpret_cast<float2*>(to) = make_float2(values[0], values[1]);
    } else {
      reinterpret_cast<float4*>(to)[0] = make_float4(values[0], values[1], values[2], values[3]);
      reinterpret_cast<float4*>(to)[1] = make_float4(values[4], values[5], values[6], values[7]);
    }
    return;
  }
  uint32_t words[kCount / 2];
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    if (dtype == FQ_FLOAT16)
      words[i] = pack<__half>(values[2 * i], values[2 * i + 1]);
    else
      words[i] = pack<__nv_bfloat16>(values[2 * i], values[2 * i + 1]);
  }
  uint16_t* to = static_cast<uint16_t*>(y) + index;
  if constexpr (kCount == 2) {
    *reinterpret_cast<uint32_t*>(to) = words[0];
  } else {
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Adds up `kParts` parts of kRows x kColumns sums (int32, or fp32 that contain w_scale already), scales and writes them; kThreads threads,
// each with kWidth neighbouring channels of some rows. The order of the operations is the reference's, without contraction.
template <class Op, bool kGrouped, int kRows, int kColumns, int kThreads, int kParts>
__device__ __forceinline__ void finish(const Arguments& p, const int32_t* parts, int64_t token, int64_t channel, int thread) {
  constexpr int kWidth = kRows * kColumns >= 8 * kThreads ? 8 : 2;
  constexpr int kPitch = kColumns + 8, kStep = kThreads * kWidth / kColumns;
  static_assert(kThreads * kWidth % kColumns == 0 && kRows % kStep == 0);
  const int column = thread * kWidth % kColumns;
  channel += column;
  if (channel >= p.n) return;
  float w_scale[kWidth], bias[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    w_scale[i] = kGrouped ? 1 : __ldg(p.w_scale + channel + i);
    bias[i] = p.bias == nullptr ? 0 : __ldg(p.bias + channel + i);
  }
#pragma unroll
  for (int row = thread * kWidth / kColumns; row < kRows; row += kStep) {
    if (token + row >= p.m) break;
    const float scale = __ldg(p.scale + token + row);
    float values[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int32_t* at = parts + row * kPitch + column + i;
      float value;
      if constexpr (kGrouped) {
        value = __int_as_float(at[0]);
#pragma unroll
        for (int part = 1; part < kParts; ++part) value += __int_as_float(at[part * kRows * kPitch]);
        value *= Op::kUnit;
      } else {
        int32_t sum = at[0];
#pragma unroll
        for (int part = 1; part < kParts; ++part) sum += at[part * kRows * kPitch];
        value = __fmul_rn(static_cast<float>(sum) * Op::kUnit, w_scale[i]);  // a power of two: exact
      }
      values[i] = __fadd_rn(__fmul_rn(value, scale), bias[i]);
    }
    store(p.y, (token + row) * p.n + channel, p.dtype, values);
  }
}

// ---- scales per group ----

// An integer sum below 2^22 that begins at these bits is, read as fp32, that sum + kMagic: no conversion needed.
constexpr int32_t kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912.0f;

// The scales of a lane's channels for one group.
template <int kColumnTiles>
struct GroupScales {
  const float* first;  // of this lane's first channel
  int last;            // of the tiles of 8 channels inside N
  float values[kColumnTiles][2];

  __device__ GroupScales(const Arguments& p, int64_t channel, int lane)
      : first(p.w_scale + (min(channel, p.n - 8) + lane % 4 * 2) * p.groups),
        last(static_cast<int>(max(min((p.n - channel) / 8, int64_t(kColumnTiles)) - 1, int64_t(0)))) {}

  // From global memory.
  __device__ __forceinline__ void load(int group, int groups) {
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i) {
      const int at = group + min(i, last) * 8 * groups;
      values[i][0] = __ldg(first + at);
      values[i][1] = __ldg(first + at + groups);
    }
  }

  // From this lane's place among the channels' scales in shared memory.
  __device__ __forceinline__ void load(uint32_t place) {
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i) {
      uint32_t first, second;
      load_8(first, second, place + i * 32);
      values[i][0] = __uint_as_float(first);
      values[i][1] = __uint_as_float(second);
    }
  }
};

// ---- the kernel ----

template <class Op, class Tile, Scales kScales>
__device__ __forceinline__ void compute_tile(const Arguments& p) {
  using Layout = Memory<Op, Tile, kScales>;
  constexpr bool kGrouped = kScales != Scales::kChannel;
  extern __shared__ __align__(128) uint8_t memory[];
  constexpr int kRowTiles = Tile::kRowTiles, kColumnTiles = Tile::kColumnTiles, kTeams = Tile::kTeams, kStages = Tile::kStages;
  // From lane 0, so that the compiler knows that it is the same for the whole warp.
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int team = kTeams == 1 ? 0 : warp / (Tile::kTeamThreads / 32), thread = threadIdx.x % Tile::kTeamThreads;
  const int row = thread / 32 / Tile::kWarpColumns * Tile::kWarpTokens, column = thread / 32 % Tile::kWarpColumns * Tile::kWarpChannels;

  // Bands of tiles of tokens; in a band, tiles of tokens are next to each other.
  const int band = blockIdx.x / (kBand * p.channel_tiles), in_band = blockIdx.x % (kBand * p.channel_tiles);
  const int height = min(p.token_tiles - band * kBand, kBand);
  const int64_t token = int64_t(band * kBand + in_band % height) * Tile::kTokens, channel = int64_t(in_band / height) * Tile::kChannels;

  const int q_pitch = p.k * Op::kActivationBytes / kPanel, w_pitch = p.k / 2;
  constexpr int kTeamThreads = Tile::kTeamThreads;
  const Copier<Tile::kTokens, Op::kActivationBytes, kTeamThreads, 16> activations(p.q + token * q_pitch, p.m - token, q_pitch, thread);
  const Copier<Tile::kChannels, Op::kWeightBytes, kTeamThreads, Op::kWeightCopy> weights(p.w + channel * w_pitch, p.n - channel, w_pitch,
                                                                                         thread);
  const uint32_t base = to_shared(memory) + team * Layout::kTeam;
  // A team without a panel in the last round has zeros in its place.
  const int panels = (p.k + kPanel - 1) / kPanel, rounds = (panels + kTeams - 1) / kTeams;
  // A lone team copies a part of a panel in each step, in between its products; where several wait for memory, copies begin as soon as
  // they may.
  constexpr int kParts = kTeams == 1 ? Op::kSteps : 1;
  const auto fetch = [&](int index, int stage, int part) {
    const int panel = index * kTeams + team;
    const uint32_t target = base + stage * Layout::kStage;
    activations.template copy<kParts>(target, panel * Op::kActivationBytes, q_pitch, thread, part);
    weights.template copy<kParts>(target + Layout::kActivations, panel * Op::kWeightBytes, w_pitch, thread, part);
    if constexpr (kScales == Scales::kPanels) {
      if (part == 0) {
        const int group = static_cast<int>((panel + 0.5f) * p.groups_per_panel);
#pragma unroll
        for (int i = 0; i < Tile::kChannels; i += kTeamThreads) {
          const int64_t own = channel + i + thread;
          const uint32_t place = target + Layout::kActivations + Layout::kWeights + (i + thread) * 4;
          if (i + thread < Tile::kChannels) copy_4(place, p.w_scale + own * p.groups + group, panel < panels && own < p.n);
        }
      }
    }
    if (part == kParts - 1) commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i)
#pragma unroll
    for (int part = 0; part < kParts; ++part) fetch(i, i, part);
  fetch(kStages - 1, kStages - 1, 0);

  int32_t sums[kRowTiles][kColumnTiles][4];
  float totals[kGrouped ? kRowTiles : 1][kColumnTiles][4];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums[i][j][e] = kGrouped ? kMagicBits : 0;
        if constexpr (kGrouped) totals[i][j][e] = 0;
      }
  [[maybe_unused]] GroupScales<kGrouped ? kColumnTiles : 1> scales(p, channel + column, lane);
  [[maybe_unused]] const auto close_group = [&] {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          totals[i][j][e] += (__int_as_float(sums[i][j][e]) - kMagic) * scales.values[j][e % 2];
          sums[i][j][e] = kMagicBits;
        }
  };

  typename Op::template Reader<kRowTiles, kColumnTiles> reader(row, column, lane);
  typename Op::template Reader<kRowTiles, kColumnTiles>::Operands operands[2];
  int stage = 0, freed = kStages - 1;
  wait_for_copies<kParts == 1 ? kStages - 1 : kStages - 2>();
  sync_threads<Tile::kTeamThreads, Tile::kThreads>(team + 1);
  reader.load(operands[0], base, base + Layout::kActivations, 0);
  for (int index = 0; index < rounds; ++index) {
    [[maybe_unused]] int group = 0, left = 0;  // codes to the end of the group
    if constexpr (kScales == Scales::kSteps) {
      const int k = (index * kTeams + team) * kPanel;
      group = k / p.group_size;
      left = (group + 1) * p.group_size - k;
    }
#pragma unroll
    for (int step = 0; step < Op::kSteps; ++step) {
      auto& now = operands[step % 2];
      auto& next = operands[(step + 1) % 2];
      if (step + 1 < Op::kSteps) {
        const uint32_t panel = base + stage * Layout::kStage;
        reader.load(next, panel, panel + Layout::kActivations, step + 1);
        if constexpr (kParts > 1) fetch(index + kStages - 1, freed, step + 1);
      } else {
        if constexpr (kScales == Scales::kPanels)
          scales.load(base + stage * Layout::kStage + Layout::kActivations + Layout::kWeights + (column + lane % 4 * 2) * 4);
        // The next panel is there, and nobody reads this one any more: its place is free.
        wait_for_copies<kStages - 2>();
        sync_threads<Tile::kTeamThreads, Tile::kThreads>(team + 1);
        freed = stage;
        stage = stage + 1 == kStages ? 0 : stage + 1;
        const uint32_t panel = base + stage * Layout::kStage;
        reader.load(next, panel, panel + Layout::kActivations, 0);
        fetch(index + kStages, freed, 0);
      }
      Op::prepare(now);
      if constexpr (kScales == Scales::kSteps) {
        constexpr int kHalves = Op::kSteps == 2 ? 2 : 1;  // a step of 64 may hold the end of one group and the beginning of the next
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          left -= 32;
          const bool closes = left == 0 || (step + 1 == Op::kSteps && half + 1 == kHalves);
          if (closes) scales.load(min(group, p.groups - 1), p.groups);
#pragma unroll
          for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
              if constexpr (kHalves == 2) {
                multiply_s4(sums[i][j], now.a[i][2 * half], now.a[i][2 * half + 1], now.b[j][half]);
              } else {
                Op::multiply(sums[i][j], now.a[i], now.b[j]);
              }
            }
          if (closes) close_group();
          if (left == 0) {
            left = p.group_size;
            ++group;
          }
        }
      } else {
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) Op::multiply(sums[i][j], now.a[i], now.b[j]);
        if constexpr (kScales == Scales::kPanels) {
          if (step + 1 == Op::kSteps) close_group();
        }
      }
    }
  }

  // Shared memory is used anew. Even copies of zeros for panels that there are not would spoil it.
  wait_for_all_copies();
  __syncthreads();
  int32_t* const parts = reinterpret_cast<int32_t*>(memory);
  const auto put = [&](int32_t* to, int i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int2 pair;
        if constexpr (kGrouped) {
          pair = make_int2(__float_as_int(totals[i][j][2 * half]), __float_as_int(totals[i][j][2 * half + 1]));
        } else {
          pair = make_int2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
        }
        *reinterpret_cast<int2*>(to + (lane / 4 + 8 * half) * Layout::kPitch + 8 * j + lane % 4 * 2) = pair;
      }
  };
  if constexpr (kTeams == 1) {
    int32_t* const part = parts + warp * Layout::kPart;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      put(part, i);
      __syncwarp();
      finish<Op, kGrouped, 16, Tile::kWarpChannels, 32, 1>(p, part, token + row + 16 * i, channel + column, lane);
      __syncwarp();
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) put(parts + team * Layout::kPart + (row + 16 * i) * Layout::kPitch + column, i);
    __syncthreads();
    finish<Op, kGrouped, Tile::kTokens, Tile::kChannels, Tile::kThreads, kTeams>(p, parts, token, channel, threadIdx.x);
  }
}

// From 9.0 on the compiler emulates products of int4 in a subroutine, which leaves no registers for large tiles.
template <class Op, class Tile, Scales kScales>
constexpr bool kCanEmulate =
    !std::is_same_v<Op, PlainInt4> || Tile::kRowTiles * Tile::kColumnTiles <= (kScales == Scales::kChannel ? 16 : 8);

template <class Op, class Tile, Scales kScales>
__global__ void __launch_bounds__(Tile::kThreads, kScales == Scales::kChannel ? Tile::kBlocks : 1)
    w4a4_gemm(const __grid_constant__ Arguments p) {
#if __CUDA_ARCH__ >= 900
  if constexpr (kCanEmulate<Op, Tile, kScales>) {
    compute_tile<Op, Tile, kScales>(p);
  } else {
    __trap();  // launch() takes another tile
  }
#else
  compute_tile<Op, Tile, kScales>(p);
#endif
}

// ---- host ----

// The tiles, tokens x channels. Those of few tokens wait for memory and are many on a multiprocessor; Deep is for so few blocks that each
// has one to itself.
using Few = Tile<1, 4, 1, 1, 4, 4, 3>;          // 16 tokens x 32 channels
using Deep = Tile<1, 4, 1, 1, 8, 3, 2>;         // 16 x 32
using Some = Tile<2, 4, 1, 1, 4, 3, 3>;         // 32 x 32
using Medium = Tile<2, 8, 2, 1, 2, 3, 2>;       // 64 x 64
using Large = Tile<4, 8, 2, 2, 1, 3, 2>;        // 128 x 128
using GroupedLarge = Tile<2, 8, 2, 2, 1, 3>;    // 64 x 128, for two sets of sums
using Largest = Tile<4, 8, 2, 4, 1, 3>;         // 128 x 256

template <class Op, class Tile, Scales kScales>
fq_status launch_tile(const fq_w4a4_gemm_params& params, cudaStream_t stream) {
  constexpr int kBytes = Memory<Op, Tile, kScales>::kBytes;
  const int64_t token_tiles = (params.m + Tile::kTokens - 1) / Tile::kTokens;
  const int64_t channel_tiles = (params.n + Tile::kChannels - 1) / Tile::kChannels;
  if (token_tiles > INT32_MAX / kBand || channel_tiles > INT32_MAX / kBand || token_tiles * channel_tiles > INT32_MAX)
    return fail(FQ_INVALID_ARGUMENT, "m %lld and n %lld are too large for one launch: split m", static_cast<long long>(params.m),
                static_cast<long long>(params.n));
  Arguments arguments = {};
  arguments.q = static_cast<const uint8_t*>(params.q);
  arguments.w = static_cast<const uint8_t*>(params.w);
  arguments.scale = params.scale;
  arguments.w_scale = params.w_scale;
  arguments.bias = params.bias;
  arguments.y = params.y;
  arguments.m = params.m;
  arguments.n = params.n;
  arguments.k = static_cast<int>(params.k);
  arguments.groups = static_cast<int>(params.groups);
  arguments.group_size = static_cast<int>(params.k / params.groups);
  arguments.groups_per_panel = static_cast<float>(kPanel) / static_cast<float>(arguments.group_size);
  arguments.dtype = params.dtype;
  arguments.token_tiles = static_cast<int>(token_tiles);
  arguments.channel_tiles = static_cast<int>(channel_tiles);
  const void* kernel = reinterpret_cast<const void*>(&w4a4_gemm<Op, Tile, kScales>);
  const cudaError_t allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (const fq_status status = check(allowed, "cudaFuncSetAttribute"); status != FQ_OK) return status;
  void* pointers[] = {&arguments};
  const dim3 grid(static_cast<unsigned>(token_tiles * channel_tiles));
  return check(cudaLaunchKernel(kernel, grid, dim3(Tile::kThreads), pointers, kBytes, stream), "w4a4_gemm");
}

template <class Op, class Tile>
fq_status launch_tile(const fq_w4a4_gemm_params& params, cudaStream_t stream) {
  if (params.groups > 1) return launch_tile<Op, Tile, Scales::kPanels>(params, stream);
  return launch_tile<Op, Tile, Scales::kChannel>(params, stream);
}

// What a tactic takes for K = 4096, in microseconds: a block that has a multiprocessor to itself, and each of many.
struct Tactic {
  int tokens, channels;
  double alone, each;
};

// Times on an H200; other devices differ by about the same factor for all. The order is that of fq_w4a4_gemm_params::tactic.
constexpr int kTactics = 6;
constexpr Tactic kChannelTactics[kTactics] = {{16, 32, 6, 3.4},  {16, 32, 5.5, 4.2},   {32, 32, 7.4, 3.6},
                                              {64, 64, 11.5, 7}, {128, 128, 27, 21.5}, {128, 256, 43, 43.5}};
// With scales per group, two sets of sums leave no room for larger tiles than 64 x 128.
constexpr Tactic kGroupTactics[kTactics] = {{16, 32, 6, 4},    {16, 32, 5.5, 4.7},  {32, 32, 7.4, 4.2},
                                            {64, 64, 12, 8.6}, {64, 128, 20, 16.4}, {64, 128, 20, 16.4}};

// The tactic of the least estimated time.
int choose_tactic(const fq_w4a4_gemm_params& params, const Device& device) {
  // Devices with 100 KiB of shared memory have room for one block on a multiprocessor.
  const bool pairs = device.shared_memory >= 2 * Memory<PlainInt8, Large, Scales::kChannel>::kBytes;
  int chosen = 0;
  double least = 0;
  for (int i = 0; i < kTactics; ++i) {
    const Tactic& tactic = params.groups > 1 ? kGroupTactics[i] : kChannelTactics[i];
    const int64_t blocks = (params.m + tactic.tokens - 1) / tactic.tokens * ((params.n + tactic.channels - 1) / tactic.channels);
    const int64_t rounds = (blocks + device.multiprocessors - 1) / device.multiprocessors;
    const double time = (rounds > 1 && pairs ? tactic.each : tactic.alone) * static_cast<double>(rounds);
    if (chosen == 0 || time < least) {
      chosen = i + 1;
      least = time;
    }
  }
  return chosen;
}

template <class Op>
fq_status launch(const fq_w4a4_gemm_params& params, const Device& device, cudaStream_t stream) {
  const bool grouped = params.groups > 1;
  int tactic = params.tactic != 0 ? params.tactic : choose_tactic(params, device);
  if (std::is_same_v<Op, PlainInt4> && device.capability >= 90) tactic = std::min(tactic, grouped ? 3 : 4);
  if (grouped && params.k / params.groups % kPanel != 0) {  // two tiles for all tactics
    if constexpr (!std::is_same_v<Op, PlainInt4>) {
      if (tactic > 3) return launch_tile<Op, Medium, Scales::kSteps>(params, stream);
    }
    return launch_tile<Op, Some, Scales::kSteps>(params, stream);
  }
  switch (tactic) {
    case 1:
      return launch_tile<Op, Few>(params, stream);
    case 2:
      return launch_tile<Op, Deep>(params, stream);
    case 3:
      return launch_tile<Op, Some>(params, stream);
    case 4:
      return launch_tile<Op, Medium>(params, stream);
    default:
      if (grouped) return launch_tile<Op, GroupedLarge, Scales::kPanels>(params, stream);
      if (tactic == 5) return launch_tile<Op, Large, Scales::kChannel>(params, stream);
      return launch_tile<Op, Largest, Scales::kChannel>(params, stream);
  }
}

const char* fits_shape(const fq_w4a4_gemm_params& params, const Device& device) {
  if (params.groups > 1 && params.k / params.groups % 32 != 0) return "groups of weights are a multiple of 32 codes";
  if (device.shared_memory < 99 * 1024) return "it takes 99 KiB of shared memory a block";
  return nullptr;
}

const char* fits_s8(const fq_w4a4_gemm_params& params, const Device& device) {
  if (params.container != FQ_INT8) return "activations are int8";
  return fits_shape(params, device);
}

fq_status launch_s8(const fq_w4a4_gemm_params& params, const Device& device, cudaStream_t stream) {
  if (params.layout == FQ_K128) return launch<BlockedInt8>(params, device, stream);
  if (params.k % 32 == 0) return launch<PlainInt8>(params, device, stream);
  // Rare, so that every tactic takes one of two tiles.
  if (params.m <= 32) return launch_tile<UnalignedInt8, Some, Scales::kChannel>(params, stream);
  return launch_tile<UnalignedInt8, Medium, Scales::kChannel>(params, stream);
}

const char* fits_s4(const fq_w4a4_gemm_params& params, const Device& device) {
  if (params.container == FQ_INT8) return "activations are packed";
  if (params.layout != FQ_PLAIN) return "weights are in the plain layout";
  if (params.k % 32 != 0) return "K is a multiple of 32";
  return fits_shape(params, device);
}

}  // namespace

const GemmKernel W4A4Gemm_mma_s8 = {fits_s8, launch_s8, kTactics};
const GemmKernel W4A4Gemm_mma_s4 = {fits_s4, launch<PlainInt4>, kTactics};

}  // namespace fq
