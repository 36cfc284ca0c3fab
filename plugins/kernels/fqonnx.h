/* fqonnx's kernels: plain pointers, sizes and a stream.
 *
 * Every function checks its arguments, enqueues its work on `stream` and returns; none allocates device memory, synchronizes or keeps
 * state between calls, so that calls may be captured in CUDA graphs and made from several streams and threads at once. On any status
 * but FQ_OK nothing was enqueued and fq_last_error() says why, in one line.
 *
 * Pointers are to device memory of the current device unless they say host. Matrices are row-major and contiguous. What the operations
 * mean, to the order of the roundings, is defined by fqonnx/ops/reference.py; numbers of types are those of ONNX's TensorProto.DataType.
 */
#ifndef FQONNX_H
#define FQONNX_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define FQ_API __declspec(dllexport)
#else
#define FQ_API __attribute__((visibility("default")))
#endif

#define FQ_ABI_VERSION 1

typedef struct CUstream_st* fq_stream; /* cudaStream_t */

typedef enum fq_status {
  FQ_OK = 0,
  FQ_INVALID_ARGUMENT = 1, /* a null or misaligned pointer, a size or a value out of range */
  FQ_UNSUPPORTED = 2,      /* no kernel of the table takes this problem on this device */
  FQ_CUDA_ERROR = 3        /* the driver or the runtime refused */
} fq_status;

typedef enum fq_dtype { FQ_FLOAT = 1, FQ_FLOAT16 = 10, FQ_BFLOAT16 = 16 } fq_dtype;

/* How activation codes are stored: one a byte, or two 4-bit codes a byte with the even index in the low nibble. */
typedef enum fq_container { FQ_INT8 = 0, FQ_PACKED = 1, FQ_INT32X8 = 2 /* eight nibbles in an int32, index 0 lowest: same bytes as FQ_PACKED */ } fq_container;

/* Order of the weight's nibbles along K; see fqonnx/ops/layout.py. */
typedef enum fq_layout { FQ_PLAIN = 0, FQ_K128 = 1 } fq_layout;

/* Rows of K values to rows of integer codes and a scale: FlatQuantize (FlatQuant, arXiv 2410.09426, section 3.1).
 *
 *   t = left^T . reshape(x, n1, n2) . right for each run of n1 n2 columns;  step = (max|t| * clip) / qmax;  scale = step < 2^-126 ? 1 : step;
 *   q = clamp(round_half_even(t / scale), -qmax - 1, qmax);  qmax = 2^(bits - 1) - 1;  a row with NaN or Inf in t has a NaN scale.
 */
typedef struct fq_flat_quantize_params {
  const void* x;         /* [rows, k] of dtype; row r begins at x + r * x_stride elements; 16-byte aligned rows */
  const void* left;      /* [n1, n1] of factor_dtype; NULL with n1 = n2 = 1: no transform */
  const void* right;     /* [n2, n2] of factor_dtype; NULL likewise */
  const float* clip_ptr; /* one fp32 in (0, 1]; NULL: clip below is it */
  void* q;               /* [rows, k] int8 or [rows, k / 2] bytes when packed; 16-byte aligned */
  float* scale;          /* [rows] */
  int64_t rows;          /* 0 is allowed: nothing to do */
  int64_t k;             /* n1 n2 divides it */
  int64_t x_stride;      /* elements from row to row, at least k */
  int32_t n1, n2;        /* 1..256 each */
  int32_t dtype;         /* fq_dtype of x */
  int32_t factor_dtype;  /* FQ_FLOAT, or dtype */
  int32_t bits;          /* 4 or 8 */
  int32_t container;     /* fq_container; FQ_PACKED and FQ_INT32X8 only with 4 bits and an even k (a multiple of 8) */
  float clip;            /* used where clip_ptr is NULL */
  int32_t variant;       /* 0: the table's choice; else 1 + index of an entry of fq_kernels that takes this problem */
  int32_t constant_factors; /* not 0: no work that is still under way on any stream writes left, right, clip_ptr or gamma, so that they may
                               be read before the work ahead on the stream is done, while it makes x */
} fq_flat_quantize_params;

FQ_API fq_status fq_flat_quantize(const fq_flat_quantize_params* params, fq_stream stream);

/* The same on h = gamma * (x / sqrt(mean(x^2) + epsilon)), computed in fp32 and rounded once to dtype, with the norm in the same launch.
 * `normed` (NULL: not wanted) receives h, [rows, k] of dtype. Where `residual` is given, x + residual (rounded to dtype) takes the place
 * of x and is written to `sum` (NULL: not wanted). gamma is [k] of dtype. */
typedef struct fq_rms_norm_params {
  const void* gamma;
  const void* residual;
  void* sum;
  void* normed;
  float epsilon;
} fq_rms_norm_params;

FQ_API fq_status fq_rms_norm_flat_quantize(const fq_flat_quantize_params* params, const fq_rms_norm_params* norm, fq_stream stream);

/* The same on h = silu(x) * up, computed in fp32 and rounded once to dtype; silu(v) = v / (1 + exp(-v)). `up` is [rows, k] of dtype with
 * up_stride elements from row to row: gate and up may be the halves of one merged GEMM's output. */
typedef struct fq_silu_mul_params {
  const void* up;
  int64_t up_stride;
} fq_silu_mul_params;

FQ_API fq_status fq_silu_mul_flat_quantize(const fq_flat_quantize_params* params, const fq_silu_mul_params* gate, fq_stream stream);

/* y = q * scale per row: codes back to dtype. */
typedef struct fq_dequantize_params {
  const void* q;      /* [rows, k] int8 or [rows, k / 2] bytes when packed */
  const float* scale; /* [rows] */
  void* y;            /* [rows, k] of dtype */
  int64_t rows, k;
  int32_t container; /* fq_container */
  int32_t dtype;     /* fq_dtype of y */
} fq_dequantize_params;

FQ_API fq_status fq_dequantize(const fq_dequantize_params* params, fq_stream stream);

/* y = (q . w^T) * w_scale * scale + bias with exact integer sums: W4A4Gemm.
 *
 * One scale a channel: y = ((sum * w_scale) * scale) + bias in fp32 in this order, rounded once to dtype: bit-equal to the reference.
 * Scales per group of k / groups: fp32 sums of the groups' exact integer sums times their scales. */
typedef struct fq_w4a4_gemm_params {
  const void* q;        /* [m, k] int8, holding -8..7 or -128..127, or [m, k / 2] bytes when packed; 16-byte aligned */
  const float* scale;   /* [m] */
  const void* w;        /* [n, k / 2] bytes, two nibbles a byte, in the order of layout; 16-byte aligned */
  const float* w_scale; /* [n, groups] */
  const float* bias;    /* [n], or NULL: none */
  void* y;              /* [m, n] of dtype; 16-byte aligned */
  int64_t m;            /* 0 is allowed: nothing to do */
  int64_t n, k;         /* multiples of 16; k at most 131,071 */
  int64_t groups;       /* 1: per channel */
  int32_t dtype;        /* fq_dtype of y */
  int32_t container;    /* fq_container of q */
  int32_t layout;       /* fq_layout of w */
  int32_t variant;      /* 0: the table's choice; else 1 + index of an entry of fq_kernels that takes this problem */
  int32_t tactic;       /* 0: chosen from the shape; else 1..fq_w4a4_gemm_tactics(): the tile of the chosen kernel */
  int32_t constant_weights; /* not 0: no work that is still under way on any stream writes w, w_scale or bias, so that they may be read
                               before the work ahead on the stream is done, while it makes q */
} fq_w4a4_gemm_params;

FQ_API fq_status fq_w4a4_gemm(const fq_w4a4_gemm_params* params, fq_stream stream);

/* How many tactics the kernel that this problem gets on the current device offers; 0 where none takes it (fq_last_error says why). */
FQ_API int32_t fq_w4a4_gemm_tactics(const fq_w4a4_gemm_params* params);

/* How keys and values of earlier tokens are stored: as they are, or as int8 codes that a scale multiplies (ONNX Runtime's
 * kv_cache_bit_width 8): code = clamp(round_half_even(x / scale), -128, 127). */
typedef enum fq_cache { FQ_CACHE_FLOAT = 0, FQ_CACHE_INT8 = 1 } fq_cache;

/* Scales of an int8 cache: one fp32 for all of the keys (and one for all of the values), or [kv_heads, head] of them. */
typedef enum fq_cache_scales { FQ_SCALE_A_TENSOR = 0, FQ_SCALE_A_CHANNEL = 1 } fq_cache_scales;

/* One token of each sequence attends to those before it and to itself: the step of com.microsoft.GroupQueryAttention (opset 1) with
 * sequence_length 1, causal, whose cache stays where it is.
 *
 *   key[b, :, past[b], :] = rotary(k[b]);  value[b, :, past[b], :] = v[b];
 *   y[b, h] = softmax(scale * rotary(q[b, h]) . key[b, g, :past[b] + 1]^T) . value[b, g, :past[b] + 1],  g = h / (heads / kv_heads);
 *
 * rotary pairs element i with i + head / 2 (arXiv 2104.09864; rotary_interleaved 0) at position past[b]. The new key and
 * value are rounded to what the cache holds before they are used. A sequence with past[b] below 0, or not below capacity (and positions, with a rotary
 * embedding), gets NaN in y, and its cache stays as it is. Products of 16-bit operands with fp32 sums; weights are rounded to dtype. */
typedef struct fq_decode_attention_params {
  const void* q;        /* [batch, heads, head] of dtype; sequence b begins at q + b * q_stride elements; rows are 16-byte aligned */
  const void* k;        /* [batch, kv_heads, head] likewise: q, k and v may be parts of one product's output */
  const void* v;
  const void* cos;      /* [positions, head / 2] of dtype, 16-byte aligned; NULL, and sin too: no rotary embedding */
  const void* sin;
  const int32_t* past;  /* [batch]: tokens in the cache (GroupQueryAttention's seqlens_k) */
  void* key;            /* [batch, kv_heads, capacity, head] of dtype or int8, as `cache` says; 16-byte aligned */
  void* value;
  const float* key_scale;   /* of an int8 cache, as `scales` says; positive; 8-byte aligned where there are several. Else NULL */
  const float* value_scale;
  void* y;              /* [batch, heads, head] of dtype */
  int64_t batch;        /* 0 is allowed: nothing to do */
  int64_t capacity, positions;
  int64_t longest;      /* largest past[b] + 1 that is expected: how work is shared out, not what comes of it */
  int64_t q_stride, k_stride, v_stride;
  int32_t heads, kv_heads; /* kv_heads divides heads */
  int32_t head;
  int32_t dtype;        /* fq_dtype */
  int32_t cache;        /* fq_cache */
  int32_t scales;       /* fq_cache_scales; FQ_SCALE_A_TENSOR where there are none */
  float scale;
  int32_t variant;      /* 0: the table's choice; else 1 + index of an entry of fq_kernels that takes this problem */
} fq_decode_attention_params;

FQ_API fq_status fq_decode_attention(const fq_decode_attention_params* params, fq_stream stream);

/* The message of this thread's last failed call; never NULL. */
FQ_API const char* fq_last_error(void);

/* The table of kernels (kernels.def). */
typedef struct fq_kernel {
  const char* op;          /* "FlatQuantize", "W4A4Gemm" or "GroupQueryAttention" */
  const char* name;        /* such as "wgmma_s8" */
  const char* instruction; /* of its inner loop */
  int32_t container;       /* fq_container, or -1: any */
  int32_t layout;          /* fq_layout, or -1: any, or no weight */
  int32_t lowest, highest; /* compute capabilities it is chosen for, such as 90 and 90 */
  int32_t runs_on_lowest, runs_on_highest; /* and those where it runs when named by `variant` */
} fq_kernel;

FQ_API int32_t fq_kernel_count(void);
FQ_API const fq_kernel* fq_kernels(void);

FQ_API int32_t fq_abi_version(void);
FQ_API const char* fq_build_info(void); /* architectures, compiler and content hash, one "name: value" a line */

#ifdef __cplusplus
}
#endif
#endif
