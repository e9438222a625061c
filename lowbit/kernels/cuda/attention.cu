// ---------------------------------------------------------------------------------------------- attention
// Grouped-query attention of one new token over the cache, split along the context: block (kv head, split) takes a
// stretch of positions for all query heads of that kv head, so that keys and values are read once. LANES neighbouring
// lanes hold one position, 16 dimensions each; a thread copies its own pieces of DEPTH passes ahead, from before the wait
// on. The new key and value are rotated and appended here. The splits are merged, in a fixed order, by the last block of
// a kv head to arrive: the bits do not depend on who that is.
struct Attention {
  const uint16_t* qkv;        // [QDIM + 2 KVDIM] of this token
  uint16_t *keys, *values;    // [KV_HEADS][length][HEAD_DIM]
  const float2* rope;         // [length][HEAD_DIM / 2] (cos, sin)
  const int64_t* position;    // of this token
  float* partial;             // [KV_HEADS][splits][QUERIES][HEAD_DIM + 2]: sums, then maximum and weight
  uint32_t* arrived;          // [KV_HEADS]
  uint16_t* out;              // [QDIM]
  int length;
};
constexpr int ATTENTION_THREADS = 256, MAX_SPLITS = 16, DEPTH = 4;
constexpr int QUERIES = HEADS / KV_HEADS, LANES = HEAD_DIM / 16, GROUPS = 32 / LANES, AT_ONCE = 8 * GROUPS;  // positions per pass
constexpr int OWN = 16 / GROUPS;                    // dimensions that a lane holds once the groups of its warp are summed
constexpr int OUTPUTS = (QUERIES * HEAD_DIM + ATTENTION_THREADS - 1) / ATTENTION_THREADS;
constexpr float LOG2_E = 1.4426950408889634f;       // exponentials are powers of two here

__device__ __forceinline__ void copy_ahead(uint4* to, const uint4* from, bool there) {  // 16 bytes, zeros where nothing is
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__global__ void __launch_bounds__(ATTENTION_THREADS, 1) attention_kernel(const __grid_constant__ Attention a) {
  extern __shared__ __align__(128) uint4 ahead[];                  // [DEPTH][4][threads]: key, key, value, value
  __shared__ __align__(16) float query[QUERIES][LANES * 20];       // 16 dimensions and 4 of padding: no bank conflicts
  __shared__ __align__(16) uint16_t new_key[HEAD_DIM], new_value[HEAD_DIM];
  __shared__ __align__(16) float sum[8][QUERIES][HEAD_DIM];
  __shared__ float most[8][QUERIES], weight[8][QUERIES], split_most[MAX_SPLITS][QUERIES], split_weight[MAX_SPLITS][QUERIES];
  __shared__ uint32_t last;
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5, sub = lane % LANES, group = lane / LANES;
  const int kv = blockIdx.x, split = blockIdx.y, splits = gridDim.y;
  // Written by the step before, whose kernels are all done: may be read before the wait, and so may the old cache
  const int position = (int)*a.position, context = position + 1;
  const int stretch = ((context + splits - 1) / splits + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
  const int active = (context + stretch - 1) / stretch, begin = split * stretch, end = min(begin + stretch, context);
  if (split >= active) return;
  const size_t first_row = (size_t)kv * a.length;
  const int mine = begin + warp * GROUPS + group;  // this thread's position in the first pass
  auto fetch = [&](int pass) {
    const int p = mine + pass * AT_ONCE;
    const bool there = p < end && p < position;
    const size_t row = (first_row + (there ? p : 0)) * HEAD_DIM;
    const uint4 *k = (const uint4*)(a.keys + row) + sub * 2, *v = (const uint4*)(a.values + row) + sub * 2;
    uint4* to = ahead + (pass % DEPTH) * 4 * ATTENTION_THREADS + t;
    copy_ahead(to, k, there), copy_ahead(to + ATTENTION_THREADS, k + 1, there);
    copy_ahead(to + 2 * ATTENTION_THREADS, v, there), copy_ahead(to + 3 * ATTENTION_THREADS, v + 1, there);
  };
#pragma unroll
  for (int pass = 0; pass < DEPTH; pass++) {
    fetch(pass);
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  constexpr int HALF = HEAD_DIM / 2, ROTATED = ((QUERIES + 2) * HALF + ATTENTION_THREADS - 1) / ATTENTION_THREADS;
  const float2 cs = __ldg(a.rope + (size_t)position * HALF + t % HALF);
  wait_for_previous();
  if (t == 0) let_next_start();
  uint16_t u0[ROTATED], u1[ROTATED];
#pragma unroll
  for (int i = 0; i < ROTATED; i++) {  // the queries, the new key, the new value, of which threads t, t + HALF … take a pair each
    const int h = (t + i * ATTENTION_THREADS) / HALF, d = t % HALF;
    const uint16_t* from = a.qkv + (h < QUERIES ? (kv * QUERIES + h) * HEAD_DIM : QDIM + (h - QUERIES) * KVDIM + kv * HEAD_DIM);
    if (h < QUERIES + 2) u0[i] = load_dependent(from + d), u1[i] = load_dependent(from + d + HALF);
  }
#pragma unroll
  for (int i = 0; i < ROTATED; i++) {
    const int h = (t + i * ATTENTION_THREADS) / HALF, d = t % HALF;
    if (h == QUERIES + 1) new_value[d] = u0[i], new_value[d + HALF] = u1[i];
    if (h > QUERIES) continue;
    const float x0 = from16(u0[i]), x1 = from16(u1[i]), y0 = x0 * cs.x - x1 * cs.y, y1 = x1 * cs.x + x0 * cs.y;
    const float scale = LOG2_E * rsqrtf((float)HEAD_DIM);
    if (h == QUERIES) new_key[d] = to16(y0), new_key[d + HALF] = to16(y1);
    else query[h][d / 16 * 20 + d % 16] = y0 * scale, query[h][(d + HALF) / 16 * 20 + d % 16] = y1 * scale;
  }
  __syncthreads();
  if (split == active - 1 && t < HEAD_DIM / 4) {  // 16-byte pieces: half of these threads write the key, half the value
    const int piece = t % (HEAD_DIM / 8);
    uint16_t* to = (t < HEAD_DIM / 8 ? a.keys : a.values) + (first_row + position) * HEAD_DIM;
    ((uint4*)to)[piece] = ((const uint4*)(t < HEAD_DIM / 8 ? new_key : new_value))[piece];
  }
  float q[QUERIES][16], o[QUERIES][16], m[QUERIES], l[QUERIES];
#pragma unroll
  for (int h = 0; h < QUERIES; h++) {
    m[h] = -1e30f, l[h] = 0.f;
#pragma unroll
    for (int e = 0; e < 4; e++) *(float4*)(q[h] + 4 * e) = *(const float4*)(query[h] + sub * 20 + 4 * e);
#pragma unroll
    for (int e = 0; e < 16; e++) o[h][e] = 0.f;
  }
  for (int pass = 0; begin + pass * AT_ONCE < end; pass++) {
    const int p = mine + pass * AT_ONCE;
    const bool valid = p < end;
    asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
    const uint4* from = ahead + (pass % DEPTH) * 4 * ATTENTION_THREADS + t;
    uint4 k[2] = {from[0], from[ATTENTION_THREADS]}, v[2] = {from[2 * ATTENTION_THREADS], from[3 * ATTENTION_THREADS]};
    if (p == position) {
      k[0] = ((const uint4*)new_key)[sub * 2], k[1] = ((const uint4*)new_key)[sub * 2 + 1];
      v[0] = ((const uint4*)new_value)[sub * 2], v[1] = ((const uint4*)new_value)[sub * 2 + 1];
    }
    float score[QUERIES] = {};
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float2 f = from16x2(((const uint32_t*)k)[j]);
#pragma unroll
      for (int h = 0; h < QUERIES; h++) score[h] += f.x * q[h][2 * j] + f.y * q[h][2 * j + 1];
    }
    bool higher = false;
#pragma unroll
    for (int d = LANES / 2; d >= 1; d >>= 1)
#pragma unroll
      for (int h = 0; h < QUERIES; h++) score[h] += __shfl_xor_sync(~0u, score[h], d);
#pragma unroll
    for (int h = 0; h < QUERIES; h++) {
      if (!valid) score[h] = -1e30f;
      higher |= score[h] > m[h];
    }
    if (__any_sync(~0u, higher)) {  // rare after the first passes: rescale what has been summed
#pragma unroll
      for (int h = 0; h < QUERIES; h++) {
        const float now = fmaxf(m[h], score[h]), c = exp2f(m[h] - now);
        m[h] = now, l[h] *= c;
#pragma unroll
        for (int i = 0; i < 16; i++) o[h][i] *= c;
      }
    }
    float e[QUERIES];
#pragma unroll
    for (int h = 0; h < QUERIES; h++) e[h] = valid ? exp2f(score[h] - m[h]) : 0.f, l[h] += e[h];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float2 f = from16x2(((const uint32_t*)v)[j]);
#pragma unroll
      for (int h = 0; h < QUERIES; h++) o[h][2 * j] += e[h] * f.x, o[h][2 * j + 1] += e[h] * f.y;
    }
    fetch(pass + DEPTH);  // into the slot just read, which is this thread's alone
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  // The groups of a warp: each step halves the dimensions a lane keeps, so 15 shuffles per head do for 4 groups
  int kept = 0;
#pragma unroll
  for (int h = 0; h < QUERIES; h++) {
    float now = m[h];
#pragma unroll
    for (int d = LANES; d < 32; d <<= 1) now = fmaxf(now, __shfl_xor_sync(~0u, now, d));
    const float c = exp2f(m[h] - now);
    l[h] *= c;
#pragma unroll
    for (int d = LANES; d < 32; d <<= 1) l[h] += __shfl_xor_sync(~0u, l[h], d);
#pragma unroll
    for (int i = 0; i < 16; i++) o[h][i] *= c;
    kept = 0;
#pragma unroll
    for (int d = LANES, n = 8; d < 32; d <<= 1, n >>= 1) {
      const bool upper = lane & d;
#pragma unroll
      for (int i = 0; i < n; i++) {
        const float send = upper ? o[h][i] : o[h][i + n], keep = upper ? o[h][i + n] : o[h][i];
        o[h][i] = keep + __shfl_xor_sync(~0u, send, d);
      }
      kept += upper ? n : 0;
    }
    if (lane == 0) most[warp][h] = now, weight[warp][h] = l[h];
  }
#pragma unroll
  for (int h = 0; h < QUERIES; h++)
#pragma unroll
    for (int i = 0; i < OWN; i++) sum[warp][h][sub * 16 + kept + i] = o[h][i];
  __syncthreads();
  float* partial = a.partial + (size_t)kv * splits * QUERIES * (HEAD_DIM + 2);
#pragma unroll
  for (int i = 0; i < OUTPUTS; i++) {  // the warps of a block
    const int at = t + i * ATTENTION_THREADS, h = at / HEAD_DIM, d = at % HEAD_DIM;
    if (h >= QUERIES) break;
    float now = -1e30f, total = 0.f, value = 0.f;
#pragma unroll
    for (int w = 0; w < 8; w++) now = fmaxf(now, most[w][h]);
#pragma unroll
    for (int w = 0; w < 8; w++) { const float c = exp2f(most[w][h] - now); total += c * weight[w][h], value += c * sum[w][h][d]; }
    if (active == 1) { a.out[(kv * QUERIES + h) * HEAD_DIM + d] = to16(value / total); continue; }
    float* own = partial + (split * QUERIES + h) * (HEAD_DIM + 2);
    own[d] = value;
    if (d == 0) own[HEAD_DIM] = now, own[HEAD_DIM + 1] = total;
  }
  if (active == 1) return;
  __syncthreads();
  if (t == 0) {  // one fence for the block: what the barrier ordered before it is released with it
    __threadfence();
    last = atomicAdd(a.arrived + kv, 1) == active - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  float value[OUTPUTS][MAX_SPLITS];  // the splits of a kv head: everything is asked for before anything is used
#pragma unroll
  for (int i = 0; i < OUTPUTS; i++)
#pragma unroll
    for (int n = 0; n < MAX_SPLITS; n++) {
      const int at = t + i * ATTENTION_THREADS, h = at / HEAD_DIM, d = at % HEAD_DIM;
      value[i][n] = n < active && h < QUERIES ? load_dependent(partial + (n * QUERIES + h) * (HEAD_DIM + 2) + d) : 0.f;
    }
  if (t < active * QUERIES) {
    const float* theirs = partial + t * (HEAD_DIM + 2) + HEAD_DIM;
    split_most[t / QUERIES][t % QUERIES] = load_dependent(theirs), split_weight[t / QUERIES][t % QUERIES] = load_dependent(theirs + 1);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < OUTPUTS; i++) {
    const int at = t + i * ATTENTION_THREADS, h = at / HEAD_DIM, d = at % HEAD_DIM;
    if (h >= QUERIES) break;
    float now = -1e30f, total = 0.f, all = 0.f;
    for (int n = 0; n < active; n++) now = fmaxf(now, split_most[n][h]);
#pragma unroll
    for (int n = 0; n < MAX_SPLITS; n++)
      if (n < active) { const float c = exp2f(split_most[n][h] - now); total += c * split_weight[n][h], all += c * value[i][n]; }
    a.out[(kv * QUERIES + h) * HEAD_DIM + d] = to16(all / total);
  }
  if (t == 0) a.arrived[kv] = 0;
}

