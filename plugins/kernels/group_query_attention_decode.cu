// GroupQueryAttention's step of one token a sequence, from compute capability 9.0 on: rotary embedding, the new key and value into the cache,
// softmax and weighted sum in one launch.
//
// Bound by the cache's way from memory. A warp takes 16 keys at a time from memory straight into its registers, in the places where the tensor
// cores want them: S = K q^T for the (up to eight) heads of queries that share the keys, and Y^T = V^T P, with q's and the result's elements in
// an order that lets every thread load neighbours. The running maximum and sum are those of online softmax (arXiv 1805.02867). What the warps
// found is put together at the end, and what the blocks of a cluster did, which share a long context (as in Flash-Decoding) and meet in
// distributed shared memory: no workspace. The code is short, for it comes from memory too.
//
// A cache of int8 is code * scale, with a scale for each channel of each head, or one for all.
#include <cfloat>

#include "cluster.cuh"
#include "kernel.h"
#include "launch.cuh"
#include "pairs.cuh"

namespace fq {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kKeys = 16;                 // of a tile
constexpr int kHeads = 8;                 // of queries, beside each other
constexpr int kMostSplits = 8;            // blocks of a cluster
constexpr float kNone = -0.5f * FLT_MAX;  // a maximum of nothing
constexpr float kLog2E = 1.44269504088896340736f;
constexpr uint32_t kAllLanes = 0xFFFFFFFF;

struct Problem {
  const void *q, *k, *v, *cos, *sin;
  const int32_t* past;
  void *key, *value, *y;
  const float *key_scale, *value_scale;  // of int8 caches
  int64_t capacity, positions;
  int64_t q_stride, k_stride, v_stride;
  int heads, kv_heads;
  float scale;  // times log2(e)
  bool scale_a_channel;
};

// Read once: nobody wants it again in this launch.
__device__ __forceinline__ void load_once(const void* from, uint32_t (&words)[4]) {
  asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(from)
               : "memory");
}

__device__ __forceinline__ void load_once(const void* from, uint32_t (&words)[2]) {
  asm volatile("ld.global.L1::no_allocate.L2::256B.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from) : "memory");
}

template <typename Element>
__device__ __forceinline__ void load_eight(const Element* from, uint32_t (&words)[4]) {
  const uint4 all = *reinterpret_cast<const uint4*>(from);
  words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
}

__device__ __forceinline__ float power_of_2(float exponent) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(exponent));
  return result;
}

// c += a b: a [16, 16], b [16, 8].
template <typename Element>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Element, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// An 8 x 8 matrix of 16-bit values over the warp, transposed.
__device__ __forceinline__ uint32_t transpose(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// Two of the bytes of `biased` (signed ones with the highest bit turned over) as fp16: 0x6400 is 1,024, and a byte below it adds itself.
template <int kSelect>
__device__ __forceinline__ uint32_t halves_of_bytes(uint32_t biased) {
  const uint32_t pair = __byte_perm(biased, 0x64646464, kSelect);
  const __half2 values = __hsub2(reinterpret_cast<const __half2&>(pair), __floats2half2_rn(1152.0f, 1152.0f));
  return reinterpret_cast<const uint32_t&>(values);
}

constexpr int kFirstBytes = 0x4140, kLastBytes = 0x4342;

// How a head's elements are dealt out. As keys and queries: thread t of a row's four holds kHead / 4 values in runs of kRun, and its second
// half is what the rotary embedding pairs with its first. As values: thread g of eight holds kHead / 8.
template <typename Stored, int kHead>
struct Deal {
  static constexpr bool kInt8 = sizeof(Stored) == 1;
  static constexpr int kRun = kInt8 && kHead == 128 ? 16 : 8;
  static constexpr int kRunWords = kRun * int(sizeof(Stored)) / 4;
  static constexpr int kRowWords = kHead / 4 * int(sizeof(Stored)) / 4;
  static constexpr int kOwn = kHead / 8;                                            // values of a key in a thread
  static constexpr int kOwnRun = kOwn * int(sizeof(Stored)) > 16 ? kOwn / 2 : kOwn;  // side by side
  static constexpr int kOwnRunWords = kOwnRun * int(sizeof(Stored)) / 4;
  static constexpr int kOwnWords = kOwn * int(sizeof(Stored)) / 4;

  __device__ static int of_key(int t, int i) { return i / kRun * 4 * kRun + t * kRun + i % kRun; }
  __device__ static int of_value(int g, int i) { return i / kOwnRun * 8 * kOwnRun + g * kOwnRun + i % kOwnRun; }
};

// A thread's part of a tile: of keys g and g + 8; of values 2 t, 2 t + 1, and eight further.
template <typename Stored, int kHead>
struct Tile {
  uint32_t keys[2][Deal<Stored, kHead>::kRowWords], values[4][Deal<Stored, kHead>::kOwnWords];
};

// What a warp found for each of its heads.
template <int kHead>
struct Found {
  float values[kHeads][kHead];
  float largest[kHeads], sum[kHeads];
};

// Eight neighbouring elements of x rotated (arXiv 2104.09864, the form that pairs the halves of a head), and those kHead / 2 further on.
template <typename Element, int kHead>
__device__ __forceinline__ void load_rotated(const Problem& p, const Element* x, int64_t position, int at, float2 (&low)[4], float2 (&high)[4]) {
  uint32_t words[2][4], tables[2][4];
  load_eight(x + at, words[0]);
  load_eight(x + at + kHead / 2, words[1]);
#pragma unroll
  for (int i = 0; i < 4; ++i) low[i] = unpack<Element>(words[0][i]), high[i] = unpack<Element>(words[1][i]);
  if (p.cos == nullptr) return;
  load_eight(static_cast<const Element*>(p.cos) + position * (kHead / 2) + at, tables[0]);
  load_eight(static_cast<const Element*>(p.sin) + position * (kHead / 2) + at, tables[1]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 cos = unpack<Element>(tables[0][i]), sin = unpack<Element>(tables[1][i]), before = low[i];
    low[i] = make_float2(low[i].x * cos.x - high[i].x * sin.x, low[i].y * cos.y - high[i].y * sin.y);
    high[i] = make_float2(high[i].x * cos.x + before.x * sin.x, high[i].y * cos.y + before.y * sin.y);
  }
}

// Eight scales from channel `at` on.
__device__ __forceinline__ void load_scales(const float* scales, bool scale_a_channel, int at, float2 (&eight)[4]) {
  const float all = scale_a_channel ? 0.0f : scales[0];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    eight[i] = scale_a_channel ? *reinterpret_cast<const float2*>(scales + at + 2 * i) : make_float2(all, all);
}

// Eight elements into the cache.
template <typename Element, typename Stored>
__device__ __forceinline__ void store_eight(Stored* to, const float2 (&values)[4], const float* scales, bool scale_a_channel, int channel) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = pack<Element>(values[i].x, values[i].y);
  if constexpr (sizeof(Stored) == 1) {
    float2 steps[4];
    load_scales(scales, scale_a_channel, channel, steps);
    const auto code = [](float value, float step) {
      return uint32_t(__float2int_rn(fminf(fmaxf(__fdividef(value, step), -128.0f), 127.0f))) & 0xFF;
    };
    uint32_t bytes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 rounded = unpack<Element>(words[i]);  // as a cache of Element would hold it
      bytes[i] = code(rounded.x, steps[i].x) | code(rounded.y, steps[i].y) << 8;
    }
    *reinterpret_cast<uint2*>(to) = make_uint2(bytes[0] | bytes[1] << 16, bytes[2] | bytes[3] << 16);
  } else {
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Grid: splits of the context (the cluster), runs of up to eight heads of queries that share keys, sequences.
template <typename Element, typename Stored, int kHead>
__global__ void __launch_bounds__(kThreads, kHead == 64 ? 5 : 4) decode(const Problem p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using D = Deal<Stored, kHead>;
  constexpr int kSteps = kHead / 16;  // of the first product along K, and tiles of the second
  constexpr bool kAhead = D::kInt8;   // loads the next tile beside the work on this one: there are registers for it
  constexpr bool kEarly = kHead == 64;  // loads the first one before q: likewise
  __shared__ Found<kHead> found[kWarps];
  let_next_begin();
  wait_for_work_before();

  const int splits = gridDim.x, split = blockIdx.x;
  const int group = p.heads / p.kv_heads, runs = (group + kHeads - 1) / kHeads;
  const int kv_head = blockIdx.y / runs, run = blockIdx.y % runs;
  const int head0 = kv_head * group + run * kHeads, heads = min(group - run * kHeads, kHeads);
  const int64_t sequence = blockIdx.z;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0), lane = threadIdx.x % kWarp;
  const int g = lane / 4, t = lane % 4;
  const int past = p.past[sequence];
  // A sequence that the cache (or the tables) has no room for gets NaN and writes nothing.
  const bool fits = past >= 0 && past < p.capacity && (p.cos == nullptr || past < p.positions);
  const int position = fits ? past : 0, known = fits ? past + 1 : 0;
  const int64_t cache = (sequence * p.kv_heads + kv_head) * p.capacity * kHead;
  Stored* const keys = static_cast<Stored*>(p.key) + cache;
  Stored* const values = static_cast<Stored*>(p.value) + cache;
  const float* const key_scale = D::kInt8 ? p.key_scale + (p.scale_a_channel ? kv_head * kHead : 0) : nullptr;
  const float* const value_scale = D::kInt8 ? p.value_scale + (p.scale_a_channel ? kv_head * kHead : 0) : nullptr;

  // The blocks' shares are as even as whole tiles are, and of a block's tiles every warp takes each kWarps-th.
  const int tiles = (known + kKeys - 1) / kKeys;
  const int first = tiles * split / splits, last = tiles * (split + 1) / splits - 1;
  const int count = (last - first - warp + kWarps) / kWarps;  // of this warp; below 1: none
  const auto begin_of = [&](int i) { return (first + warp + i * kWarps) * kKeys; };
  const bool has_new = fits && last == tiles - 1 && (last - first) % kWarps == warp;  // the last of its tiles ends with the new key
  const auto is_new = [&](int i) { return has_new && i == count - 1; };
  const auto load = [&](Tile<Stored, kHead>& tile, int i) {
    const int begin = begin_of(i);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      // Of a key that is not there, another: its weight is zero.
      const Stored* const from = keys + uint32_t(min(begin + g + 8 * row, known - 1)) * kHead;
#pragma unroll
      for (int word = 0; word < D::kRowWords; word += D::kRunWords)
        load_once(from + D::of_key(t, word / D::kRunWords * D::kRun), reinterpret_cast<uint32_t(&)[D::kRunWords]>(tile.keys[row][word]));
    }
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      const Stored* const from = values + uint32_t(min(begin + 2 * t + row % 2 + row / 2 * 8, known - 1)) * kHead;
#pragma unroll
      for (int word = 0; word < D::kOwnWords; word += D::kOwnRunWords)
        load_once(from + D::of_value(g, word / D::kOwnRunWords * D::kOwnRun),
                  reinterpret_cast<uint32_t(&)[D::kOwnRunWords]>(tile.values[row][word]));
    }
  };
  Tile<Stored, kHead> tile;
  if (kEarly && count > 0 && !is_new(0)) load(tile, 0);

  // The new key and value go into the cache, by the warp that reads them; where several runs of heads share them, each writes the same bytes.
  if (has_new) {
    const int at = 8 * lane;
    if (at < kHead / 2) {
      const Element* const k = static_cast<const Element*>(p.k) + sequence * p.k_stride + kv_head * kHead;
      const Element* const v = static_cast<const Element*>(p.v) + sequence * p.v_stride + kv_head * kHead;
      Stored* const to[2] = {keys + int64_t(past) * kHead, values + int64_t(past) * kHead};
      float2 low[4], high[4];
      load_rotated<Element, kHead>(p, k, position, at, low, high);
      store_eight<Element>(to[0] + at, low, key_scale, p.scale_a_channel, at);
      store_eight<Element>(to[0] + at + kHead / 2, high, key_scale, p.scale_a_channel, at + kHead / 2);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int channel = at + half * (kHead / 2);
        uint32_t words[4];
        load_eight(v + channel, words);
        const float2 eight[4] = {unpack<Element>(words[0]), unpack<Element>(words[1]), unpack<Element>(words[2]), unpack<Element>(words[3])};
        store_eight<Element>(to[1] + channel, eight, value_scale, p.scale_a_channel, channel);
      }
    }
    __threadfence_block();
    __syncwarp();
  }

  // q of head g, with the scales of keys relative to the largest.
  float scale = p.scale;
  uint32_t q[kSteps][2];
  {
    const bool exists = g < heads;
    const Element* const from = static_cast<const Element*>(p.q) + sequence * p.q_stride + int64_t(head0 + (exists ? g : 0)) * kHead;
    float inverse = 1.0f;
    if (D::kInt8 && p.scale_a_channel) {
      float largest = 0.0f;
#pragma unroll 4
      for (int i = t; i < kHead; i += 4) largest = fmaxf(largest, key_scale[i]);
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
      scale *= largest;
      inverse = 1.0f / largest;
    } else if (D::kInt8) {
      scale *= key_scale[0];
    }
#pragma unroll
    for (int i = 0; i < kHead / 8; i += 8) {
      const int at = D::of_key(t, i);
      float2 low[4], high[4];
      load_rotated<Element, kHead>(p, from, position, at, low, high);
      if (D::kInt8 && p.scale_a_channel) {
        float2 scales[4];
        load_scales(key_scale, true, at, scales);
#pragma unroll
        for (int j = 0; j < 4; ++j) low[j] = make_float2(low[j].x * (scales[j].x * inverse), low[j].y * (scales[j].y * inverse));
        load_scales(key_scale, true, at + kHead / 2, scales);
#pragma unroll
        for (int j = 0; j < 4; ++j) high[j] = make_float2(high[j].x * (scales[j].x * inverse), high[j].y * (scales[j].y * inverse));
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        q[i / 4 + j / 2][j % 2] = exists ? pack<Element>(low[j].x, low[j].y) : 0;
        q[kSteps / 2 + i / 4 + j / 2][j % 2] = exists ? pack<Element>(high[j].x, high[j].y) : 0;
      }
    }
  }

  float y[kSteps][4] = {};           // [tile][row g or g + 8 of it, heads 2 t and 2 t + 1]
  float largest[2] = {kNone, kNone};  // of heads 2 t and 2 t + 1
  float sum[2] = {0.0f, 0.0f};        // and of this thread's keys alone
#pragma unroll 1
  for (int i = kAhead && (!kEarly || is_new(0)) ? -1 : 0; i < count; ++i) {
    Tile<Stored, kHead> next;
    if (kAhead) {
      if (i + 1 < count) load(next, i + 1);
      if (i < 0) {
        tile = next;
        continue;
      }
    } else if (!kEarly || i > 0 || is_new(0)) {
      load(tile, i);
    }
    float scores[4] = {};  // keys g and g + 8, heads 2 t and 2 t + 1
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if constexpr (D::kInt8) {
          const uint32_t biased = tile.keys[row][step] ^ 0x80808080;
          a[row] = halves_of_bytes<kFirstBytes>(biased);
          a[2 + row] = halves_of_bytes<kLastBytes>(biased);
        } else {
          a[row] = tile.keys[row][2 * step];
          a[2 + row] = tile.keys[row][2 * step + 1];
        }
      }
      multiply<Element>(scores, a, q[step][0], q[step][1]);
    }
    const int begin = begin_of(i);
    const bool present[2] = {begin + g < known, begin + g + 8 < known};
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      float most = largest[head];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        scores[2 * row + head] = present[row] ? scores[2 * row + head] * scale : kNone;
        most = fmaxf(most, scores[2 * row + head]);
      }
#pragma unroll
      for (int lanes = 4; lanes < kWarp; lanes *= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, lanes));
      const float factor = power_of_2(largest[head] - most);
      largest[head] = most;
      sum[head] *= factor;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        scores[2 * row + head] = present[row] ? power_of_2(scores[2 * row + head] - most) : 0.0f;
        sum[head] += scores[2 * row + head];
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        y[step][head] *= factor;
        y[step][2 + head] *= factor;
      }
    }
    // The weights, keys by heads, become the right operand.
    const uint32_t weights[2] = {transpose(pack<Element>(scores[0], scores[1])), transpose(pack<Element>(scores[2], scores[3]))};
    const auto pair_of = [&](int rows, int i) {  // element i of this thread's in keys 2 t and 2 t + 1, eight further where rows is 1
      const auto& one = tile.values[2 * rows];
      const auto& next = tile.values[2 * rows + 1];
      if constexpr (D::kInt8) {
        const uint32_t mixed = __byte_perm(one[i / 4], next[i / 4], i % 4 < 2 ? 0x5140 : 0x7362) ^ 0x80808080;
        return i % 2 == 0 ? halves_of_bytes<kFirstBytes>(mixed) : halves_of_bytes<kLastBytes>(mixed);
      } else {
        return __byte_perm(one[i / 2], next[i / 2], i % 2 == 0 ? 0x5410 : 0x7632);
      }
    };
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t a[4] = {pair_of(0, step), pair_of(0, step + kSteps), pair_of(1, step), pair_of(1, step + kSteps)};
      multiply<Element>(y[step], a, weights[0], weights[1]);
    }
    if (kAhead) tile = next;
  }

  Found<kHead>& its = found[warp];
#pragma unroll
  for (int head = 0; head < 2; ++head) {
#pragma unroll
    for (int lanes = 4; lanes < kWarp; lanes *= 2) sum[head] += __shfl_xor_sync(kAllLanes, sum[head], lanes);
    if (2 * t + head < heads) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        its.values[2 * t + head][D::of_value(g, i)] = y[i][head];
        its.values[2 * t + head][D::of_value(g, i + kSteps)] = y[i][2 + head];
      }
      if (g == 0) {
        its.largest[2 * t + head] = largest[head];
        its.sum[2 * t + head] = sum[head];
      }
    }
  }
  __syncthreads();
  cluster_arrive(), cluster_wait();
  // A thread finishes one element of a head with what all warps of all blocks found; every block finishes a share of them.
  const int elements = heads * kHead;
#pragma unroll 1
  for (int i = split * kThreads + threadIdx.x; i < elements; i += splits * kThreads) {
    const int head = i / kHead, element = i % kHead;
    float most = kNone, total = 0.0f, value = 0.0f;
#pragma unroll 1
    for (int block = 0; block < splits; ++block) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float its = read_from_block(found[w].largest[head], block), its_sum = read_from_block(found[w].sum[head], block);
        const float its_value = read_from_block(found[w].values[head][element], block);
        const float larger = fmaxf(most, its), before = power_of_2(most - larger), factor = power_of_2(its - larger);
        most = larger;
        total = total * before + factor * its_sum;
        value = value * before + factor * its_value;
      }
    }
    if (D::kInt8) value *= value_scale[p.scale_a_channel ? element : 0];
    static_cast<Element*>(p.y)[(sequence * p.heads + head0 + head) * kHead + element] =
        Element(fits ? __fdividef(value, total) : __int_as_float(0x7FC00000));
  }
  cluster_arrive(), cluster_wait();  // the others have read this block's memory
#endif
}

// As few blocks to a context as keep the device busy, each with a tile for every warp: more of them cost more to put together.
int splits_for(int64_t blocks, int64_t longest, const Device& device) {
  int splits = 1;
  while (splits < kMostSplits && 2 * blocks * splits < 3 * device.multiprocessors && longest >= 2 * splits * kWarps * kKeys) splits *= 2;
  return splits;
}

template <typename Element, typename Stored, int kHead>
fq_status launch_as(const fq_decode_attention_params& params, const Device& device, cudaStream_t stream) {
  Problem problem = {};
  problem.q = params.q;
  problem.k = params.k;
  problem.v = params.v;
  problem.cos = params.cos;
  problem.sin = params.sin;
  problem.past = params.past;
  problem.key = params.key;
  problem.value = params.value;
  problem.y = params.y;
  problem.key_scale = params.key_scale;
  problem.value_scale = params.value_scale;
  problem.capacity = params.capacity;
  problem.positions = params.positions;
  problem.q_stride = params.q_stride;
  problem.k_stride = params.k_stride;
  problem.v_stride = params.v_stride;
  problem.heads = params.heads;
  problem.kv_heads = params.kv_heads;
  problem.scale = params.scale * kLog2E;
  problem.scale_a_channel = params.scales == FQ_SCALE_A_CHANNEL;
  const int group = params.heads / params.kv_heads;
  const unsigned runs = unsigned(params.kv_heads * ((group + kHeads - 1) / kHeads));
  const int splits = splits_for(params.batch * runs, params.longest, device);
  const Launch launch = {dim3(unsigned(splits), runs, unsigned(params.batch)), dim3(unsigned(splits), 1, 1), kThreads, 0, true};
  return launch_kernel("GroupQueryAttention decode", decode<Element, Stored, kHead>, launch, stream, problem);
}

template <typename Element, typename Stored>
fq_status launch_type(const fq_decode_attention_params& params, const Device& device, cudaStream_t stream) {
  return params.head == 64 ? launch_as<Element, Stored, 64>(params, device, stream) : launch_as<Element, Stored, 128>(params, device, stream);
}

const char* fits(const fq_decode_attention_params& params, const Device&) {
  if (params.dtype != FQ_FLOAT16 && params.dtype != FQ_BFLOAT16) return "takes float16 or bfloat16";
  if (params.cache == FQ_CACHE_INT8 && params.dtype != FQ_FLOAT16) return "takes a cache of int8 with float16";
  if (params.head != 64 && params.head != 128) return "takes heads of 64 or 128";
  if (params.capacity * params.head > INT32_MAX) return "takes up to 2^31 elements of a head's keys";
  if (params.heads > 65535 || params.batch > 65535) return "takes up to 65,535 heads and sequences";
  return nullptr;
}

fq_status launch(const fq_decode_attention_params& params, const Device& device, cudaStream_t stream) {
  if (params.cache == FQ_CACHE_INT8) return launch_type<__half, int8_t>(params, device, stream);
  return params.dtype == FQ_FLOAT16 ? launch_type<__half, __half>(params, device, stream)
                                    : launch_type<__nv_bfloat16, __nv_bfloat16>(params, device, stream);
}

}  // namespace

const AttentionKernel GroupQueryAttention_decode = {fits, launch};

}  // namespace fq
