// ---------------------------------------------------------------------------------------------- a product with 2 to 8 sequences
// Its design is told in batch_x.cu.
struct Batch {                 // one product
  const uint8_t* weights;      // stream: [tile][K / stage_columns(K)][stage]
  const float* row_scale;      // [rows], ROW_SCALED only
  const void* x;               // READY: as above; else 16-bit activations [BATCH][K]
  void* out;                   // [BATCH][..]: 16-bit activations or fp32 logits; PARTS: fp32 [slices][BATCH][rows]
  uint64_t* best;              // TO_LOGITS: [BATCH] the arg max so far, as an ordered key
  uint32_t* arrived;           // TO_LOGITS: blocks that are done
  int64_t* token;              // TO_LOGITS: [BATCH] the next tokens go here
  int64_t* position;           // TO_LOGITS: of all sequences, advanced by one
  int64_t* history;            // TO_LOGITS: [BATCH][length], the token of each position
  int tiles;                   // rows / 16, rounded up
  int rows;
  int ring;                    // stages in shared memory, a multiple of WARPS
  int turns;                   // tiles whose sums are in shared memory at once
  int length;
};

// ---------------------------------------------------------------------------------------------- a stage, by one warp
// Lane l: rows l / 4 and l / 4 + 8 of columns (sequences) 2 (l % 4) and the next -> r[0], r[1] and r[2], r[3].
template <int KU> __device__ __forceinline__ void batch_product(const uint8_t* stage, const uint8_t* x, const float2* groups, float (&r)[4]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, quarter = lane & 3;
  const uint4* wp = (const uint4*)stage + lane;
  const uint8_t* own = x + min(g, BATCH - 1) * 64 + quarter * 16;  // operand B's column: beyond BATCH another's, not kept
  auto operand = [&](int plane) { return *(const uint4*)(own + plane * PLANE); };
  if constexpr (!INTEGER) {
    float c[4][4] = {};
    if constexpr (FORMAT == BF16) {
#pragma unroll
      for (int i = 0; i < KU / 32; i++) {
        const uint4 b = operand(i), w0 = wp[(2 * i) * 32], w1 = wp[(2 * i + 1) * 32];
        mma(c[(i & 1) * 2], w0.x, w0.y, w0.z, w0.w, b.x, b.y);
        mma(c[(i & 1) * 2 + 1], w1.x, w1.y, w1.z, w1.w, b.z, b.w);
      }
    } else {
#pragma unroll
      for (int i = 0; i < KU / 64; i++) {
        const uint4 b0 = operand(2 * i), b1 = operand(2 * i + 1), w0 = wp[(2 * i) * 32], w1 = wp[(2 * i + 1) * 32];
        auto four = [&](float (&to)[4], uint32_t a, uint32_t b, uint32_t x0, uint32_t x1) {
          mma(to, e4m3_to_halves(a, 0), e4m3_to_halves(b, 0), e4m3_to_halves(a, 1), e4m3_to_halves(b, 1), x0, x1);
        };
        four(c[0], w0.x, w1.x, b0.x, b0.y), four(c[1], w0.y, w1.y, b0.z, b0.w);
        four(c[2], w0.z, w1.z, b1.x, b1.y), four(c[3], w0.w, w1.w, b1.z, b1.w);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) r[i] = c[0][i] + c[1][i] + c[2][i] + c[3][i];
  } else if constexpr (FORMAT == NVFP4) {
    // A scale for 16 columns, which are a quarter's of 64: of x, an mma gets one quarter after the other, zeros else
    constexpr int BLOCKS = KU / 64;
    const Tables t = lifted_tables();
    const uint32_t* scales = (const uint32_t*)(stage + code_bytes(KU)) + g * 4 * (BLOCKS / 2);  // [quarter][two blocks][row]
#pragma unroll
    for (int i = 0; i < 4; i++) r[i] = 0.f;
#pragma unroll 2
    for (int block = 0; block < BLOCKS; block++) {
      const uint4 high = operand(block * 2), low = operand(block * 2 + 1);
      const Words w = words_at<KU>(wp, block / 2, block % 2);
      const Rows a = lifted_of(w, 0, t), b = lifted_of(w, 1, t), c = lifted_of(w, 2, t), d = lifted_of(w, 3, t);
#pragma unroll
      for (int q = 0; q < 4; q++) {
        const uint32_t mine = quarter == q ? ~0u : 0u;
        int d0[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS}, d1[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
        mma(d0, a.low, a.high, b.low, b.high, high.x & mine, high.y & mine), mma(d1, a.low, a.high, b.low, b.high, low.x & mine, low.y & mine);
        mma(d0, c.low, c.high, d.low, d.high, high.z & mine, high.w & mine), mma(d1, c.low, c.high, d.low, d.high, low.z & mine, low.w & mine);
        const float4 two = *(const float4*)(groups + (block * 4 + q) * COLUMNS + min(quarter, OWN - 1) * 2);
        const float2 scale = halves_of(e4m3_to_halves(scales[q * (BLOCKS / 2) + block / 2], block % 2));
#pragma unroll
        for (int i = 0; i < 4; i++)
          r[i] += (i / 2 ? scale.y : scale.x) * ((i % 2 ? two.z : two.x) * total(d0[i], d1[i], WORTH0) - 6.f * (i % 2 ? two.w : two.y));
      }
    }
  } else {
    constexpr int APART = SUBS > 1 ? SUBS : SHIFT ? 2 : 1;  // sums of a group: by scale, or by what its halves' fields are worth
    constexpr int XS = GROUP / SUM_COLUMNS;                 // sums of x of a group
    const Tables t = tables();
#pragma unroll
    for (int i = 0; i < 4; i++) r[i] = 0.f;
#pragma unroll
    for (int group = 0; group < KU / GROUP; group++) {
      int c[APART][2][4];  // of each digit
#pragma unroll
      for (int i = 0; i < APART * 8; i++) c[i / 8][i / 4 % 2][i % 4] = SUBS > 1 || i / 8 == APART - 1 ? MAGIC_BITS : 0;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint4 high = operand((group * 2 + half) * 2), low = operand((group * 2 + half) * 2 + 1);
        const Words w = words_at<KU>(wp, group, half);
        int (&c0)[2][4] = c[half * APART / 2], (&c1)[2][4] = c[half * APART / 2 + (APART > 2)];
        auto both = [&](int (&to)[2][4], Rows a, Rows b, uint32_t h0, uint32_t h1, uint32_t l0, uint32_t l1) {
          mma(to[0], a.low, a.high, b.low, b.high, h0, h1), mma(to[1], a.low, a.high, b.low, b.high, l0, l1);
        };
        both(c0, rows_of(w, 0, half, group, t), rows_of(w, 1, half, group, t), high.x, high.y, low.x, low.y);
        both(c1, rows_of(w, 2, half, group, t), rows_of(w, 3, half, group, t), high.z, high.w, low.z, low.w);
        if constexpr (E2M1) {
          both(c0, negatives_of(w, 0, t), negatives_of(w, 1, t), high.x, high.y, low.x, low.y);
          both(c1, negatives_of(w, 2, t), negatives_of(w, 3, t), high.z, high.w, low.z, low.w);
        }
      }
      Scales s = {};
      if constexpr (GROUPED) s = scales_at<KU>(stage, group, g);
#pragma unroll
      for (int sub = 0; sub < SUBS; sub++) {
        const float2* of = groups + (group * XS + sub * XS / SUBS) * COLUMNS + min(quarter, OWN - 1) * 2;
        const float4 two = *(const float4*)of;  // scales and sums of x of both columns
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float factor = (i % 2 ? two.z : two.x) * (FORMAT == BINARY && group & 1 ? 0.25f : 1.f), sum = i % 2 ? two.w : two.y;
          auto digit = [&](int d) { return SUBS > 1 ? c[sub][d][i] : (APART == 2 ? c[0][d][i] << SHIFT : 0) + c[APART - 1][d][i]; };
          const float found = factor * total(digit(0), digit(1), i / 2 ? WORTH1 : WORTH0), scale = s.scale[sub][i / 2];
          if constexpr (GROUPED && ZEROED) r[i] += scale * found, r[i] += s.zero[sub][i / 2] * sum;  // w = scale q + zero
          else if constexpr (FORMAT == INT4) r[i] += scale * (found - 8.f * sum);                     // w = scale (q - 8)
          else if constexpr (GROUPED) r[i] += scale * found;
          else r[i] += found - (FORMAT == TERNARY || FORMAT == BINARY ? sum : 0.f);  // w = q - 1, 2 q - 1
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- shared memory of a block
struct BatchShared {
  uint8_t* ring;      // [ring][stage]
  uint8_t* x;         // x_bytes of the slice's columns
  float* sums;        // [turns][stages of a tile][SUMS]
  uint64_t* best;     // [WARPS][8]
  uint32_t* done;     // [turns]: stages of the tile whose sums are there
  uint64_t *full, *empty, *ready;  // [ring] and x's
};
template <int K, bool READY> struct Slicing {
  static constexpr int KU = stage_columns(K), CHUNKS = K / KU, COUNT = READY ? 1 : slices(CHUNKS);
  static constexpr bool EVEN = CHUNKS % COUNT == 0;
  static constexpr int LARGEST = (CHUNKS + COUNT - 1) / COUNT;  // stages of a tile
};
// lowbit/kernels/batch.py computes the same size
template <int K, bool READY> __device__ __forceinline__ BatchShared carve_batch(uint8_t* memory, int ring, int turns) {
  using Cut = Slicing<K, READY>;
  BatchShared s;
  s.ring = memory;
  uint8_t* p = memory + ring * stage_bytes(Cut::KU);
  s.x = p, p += x_bytes(Cut::LARGEST * Cut::KU);
  s.sums = (float*)p, p += turns * Cut::LARGEST * SUMS * 4;
  s.best = (uint64_t*)p, p += WARPS * 64;
  s.full = (uint64_t*)p, s.empty = s.full + MAX_RING, s.ready = s.empty + MAX_RING, p += (2 * MAX_RING + 1) * 8;
  s.done = (uint32_t*)p;
  return s;
}

// ---------------------------------------------------------------------------------------------- x of a block
template <int K> __device__ __forceinline__ void fetch_x(const Batch& op, const BatchShared& s) {
  constexpr int BYTES = x_bytes(K);
  if (threadIdx.x) return;
  before_copies();
  barrier_expect(s.ready, BYTES);
  bulk_copy(s.x, op.x, BYTES, s.ready, evict_last());
}
// Columns first .. first + n of all sequences
template <int K> __device__ __forceinline__ void stage_slice(const Batch& op, const BatchShared& s, int first, int n) {
  using Cut = Slicing<K, false>;
  constexpr int EACH = (Cut::LARGEST * Cut::KU * BATCH / 8 + CONSUMERS - 1) / CONSUMERS, AT_ONCE = EACH < 8 ? EACH : 8;
  const int t = threadIdx.x, of_one = n / 8;
#pragma unroll 1
  for (int base = 0; base < EACH; base += AT_ONCE) {
    uint4 u[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      // Where nothing is left, the last once more, not kept: a load under a condition would wait for those before it
      const int at = min((base + i) * CONSUMERS + t, of_one * BATCH - 1), sequence = at / of_one;
      u[i] = load_dependent((const uint4*)op.x + (sequence * K + first) / 8 + (at - sequence * of_one));
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int at = (base + i) * CONSUMERS + t, sequence = at / of_one;
      float v[8];
      const uint32_t w[4] = {u[i].x, u[i].y, u[i].z, u[i].w};
#pragma unroll
      for (int j = 0; j < 4; j++) { const float2 f = from16x2(w[j]); v[2 * j] = f.x, v[2 * j + 1] = f.y; }
      put_x(s.x, n, sequence, (at - sequence * of_one) * 8, v, at < of_one * BATCH);
    }
  }
}

// ---------------------------------------------------------------------------------------------- one product
// Over the slice's stages of every tile
template <int K, bool READY> __device__ __forceinline__ void produce_batch(const Batch& op, const BatchShared& s, int t0, int t1, int c0, int chunks) {
  using Cut = Slicing<K, READY>;
  constexpr int STAGE_BYTES = stage_bytes(Cut::KU);
  const uint8_t* from = op.weights + ((size_t)t0 * Cut::CHUNKS + c0) * STAGE_BYTES;
  const uint64_t policy = evict_first();
  int chunk = 0;
  feed_ring(op, s, (t1 - t0) * chunks, [&](int, int slot) {
    barrier_expect(s.full + slot, STAGE_BYTES);
    bulk_copy(s.ring + slot * STAGE_BYTES, from, STAGE_BYTES, s.full + slot, policy);
    from += STAGE_BYTES;
    if (++chunk == chunks) chunk = 0, from += (size_t)(Cut::CHUNKS - chunks) * STAGE_BYTES;
  });
}
template <int EPILOGUE> __device__ __forceinline__ void finish_tile(const Batch& op, const float* sums, int stages, int tile, int slice, float scale, uint64_t (&best)[OWN]) {
  const int lane = threadIdx.x & 31, row = tile * 16 + lane / 2, first = lane % 2 * OWN;  // of the columns
  float v[OWN] = {};
  const float* from = sums + lane * OWN;
#pragma unroll 4
  for (int c = 0; c < stages; c++, from += SUMS) {
    if constexpr (OWN == 4) {
      const float4 four = *(const float4*)from;
      v[0] += four.x, v[1] += four.y, v[2] += four.z, v[3] += four.w;
    } else {
#pragma unroll
      for (int j = 0; j < OWN; j++) v[j] += from[j];
    }
  }
#pragma unroll
  for (int j = 0; j < OWN; j++) {
    const int sequence = first + j;
    v[j] *= scale;
    if (EPILOGUE == SILU_MUL) {  // rows 0 to 7 of a tile are gate's, 8 to 15 up's
      const float up = __shfl_xor_sync(~0u, v[j], 16);
      if (lane < 16 && sequence < BATCH)
        ((uint16_t*)op.out)[(size_t)sequence * (op.rows / 2) + tile * 8 + lane / 2] = to16(v[j] / (1.f + __expf(-v[j])) * up);
    } else if (sequence < BATCH && row < op.rows) {
      const size_t at = (size_t)sequence * op.rows + row;
      if (EPILOGUE == TO_ACT) ((uint16_t*)op.out)[at] = to16(v[j]);
      if (EPILOGUE == PARTS) ((float*)op.out)[(size_t)slice * BATCH * op.rows + at] = v[j];
      if (EPILOGUE == TO_LOGITS) {
        ((float*)op.out)[at] = v[j];
        const uint64_t key = order_key(v[j], row);
        best[j] = key > best[j] ? key : best[j];
      }
    }
  }
}
// The last block to arrive knows the arg max of every sequence.
__device__ __forceinline__ void finish_tokens(const Batch& op, const BatchShared& s, const uint64_t (&best)[OWN]) {
  const int t = threadIdx.x, lane = t & 31;
#pragma unroll
  for (int j = 0; j < OWN; j++) {
    uint64_t most = best[j];
#pragma unroll
    for (int d = 16; d >= 2; d >>= 1) { const uint64_t o = __shfl_xor_sync(~0u, most, d); most = o > most ? o : most; }
    if (lane < 2) s.best[(t >> 5) * 8 + lane * OWN + j] = most;
  }
  sync_consumers();
  if (t < BATCH) {
    uint64_t most = 0;
    for (int w = 0; w < WARPS; w++) most = s.best[w * 8 + t] > most ? s.best[w * 8 + t] : most;
    atomicMax(op.best + t, most);
  }
  sync_consumers();
  if (t) return;
  __threadfence();
  if (atomicAdd(op.arrived, 1) != gridDim.x - 1) return;
  __threadfence();
  const int64_t position = *op.position + 1;
  uint64_t found[BATCH];
#pragma unroll
  for (int n = 0; n < BATCH; n++) found[n] = load_dependent(op.best + n);
#pragma unroll
  for (int n = 0; n < BATCH; n++) {
    const int64_t token = (int64_t)(~(uint32_t)(found[n] & 0xffffffffu));
    op.token[n] = token, op.history[(size_t)n * op.length + position] = token, op.best[n] = 0;
  }
  *op.position = position, *op.arrived = 0;
}
template <int K, bool READY, int EPILOGUE> __global__ void __launch_bounds__(THREADS, 1) batch_kernel(const __grid_constant__ Batch op) {
  using Cut = Slicing<K, READY>;
  constexpr int KU = Cut::KU, STAGE_BYTES = stage_bytes(KU);
  SHARED_MEMORY(memory);
  const BatchShared s = carve_batch<K, READY>(memory, op.ring, op.turns);
  const int t = threadIdx.x, slice = blockIdx.x % Cut::COUNT, share = blockIdx.x / Cut::COUNT, shares = gridDim.x / Cut::COUNT;
  const int t0 = (int)((int64_t)op.tiles * share / shares), t1 = (int)((int64_t)op.tiles * (share + 1) / shares);
  const int c0 = Cut::CHUNKS * slice / Cut::COUNT;
  const int chunks = Cut::EVEN ? Cut::LARGEST : Cut::CHUNKS * (slice + 1) / Cut::COUNT - c0;  // stages of a tile
  if (t >= CONSUMERS) {
    if (t == CONSUMERS) produce_batch<K, READY>(op, s, t0, t1, c0, chunks);
    return;
  }
  if (t < op.turns) s.done[t] = 0;
  if (READY && t == 0) barrier_init(s.ready, 1), barriers_ready();
  wait_for_previous();
  if (t == 0) let_next_start();
  if constexpr (READY) fetch_x<K>(op, s);
  else stage_slice<K>(op, s, c0 * KU, chunks * KU);
  __syncthreads();  // x is staged or under way, and the producer's barriers are made
  if constexpr (READY) barrier_wait(s.ready, 0);

  const int lane = t & 31, warp = t >> 5, g = lane >> 2, quarter = lane & 3;
  const float2* groups = (const float2*)(s.x + 2 * chunks * KU * BATCH);
  const uint32_t stages = (t1 - t0) * chunks;
  uint64_t best[OWN] = {};
  int turned = 0;  // tiles before the one whose sums lie in the first turn
  for (Place at{(uint32_t)warp, 0, warp}; at.stage < stages; at.next(op.ring)) {
    const int tile = at.stage / chunks, chunk = at.stage - tile * chunks;
    while (tile >= turned + op.turns) turned += op.turns;
    const int turn = tile - turned;
    float* sums = s.sums + turn * Cut::LARGEST * SUMS;
    float scale = 1.f, r[4];
    if constexpr (ROW_SCALED) scale = __ldg(op.row_scale + (t0 + tile) * 16 + lane / 2);  // on its way while the stage is multiplied
    barrier_wait(s.full + at.slot, at.parity);
    batch_product<KU>(s.ring + at.slot * STAGE_BYTES, s.x + chunk * KU * 2 * BATCH, groups + chunk * (KU / SUM_COLUMNS) * COLUMNS, r);
    before_overwriting();
    __syncwarp();
    if (lane == 0) barrier_arrive(s.empty + at.slot);
    if (quarter < OWN) {
      float* p = sums + chunk * SUMS + g * COLUMNS + quarter * 2;
      *(float2*)p = make_float2(r[0], r[1]), *(float2*)(p + 8 * COLUMNS) = make_float2(r[2], r[3]);
    }
    __syncwarp();
    // A turn is taken again only when its tile is finished: lowbit/kernels/batch.py counts how many there must be.
    uint32_t last = 0;
    if (lane == 0) {
      last = count_one(s.done + turn) == (uint32_t)chunks - 1;
      if (last) s.done[turn] = 0;
    }
    last = __shfl_sync(~0u, last, 0);
    __syncwarp();  // what its first lane has seen of the other warps' sums, all lanes see
    if (last) finish_tile<EPILOGUE>(op, sums, chunks, t0 + tile, slice, scale, best);
    __syncwarp();
  }
  if constexpr (EPILOGUE == TO_LOGITS) finish_tokens(op, s, best);
}
