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
//   * WARPS consumer warps take whole stages, each alone: 128-bit loads, an integer trick instead of a conversion, and
//     mma.m16n8k16 with the weights as operand A. Tensor cores do the multiplication and the sum over k; operand B is x.
//
// Dequantization. An integer q of up to 10 bits is or-ed into the mantissa of the half 1024.0 (0x6400): the half then is
// 1024 + q, exactly, at the price of one LOP3 for two weights. A 4-bit field that lies at bits 4 to 7 of its half is left
// there and reads 1024 + 16 q: the 16 is undone on the activation, which is multiplied by 1/16 (exact). The constant is
// taken out with sums of x per 128 columns: sum((1024 + q) x) - 1024 sum(x). Nothing is rounded but x, to fp16.
//
// PDL. A kernel triggers its dependents after its own wait, never before: an earlier trigger lets kernel N+2 start while
// N still runs, and gave different bits in 1 of 10 runs while every tolerance held (docs/kernels.md).
//
// Compiled by NVRTC (lowbit/kernels/nvrtc.py), which knows no host headers. Macros given on the command line:
// FORMAT, WIDEST, HIDDEN, INTER, HEADS, KV_HEADS, HEAD_DIM, EPS, WARPS.
#include <cuda_fp16.h>
#include <cuda_bf16.h>

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;

enum { BF16 = 0, INT8 = 1, INT4 = 2, INT2 = 3, TERNARY = 4, FP8 = 5 };
enum { TO_ACT = 0, ADD_RESIDUAL = 1, SILU_MUL = 2, TO_LOGITS = 3 };  // what a product's epilogue does

constexpr int CONSUMERS = WARPS * 32, THREADS = CONSUMERS + 32;  // and one producer warp
constexpr int QDIM = HEADS * HEAD_DIM, KVDIM = KV_HEADS * HEAD_DIM;
constexpr int GROUP = 128;       // columns that share a sum of x, and a scale in the grouped formats
constexpr int MAX_RING = 48;      // stages
constexpr int BATCH_TILES = 14;  // row tiles whose partial sums are in shared memory at once
constexpr bool GROUPED = FORMAT == INT4 || FORMAT == INT2;                        // fp16 scale and zero per group
constexpr bool ROW_SCALED = FORMAT == INT8 || FORMAT == TERNARY || FORMAT == FP8;  // fp32 scale per row
constexpr int BITS = FORMAT == BF16 ? 16 : (FORMAT == INT8 || FORMAT == FP8) ? 8 : FORMAT == INT4 ? 4 : 2;
// Of a matrix with K columns: columns of a stage, bytes of its codes, bytes with scales
__device__ constexpr int stage_columns(int k) { int ku = WIDEST; while (k % ku) ku /= 2; return ku; }
__device__ constexpr int code_bytes(int ku) { return 2 * ku * BITS; }
__device__ constexpr int stage_bytes(int ku) { return code_bytes(ku) + (GROUPED ? ku / GROUP * 64 : 0); }
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

// ---------------------------------------------------------------------------------------------- PTX, one line each
__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(uint64_t* b, int n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(n) : "memory"); }
__device__ __forceinline__ void barrier_expect(uint64_t* b, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory"); }
__device__ __forceinline__ void barrier_arrive(uint64_t* b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory"); }
__device__ __forceinline__ bool barrier_try(uint64_t* b, uint32_t parity) {
  uint32_t ok;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(ok) : "r"(shared_address(b)), "r"(parity) : "memory");
  return ok;
}
__device__ __forceinline__ void barrier_wait(uint64_t* b, uint32_t parity) { while (!barrier_try(b, parity)) {} }
__device__ __forceinline__ uint64_t evict_first() { uint64_t p; asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p)); return p; }
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier, uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy) : "memory");
}
// Loads of what an earlier kernel wrote. __ldcg is no volatile asm in CUDA's headers: a compiler may move it above the
// wait; these stay where they are.
__device__ __forceinline__ uint4 load_dependent(const uint4* p) { uint4 v; asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ float4 load_dependent(const float4* p) { float4 v; asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ float load_dependent(const float* p) { float v; asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ uint16_t load_dependent(const uint16_t* p) { uint16_t v; asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ uint64_t load_dependent(const uint64_t* p) { uint64_t v; asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void sync_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }
// Volatile: the release of a stage that follows must not be issued before its weights are in registers, or the copy
// engine overwrites them (seen: wrong sums).
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (FORMAT == BF16)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <uint32_t MASK> __device__ __forceinline__ uint32_t field(uint32_t w) {  // (w & MASK) | two halves 1024.0
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(w), "n"(MASK), "n"(0x64006400));
  return r;
}
__device__ __forceinline__ uint32_t bytes_to_halves(uint32_t w, uint32_t pick) {  // bytes q -> halves 1024 + q
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(w), "r"(0x64646464u), "r"(pick));
  return r;
}
__device__ __forceinline__ uint32_t e4m3_to_halves(uint32_t w, int high) {  // two e4m3 -> two halves, exact
  uint32_t r;
  uint16_t two = high ? (uint16_t)(w >> 16) : (uint16_t)w;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(two));
  return r;
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

