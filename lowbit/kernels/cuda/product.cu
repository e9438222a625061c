// ---------------------------------------------------------------------------------------------- shared memory of a block
struct Shared {
  uint8_t* ring;      // [ring][stage]
  uint16_t* x;        // [K]; INTEGER: two planes of digits, [K + PLANE_GAP] bytes each, and then zeros for a stage's columns
  float2* groups;     // [K / SUM_COLUMNS], INTEGER: scale of x, sum of x
  float* partial;     // [batch x stages of a tile][16]: row sums of every stage
  float* reduce;      // [32]
  uint64_t *full, *empty;  // [ring]
};
constexpr int PLANE_GAP = 64;  // bytes, so that a column of x in one plane and that in the other share no bank
// lowbit/kernels/geometry.py computes the same size
template <int K> __device__ __forceinline__ Shared carve(uint8_t* memory, int ring, int batch) {
  Shared s;
  s.ring = memory;
  uint8_t* p = memory + ring * stage_bytes(stage_columns(K));
  s.x = (uint16_t*)p, p += K * 2 + (INTEGER ? 2 * PLANE_GAP + stage_columns(K) : 0);
  s.groups = (float2*)p, p += K / SUM_COLUMNS * 8;
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
// 8 consecutive values from column k on, by each of 32 lanes; 16 neighbours hold a group.
template <int K> __device__ __forceinline__ void put8(const Shared& s, int k, const float (&v)[8]) {
  if constexpr (!INTEGER) {
    uint32_t o[4];
#pragma unroll
    for (int i = 0; i < 4; i++) o[i] = (uint32_t)to16(v[2 * i]) | ((uint32_t)to16(v[2 * i + 1]) << 16);
    *(uint4*)(s.x + k) = make_uint4(o[0], o[1], o[2], o[3]);
  } else {
    uint32_t high[2], low[2];
    float scale;
    int sum;
    to_digits(v, high, low, scale, sum);
    uint8_t* to = (uint8_t*)s.x + place_of(k);
    *(uint2*)to = make_uint2(high[0], high[1]);
    *(uint2*)(to + K + PLANE_GAP) = make_uint2(low[0], low[1]);
    sum = sum_of_columns(sum);
    if (k % SUM_COLUMNS == 0) s.groups[k / SUM_COLUMNS] = make_float2(scale, scale * (float)sum);
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
      put8<K>(s, (i * CONSUMERS + t) * 8, v[i]);
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
      put8<K>(s, (i * CONSUMERS + t) * 8, v);
    }
  }
}

// ---------------------------------------------------------------------------------------------- a stage, by one warp
// Lane l holds rows l / 4 and l / 4 + 8 and, of every 64 columns, the 16 from (l % 4) * 16 on (bf16: of every 32, 8): an
// mma's columns may be permuted as long as x is permuted alike.
template <int K> __device__ __forceinline__ void stage_product(const uint8_t* stage, const Shared& s, int chunk, float& r0, float& r1) {
  constexpr int KU = stage_columns(K);
  const int lane = threadIdx.x & 31, g = lane >> 2, quarter = lane & 3;
  const uint4* wp = (const uint4*)stage + lane;
  if constexpr (FORMAT == BF16) {
    const uint4* xp = (const uint4*)(s.x + chunk * KU + quarter * 8);  // + 4 per 32 columns
    float c[4][4] = {};
#pragma unroll
    for (int i = 0; i < KU / 32; i++) {
      uint4 x = xp[i * 4], w0 = wp[(2 * i) * 32], w1 = wp[(2 * i + 1) * 32];
      mma(c[(i & 1) * 2], w0.x, w0.y, w0.z, w0.w, x.x, x.y);
      mma(c[(i & 1) * 2 + 1], w1.x, w1.y, w1.z, w1.w, x.z, x.w);
    }
    r0 = c[0][0] + c[1][0] + c[2][0] + c[3][0], r1 = c[0][2] + c[1][2] + c[2][2] + c[3][2];
  } else if constexpr (FORMAT == FP8) {
    const uint4* xp = (const uint4*)(s.x + chunk * KU + quarter * 16);  // + 8 per 64 columns
    float c[4][4] = {};
#pragma unroll
    for (int i = 0; i < KU / 64; i++) {
      const uint4 x0 = xp[i * 8], x1 = xp[i * 8 + 1], w0 = wp[(2 * i) * 32], w1 = wp[(2 * i + 1) * 32];
      auto four = [&](float (&to)[4], uint32_t a, uint32_t b, uint32_t b0, uint32_t b1) {
        mma(to, e4m3_to_halves(a, 0), e4m3_to_halves(b, 0), e4m3_to_halves(a, 1), e4m3_to_halves(b, 1), b0, b1);
      };
      four(c[0], w0.x, w1.x, x0.x, x0.y), four(c[1], w0.y, w1.y, x0.z, x0.w);
      four(c[2], w0.z, w1.z, x1.x, x1.y), four(c[3], w0.w, w1.w, x1.z, x1.w);
    }
    r0 = c[0][0] + c[1][0] + c[2][0] + c[3][0], r1 = c[0][2] + c[1][2] + c[2][2] + c[3][2];
  } else {
    const uint8_t* digits = (const uint8_t*)s.x;
    const uint8_t* own = digits + (g & 1) * (K + PLANE_GAP) + chunk * KU + quarter * 16;
    const uint8_t* zeros = digits + 2 * (K + PLANE_GAP);
    if constexpr (FORMAT == NVFP4) sixteens_product<K>(stage, s.groups + chunk * (KU / GROUP), own, zeros, r0, r1);
    else groups_product<K>(stage, s.groups + chunk * (KU / SUM_COLUMNS), own, zeros, r0, r1);
#pragma unroll
    for (int d = 1; d < 4; d <<= 1) r0 += __shfl_xor_sync(~0u, r0, d), r1 += __shfl_xor_sync(~0u, r1, d);
  }
}

// ---------------------------------------------------------------------------------------------- one product
__device__ __forceinline__ int first_tile(int tiles, int block, int blocks) { return (int)((uint32_t)tiles * block / blocks); }
// The producer thread's way through a ring: fetch(stage, slot) asks for a stage. The thread that uses a slot first makes its
// barriers, on its way: so the first stages are asked for as soon as the block runs, and the consumers stage x meanwhile.
// Few at a time, with a WINDOW no more stages on their way than that, and no sooner than PACE cycles after those before: what the
// kernel before still loads and this one's x queue behind them, so that asking faster made a step slower (docs/kernels.md).
template <typename Op, typename Barriers, typename Fetch> __device__ __forceinline__ void feed_ring(const Op& op, const Barriers& s, int stages, Fetch&& fetch) {
  constexpr int AT_ONCE = 4;
  static_assert(WINDOW % AT_ONCE == 0, "the window moves by what is asked for at once");
  const int first = min(stages, op.ring);
  uint32_t next = PACE > 0 ? clock_now() : 0;
  for (int i = 0; i < first; i += AT_ONCE) {
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) if (i + j < first) barrier_init(s.full + i + j, 1), barrier_init(s.empty + i + j, 1);
    barriers_ready();
    if constexpr (WINDOW > 0) if (i >= WINDOW) barrier_wait(s.full + i - WINDOW + AT_ONCE - 1, 0);
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) if (i + j < first) fetch(i + j, i + j);
    if constexpr (PACE > 0) {
      next += PACE;
      while ((int)(clock_now() - next) < 0) {}
    }
  }
  __syncthreads();  // with the consumers, who have staged x meanwhile
  int slot = 0;
  uint32_t parity = 0;
  for (int i = first; i < stages; i++) {
    barrier_wait(s.empty + slot, parity);
    fetch(i, slot);
    if (++slot == op.ring) slot = 0, parity ^= 1;
  }
}
template <int K> __device__ __forceinline__ void produce(const Product& op, const Shared& s, int t0, int t1) {
  constexpr int CHUNKS = K / stage_columns(K), STAGE_BYTES = stage_bytes(stage_columns(K));
  const uint8_t* from = op.weights + (size_t)t0 * CHUNKS * STAGE_BYTES;
  const uint64_t policy = evict_first();
  feed_ring(op, s, (t1 - t0) * CHUNKS, [&](int stage, int slot) {
    barrier_expect(s.full + slot, STAGE_BYTES);
    bulk_copy(s.ring + slot * STAGE_BYTES, from + (size_t)stage * STAGE_BYTES, STAGE_BYTES, s.full + slot, policy);
  });
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
  if (INTEGER && t < KU / 16) ((uint4*)((uint8_t*)s.x + 2 * (K + PLANE_GAP)))[t] = make_uint4(0, 0, 0, 0);
  wait_for_previous();
  if (t == 0) let_next_start();
  float residual = 0.f;
  if (EPILOGUE == ADD_RESIDUAL && t < (t1 - t0) * 16) residual = load_dependent((const float*)op.out + t0 * 16 + t);
  stage_x<K, NORM>(op, ahead, s);
  __syncthreads();  // x is staged, and the producer's barriers are made
  uint64_t best = 0;
  Place at{(uint32_t)warp, 0, warp};
  uint32_t first = 0;
  for (int base = t0; base < t1; base += op.batch) {  // several for the head, and for gate_up of wide models
    Ahead next;  // SILU_MUL asks for its scales behind the epilogue: two more beside these cost up to 8 registers
    if (EPILOGUE != SILU_MUL && base + op.batch < t1)
      load_row_scales<EPILOGUE>(op, next, base + op.batch, min(t1 - base - op.batch, op.batch));
    const int tiles = min(op.batch, t1 - base);
    const uint32_t end = first + tiles * CHUNKS;
    while ((int)(at.stage - end) < 0) {
      const int i = at.stage - first;
      float r0, r1;
      barrier_wait(s.full + at.slot, at.parity);
      stage_product<K>(s.ring + at.slot * STAGE_BYTES, s, i % CHUNKS, r0, r1);
      before_overwriting();
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
    if (base + op.batch < t1) {
      if (EPILOGUE == SILU_MUL)
        load_row_scales<EPILOGUE>(op, ahead, base + op.batch, min(t1 - base - op.batch, op.batch));
      else ahead.scale0 = next.scale0;
      sync_consumers();
    }
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
  if (threadIdx.x >= CONSUMERS) {
    if (threadIdx.x == CONSUMERS) produce<K>(op, s, t0, t1);
  } else consume<K, NORM, EPILOGUE>(op, s, t0, t1);
}
