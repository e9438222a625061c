// ---------------------------------------------------------------------------------------------- 2 to 8 sequences
// The same streams, the same ring, BATCH columns of x instead of one: an mma has 8, so that weights are unpacked once for
// all sequences, and a step reads them once. What is different from product.cu:
//
//   x         8 sequences take 16 bytes per column, 64 KB at K = 4096: every block norming and cutting them into digits
//             would take longer than its weights. normalize_kernel does it once, with a block per sequence, and lays them
//             out as the blocks want them; those fetch them with the copy engine.
//   K         o and down read 16-bit activations and cut K into slices: a block takes a slice of K for more tiles, so that
//             it stages a quarter of x (all of it would not fit at K = 14336). Their sums are parts of the residual, which
//             the normalize_kernel that follows adds, in the order of the slices: the bits repeat.
//   sums      of a tile lie in shared memory by stage; the warp whose stage is the last to be done adds them up, in the
//             order of the stages, and finishes the tile. No barrier of the block: warps are never made to wait.
//
// x of n columns: [n / 64][2][BATCH][64 bytes]; the two are digits (INTEGER), blocks of 32 columns (bf16), or the first and
// second 8 of each 16 columns (fp8). A warp then reads 512 neighbouring bytes for an operand B. INTEGER: behind it lie
// [n / SUM_COLUMNS][COLUMNS] (scale of x, sum of x).
enum { PARTS = 4 };                                 // an epilogue: this slice's part of the residual
constexpr int COLUMNS = (BATCH + 1) / 2 * 2;        // of an mma's 8 that are kept; lanes hold two
constexpr int OWN = COLUMNS / 2;                    // sums of a row that a lane finishes
constexpr int SUMS = 16 * COLUMNS;                  // of a stage: [16 rows][COLUMNS]
constexpr int PLANE = BATCH * 64;                   // bytes
static_assert(BATCH >= 2 && BATCH <= 8, "an mma has 8 columns");
__device__ constexpr int x_bytes(int n) { return 2 * n * BATCH + (INTEGER ? n / SUM_COLUMNS * COLUMNS * 8 : 0); }
// lowbit/kernels/batch.py says the same
__device__ constexpr int slices(int chunks) { return chunks % 4 == 0 ? 4 : chunks % 2 == 0 ? 2 : chunks >= 12 ? 4 : 1; }

// 8 values from column k on of one sequence, by each of 32 lanes; 16 neighbours hold a group. `x` has n columns; what is not
// `kept` is not stored.
__device__ __forceinline__ void put_x(uint8_t* x, int n, int sequence, int k, const float (&v)[8], bool kept = true) {
  const int at = k / 64 * 2 * PLANE + sequence * 64;
  if constexpr (INTEGER) {
    uint32_t high[2], low[2];
    float scale;
    int sum;
    to_digits(v, high, low, scale, sum);
    if (kept) *(uint2*)(x + at + place_of(k) % 64) = make_uint2(high[0], high[1]);
    if (kept) *(uint2*)(x + at + PLANE + place_of(k) % 64) = make_uint2(low[0], low[1]);
    sum = sum_of_columns(sum);
    if (kept && k % SUM_COLUMNS == 0) ((float2*)(x + 2 * n * BATCH))[k / SUM_COLUMNS * COLUMNS + sequence] = make_float2(scale, scale * (float)sum);
  } else {
    uint32_t o[4];
#pragma unroll
    for (int i = 0; i < 4; i++) o[i] = (uint32_t)to16(v[2 * i]) | ((uint32_t)to16(v[2 * i + 1]) << 16);
    const int to = FORMAT == BF16 ? k % 64 / 32 * PLANE + k % 32 * 2 : k / 8 % 2 * PLANE + k % 64 / 16 * 16;
    if (kept) *(uint4*)(x + at + to) = make_uint4(o[0], o[1], o[2], o[3]);
  }
}

// ---------------------------------------------------------------------------------------------- x of a norm
struct Normalize {
  float* residual;        // [BATCH][HIDDEN]
  const float* parts;     // [SLICES][BATCH][HIDDEN], added to it first
  const uint16_t* norm;   // RMSNorm weight, 16 bits
  uint8_t* x;             // x_bytes(HIDDEN)
};
constexpr int NORM_THREADS = 512;
// (.., 1): else ptxas saves registers, and takes what is to be added in three turns, each a way to L2
template <int SLICES> __global__ void __launch_bounds__(NORM_THREADS, 1) normalize_kernel(const __grid_constant__ Normalize n) {
  SHARED_MEMORY(memory);
  constexpr int EACH = (HIDDEN / 8 + NORM_THREADS - 1) / NORM_THREADS;  // 8 values each
  const int t = threadIdx.x, sequence = blockIdx.x;
  uint4 weight[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) if (i * NORM_THREADS + t < HIDDEN / 8) weight[i] = __ldg((const uint4*)n.norm + i * NORM_THREADS + t);
  wait_for_previous();
  if (t == 0) let_next_start();
  float v[EACH][8] = {}, squares = 0.f;
#pragma unroll
  for (int i = 0; i < EACH; i++) if (i * NORM_THREADS + t < HIDDEN / 8) {
    const size_t at = (size_t)sequence * HIDDEN + (i * NORM_THREADS + t) * 8;
    float4 low[SLICES + 1], high[SLICES + 1];
#pragma unroll
    for (int s = 0; s <= SLICES; s++) {  // all on their way at once
      const float4* from = (const float4*)(s ? n.parts + (size_t)(s - 1) * BATCH * HIDDEN + at : n.residual + at);
      low[s] = load_dependent(from), high[s] = load_dependent(from + 1);
    }
#pragma unroll
    for (int s = 0; s <= SLICES; s++) {
      v[i][0] += low[s].x, v[i][1] += low[s].y, v[i][2] += low[s].z, v[i][3] += low[s].w;
      v[i][4] += high[s].x, v[i][5] += high[s].y, v[i][6] += high[s].z, v[i][7] += high[s].w;
    }
    if constexpr (SLICES > 0) {
      low[0].x = v[i][0], low[0].y = v[i][1], low[0].z = v[i][2], low[0].w = v[i][3];
      high[0].x = v[i][4], high[0].y = v[i][5], high[0].z = v[i][6], high[0].w = v[i][7];
      ((float4*)(n.residual + at))[0] = low[0], ((float4*)(n.residual + at))[1] = high[0];
    }
  }
#pragma unroll
  for (int i = 0; i < EACH * 8; i++) squares += v[i >> 3][i & 7] * v[i >> 3][i & 7];
#pragma unroll
  for (int d = 16; d >= 1; d >>= 1) squares += __shfl_xor_sync(~0u, squares, d);
  float* of_warps = (float*)memory;
  if ((t & 31) == 0) of_warps[t >> 5] = squares;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < NORM_THREADS / 32; i++) total += of_warps[i];
  const float r = rsqrtf(total / HIDDEN + EPS);
#pragma unroll
  for (int i = 0; i < EACH; i++) if (i * NORM_THREADS + t < HIDDEN / 8) {
    const uint32_t w[4] = {weight[i].x, weight[i].y, weight[i].z, weight[i].w};
#pragma unroll
    for (int j = 0; j < 4; j++) { const float2 f = from16x2(w[j]); v[i][2 * j] *= r * f.x, v[i][2 * j + 1] *= r * f.y; }
    put_x(n.x, HIDDEN, sequence, (i * NORM_THREADS + t) * 8, v[i]);
  }
}
