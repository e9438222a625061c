// ---------------------------------------------------------------------------------------------- shared memory of a block
struct Shared {
  uint8_t* ring;      // [ring][stage]
  uint16_t* x;        // [K], scaled for the fields' places
  float2* sums;       // [K / GROUP]: what the 1024s add up to, and the sum of x
  float* partial;     // [batch x stages of a tile][16]: row sums of every stage
  float* reduce;      // [32]
  uint64_t *full, *empty;  // [ring]
};
// lowbit/kernels/geometry.py computes the same size
template <int K> __device__ __forceinline__ Shared carve(uint8_t* memory, int ring, int batch) {
  Shared s;
  s.ring = memory;
  uint8_t* p = memory + ring * stage_bytes(stage_columns(K));
  s.x = (uint16_t*)p, p += K * 2;
  s.sums = (float2*)p, p += K / GROUP * 8;
  s.partial = (float*)p, p += batch * (K / stage_columns(K)) * 64;
  s.reduce = (float*)p, p += 128;
  s.full = (uint64_t*)p, s.empty = (uint64_t*)p + MAX_RING;
  return s;
}
// A warp's place in the stream. The ring's length is a multiple of WARPS, so that a slot always belongs to one warp: else
// a warp can pass on the phase before last.
struct Place {
  uint32_t stage, parity;
  int slot;
  __device__ __forceinline__ void next(int ring) {
    stage += WARPS, slot += WARPS;
    if (slot >= ring) slot -= ring, parity ^= 1;
  }
};

// ---------------------------------------------------------------------------------------------- before the wait
constexpr int PIECES = (HIDDEN / 8 + CONSUMERS - 1) / CONSUMERS;  // 8 values of the residual each, per consumer thread
struct Ahead { uint4 norm[PIECES]; float scale0, scale1; };       // weights that need no dependency
template <int EPILOGUE> __device__ __forceinline__ void load_row_scales(const Product& op, Ahead& a, int tile, int tiles) {
  a.scale0 = a.scale1 = 1.f;
  if constexpr (ROW_SCALED) {
    const int t = threadIdx.x;
    if (EPILOGUE == SILU_MUL) {
      if (t < tiles * 8) { int r = (tile + t / 8) * 16 + t % 8; a.scale0 = __ldg(op.row_scale + r), a.scale1 = __ldg(op.row_scale + r + 8); }
    } else if (t < tiles * 16) a.scale0 = __ldg(op.row_scale + tile * 16 + t);
  }
}

// ---------------------------------------------------------------------------------------------- x into shared memory
__device__ __forceinline__ float place_scale(int i) {  // 1 / the power of two at which field i of 8 is left in its half
  if constexpr (FORMAT == INT4) return (i & 2) ? 1.f / 16 : 1.f;
  if constexpr (FORMAT == INT2 || FORMAT == TERNARY) return i < 2 ? 1.f : i < 4 ? 1.f / 4 : i < 6 ? 1.f / 16 : 1.f / 64;
  return 1.f;
}
// 8 consecutive values from column k on. 16 neighbouring lanes hold one group and sum it up.
__device__ __forceinline__ void put8(const Shared& s, int k, const float (&v)[8]) {
  uint32_t o[4];
  float bias = 0.f, sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (FORMAT == BF16) { o[i] = (uint32_t)to16(v[2 * i]) | ((uint32_t)to16(v[2 * i + 1]) << 16); continue; }
    const float scale = place_scale(2 * i);
    __half2 h = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
    const float x0 = __low2float(h), x1 = __high2float(h);
    __half2 placed = __floats2half2_rn(x0 * scale, x1 * scale);
    sum += x0 + x1, bias += 1024.f * (__low2float(placed) + __high2float(placed));
    o[i] = *(uint32_t*)&placed;
  }
  *(uint4*)(s.x + k) = make_uint4(o[0], o[1], o[2], o[3]);
  if constexpr (FORMAT != BF16 && FORMAT != FP8) {
#pragma unroll
    for (int d = 8; d >= 1; d >>= 1) bias += __shfl_xor_sync(~0u, bias, d), sum += __shfl_xor_sync(~0u, sum, d);
    if (FORMAT == INT8) bias += 128.f * sum;     // bytes are stored as q + 128
    if (FORMAT == TERNARY) bias += sum;          // fields are stored as q + 1
    if ((threadIdx.x & 15) == 0) s.sums[k / GROUP] = make_float2(bias, sum);
  }
}
template <int K, bool NORM> __device__ __forceinline__ void stage_x(const Product& op, const Ahead& ahead, const Shared& s) {
  const int t = threadIdx.x;
  if constexpr (NORM) {
    const float4* x = (const float4*)op.x;
    float v[PIECES][8] = {}, squares = 0.f;
#pragma unroll
    for (int i = 0; i < PIECES; i++) if (i * CONSUMERS + t < K / 8) {
      float4 a = load_dependent(x + (i * CONSUMERS + t) * 2), b = load_dependent(x + (i * CONSUMERS + t) * 2 + 1);
      v[i][0] = a.x, v[i][1] = a.y, v[i][2] = a.z, v[i][3] = a.w, v[i][4] = b.x, v[i][5] = b.y, v[i][6] = b.z, v[i][7] = b.w;
    }
#pragma unroll
    for (int i = 0; i < PIECES * 8; i++) squares += v[i >> 3][i & 7] * v[i >> 3][i & 7];
#pragma unroll
    for (int d = 16; d >= 1; d >>= 1) squares += __shfl_xor_sync(~0u, squares, d);
    if ((t & 31) == 0) s.reduce[t >> 5] = squares;
    sync_consumers();
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) total += s.reduce[i];
    const float r = rsqrtf(total / K + EPS);
#pragma unroll
    for (int i = 0; i < PIECES; i++) if (i * CONSUMERS + t < K / 8) {
      const uint32_t* w = (const uint32_t*)&ahead.norm[i];
#pragma unroll
      for (int j = 0; j < 4; j++) { float2 n = from16x2(w[j]); v[i][2 * j] *= r * n.x, v[i][2 * j + 1] *= r * n.y; }
      put8(s, (i * CONSUMERS + t) * 8, v[i]);
    }
  } else {
    constexpr int N = (K / 8 + CONSUMERS - 1) / CONSUMERS;
    const uint4* x = (const uint4*)op.x;
    uint4 u[N];
#pragma unroll
    for (int i = 0; i < N; i++) if (i * CONSUMERS + t < K / 8) u[i] = load_dependent(x + i * CONSUMERS + t);
#pragma unroll
    for (int i = 0; i < N; i++) if (i * CONSUMERS + t < K / 8) {
      float v[8];
      const uint32_t* h = (const uint32_t*)&u[i];
#pragma unroll
      for (int j = 0; j < 4; j++) { float2 f = from16x2(h[j]); v[2 * j] = f.x, v[2 * j + 1] = f.y; }
      put8(s, (i * CONSUMERS + t) * 8, v);
    }
  }
  sync_consumers();
}

// ---------------------------------------------------------------------------------------------- a stage, by one warp
// Lane l holds rows l / 4 and l / 4 + 8 and, of every 32 columns, the 8 from (l % 4) * 8 on: the first 4 of them are
// operand A of one mma, the other 4 of a second one (an mma's columns may be permuted as long as x is permuted alike).
// All 8 columns of operand B are the same x; the sums for rows l / 4 and l / 4 + 8 come back in c[0] and c[2].
template <int KU> __device__ __forceinline__ void stage_product(const uint8_t* stage, const Shared& s, int chunk, float& r0, float& r1) {
  const int lane = threadIdx.x & 31;
  const uint4* wp = (const uint4*)stage + lane;
  const uint4* xp = (const uint4*)(s.x + chunk * KU + (lane & 3) * 8);  // + 4 per 32 columns
  r0 = r1 = 0.f;
  if constexpr (FORMAT == BF16) {
    float c[4][4] = {};
#pragma unroll
    for (int i = 0; i < KU / 32; i++) {
      uint4 x = xp[i * 4], w0 = wp[(2 * i) * 32], w1 = wp[(2 * i + 1) * 32];
      mma(c[(i & 1) * 2], w0.x, w0.y, w0.z, w0.w, x.x, x.y);
      mma(c[(i & 1) * 2 + 1], w1.x, w1.y, w1.z, w1.w, x.z, x.w);
    }
    r0 = c[0][0] + c[1][0] + c[2][0] + c[3][0], r1 = c[0][2] + c[1][2] + c[2][2] + c[3][2];
  } else {
    constexpr int G = 2;  // groups in flight: 2 G independent chains of mma
    const float2* sums = s.sums + chunk * (KU / GROUP);
#pragma unroll 2
    for (int gp = 0; gp < KU / GROUP; gp += G) {
      float ca[G][4] = {}, cb[G][4] = {};
      if constexpr (FORMAT == INT8 || FORMAT == FP8) {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int g = 0; g < G; g++) {
            uint4 x = xp[((gp + g) * 4 + i) * 4], w = wp[((gp + g) * 4 + i) * 32];
            if constexpr (FORMAT == INT8) {
              mma(ca[g], bytes_to_halves(w.x, 0x4140), bytes_to_halves(w.y, 0x4140), bytes_to_halves(w.x, 0x4342), bytes_to_halves(w.y, 0x4342), x.x, x.y);
              mma(cb[g], bytes_to_halves(w.z, 0x4140), bytes_to_halves(w.w, 0x4140), bytes_to_halves(w.z, 0x4342), bytes_to_halves(w.w, 0x4342), x.z, x.w);
            } else {
              mma(ca[g], e4m3_to_halves(w.x, 0), e4m3_to_halves(w.y, 0), e4m3_to_halves(w.x, 1), e4m3_to_halves(w.y, 1), x.x, x.y);
              mma(cb[g], e4m3_to_halves(w.z, 0), e4m3_to_halves(w.w, 0), e4m3_to_halves(w.z, 1), e4m3_to_halves(w.w, 1), x.z, x.w);
            }
          }
      } else if constexpr (FORMAT == INT4) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          uint4 w[G], x0[G], x1[G];
#pragma unroll
          for (int g = 0; g < G; g++) w[g] = wp[((gp + g) * 2 + i) * 32], x0[g] = xp[((gp + g) * 4 + 2 * i) * 4], x1[g] = xp[((gp + g) * 4 + 2 * i + 1) * 4];
          auto eight = [&](float (&c)[4], uint32_t q, uint32_t b0, uint32_t b1) {
            const uint32_t h = q >> 8;
            mma(c, field<0x000f000f>(q), field<0x000f000f>(h), field<0x00f000f0>(q), field<0x00f000f0>(h), b0, b1);
          };
#pragma unroll
          for (int g = 0; g < G; g++) eight(ca[g], w[g].x, x0[g].x, x0[g].y), eight(cb[g], w[g].y, x0[g].z, x0[g].w);
#pragma unroll
          for (int g = 0; g < G; g++) eight(ca[g], w[g].z, x1[g].x, x1[g].y), eight(cb[g], w[g].w, x1[g].z, x1[g].w);
        }
      } else {
        uint4 w[G];
#pragma unroll
        for (int g = 0; g < G; g++) w[g] = wp[(gp + g) * 32];
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int g = 0; g < G; g++) {
            const uint32_t q = i == 0 ? w[g].x : i == 1 ? w[g].y : i == 2 ? w[g].z : w[g].w, h = q >> 8;
            const uint4 x = xp[((gp + g) * 4 + i) * 4];
            mma(ca[g], field<0x00030003>(q), field<0x00030003>(h), field<0x000c000c>(q), field<0x000c000c>(h), x.x, x.y);
            mma(cb[g], field<0x00300030>(q), field<0x00300030>(h), field<0x00c000c0>(q), field<0x00c000c0>(h), x.z, x.w);
          }
      }
#pragma unroll
      for (int g = 0; g < G; g++) {
        float d0 = ca[g][0] + cb[g][0], d1 = ca[g][2] + cb[g][2];
        if constexpr (FORMAT != FP8) { const float bias = sums[gp + g].x; d0 -= bias, d1 -= bias; }
        if constexpr (GROUPED) {  // w = scale q + zero
          const float sum = sums[gp + g].y;
          const uint2 u = *(const uint2*)(stage + code_bytes(KU) + ((gp + g) * 8 + (lane >> 2)) * 8);
          const float2 s0 = __half22float2(*(const __half2*)&u.x), s1 = __half22float2(*(const __half2*)&u.y);
          r0 += s0.x * d0 + s0.y * sum, r1 += s1.x * d1 + s1.y * sum;
        } else r0 += d0, r1 += d1;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- one product
__device__ __forceinline__ int first_tile(int tiles, int block, int blocks) { return (int)((int64_t)tiles * block / blocks); }
template <int K> __device__ __forceinline__ void produce(const Product& op, const Shared& s, int t0, int t1) {
  constexpr int CHUNKS = K / stage_columns(K), STAGE_BYTES = stage_bytes(stage_columns(K));
  const uint8_t* from = op.weights + (size_t)t0 * CHUNKS * STAGE_BYTES;
  const int stages = (t1 - t0) * CHUNKS;
  const uint64_t policy = evict_first();
  int slot = 0;
  uint32_t parity = 0;
  for (int i = 0; i < stages; i++) {
    if (i >= op.ring) barrier_wait(s.empty + slot, parity ^ 1);
    barrier_expect(s.full + slot, STAGE_BYTES);
    bulk_copy(s.ring + slot * STAGE_BYTES, from + (size_t)i * STAGE_BYTES, STAGE_BYTES, s.full + slot, policy);
    if (++slot == op.ring) slot = 0, parity ^= 1;
  }
}
__device__ __forceinline__ uint64_t order_key(float value, int row) {  // larger value first, then the lower row
  uint32_t u = __float_as_uint(value);
  u = (u & 0x80000000u) ? ~u : (u | 0x80000000u);
  return ((uint64_t)u << 32) | (uint32_t)(~row);
}
// The last block to arrive knows the arg max: it hands out the token, advances the position and resets for the next step.
__device__ __forceinline__ void finish_token(const Product& op) {
  sync_consumers();
  if (threadIdx.x) return;
  __threadfence();
  if (atomicAdd(op.arrived, 1) != gridDim.x - 1) return;
  __threadfence();
  const int64_t token = (int64_t)(~(uint32_t)(load_dependent(op.best) & 0xffffffffu)), position = *op.position + 1;
  *op.token = token, *op.position = position, op.history[position] = token;
  *op.best = 0, *op.arrived = 0;
}
template <int K, bool NORM, int EPILOGUE> __device__ __forceinline__ void consume(const Product& op, const Shared& s, int t0, int t1) {
  constexpr int KU = stage_columns(K), CHUNKS = K / KU, STAGE_BYTES = stage_bytes(KU);
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  Ahead ahead;
  if constexpr (NORM) {
    const uint4* n = (const uint4*)op.norm;
#pragma unroll
    for (int i = 0; i < PIECES; i++) if (i * CONSUMERS + t < K / 8) ahead.norm[i] = __ldg(n + i * CONSUMERS + t);
  }
  load_row_scales<EPILOGUE>(op, ahead, t0, min(t1 - t0, op.batch));
  wait_for_previous();
  if (t == 0) let_next_start();
  float residual = 0.f;
  if (EPILOGUE == ADD_RESIDUAL && t < (t1 - t0) * 16) residual = load_dependent((const float*)op.out + t0 * 16 + t);
  stage_x<K, NORM>(op, ahead, s);
  uint64_t best = 0;
  Place at{(uint32_t)warp, 0, warp};
  uint32_t first = 0;
  for (int base = t0; base < t1; base += op.batch) {  // one batch for all but the head
    Ahead next;
    if (base + op.batch < t1) load_row_scales<EPILOGUE>(op, next, base + op.batch, min(t1 - base - op.batch, op.batch));
    const int tiles = min(op.batch, t1 - base);
    const uint32_t end = first + tiles * CHUNKS;
    while ((int)(at.stage - end) < 0) {
      const int i = at.stage - first;
      float r0, r1;
      barrier_wait(s.full + at.slot, at.parity);
      stage_product<KU>(s.ring + at.slot * STAGE_BYTES, s, i % CHUNKS, r0, r1);
      __syncwarp();
      if (lane == 0) barrier_arrive(s.empty + at.slot);
      at.next(op.ring);
      if ((lane & 3) == 0) { float* p = s.partial + i * 16 + (lane >> 2); p[0] = r0, p[8] = r1; }
    }
    first = end;
    sync_consumers();
    if (EPILOGUE == SILU_MUL) {  // rows 0 to 7 of a tile are gate's, 8 to 15 up's
      if (t < tiles * 8) {
        const float* p = s.partial + (t / 8) * CHUNKS * 16 + t % 8;
        float gate = 0.f, up = 0.f;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) gate += p[c * 16], up += p[c * 16 + 8];
        gate *= ahead.scale0, up *= ahead.scale1;
        ((uint16_t*)op.out)[base * 8 + t] = to16(gate / (1.f + __expf(-gate)) * up);
      }
    } else if (t < tiles * 16) {
      const float* p = s.partial + (t / 16) * CHUNKS * 16 + t % 16;
      float a = 0.f;
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) a += p[c * 16];
      a *= ahead.scale0;
      const int row = base * 16 + t;
      if (EPILOGUE == TO_ACT) ((uint16_t*)op.out)[row] = to16(a);
      if (EPILOGUE == ADD_RESIDUAL) ((float*)op.out)[row] = residual + a;
      if (EPILOGUE == TO_LOGITS && row < op.rows) {
        ((float*)op.out)[row] = a;
        const uint64_t key = order_key(a, row);
        best = key > best ? key : best;
      }
    }
    if (base + op.batch < t1) { ahead.scale0 = next.scale0; sync_consumers(); }
  }
  if (EPILOGUE == TO_LOGITS) {
#pragma unroll
    for (int d = 16; d >= 1; d >>= 1) { const uint64_t o = __shfl_xor_sync(~0u, best, d); best = o > best ? o : best; }
    if (lane == 0) atomicMax(op.best, best);
    finish_token(op);
  }
}
template <int K, bool NORM, int EPILOGUE> __global__ void __launch_bounds__(THREADS, 1) product_kernel(const __grid_constant__ Product op) {
  SHARED_MEMORY(memory);
  const Shared s = carve<K>(memory, op.ring, op.batch);
  const int t0 = first_tile(op.tiles, blockIdx.x, gridDim.x), t1 = first_tile(op.tiles, blockIdx.x + 1, gridDim.x);
  if (threadIdx.x == 0) {
    for (int i = 0; i < op.ring; i++) barrier_init(s.full + i, 1), barrier_init(s.empty + i, 1);
    barriers_ready();
  }
  __syncthreads();
  if (threadIdx.x >= CONSUMERS) {
    if (threadIdx.x == CONSUMERS) produce<K>(op, s, t0, t1);
  } else consume<K, NORM, EPILOGUE>(op, s, t0, t1);
}
