// ---------------------------------------------------------------------------------------------- attention
// Grouped-query attention of one new token over the cache. A cluster of SPLITS blocks (8; 16 over a long cache, see
// lowbit/kernels/geometry.py) works for one KV head and all the query heads that share it, so that keys and values are
// read once. Positions come in chunks of 16, dealt to the blocks and to their warps in turn; a warp copies its own chunks
// into shared memory, from before the wait on, and multiplies with mma.m16n8k16:
//
//   scores [16 positions x 8 heads] = keys [16 x HEAD_DIM] · queries        sums [HEAD_DIM x 8 heads] += values^T · weights
//
// (up to 8 query heads per KV head; Llama-3 has 3 or 4, the other columns are zeros). The new key is rotated and appended
// here. Warps are merged in shared memory and blocks through their cluster's, in a fixed order: the bits repeat.
struct Attention {
  const uint16_t* qkv;        // [QDIM + 2 KVDIM] of this token
  uint16_t *keys, *values;    // [KV_HEADS][length][HEAD_DIM]
  const float2* rope;         // [length][HEAD_DIM / 2] (cos, sin)
  const int64_t* position;    // of this token
  uint16_t* out;              // [QDIM]
  int length;
};
constexpr int ATTENTION_WARPS = 8, CHUNK = 16;              // warps of a block, positions of a chunk
constexpr int QUERIES = HEADS / KV_HEADS, HALF_DIM = HEAD_DIM / 2, K_TILES = HEAD_DIM / 16;
constexpr int ROW = HEAD_DIM + 8;                           // padded: the 8 rows that ldmatrix reads at once share no bank
constexpr int CHUNK_VALUES = CHUNK * ROW;                   // 16 bits each; of keys, then of values
constexpr int OUTPUTS = QUERIES * HEAD_DIM;
constexpr int RESULT = OUTPUTS + 2 * QUERIES;               // a warp's or block's: sums, then maxima, then weights
constexpr float LOG2_E = 1.4426950408889634f;               // exponentials are powers of two here
static_assert(QUERIES <= 8, "the heads of a group are the 8 columns of an mma");
static_assert(RESULT * 4 <= CHUNK_VALUES * 2 * 2, "a warp's result takes the place of its first chunk");

__device__ __forceinline__ uint32_t pack16(float a, float b) { return (uint32_t)to16(a) | ((uint32_t)to16(b) << 16); }
__device__ __forceinline__ uint32_t rotate_low(uint32_t low, uint32_t high, const float4& cs, float scale) {
  const float2 x = from16x2(low), y = from16x2(high);
  return pack16((x.x * cs.x - y.x * cs.y) * scale, (x.y * cs.z - y.y * cs.w) * scale);
}
__device__ __forceinline__ uint32_t rotate_high(uint32_t low, uint32_t high, const float4& cs, float scale) {
  const float2 x = from16x2(low), y = from16x2(high);
  return pack16((y.x * cs.x + x.x * cs.y) * scale, (y.y * cs.z + x.y * cs.w) * scale);
}
// STAGES chunks per warp on their way: 1 leaves room for a product's block beside this one, more keep memory busy.
template <int STAGES, int SPLITS> __global__ void __maxnreg__(96) attention_kernel(const __grid_constant__ Attention a) {
  static_assert(OUTPUTS % SPLITS == 0 && OUTPUTS / SPLITS <= ATTENTION_WARPS * 32, "each block finishes its share");
  SHARED_MEMORY(memory);
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5, g = lane >> 2, quarter = lane & 3, kv = blockIdx.x, split = blockIdx.y;
  uint16_t* own = (uint16_t*)memory + warp * STAGES * 2 * CHUNK_VALUES;
  float* result = (float*)(memory + ATTENTION_WARPS * STAGES * 4 * CHUNK_VALUES);
  // Written by the step before, whose kernels are all done: may be read before the wait, and so may the old cache
  const int position = (int)*a.position, chunks = position / CHUNK + 1;
  const size_t first_row = (size_t)kv * a.length;
  auto chunk_of = [&](int i) { return (i * ATTENTION_WARPS + warp) * SPLITS + split; };
  auto fetch = [&](int i) {
    const int first = chunk_of(i) * CHUNK;
    uint16_t* to = own + i % STAGES * 2 * CHUNK_VALUES;
    if (first <= position) {
#pragma unroll 2
      for (int n = 0; n < CHUNK * HEAD_DIM / 8 / 32; n++) {
        const int piece = n * 32 + lane, row = piece / (HEAD_DIM / 8), column = piece % (HEAD_DIM / 8) * 8;
        const bool there = first + row < position;  // zeros for the rest: what is weighted with 0 must be finite
        const size_t from = (first_row + (there ? first + row : 0)) * HEAD_DIM + column;
        copy_ahead(to + row * ROW + column, a.keys + from, there);
        copy_ahead(to + CHUNK_VALUES + row * ROW + column, a.values + from, there);
      }
    }
    close_copies();
  };
#pragma unroll
  for (int i = 0; i < STAGES; i++) fetch(i);
  const float4* rope = (const float4*)(a.rope + (size_t)position * HALF_DIM);  // two dimensions each
  float4 cs[K_TILES / 2][2], new_cs = __ldg(rope + (lane < HALF_DIM / 2 ? lane : 0));
#pragma unroll
  for (int kt = 0; kt < K_TILES / 2; kt++) cs[kt][0] = __ldg(rope + kt * 8 + quarter), cs[kt][1] = __ldg(rope + kt * 8 + 4 + quarter);
  const int newest = position / CHUNK, new_turn = newest / SPLITS / ATTENTION_WARPS;
  const bool owner = chunk_of(new_turn) == newest;  // this warp's chunk holds the new position
  wait_for_previous();
  if (t == 0) let_next_start();

  uint32_t q[K_TILES][2];  // operand B: head g, dimensions kt * 16 + quarter * 2, and 8 further
  const uint32_t* from = (const uint32_t*)(a.qkv + (kv * QUERIES + g) * HEAD_DIM);
#pragma unroll
  for (int kt = 0; kt < K_TILES; kt++)
#pragma unroll
    for (int i = 0; i < 2; i++) q[kt][i] = g < QUERIES ? load_dependent(from + kt * 8 + i * 4 + quarter) : 0u;
  uint32_t key0 = 0, key1 = 0, value0 = 0, value1 = 0;
  if (owner && lane < HALF_DIM / 2) {
    const uint32_t* new_key = (const uint32_t*)(a.qkv + QDIM + kv * HEAD_DIM) + lane;
    const uint32_t* new_value = (const uint32_t*)(a.qkv + QDIM + KVDIM + kv * HEAD_DIM) + lane;
    const uint32_t low = load_dependent(new_key), high = load_dependent(new_key + HALF_DIM / 2);
    value0 = load_dependent(new_value), value1 = load_dependent(new_value + HALF_DIM / 2);
    key0 = rotate_low(low, high, new_cs, 1.f), key1 = rotate_high(low, high, new_cs, 1.f);
  }
  const float scale = LOG2_E * rsqrtf((float)HEAD_DIM);
#pragma unroll
  for (int kt = 0; kt < K_TILES / 2; kt++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t low = q[kt][i], high = q[kt + K_TILES / 2][i];
      q[kt][i] = rotate_low(low, high, cs[kt][i], scale), q[kt + K_TILES / 2][i] = rotate_high(low, high, cs[kt][i], scale);
    }

  float o[K_TILES][4] = {}, most[2] = {-1e30f, -1e30f}, weight[2] = {};  // of heads quarter * 2 and quarter * 2 + 1
  const int key_at = ((lane & 7) + (lane >> 3 & 1) * 8) * ROW + (lane >> 4) * 8;    // ldmatrix: 8 rows per quarter of a warp
  const int value_at = ((lane & 7) + (lane >> 4) * 8) * ROW + (lane >> 3 & 1) * 8;
  int i = 0;
  for (; chunk_of(i) < chunks; i++) {
    uint16_t *keys = own + i % STAGES * 2 * CHUNK_VALUES, *values = keys + CHUNK_VALUES;
    wait_copies<STAGES - 1>();
    __syncwarp();
    if (owner && i == new_turn) {
      if (lane < HALF_DIM / 2) {
        const size_t to = (first_row + position) * HEAD_DIM;
        uint32_t *k = (uint32_t*)(keys + position % CHUNK * ROW) + lane, *v = (uint32_t*)(values + position % CHUNK * ROW) + lane;
        uint32_t *cache_k = (uint32_t*)(a.keys + to) + lane, *cache_v = (uint32_t*)(a.values + to) + lane;
        k[0] = key0, k[HALF_DIM / 2] = key1, v[0] = value0, v[HALF_DIM / 2] = value1;
        cache_k[0] = key0, cache_k[HALF_DIM / 2] = key1, cache_v[0] = value0, cache_v[HALF_DIM / 2] = value1;
      }
      __syncwarp();
    }
    float s[4] = {};  // positions g and g + 8, two heads each
#pragma unroll
    for (int kt = 0; kt < K_TILES; kt++) {
      uint32_t k[4];
      load_matrices(k, keys + key_at + kt * 16);
      mma(s, k[0], k[1], k[2], k[3], q[kt][0], q[kt][1]);
    }
    const int first = chunk_of(i) * CHUNK;
    if (first + g > position) s[0] = s[1] = -1e30f;
    if (first + g + 8 > position) s[2] = s[3] = -1e30f;
    float change[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float now = fmaxf(most[j], fmaxf(s[j], s[2 + j]));
#pragma unroll
      for (int d = 4; d < 32; d <<= 1) now = fmaxf(now, __shfl_xor_sync(~0u, now, d));
      change[j] = exp2f(most[j] - now), most[j] = now;
      s[j] = exp2f(s[j] - now), s[2 + j] = exp2f(s[2 + j] - now);
      weight[j] = weight[j] * change[j] + s[j] + s[2 + j];
    }
    const uint32_t w0 = transpose_matrix(pack16(s[0], s[1])), w1 = transpose_matrix(pack16(s[2], s[3]));
#pragma unroll
    for (int dt = 0; dt < K_TILES; dt++) {
      uint32_t v[4];
      load_matrices_transposed(v, values + value_at + dt * 16);
      o[dt][0] *= change[0], o[dt][1] *= change[1], o[dt][2] *= change[0], o[dt][3] *= change[1];
      mma(o[dt], v[0], v[1], v[2], v[3], w0, w1);
    }
    __syncwarp();  // all lanes have read the chunk
    fetch(i + STAGES);
  }

  // The warps of a block. One without a chunk has no result.
  wait_copies<0>();
  __syncwarp();
  float* mine = (float*)own;
  if (i) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
      for (int d = 4; d < 32; d <<= 1) weight[j] += __shfl_xor_sync(~0u, weight[j], d);
      const int h = quarter * 2 + j;
      if (h < QUERIES) {
#pragma unroll
        for (int dt = 0; dt < K_TILES; dt++) mine[h * HEAD_DIM + dt * 16 + g] = o[dt][j], mine[h * HEAD_DIM + dt * 16 + g + 8] = o[dt][2 + j];
        if (g == 0) mine[OUTPUTS + h] = most[j], mine[OUTPUTS + QUERIES + h] = weight[j];
      }
    }
  }
  __syncthreads();
  const int active = min(ATTENTION_WARPS, (chunks - split + SPLITS - 1) / SPLITS);  // warps with a result; at most 0: none
  const int stride = STAGES * CHUNK_VALUES;                                         // of their results, in floats
  for (int n = t; n < OUTPUTS; n += ATTENTION_WARPS * 32) {
    const int h = n / HEAD_DIM;
    const float* first = (const float*)memory;
    float now = -1e30f, total = 0.f, sum = 0.f;
    for (int w = 0; w < active; w++) now = fmaxf(now, first[w * stride + OUTPUTS + h]);
    for (int w = 0; w < active; w++) {
      const float* theirs = first + w * stride;
      const float c = exp2f(theirs[OUTPUTS + h] - now);
      total += c * theirs[OUTPUTS + QUERIES + h], sum += c * theirs[n];
    }
    result[n] = sum;
    if (n % HEAD_DIM == 0) result[OUTPUTS + h] = now, result[OUTPUTS + QUERIES + h] = total;
  }
  // The blocks of the cluster: each finishes its share of the outputs
  cluster_sync();
  if (t < OUTPUTS / SPLITS) {
    const int n = split * (OUTPUTS / SPLITS) + t, h = n / HEAD_DIM;
    float m[SPLITS], l[SPLITS], v[SPLITS], now = -1e30f, total = 0.f, sum = 0.f;
#pragma unroll
    for (int r = 0; r < SPLITS; r++) {
      m[r] = load_peer(result + OUTPUTS + h, r), l[r] = load_peer(result + OUTPUTS + QUERIES + h, r), v[r] = load_peer(result + n, r);
      now = fmaxf(now, m[r]);
    }
#pragma unroll
    for (int r = 0; r < SPLITS; r++) { const float c = exp2f(m[r] - now); total += c * l[r], sum += c * v[r]; }
    a.out[kv * OUTPUTS + n] = to16(sum / total);
  }
  cluster_sync();  // a block's shared memory lives until its peers have read it
}
