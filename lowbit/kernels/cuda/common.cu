// One decoded token of a Llama at batch 1, as a chain of kernels that stream every weight once (SM90).
//
//   embed -> layers x [ RMSNorm+qkv, RoPE+attention+KV append, o+residual, RMSNorm+gate_up+SiLU, down+residual ]
//         -> RMSNorm+head+arg max, which also writes the next token and advances the position
//
// How a matrix-vector product is done. The rows of a matrix are cut into tiles of 16, the tiles are dealt to 128
// thread blocks, and each block's weights lie in memory as one contiguous stream of stages: 16 rows x up to WIDEST columns,
// scales behind them (lowbit/kernels/stream.py packs it). In a block
//   * one producer thread copies stage after stage into a ring in shared memory with the bulk copy engine. It never
//     waits for the kernel before, so weights keep flowing while that one ends (programmatic dependent launch, PDL);
//   * WARPS consumer warps take whole stages, each alone: 128-bit loads, a mask instead of a conversion, and mma with the
//     weights as operand A. Tensor cores do the multiplication and the sum over k; operand B is x.
//
// Integer formats (int8, int4, int3, int2, ternary, binary, and e2m1 as twice its values) are multiplied as integers, exactly, by mma.m16n8k32. Per 128 columns x is
// rounded to 16 bits, x = scale (256 d0 + d1) with digits of 8 bits, which is closer than fp16. An mma has 8 columns of x,
// one would do for a matrix-vector product: here they are d0 and d1 of 4 groups of 128 columns. A lane whose column
// belongs to another group than the weights at hand gives zeros, so that after 4 groups the sums of all of them, digit by
// digit, lie side by side, and the four lanes that share a row scale one group each. Fields that do not lie at the lowest
// bits of their byte are masked, not shifted: row g + 8's 4 bits are worth 16 times as much as row g's, which the sum undoes.
// bf16 is multiplied as bf16, fp8 is converted to fp16 first (mma.m16n8k16); x is rounded to the same 16 bits.
//
// PDL. A kernel triggers its dependents after its own wait, never before: an earlier trigger lets kernel N+2 start while
// N still runs, and gave different bits in 1 of 10 runs while every tolerance held (docs/kernels.md).
//
// Compiled by NVRTC (lowbit/kernels/nvrtc.py), which knows no host headers. Macros given on the command line:
// FORMAT, WIDEST, WGROUP, ZEROED, HIDDEN, INTER, HEADS, KV_HEADS, HEAD_DIM, EPS, WARPS, KV, SPLITS, BATCH (sequences; batch.cu is for 2 to 8).
enum { BF16 = 0, INT8 = 1, INT4 = 2, INT2 = 3, TERNARY = 4, FP8 = 5, MXFP4 = 6, NVFP4 = 7, INT3 = 8, BINARY = 9 };
enum { TO_ACT = 0, ADD_RESIDUAL = 1, SILU_MUL = 2, TO_LOGITS = 3 };  // what a product's epilogue does

constexpr int CONSUMERS = WARPS * 32, THREADS = CONSUMERS + 32;  // and one producer warp
constexpr int QDIM = HEADS * HEAD_DIM, KVDIM = KV_HEADS * HEAD_DIM;
constexpr int GROUP = 128;       // columns that share a scale of x (INTEGER)
constexpr int MAX_RING = 48;      // stages
constexpr int BATCH_TILES = 14;  // row tiles whose partial sums are in shared memory at once
constexpr bool GROUPED = WGROUP > 0;  // WGROUP columns of a row share a scale and, ZEROED, a zero: fp16, or a byte beside e2m1
constexpr bool ROW_SCALED = FORMAT == INT8 || FORMAT == TERNARY || FORMAT == BINARY || FORMAT == FP8 || FORMAT == NVFP4;  // fp32 per row
constexpr bool INTEGER = FORMAT != BF16 && FORMAT != FP8, E2M1 = FORMAT == MXFP4 || FORMAT == NVFP4;
constexpr int BITS = FORMAT == BF16 ? 16 : (FORMAT == INT8 || FORMAT == FP8) ? 8 : FORMAT == INT3 ? 3 : (FORMAT == INT2 || FORMAT == TERNARY) ? 2 : FORMAT == BINARY ? 1 : 4;
constexpr int SCALE_COLUMNS = GROUPED ? WGROUP : GROUP, SCALE_BYTES = !GROUPED ? 0 : E2M1 ? 1 : ZEROED ? 4 : 2;
constexpr bool SPLIT = WGROUP == 32;  // a lane's 16 of 64 columns lie in two of those groups (decode.cu)
constexpr int SUM_COLUMNS = (FORMAT == INT4 && WGROUP < GROUP) || (FORMAT == NVFP4 && BATCH > 1) ? WGROUP : GROUP;  // whose sum of x the weights' zeros are multiplied by
// Of a matrix with K columns: columns of a stage, bytes of its codes, bytes with scales
__device__ constexpr int stage_columns(int k) { int ku = WIDEST; while (k % ku) ku /= 2; return ku; }
__device__ constexpr int code_bytes(int ku) { return 2 * ku * BITS; }
__device__ constexpr int stage_bytes(int ku) { return code_bytes(ku) + 16 * ku / SCALE_COLUMNS * SCALE_BYTES; }
static_assert(CONSUMERS >= BATCH_TILES * 16, "an epilogue has one thread per row");
static_assert(HIDDEN % 256 == 0 && INTER % 256 == 0 && QDIM % 256 == 0, "K is cut into whole stages");

struct Product {               // one matrix-vector product
  const uint8_t* weights;      // stream: [tile][K / stage_columns(K)][stage]
  const float* row_scale;      // [rows], ROW_SCALED only
  const void* x;               // fp32 residual (NORM) or 16-bit activations
  const uint16_t* norm;        // RMSNorm weight (NORM), 16 bits
  void* out;                   // 16-bit activations, fp32 residual (added to) or fp32 logits
  uint64_t* best;              // TO_LOGITS: the arg max so far, as an ordered key
  uint32_t* arrived;           // TO_LOGITS: blocks that are done
  int64_t* token;              // TO_LOGITS: the next token goes here
  int64_t* position;           // TO_LOGITS: advanced by one
  int64_t* history;            // TO_LOGITS: [length], the token of each position
  int tiles;                   // rows / 16, rounded up
  int rows;
  int ring;                    // stages in shared memory, a multiple of WARPS
  int batch;                   // row tiles per batch, at most BATCH_TILES
};

__device__ __forceinline__ void sync_consumers() { sync_some<CONSUMERS>(); }
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (FORMAT == BF16) mma_bf16(c, a0, a1, a2, a3, b0, b1);
  else mma_f16(c, a0, a1, a2, a3, b0, b1);
}
__device__ __forceinline__ void mma(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (FORMAT == INT8 || E2M1) mma_s8(c, a0, a1, a2, a3, b0, b1);
  else mma_u8(c, a0, a1, a2, a3, b0, b1);
}
// 16-bit activations, norms and KV cache: bf16 beside bf16 weights, else fp16.
__device__ __forceinline__ uint16_t to16(float v) {
  if constexpr (FORMAT == BF16) return __bfloat16_as_ushort(__float2bfloat16(v));
  return __half_as_ushort(__float2half_rn(v));
}
__device__ __forceinline__ float from16(uint16_t v) {
  if constexpr (FORMAT == BF16) return __uint_as_float((uint32_t)v << 16);
  return __half2float(__ushort_as_half(v));
}
__device__ __forceinline__ float2 from16x2(uint32_t v) { return make_float2(from16((uint16_t)v), from16((uint16_t)(v >> 16))); }
// ---------------------------------------------------------------------------------------------- x in two digits
constexpr float MAGIC = 12582912.f;  // 1.5 * 2^23: float MAGIC + i has i in its low bits, for |i| < 2^22
constexpr int MAGIC_BITS = 0x4b400000;
// Over LANES neighbours, by shuffles; the halves of a warp, of several sequences, by two redux of all 32 lanes (`whole`), which are faster
// there. A redux.sync with a mask for each half would make a warp run as two halves, one after the other, from the first of them to the
// last (SASS: WARPSYNC.EXCLUSIVE).
template <int LANES, typename T, typename Join, typename Whole> __device__ __forceinline__ T over_lanes(T v, Join&& join, Whole&& whole) {
  if constexpr (BATCH > 1 && LANES == 16) {
    const bool upper = threadIdx.x & 16;
    const T of_lower = whole(upper ? T(0) : v), of_upper = whole(upper ? v : T(0));
    return upper ? of_upper : of_lower;
  } else {
#pragma unroll
    for (int d = LANES / 2; d >= 1; d >>= 1) v = join(v, __shfl_xor_sync(~0u, v, d));
    return v;
  }
}
// 8 consecutive values of x in each of 32 lanes, of which 16 neighbours hold a group -> two digits each, the group's
// scale, the lane's sum.
__device__ __forceinline__ void to_digits(const float (&v)[8], uint32_t (&high)[2], uint32_t (&low)[2], float& scale, int& sum) {
  constexpr float LARGEST = 32512.f;  // 127 * 256
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) most = max(most, __float_as_uint(v[i]) & 0x7fffffffu);  // bits order as values do, NaN last
  most = over_lanes<16>(most, [](uint32_t a, uint32_t b) { return max(a, b); }, warp_max);
  const float largest = __uint_as_float(most);
  const bool tiny = largest < 1e-30f;
  scale = tiny ? 0.f : largest * (1.f / LARGEST);
  const float times = tiny ? 0.f : __fdividef(LARGEST, largest);
  sum = -8 * MAGIC_BITS;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    uint32_t q[4];
#pragma unroll
    for (int i = 0; i < 4; i++) q[i] = __float_as_uint(v[h * 4 + i] * times + MAGIC), sum += (int)q[i];
    low[h] = pick_bytes(pick_bytes(q[0], q[1], 0x0040), pick_bytes(q[2], q[3], 0x0040), 0x5410);
#pragma unroll
    for (int i = 0; i < 4; i++) q[i] += 128;  // low is signed: -128 to 127
    high[h] = pick_bytes(pick_bytes(q[0], q[1], 0x0051), pick_bytes(q[2], q[3], 0x0051), 0x5410);
  }
}
