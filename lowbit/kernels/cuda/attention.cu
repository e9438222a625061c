// ---------------------------------------------------------------------------------------------- attention
// Grouped-query attention of one new token over the cache, split along the context: block (kv head, split) takes a
// stretch of positions for all query heads of that kv head, so that keys and values are read once. LANES neighbouring
// lanes hold one position, 16 dimensions each. The new key and value are rotated and appended here. Partial results of
// the splits are merged, in a fixed order, by the last block of a kv head to arrive: the bits do not depend on who it is.
struct Attention {
  const uint16_t* qkv;        // [QDIM + 2 KVDIM] of this token
  uint16_t *keys, *values;    // [KV_HEADS][length][HEAD_DIM]
  const float2* rope;         // [length][HEAD_DIM / 2] (cos, sin)
  const int64_t* position;    // of this token
  float* partial;             // [KV_HEADS][splits][QUERIES][HEAD_DIM + 2]
  uint32_t* arrived;          // [KV_HEADS]
  uint16_t* out;              // [QDIM]
  int length;
};
constexpr int QUERIES = HEADS / KV_HEADS, LANES = HEAD_DIM / 16, AT_ONCE = 8 * (32 / LANES);  // positions per pass of a block
constexpr float SCORE_SCALE = 1.4426950408889634f;  // log2(e): exponentials are powers of two here

__device__ __forceinline__ void load_position(uint4 (&k)[2], uint4 (&v)[2], const Attention& a, size_t row, int sub) {
  const uint4 *kp = (const uint4*)(a.keys + row * HEAD_DIM) + sub * 2, *vp = (const uint4*)(a.values + row * HEAD_DIM) + sub * 2;
  k[0] = __ldcg(kp), k[1] = __ldcg(kp + 1), v[0] = __ldcg(vp), v[1] = __ldcg(vp + 1);
}
__global__ void __launch_bounds__(256) attention_kernel(const __grid_constant__ Attention a) {
  __shared__ float query[QUERIES][HEAD_DIM];
  __shared__ __align__(16) uint16_t new_key[HEAD_DIM], new_value[HEAD_DIM];
  __shared__ float sum[8][QUERIES][HEAD_DIM], most[8][QUERIES], weight[8][QUERIES];
  __shared__ uint32_t last;
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5, sub = lane % LANES, group = lane / LANES;
  const int kv = blockIdx.x, split = blockIdx.y, splits = gridDim.y;
  // Written by the step before, whose kernels are all done: may be read before the wait, and so may the old cache
  const int position = (int)*a.position, context = position + 1;
  const int stretch = ((context + splits - 1) / splits + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
  const int active = (context + stretch - 1) / stretch, begin = split * stretch, end = min(begin + stretch, context);
  if (split >= active) return;
  const size_t first_row = (size_t)kv * a.length;
  int p = begin + warp * (32 / LANES) + group;
  uint4 k[2] = {}, v[2] = {};
  if (p < position) load_position(k, v, a, first_row + p, sub);
  const float2* rope = a.rope + (size_t)position * (HEAD_DIM / 2);
  wait_for_previous();
  if (t == 0) let_next_start();
  for (int i = t; i < (QUERIES + 2) * (HEAD_DIM / 2); i += 256) {  // rotate the queries and the new key; take the new value
    const int h = i / (HEAD_DIM / 2), d = i % (HEAD_DIM / 2);
    const uint16_t* from = a.qkv + (h < QUERIES ? (kv * QUERIES + h) * HEAD_DIM : QDIM + (h - QUERIES) * KVDIM + kv * HEAD_DIM);
    const uint16_t u0 = load_dependent(from + d), u1 = load_dependent(from + d + HEAD_DIM / 2);
    if (h == QUERIES + 1) { new_value[d] = u0, new_value[d + HEAD_DIM / 2] = u1; continue; }
    const float2 cs = __ldg(rope + d);
    const float x0 = from16(u0), x1 = from16(u1), y0 = x0 * cs.x - x1 * cs.y, y1 = x1 * cs.x + x0 * cs.y;
    if (h == QUERIES) new_key[d] = to16(y0), new_key[d + HEAD_DIM / 2] = to16(y1);
    else query[h][d] = y0 * (SCORE_SCALE * rsqrtf((float)HEAD_DIM)), query[h][d + HEAD_DIM / 2] = y1 * (SCORE_SCALE * rsqrtf((float)HEAD_DIM));
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
    for (int e = 0; e < 16; e++) q[h][e] = query[h][sub * 16 + e], o[h][e] = 0.f;
  }
  for (int base = begin; base < end; base += AT_ONCE, p += AT_ONCE) {
    const bool valid = p < end;
    uint4 nk[2] = {}, nv[2] = {};
    if (p + AT_ONCE < end && p + AT_ONCE < position) load_position(nk, nv, a, first_row + p + AT_ONCE, sub);
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
    float e[QUERIES];
    bool higher = false;
#pragma unroll
    for (int h = 0; h < QUERIES; h++) {
#pragma unroll
      for (int d = LANES / 2; d >= 1; d >>= 1) score[h] += __shfl_xor_sync(~0u, score[h], d);
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
#pragma unroll
    for (int h = 0; h < QUERIES; h++) e[h] = valid ? exp2f(score[h] - m[h]) : 0.f, l[h] += e[h];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float2 f = from16x2(((const uint32_t*)v)[j]);
#pragma unroll
      for (int h = 0; h < QUERIES; h++) o[h][2 * j] += e[h] * f.x, o[h][2 * j + 1] += e[h] * f.y;
    }
    k[0] = nk[0], k[1] = nk[1], v[0] = nv[0], v[1] = nv[1];
  }
#pragma unroll
  for (int h = 0; h < QUERIES; h++) {  // the groups of a warp
    float now = m[h];
#pragma unroll
    for (int d = LANES; d < 32; d <<= 1) now = fmaxf(now, __shfl_xor_sync(~0u, now, d));
    const float c = exp2f(m[h] - now);
    l[h] *= c;
#pragma unroll
    for (int d = LANES; d < 32; d <<= 1) l[h] += __shfl_xor_sync(~0u, l[h], d);
#pragma unroll
    for (int i = 0; i < 16; i++) {
      o[h][i] *= c;
#pragma unroll
      for (int d = LANES; d < 32; d <<= 1) o[h][i] += __shfl_xor_sync(~0u, o[h][i], d);
      if (group == 0) sum[warp][h][sub * 16 + i] = o[h][i];
    }
    if (lane == 0) most[warp][h] = now, weight[warp][h] = l[h];
  }
  __syncthreads();
  float* partial = a.partial + (size_t)kv * splits * QUERIES * (HEAD_DIM + 2);
  for (int i = t; i < QUERIES * HEAD_DIM; i += 256) {  // the warps of a block
    const int h = i / HEAD_DIM, d = i % HEAD_DIM;
    float now = -1e30f, total = 0.f, value = 0.f;
#pragma unroll
    for (int w = 0; w < 8; w++) now = fmaxf(now, most[w][h]);
#pragma unroll
    for (int w = 0; w < 8; w++) { const float c = exp2f(most[w][h] - now); total += c * weight[w][h], value += c * sum[w][h][d]; }
    if (active == 1) { a.out[(kv * QUERIES + h) * HEAD_DIM + d] = to16(value / total); continue; }
    float* mine = partial + (split * QUERIES + h) * (HEAD_DIM + 2);
    mine[d] = value;
    if (d == 0) mine[HEAD_DIM] = now, mine[HEAD_DIM + 1] = total;
  }
  if (active == 1) return;
  __threadfence();
  __syncthreads();
  if (t == 0) last = atomicAdd(a.arrived + kv, 1) == active - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int i = t; i < QUERIES * HEAD_DIM; i += 256) {  // the splits of a kv head
    const int h = i / HEAD_DIM, d = i % HEAD_DIM;
    float now = -1e30f, total = 0.f, value = 0.f;
    for (int n = 0; n < active; n++) now = fmaxf(now, load_dependent(partial + (n * QUERIES + h) * (HEAD_DIM + 2) + HEAD_DIM));
    for (int n = 0; n < active; n++) {
      const float* theirs = partial + (n * QUERIES + h) * (HEAD_DIM + 2);
      const float c = exp2f(load_dependent(theirs + HEAD_DIM) - now);
      total += c * load_dependent(theirs + HEAD_DIM + 1), value += c * load_dependent(theirs + d);
    }
    a.out[(kv * QUERIES + h) * HEAD_DIM + d] = to16(value / total);
  }
  if (t == 0) a.arrived[kv] = 0;
}

