// What CUDA C++ has no word for: PTX, a line each. tests/emulator/ has the same functions for a CPU, so that the kernels
// that call them run without a GPU.
#include <cuda_fp16.h>
#include <cuda_bf16.h>

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;

#define SHARED_MEMORY(name) extern __shared__ __align__(128) uint8_t name[]

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(uint64_t* b, int n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(n) : "memory"); }
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_expect(uint64_t* b, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory"); }
__device__ __forceinline__ void barrier_arrive(uint64_t* b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory"); }
__device__ __forceinline__ bool barrier_try(uint64_t* b, uint32_t parity) {
  uint32_t ok;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(ok) : "r"(shared_address(b)), "r"(parity) : "memory");
  return ok;
}
__device__ __forceinline__ void barrier_wait(uint64_t* b, uint32_t parity) { while (!barrier_try(b, parity)) {} }
__device__ __forceinline__ uint64_t evict_first() { uint64_t p; asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p)); return p; }
// What was there before. Whoever counts sees what those before it had stored in shared memory, themselves or their warps.
__device__ __forceinline__ uint32_t count_one(uint32_t* p) { uint32_t v; asm volatile("atom.acq_rel.cta.shared::cta.add.u32 %0, [%1], 1;" : "=r"(v) : "r"(shared_address(p)) : "memory"); return v; }
__device__ __forceinline__ uint64_t evict_last() { uint64_t p; asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(p)); return p; }
// What other kernels stored is to be seen by the copy engine, which is a proxy of its own
__device__ __forceinline__ void before_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
// The same of shared memory, by every lane: what it has read of a stage has arrived before the copy that overwrites the stage.
// Nothing else says so: ptxas issues all reads before the release, but moves the mma that wait for them behind it.
__device__ __forceinline__ void before_overwriting() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier, uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy) : "memory");
}
// Loads of what an earlier kernel wrote. __ldcg is no volatile asm in CUDA's headers: a compiler may move it above the
// wait; these stay where they are.
__device__ __forceinline__ uint4 load_dependent(const uint4* p) { uint4 v; asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ float4 load_dependent(const float4* p) { float4 v; asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ float load_dependent(const float* p) { float v; asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ uint32_t load_dependent(const uint32_t* p) { uint32_t v; asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ uint16_t load_dependent(const uint16_t* p) { uint16_t v; asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ uint64_t load_dependent(const uint64_t* p) { uint64_t v; asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ uint32_t clock_now() { uint32_t v; asm volatile("mov.u32 %0, %%clock;" : "=r"(v) :: "memory"); return v; }
// An address as a value of its own, that is computed here: ptxas else computes it anew for every load behind a wait
template <class T> __device__ __forceinline__ T* computed(T* p) { asm volatile("" : "+l"(p)); return p; }
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
template <int THREADS_> __device__ __forceinline__ void sync_some() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS_) : "memory"); }
// Volatile: their loads must not be moved behind the release of a stage that follows, or the copy engine overwrites what
// they read (seen: wrong sums).
#define MMA(NAME, TYPE)                                                                                                    \
  __device__ __forceinline__ void NAME(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));  \
  }
MMA(mma_f16, "f16")
MMA(mma_bf16, "bf16")
#undef MMA
// Operand A: 16 x 32 bytes, unsigned or signed; operand B: 32 x 8 signed bytes; sums of 32 bits
#define MMA(NAME, TYPE)                                                                                                    \
  __device__ __forceinline__ void NAME(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." TYPE ".s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" \
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));  \
  }
MMA(mma_u8, "u8")
MMA(mma_s8, "s8")
#undef MMA
__device__ __forceinline__ uint32_t warp_max(uint32_t v) { uint32_t r; asm volatile("redux.sync.max.u32 %0, %1, -1;" : "=r"(r) : "r"(v)); return r; }
__device__ __forceinline__ int warp_sum(int v) { int r; asm volatile("redux.sync.add.s32 %0, %1, -1;" : "=r"(r) : "r"(v)); return r; }
__device__ __forceinline__ uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t pick) {  // bytes 0 to 3 are a's, 4 to 7 b's; + 8: of that byte the sign, eight times
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(pick));
  return r;
}
__device__ __forceinline__ uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {  // a where the mask is 1; one LOP3 and not two
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(r) : "r"(mask), "r"(a), "r"(b));
  return r;
}
// In a register of its own, by a shuffle of which ptxas does not know what it gives: a constant is else copied anew, from a
// uniform register, for every prmt (SASS: an IMAD.U32 each)
__device__ __forceinline__ uint32_t in_register(uint32_t v) {
  uint32_t r;
  asm volatile("shfl.sync.idx.b32 %0, %1, 0, 31, -1;" : "=r"(r) : "r"(v));
  return r;
}
__device__ __forceinline__ uint32_t e4m3_to_halves(uint32_t w, int high) {  // two e4m3 -> two halves, exact
  uint32_t r;
  uint16_t two = high ? (uint16_t)(w >> 16) : (uint16_t)w;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(two));
  return r;
}
__device__ __forceinline__ uint32_t floats_to_e4m3(float low, float high) {  // two codes; beyond 448: 448
  uint16_t r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ uint32_t subtract_halves(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ void copy_ahead(void* to, const void* from, bool there) {  // 16 bytes; zeros if nothing is there
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
// Orders no memory: what peers are to find is a barrier made ready. With a release it is a MEMBAR.ALL.GPU.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// For what blocks of the cluster have sent: they are beyond what the other wait speaks of
__device__ __forceinline__ void barrier_wait_for_peers(uint64_t* b, uint32_t parity) {
  uint32_t ok;
  do asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(ok) : "r"(shared_address(b)), "r"(parity) : "memory");
  while (!ok);
}
// To the same address in a block of the cluster, whose barrier at the same address counts the bytes when they are there
__device__ __forceinline__ void send_peer(float4* own, int rank, const float4& v, uint64_t* barrier) {
  asm volatile("{ .reg .u32 a, b; mapa.shared::cluster.u32 a, %0, %2; mapa.shared::cluster.u32 b, %1, %2;"
               " st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [a], {%3, %4, %5, %6}, [b]; }"
               ::"r"(shared_address(own)), "r"(shared_address(barrier)), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ __forceinline__ void send_peer(float2* own, int rank, const float2& v, uint64_t* barrier) {
  asm volatile("{ .reg .u32 a, b; mapa.shared::cluster.u32 a, %0, %2; mapa.shared::cluster.u32 b, %1, %2;"
               " st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [a], {%3, %4}, [b]; }"
               ::"r"(shared_address(own)), "r"(shared_address(barrier)), "r"(rank), "f"(v.x), "f"(v.y) : "memory");
}
// Four 8x8 matrices of 16 bits; lanes 8 i to 8 i + 7 name the rows of matrix i
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t v) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}
