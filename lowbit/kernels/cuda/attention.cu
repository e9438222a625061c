// ---------------------------------------------------------------------------------------------- attention
// Grouped-query attention of one new token over the cache. A cluster of SPLITS blocks works for one KV head and all the
// query heads that share it, so that keys and values are read once. Positions come in chunks of 16, dealt to the blocks
// and to their warps in turn; a warp copies its own chunks into shared memory, from before the wait on, and multiplies
// with mma.m16n8k16:
//
//   scores [16 positions x 8 heads] = keys [16 x HEAD_DIM] · queries        sums [HEAD_DIM x 8 heads] += values^T · weights
//
// (up to 8 query heads per KV head; Llama-3 has 3 or 4, the other columns are zeros). The new key is rotated and appended
// here. Warps are merged in shared memory and blocks by letters to their cluster's, in a fixed order: the bits repeat. A
// letter's bytes are counted where they arrive; a cluster's barrier that orders memory would wait for all stores of a block.
//
// KV: what the cache holds. 16 bits as the activations; or codes of 8 bits, int8 or e4m3, with an fp16 scale per head and
// position, as lowbit/kvcache defines them (NARROW). Codes lie in shared memory as they come and become fp16, exactly, on
// their way into an mma of fp16. ldmatrix moves 16 bits, so it hands out two codes where it moved one number:
//   keys    a lane has 4 dimensions in a row of each 16, instead of 2 and 2: queries are loaded in that order;
//   values  transposed are pairs of dimensions: even ones become the upper 8 rows of the mma, odd ones the lower 8.
// A key's scale multiplies its scores, a value's its weights, which a power of two holds in fp16's range.
enum { KV_16 = 0, KV_INT8 = 1, KV_FP8 = 2 };
constexpr bool NARROW = KV != KV_16;
template <bool> struct Codes { using One = uint16_t; using Two = uint32_t; };
template <> struct Codes<true> { using One = uint8_t; using Two = uint16_t; };
using Code = Codes<NARROW>::One;
using CodePair = Codes<NARROW>::Two;

struct Attention {
  const uint16_t* qkv;        // [QDIM + 2 KVDIM] of this token
  Code *keys, *values;        // [KV_HEADS][length][HEAD_DIM]
  uint16_t *key_scale, *value_scale;  // [KV_HEADS][length] fp16, NARROW only
  const float2* rope;         // [length][HEAD_DIM / 2] (cos, sin)
  const int64_t* position;    // of this token
  uint16_t* out;              // [QDIM]
  int length;
};
// SPLITS, blocks of a cluster, is a macro: 8, and fewer where several sequences fill the GPU
constexpr int CHUNK = 16;                                   // positions
constexpr int QUERIES = HEADS / KV_HEADS, HALF_DIM = HEAD_DIM / 2, K_TILES = HEAD_DIM / 16;
constexpr int MATRICES = NARROW ? K_TILES / 2 : K_TILES;    // that ldmatrix hands out per chunk, of keys and of values
constexpr int MATRIX = HEAD_DIM / MATRICES;                 // dimensions of one
constexpr int PIECE = 16 / sizeof(Code);                    // codes that are copied at once
constexpr int ROW = HEAD_DIM + PIECE;                       // padded: the 8 rows that ldmatrix reads at once share no bank
constexpr int CHUNK_CODES = CHUNK * ROW;                    // of keys, then of values, then their scales
constexpr int CHUNK_BYTES = 2 * CHUNK_CODES * (int)sizeof(Code) + (NARROW ? 2 * CHUNK * 2 : 0);
constexpr float LARGEST = KV == KV_INT8 ? 127.f : 448.f;    // of a code
constexpr float LIFT = KV == KV_INT8 ? 64.f : KV == KV_FP8 ? 256.f : 1.f;  // × a weight × 65504 / LARGEST fits fp16
constexpr int OUTPUTS = QUERIES * HEAD_DIM;
constexpr int HEAD_ROW = HEAD_DIM + 8, ALL_SUMS = QUERIES * HEAD_ROW;  // no bank twice
constexpr int RESULT = ALL_SUMS + 2 * QUERIES;              // a warp's: sums, then maxima, then weights
constexpr int SHARE = OUTPUTS / SPLITS;                     // of the outputs: what each block of a cluster finishes
constexpr int LETTER = SHARE + (2 * QUERIES + 3) / 4 * 4;   // what each tells it: sums, then maximum and weight by head
constexpr float LOG2_E = 1.4426950408889634f;               // exponentials are powers of two here
static_assert(QUERIES <= 8, "the heads of a group are the 8 columns of an mma");
static_assert(SPLITS > 1, "st.async, which carries letters, is defined in clusters of several blocks alone");
constexpr int FREE = 2 * CHUNK_CODES * (int)sizeof(Code) - 16;  // of a chunk: behind its last row of values
static_assert(RESULT * 4 <= FREE && CHUNK_BYTES % 16 == 0, "a warp's result takes the place of its first chunk");

__device__ __forceinline__ uint32_t pack16(float a, float b) { return (uint32_t)to16(a) | ((uint32_t)to16(b) << 16); }
// As the mma takes them: in 16 bits as the cache's, beside codes in fp16
__device__ __forceinline__ uint32_t pack_operand(float a, float b) {
  if constexpr (!NARROW) return pack16(a, b);
  return (uint32_t)__half_as_ushort(__float2half_rn(a)) | ((uint32_t)__half_as_ushort(__float2half_rn(b)) << 16);
}
__device__ __forceinline__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (NARROW) mma_f16(c, a0, a1, a2, a3, b0, b1);
  else mma(c, a0, a1, a2, a3, b0, b1);
}
__device__ __forceinline__ float2 rotate_low(uint32_t low, uint32_t high, const float4& cs) {
  const float2 x = from16x2(low), y = from16x2(high);
  return make_float2(x.x * cs.x - y.x * cs.y, x.y * cs.z - y.y * cs.w);
}
__device__ __forceinline__ float2 rotate_high(uint32_t low, uint32_t high, const float4& cs) {
  const float2 x = from16x2(low), y = from16x2(high);
  return make_float2(y.x * cs.x + x.x * cs.y, y.y * cs.z + x.y * cs.w);
}
// Two codes of a word as two halves: bytes 0 and 1 or 2 and 3 (neighbours), 0 and 2 or 1 and 3 (every second one)
template <bool SECOND> __device__ __forceinline__ void codes_to_halves(uint32_t w, uint32_t& a, uint32_t& b) {
  if constexpr (KV == KV_INT8) {
    w ^= 0x80808080u;  // code + 128; with 0x64 above it the half 1024 + 128 + code, less 1152
    a = subtract_halves(pick_bytes(w, 0x64646464u, SECOND ? 0x4240 : 0x4140), 0x64806480u);
    b = subtract_halves(pick_bytes(w, 0x64646464u, SECOND ? 0x4341 : 0x4342), 0x64806480u);
  } else {
    if constexpr (SECOND) w = pick_bytes(w, 0u, 0x3120);
    a = e4m3_to_halves(w, 0), b = e4m3_to_halves(w, 1);
  }
}
// A new key's or value's four numbers per lane -> its scale, and the same four as codes, two in each word
__device__ __forceinline__ uint16_t to_codes(uint32_t& low, uint32_t& high) {
  const float2 x = from16x2(low), y = from16x2(high);
  float most = fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(y.x), fabsf(y.y)));
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
  const uint16_t scale = __half_as_ushort(__float2half_rn(fmaxf(most / LARGEST, 5.9604644775390625e-08f)));  // 2^-24
  const float s = __half2float(__ushort_as_half(scale));
  auto pair = [&](float a, float b) -> uint32_t {
    a = fminf(fmaxf(a / s, -LARGEST), LARGEST), b = fminf(fmaxf(b / s, -LARGEST), LARGEST);
    if constexpr (KV == KV_FP8) return floats_to_e4m3(a, b);
    return ((uint32_t)(int)rintf(a) & 255u) | (((uint32_t)(int)rintf(b) & 255u) << 8);
  };
  low = pair(x.x, x.y), high = pair(y.x, y.y);
  return scale;
}
// STAGES chunks per warp on their way: 1 leaves room for a product's block beside this one, more keep memory busy. ATTENTION_WARPS: of a
// block; half as many leave half of the shared memory and of the registers to a product.
template <int STAGES, int ATTENTION_WARPS> __global__ void __maxnreg__(STAGES > 1 ? 128 : NARROW ? 104 : 96) attention_kernel(const __grid_constant__ Attention a) {
  static_assert(SHARE % 4 == 0 && SHARE <= ATTENTION_WARPS * 32 && SPLITS <= HEAD_DIM / 4, "each block finishes its share");
  constexpr int AT_ONCE = STAGES > 1 ? 4 : NARROW ? 1 : 2;  // matrices in registers
  SHARED_MEMORY(memory);
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5, g = lane >> 2, quarter = lane & 3, split = blockIdx.y;
  // Of a batch, sequence after sequence: caches lie [BATCH][KV_HEADS]..., qkv and out [BATCH]...
  const int owned = blockIdx.x, kv = BATCH > 1 ? owned % KV_HEADS : owned;
  const uint16_t* qkv = a.qkv + (BATCH > 1 ? owned / KV_HEADS * (QDIM + 2 * KVDIM) : 0);
  uint8_t* own = memory + warp * STAGES * CHUNK_BYTES;
  float* letters = (float*)(memory + ATTENTION_WARPS * STAGES * CHUNK_BYTES);  // [SPLITS][LETTER]
  uint64_t* arrived = (uint64_t*)(memory + FREE);
  if (t == 0) barrier_init(arrived, 1), barriers_ready(), barrier_expect(arrived, SPLITS * (SHARE + 2 * QUERIES) * 4);
  __syncwarp();
  cluster_arrive();  // peers may write here from now on
  // Written by the step before, whose kernels are all done: may be read before the wait, and so may the old cache
  const int position = (int)*a.position, chunks = position / CHUNK + 1;
  const size_t first_row = (size_t)owned * a.length;
  auto chunk_of = [&](int i) { return (i * ATTENTION_WARPS + warp) * SPLITS + split; };
  auto fetch = [&](int i) {
    const int first = chunk_of(i) * CHUNK;
    Code* to = (Code*)(own + i % STAGES * CHUNK_BYTES);
    if (first <= position) {
#pragma unroll 2
      for (int n = 0; n < CHUNK * HEAD_DIM / PIECE / 32; n++) {
        const int piece = n * 32 + lane, row = piece / (HEAD_DIM / PIECE), column = piece % (HEAD_DIM / PIECE) * PIECE;
        const bool there = first + row < position;  // zeros for the rest: what is weighted with 0 must be finite
        const size_t from = (first_row + (there ? first + row : 0)) * HEAD_DIM + column;
        copy_ahead(to + row * ROW + column, a.keys + from, there);
        copy_ahead(to + CHUNK_CODES + row * ROW + column, a.values + from, there);
      }
      if constexpr (NARROW) {  // two pieces of 8 scales for keys and for values
        if (lane < 4) {
          const int at = first + (lane & 1) * 8;
          const bool there = at < position;
          copy_ahead(to + 2 * CHUNK_CODES + lane * 16, (lane & 2 ? a.value_scale : a.key_scale) + first_row + (there ? at : 0), there);
        }
      }
    }
    close_copies();
  };
#pragma unroll
  for (int i = 0; i < STAGES; i++) fetch(i);
  // Operand B of an mma holds these two pairs of dimensions in a lane, counted from a head's first
  auto pair_of = [&](int kt, int i) { return kt * 8 + (NARROW ? quarter * 2 + i : i * 4 + quarter); };
  const float4* rope = (const float4*)(a.rope + (size_t)position * HALF_DIM);  // two dimensions each
  float4 cs[K_TILES / 2][2], new_cs = __ldg(rope + (lane < HALF_DIM / 2 ? lane : 0));
#pragma unroll
  for (int kt = 0; kt < K_TILES / 2; kt++) cs[kt][0] = __ldg(rope + pair_of(kt, 0)), cs[kt][1] = __ldg(rope + pair_of(kt, 1));
  const int newest = position / CHUNK, new_turn = newest / SPLITS / ATTENTION_WARPS;
  const bool owner = chunk_of(new_turn) == newest;  // this warp's chunk holds the new position
  const uint32_t* from = (const uint32_t*)(qkv + (kv * QUERIES + g) * HEAD_DIM) + (NARROW ? quarter * 2 : quarter);
  const uint32_t* new_key = (const uint32_t*)(qkv + QDIM + kv * HEAD_DIM) + lane;
  from = computed(from), new_key = computed(new_key);
  cluster_wait();  // for the peers to be there
  wait_for_previous();
  if (t == 0) let_next_start();

  uint32_t key0 = 0, key1 = 0, value0 = 0, value1 = 0;  // asked for first: whoever has them does the most
  const bool mover = owner && lane < HALF_DIM / 2;
  if (mover) {
    key0 = load_dependent(new_key), key1 = load_dependent(new_key + HALF_DIM / 2);
    value0 = load_dependent(new_key + KVDIM / 2), value1 = load_dependent(new_key + KVDIM / 2 + HALF_DIM / 2);
  }
  uint32_t q[K_TILES][2];  // operand B: head g
#pragma unroll
  for (int kt = 0; kt < K_TILES; kt++)
#pragma unroll
    for (int i = 0; i < 2; i++) q[kt][i] = g < QUERIES ? load_dependent(from + (kt * 8 + (NARROW ? i : i * 4))) : 0u;
  uint16_t new_key_scale = 0, new_value_scale = 0;
  if (mover) {
    const float2 x = rotate_low(key0, key1, new_cs), y = rotate_high(key0, key1, new_cs);
    key0 = pack16(x.x, x.y), key1 = pack16(y.x, y.y);
  }
  const float scale = LOG2_E * rsqrtf((float)HEAD_DIM);
#pragma unroll
  for (int kt = 0; kt < K_TILES / 2; kt++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t low = q[kt][i], high = q[kt + K_TILES / 2][i];
      const float2 x = rotate_low(low, high, cs[kt][i]), y = rotate_high(low, high, cs[kt][i]);
      q[kt][i] = pack_operand(x.x * scale, x.y * scale), q[kt + K_TILES / 2][i] = pack_operand(y.x * scale, y.y * scale);
    }
  if constexpr (NARROW)
    if (owner) new_key_scale = to_codes(key0, key1), new_value_scale = to_codes(value0, value1);

  float o[K_TILES][4] = {}, most[2] = {-1e30f, -1e30f}, weight[2] = {};  // of heads quarter * 2 and quarter * 2 + 1
  const int key_at = ((lane & 7) + (lane >> 3 & 1) * 8) * ROW + (lane >> 4) * PIECE;  // ldmatrix: 8 rows per quarter of a warp
  const int value_at = NARROW ? key_at : ((lane & 7) + (lane >> 4) * 8) * ROW + (lane >> 3 & 1) * PIECE;
  int i = 0;
  for (; chunk_of(i) < chunks; i++) {  // STAGES 1: for caches of at most a chunk per warp (Geometry.attention)
    Code *keys = (Code*)(own + i % STAGES * CHUNK_BYTES), *values = keys + CHUNK_CODES;
    uint16_t* scales = (uint16_t*)(values + CHUNK_CODES);
    wait_copies<STAGES - 1>();
    __syncwarp();
    if (owner && i == new_turn) {
      if (lane < HALF_DIM / 2) {
        const size_t to = (first_row + position) * HEAD_DIM;
        CodePair *k = (CodePair*)(keys + position % CHUNK * ROW) + lane, *v = (CodePair*)(values + position % CHUNK * ROW) + lane;
        CodePair *cache_k = (CodePair*)(a.keys + to) + lane, *cache_v = (CodePair*)(a.values + to) + lane;
        k[0] = key0, k[HALF_DIM / 2] = key1, v[0] = value0, v[HALF_DIM / 2] = value1;
        cache_k[0] = key0, cache_k[HALF_DIM / 2] = key1, cache_v[0] = value0, cache_v[HALF_DIM / 2] = value1;
      }
      if constexpr (NARROW) {
        if (lane == 0) {
          scales[position % CHUNK] = a.key_scale[first_row + position] = new_key_scale;
          scales[CHUNK + position % CHUNK] = a.value_scale[first_row + position] = new_value_scale;
        }
      }
      __syncwarp();
    }
    // Matrices are asked for some at a time, before any of them is used; every other one has sums of its own, so that one
    // mma does not wait for the one before it
    float s[4] = {}, odd_s[4] = {};  // positions g and g + 8, two heads each
    [[maybe_unused]] float value_scale[2];  // theirs
    const int first = chunk_of(i) * CHUNK;
#pragma unroll
    for (int m0 = 0; m0 < MATRICES; m0 += AT_ONCE) {
      uint32_t k[AT_ONCE][4];
#pragma unroll
      for (int m = 0; m < AT_ONCE; m++) if (m0 + m < MATRICES) load_matrices(k[m], keys + key_at + (m0 + m) * MATRIX);
#pragma unroll
      for (int m = 0; m < AT_ONCE; m++) if (m0 + m < MATRICES) {
        float (&to)[4] = m % 2 ? odd_s : s;
        if constexpr (NARROW) {
          const int kt = (m0 + m) * 2;
          uint32_t low[4], high[4];
#pragma unroll
          for (int n = 0; n < 4; n++) codes_to_halves<false>(k[m][n], low[n], high[n]);
          multiply(to, low[0], low[1], high[0], high[1], q[kt][0], q[kt][1]);
          multiply(to, low[2], low[3], high[2], high[3], q[kt + 1][0], q[kt + 1][1]);
        } else multiply(to, k[m][0], k[m][1], k[m][2], k[m][3], q[m0 + m][0], q[m0 + m][1]);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; n++) s[n] += odd_s[n];
    if constexpr (NARROW) {
#pragma unroll
      for (int n = 0; n < 2; n++) {  // beyond the position a scale may be anything
        const float key_scale = __half2float(__ushort_as_half(scales[g + n * 8]));
        s[n * 2] *= key_scale, s[n * 2 + 1] *= key_scale;
        value_scale[n] = first + g + n * 8 > position ? 0.f : LIFT * __half2float(__ushort_as_half(scales[CHUNK + g + n * 8]));
      }
    }
    if (first + g > position) s[0] = s[1] = -1e30f;
    if (first + g + 8 > position) s[2] = s[3] = -1e30f;
    float change[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float now = fmaxf(most[j], fmaxf(s[j], s[2 + j]));
#pragma unroll
      for (int d = 4; d < 32; d <<= 1) now = fmaxf(now, __shfl_xor_sync(~0u, now, d));
      if constexpr (STAGES > 1) change[j] = exp2f(most[j] - now);  // else a warp has one chunk at most
      most[j] = now;
      s[j] = exp2f(s[j] - now), s[2 + j] = exp2f(s[2 + j] - now);
      weight[j] = STAGES > 1 ? weight[j] * change[j] + s[j] + s[2 + j] : s[j] + s[2 + j];
    }
    if constexpr (NARROW) s[0] *= value_scale[0], s[1] *= value_scale[0], s[2] *= value_scale[1], s[3] *= value_scale[1];
    const uint32_t w0 = transpose_matrix(pack_operand(s[0], s[1])), w1 = transpose_matrix(pack_operand(s[2], s[3]));
    auto add_values = [&](int dt, uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3) {
      if constexpr (STAGES > 1) o[dt][0] *= change[0], o[dt][1] *= change[1], o[dt][2] *= change[0], o[dt][3] *= change[1];
      multiply(o[dt], v0, v1, v2, v3, w0, w1);
    };
#pragma unroll
    for (int m0 = 0; m0 < MATRICES; m0 += AT_ONCE) {
      uint32_t v[AT_ONCE][4];
#pragma unroll
      for (int m = 0; m < AT_ONCE; m++) if (m0 + m < MATRICES) load_matrices_transposed(v[m], values + value_at + (m0 + m) * MATRIX);
#pragma unroll
      for (int m = 0; m < AT_ONCE; m++) if (m0 + m < MATRICES) {
        if constexpr (NARROW) {
          const int dt = (m0 + m) * 2;
          uint32_t even[4], odd[4];
#pragma unroll
          for (int n = 0; n < 4; n++) codes_to_halves<true>(v[m][n], even[n], odd[n]);
          add_values(dt, even[0], odd[0], even[1], odd[1]);
          add_values(dt + 1, even[2], odd[2], even[3], odd[3]);
        } else add_values(m0 + m, v[m][0], v[m][1], v[m][2], v[m][3]);
      }
    }
    __syncwarp();  // all lanes have read the chunk
    if constexpr (STAGES == 1) { i++; break; }
    fetch(i + STAGES);
  }

  // The warps of a block. One without a chunk has no result.
  wait_copies<0>();
  __syncwarp();
  float* mine = (float*)own;
  if (i) {
#pragma unroll
    for (int d = 4; d < 32; d <<= 1)
#pragma unroll
      for (int j = 0; j < 2; j++) weight[j] += __shfl_xor_sync(~0u, weight[j], d);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int h = quarter * 2 + j;
      if (h < QUERIES) {
#pragma unroll
        for (int dt = 0; dt < K_TILES; dt++) *(float2*)(mine + h * HEAD_ROW + dt * 16 + g * 2) = make_float2(o[dt][j], o[dt][2 + j]);
        if (g == 0) mine[ALL_SUMS + h] = most[j], mine[ALL_SUMS + QUERIES + h] = weight[j];
      }
    }
  }
  __syncthreads();
  const int active = min(ATTENTION_WARPS, (chunks - split + SPLITS - 1) / SPLITS);  // warps with a result; at most 0: none
  const int stride = STAGES * CHUNK_BYTES / 4;                                      // of their results, in floats
  for (int n = t * 4; n < OUTPUTS; n += ATTENTION_WARPS * 32 * 4) {                 // four of a head
    const int h = n / HEAD_DIM, peer = n % HEAD_DIM / 4;
    const float* first = (const float*)memory;
    float now = -1e30f, total = 0.f, m[ATTENTION_WARPS], l[ATTENTION_WARPS];
    float4 sum{}, v[ATTENTION_WARPS];
#pragma unroll
    for (int w = 0; w < ATTENTION_WARPS; w++) {  // one without a result counts nothing
      const float* theirs = first + w * stride;
      m[w] = -1e30f, l[w] = 0.f, v[w] = float4{};
      if (w < active) m[w] = theirs[ALL_SUMS + h], l[w] = theirs[ALL_SUMS + QUERIES + h], v[w] = *(const float4*)(theirs + h * HEAD_ROW + n % HEAD_DIM);
      now = fmaxf(now, m[w]);
    }
#pragma unroll
    for (int w = 0; w < ATTENTION_WARPS; w++) {
      const float c = exp2f(m[w] - now);
      total += c * l[w];
      sum.x += c * v[w].x, sum.y += c * v[w].y, sum.z += c * v[w].z, sum.w += c * v[w].w;
    }
    float* letter = letters + split * LETTER;  // sums to the block that finishes them, maxima and weights to all
    send_peer((float4*)(letter + n % SHARE), n / SHARE, sum, arrived);
    if (peer < SPLITS) send_peer((float2*)(letter + SHARE + 2 * h), peer, make_float2(now, total), arrived);
  }
  if (t < SHARE) {
    const int n = split * SHARE + t, h = n / HEAD_DIM;
    float m[SPLITS], l[SPLITS], v[SPLITS], now = -1e30f, total = 0.f, sum = 0.f;
    barrier_wait_for_peers(arrived, 0);  // all letters, so that no peer writes here any more
#pragma unroll
    for (int r = 0; r < SPLITS; r++) {
      const float* letter = letters + r * LETTER;
      const float2 theirs = *(const float2*)(letter + SHARE + 2 * h);
      m[r] = theirs.x, l[r] = theirs.y, v[r] = letter[t];
      now = fmaxf(now, m[r]);
    }
#pragma unroll
    for (int r = 0; r < SPLITS; r++) { const float c = exp2f(m[r] - now); total += c * l[r], sum += c * v[r]; }
    const int to = NARROW ? n : n / 16 * 16 + n % 2 * 8 + n % 16 / 2;  // an mma's rows g and g + 8 lie side by side
    a.out[owned * OUTPUTS + to] = to16(sum / (NARROW ? total * LIFT : total));
  }
}
