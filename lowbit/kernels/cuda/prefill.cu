// ---------------------------------------------------------------------------------------------- between a prompt's products
// What stands between the matrix products of a prompt's layers: each kernel reads and writes its activations once, 16
// bytes at a time, and computes in fp32. The products themselves are cuBLAS on unpacked weights (unpack.cu).
constexpr int PROMPT_THREADS = 256;

__device__ __forceinline__ void widen8(const uint4& w, float (&v)[8]) {
  const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < 4; i++) { const float2 two = from16x2(words[i]); v[2 * i] = two.x, v[2 * i + 1] = two.y; }
}
__device__ __forceinline__ uint4 narrow8(const float (&v)[8]) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = (uint32_t)to16(v[2 * i]) | ((uint32_t)to16(v[2 * i + 1]) << 16);
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// residual += added, then RMSNorm: one block per token.
struct Norm {
  float* residual;         // [tokens][HIDDEN]
  const uint16_t* added;   // [tokens][HIDDEN], or null: nothing is added
  const uint16_t* weight;  // [HIDDEN]
  uint16_t* out;           // [tokens][HIDDEN]
};
__global__ void __launch_bounds__(PROMPT_THREADS) norm_kernel(const __grid_constant__ Norm n) {
  SHARED_MEMORY(memory);
  constexpr int PIECES_OF_ROW = (HIDDEN / 8 + PROMPT_THREADS - 1) / PROMPT_THREADS;
  const int t = threadIdx.x;
  const size_t row = (size_t)blockIdx.x * HIDDEN;
  float v[PIECES_OF_ROW][8], squares = 0.f;
#pragma unroll
  for (int p = 0; p < PIECES_OF_ROW; p++) {
    const int at = (p * PROMPT_THREADS + t) * 8;
    if (at >= HIDDEN) break;
    float4* residual = (float4*)(n.residual + row + at);
    const float4 a = residual[0], b = residual[1];
    const float held[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    float added[8] = {};
    if (n.added) widen8(*(const uint4*)(n.added + row + at), added);
#pragma unroll
    for (int i = 0; i < 8; i++) v[p][i] = held[i] + added[i], squares += v[p][i] * v[p][i];
    if (n.added) {
      float4 low, high;
      low.x = v[p][0], low.y = v[p][1], low.z = v[p][2], low.w = v[p][3];
      high.x = v[p][4], high.y = v[p][5], high.z = v[p][6], high.w = v[p][7];
      residual[0] = low, residual[1] = high;
    }
  }
#pragma unroll
  for (int d = 16; d >= 1; d >>= 1) squares += __shfl_xor_sync(~0u, squares, d);
  float* sums = (float*)memory;  // of each warp; added in the same order by every thread
  if (t % 32 == 0) sums[t / 32] = squares;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < PROMPT_THREADS / 32; w++) total += sums[w];
  const float factor = rsqrtf(total / HIDDEN + EPS);
#pragma unroll
  for (int p = 0; p < PIECES_OF_ROW; p++) {
    const int at = (p * PROMPT_THREADS + t) * 8;
    if (at >= HIDDEN) break;
    float weight[8];
    widen8(*(const uint4*)(n.weight + at), weight);
#pragma unroll
    for (int i = 0; i < 8; i++) v[p][i] *= factor * weight[i];
    *(uint4*)(n.out + row + at) = narrow8(v[p]);
  }
}

// RoPE: queries are rotated where they lie, keys into the cache, values copied there; one block per token. A thread takes
// 8 dimensions of the first half of a head and the 8 of the second half that they are rotated with.
struct Rope {
  uint16_t* qkv;            // [BATCH][tokens][QDIM + 2 KVDIM]
  uint16_t *keys, *values;  // [BATCH][KV_HEADS][length][HEAD_DIM], from position 0 on
  const float2* rope;       // [length][HEAD_DIM / 2] (cos, sin)
  int length, tokens;
};
__global__ void __launch_bounds__(PROMPT_THREADS) rope_kernel(const __grid_constant__ Rope r) {
  constexpr int HALF = HEAD_DIM / 2, PER_HEAD = HALF / 8, ROTATED = (HEADS + KV_HEADS) * PER_HEAD, COPIED = KVDIM / 8;
  const int sequence = BATCH > 1 ? blockIdx.x / r.tokens : 0, position = blockIdx.x - sequence * r.tokens;
  const size_t cached = (size_t)sequence * KV_HEADS;  // heads of the sequences before
  uint16_t* token = r.qkv + (size_t)blockIdx.x * (QDIM + 2 * KVDIM);
  for (int u = threadIdx.x; u < ROTATED + COPIED; u += PROMPT_THREADS) {
    if (u >= ROTATED) {
      const int at = (u - ROTATED) * 8;
      const size_t to = ((cached + at / HEAD_DIM) * r.length + position) * HEAD_DIM + at % HEAD_DIM;
      *(uint4*)(r.values + to) = *(const uint4*)(token + QDIM + KVDIM + at);
      continue;
    }
    const int head = u / PER_HEAD, at = u % PER_HEAD * 8;
    const uint16_t* from = token + head * HEAD_DIM + at;  // keys lie behind the queries
    uint16_t* to = token + head * HEAD_DIM + at;
    if (head >= HEADS) to = r.keys + ((cached + head - HEADS) * r.length + position) * HEAD_DIM + at;
    float first[8], second[8];
    widen8(*(const uint4*)from, first), widen8(*(const uint4*)(from + HALF), second);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float2 cs = __ldg(r.rope + (size_t)position * HALF + at + i);
      const float a = first[i], b = second[i];
      first[i] = a * cs.x - b * cs.y, second[i] = b * cs.x + a * cs.y;
    }
    *(uint4*)to = narrow8(first), *(uint4*)(to + HALF) = narrow8(second);
  }
}

// SiLU(gate) * up, where 8 columns of gate and 8 of up lie in turns, as their stream's rows do: 32 bytes in, 16 out.
struct Silu {
  const uint16_t* both;  // [tokens][2 INTER]
  uint16_t* out;         // [tokens][INTER]
  int pieces;            // tokens * INTER / 8
};
__global__ void __launch_bounds__(PROMPT_THREADS) silu_kernel(const __grid_constant__ Silu s) {
  const int i = blockIdx.x * PROMPT_THREADS + threadIdx.x;
  if (i >= s.pieces) return;
  const uint4* in = (const uint4*)s.both + (size_t)i * 2;
  float gate[8], up[8];
  widen8(in[0], gate), widen8(in[1], up);
#pragma unroll
  for (int e = 0; e < 8; e++) gate[e] = gate[e] / (1.f + __expf(-gate[e])) * up[e];
  ((uint4*)s.out)[i] = narrow8(gate);
}
