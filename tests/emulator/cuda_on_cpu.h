// CUDA kernels on a CPU, to see what they compute where no GPU is: a block's threads are fibers, run in turns; barriers,
// shuffles, matrix instructions and asynchronous copies are written out. It knows no timing and, but for copies that are
// not waited for, no races: it proves addresses, layouts and arithmetic. x86-64, GCC or Clang.
//
// Takes the place of lowbit/kernels/cuda/ptx.cu; the kernels that follow are the GPU's own source text.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __grid_constant__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define SHARED_MEMORY(name) uint8_t* const name = emulator::self->block->shared

using std::max;
using std::min;

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct Dim { int x, y, z; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// ---------------------------------------------------------------------------------------------- fibers
namespace emulator {
[[noreturn]] inline void fail(const char* what) { std::fprintf(stderr, "emulated kernel: %s\n", what); std::abort(); }

struct Barrier { int arrived = 0; unsigned generation = 0; };
struct Warp { Barrier barrier; uint8_t slots[2][32][32]; };
struct Block {
  Dim index, grid, threads;
  int rank = 0, live = 0;
  uint8_t* shared = nullptr;
  size_t shared_bytes = 0;
  Barrier all, some;
  std::vector<Warp> warps;
  struct Cluster* cluster = nullptr;
};
struct Cluster { std::vector<Block> blocks; Barrier barrier; int live = 0; };
struct Copy { void* to; const void* from; int bytes; };
struct Fiber {
  void* stack_pointer = nullptr;
  Block* block = nullptr;
  Dim thread{};
  int parity = 0;
  bool done = false, reading = false;  // reading: since it waited at an mbarrier, with no fence between the proxies
  std::vector<Copy> open;                 // copies since the last commit
  std::vector<std::vector<Copy>> groups;  // committed, not yet waited for
};
inline Fiber* self = nullptr;
inline void* scheduler = nullptr;
inline void (*body)(const void*) = nullptr;
inline const void* argument = nullptr;

extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
inline void yield() { emulator_switch(&self->stack_pointer, scheduler); }
inline void run_body() {
  body(argument);
  self->done = true, self->block->live--, self->block->cluster->live--;
  yield();
  fail("a thread went on after its end");
}
// Until as many as `needed` says have arrived; those that have ended are not waited for.
template <class Needed> inline void wait_at(Barrier& b, Needed needed) {
  const unsigned mine = b.generation;
  b.arrived++;
  while (b.generation == mine) {
    if (b.arrived >= needed()) { b.arrived = 0, b.generation++; return; }
    yield();
  }
}
inline int thread_in_block() { return self->thread.x; }
inline Warp& warp() { return self->block->warps[thread_in_block() / 32]; }
inline int lane() { return thread_in_block() % 32; }
// Every lane of the warp gives `bytes`; all see what the 32 gave. Two sets of slots in turn: one may still be read.
inline uint8_t (&exchange(const void* mine, size_t bytes))[32][32] {
  Warp& w = warp();
  auto& slots = w.slots[self->parity];
  self->parity ^= 1;
  std::memcpy(slots[lane()], mine, bytes);
  wait_at(w.barrier, [] { return 32; });
  return slots;
}
template <class T> inline T from_lane(T value, int other) {
  auto& slots = exchange(&value, sizeof(T));
  std::memcpy(&value, slots[other], sizeof(T));
  return value;
}
inline void check_shared(const void* p, size_t bytes, size_t align) {
  const uint8_t* at = (const uint8_t*)p;
  const Block& b = *self->block;
  if (at < b.shared || at + bytes > b.shared + b.shared_bytes) fail("an access outside of the block's shared memory");
  if ((uintptr_t)p % align) fail("a misaligned access to shared memory");
}
inline void land(const std::vector<Copy>& copies) {
  for (const Copy& c : copies) c.from ? (void)std::memcpy(c.to, c.from, c.bytes) : (void)std::memset(c.to, 0, c.bytes);
}

inline void run_cluster(Cluster& cluster, int threads) {
  constexpr size_t STACK = (64 << 10) + 17 * 64;  // no power of 2: the tops would share one set of the cache
  static uint8_t* stacks = nullptr;
  static size_t room = 0;
  const size_t count = cluster.blocks.size() * threads;
  if (room < count) std::free(stacks), stacks = (uint8_t*)std::malloc(count * STACK), room = count;  // untouched: no memory
  if (!stacks) fail("no memory for the fibers' stacks");
  std::vector<Fiber> fibers(count);
  for (size_t i = 0; i < count; i++) {
    Fiber& f = fibers[i];
    f.block = &cluster.blocks[i / threads], f.thread = {(int)(i % threads), 0, 0};
    void** top = (void**)((uintptr_t)(stacks + (i + 1) * STACK) & ~(uintptr_t)15);
    *--top = nullptr, *--top = (void*)run_body;
    for (int r = 0; r < 6; r++) *--top = nullptr;
    f.stack_pointer = top;
  }
  for (size_t left = count, idle = 0; left;) {
    for (Fiber& f : fibers) {
      if (f.done) continue;
      self = &f;
      emulator_switch(&scheduler, f.stack_pointer);
      if (f.done) left--, idle = 0;
    }
    if (++idle > 20000000) fail("nothing goes on: a barrier that is never completed");
  }
}
// Blocks of a cluster run together, clusters one after another.
inline void launch(void (*kernel)(const void*), const void* with, int grid_x, int grid_y, int cluster_y, int threads, size_t shared) {
  body = kernel, argument = with;
  std::vector<uint8_t> memory((shared + 256) * cluster_y);
  for (int x = 0; x < grid_x; x++)
    for (int y = 0; y < grid_y; y += cluster_y) {
      Cluster cluster;
      cluster.blocks.resize(cluster_y), cluster.live = cluster_y * threads;
      std::memset(memory.data(), 0xff, memory.size());  // NaN: what is read must have been written
      for (int r = 0; r < cluster_y; r++) {
        Block& b = cluster.blocks[r];
        b.index = {x, y + r, 0}, b.grid = {grid_x, grid_y, 1}, b.threads = {threads, 1, 1}, b.rank = r, b.live = threads;
        b.shared = (uint8_t*)(((uintptr_t)memory.data() + 127) & ~(uintptr_t)127) + r * ((shared + 127) & ~(size_t)127);
        b.shared_bytes = shared, b.warps.resize((threads + 31) / 32), b.cluster = &cluster;
      }
      run_cluster(cluster, threads);
    }
}
}  // namespace emulator

#define threadIdx (emulator::self->thread)
#define blockIdx (emulator::self->block->index)
#define gridDim (emulator::self->block->grid)
#define blockDim (emulator::self->block->threads)

// ---------------------------------------------------------------------------------------------- CUDA's own words
inline void __syncthreads() { emulator::wait_at(emulator::self->block->all, [] { return emulator::self->block->live; }); }
inline void __syncwarp() { emulator::wait_at(emulator::warp().barrier, [] { return 32; }); }
inline void __threadfence() {}
template <class T> inline T __shfl_xor_sync(unsigned, T v, int d) { return emulator::from_lane(v, emulator::lane() ^ d); }
template <class T> inline T __shfl_sync(unsigned, T v, int from) { return emulator::from_lane(v, from & 31); }
inline int __any_sync(unsigned, int p) {
  auto& slots = emulator::exchange(&p, sizeof p);
  bool any = false;
  for (int i = 0; i < 32; i++) { int v; std::memcpy(&v, slots[i], sizeof v); any |= v != 0; }
  return any;
}
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
inline uint32_t atomicAdd(uint32_t* p, uint32_t v) { const uint32_t old = *p; *p += v; return old; }
inline uint64_t atomicMax(uint64_t* p, uint64_t v) { const uint64_t old = *p; *p = max(old, v); return old; }
inline uint32_t __float_as_uint(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
inline int __float_as_int(float f) { return (int)__float_as_uint(f); }
inline float __uint_as_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline float __int_as_float(int i) { return __uint_as_float((uint32_t)i); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
inline float __expf(float v) { return std::exp(v); }

struct __half { uint16_t bits; };
struct __half2 { __half x, y; };
struct __nv_bfloat16 { uint16_t bits; };
namespace emulator {
inline float widen(uint16_t h) {  // IEEE 754 binary16
  const int e = h >> 10 & 31, m = h & 1023;
  const float v = e == 31 ? (m ? NAN : INFINITY) : e ? std::ldexp((float)(m | 1024), e - 25) : std::ldexp((float)m, -24);
  return h & 0x8000 ? -v : v;
}
inline float half_value(uint16_t h) {
  static const std::vector<float> table = [] { std::vector<float> t(65536); for (int i = 0; i < 65536; i++) t[i] = widen((uint16_t)i); return t; }();
  return table[h];
}
inline uint16_t half_bits(float f) {  // rounds to nearest, ties to even
  const uint16_t sign = __float_as_uint(f) >> 16 & 0x8000;
  const float a = std::fabs(f);
  if (std::isnan(f)) return 0x7fff;
  if (a >= 65520.f) return sign | 0x7c00;
  if (a < 6.103515625e-05f) return sign | (uint16_t)std::nearbyint(std::ldexp(a, 24));
  const uint32_t u = __float_as_uint(a) - (112u << 23);
  return sign | (uint16_t)((u + 0xfff + (u >> 13 & 1)) >> 13);
}
inline uint16_t bf16_bits(float f) {
  const uint32_t u = __float_as_uint(f);
  return std::isnan(f) ? 0x7fff : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
}  // namespace emulator
inline __half __float2half_rn(float f) { return {emulator::half_bits(f)}; }
inline float __half2float(__half h) { return emulator::half_value(h.bits); }
inline __half __ushort_as_half(uint16_t u) { return {u}; }
inline uint16_t __half_as_ushort(__half h) { return h.bits; }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline float __low2float(__half2 h) { return __half2float(h.x); }
inline float __high2float(__half2 h) { return __half2float(h.y); }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __nv_bfloat16 __float2bfloat16(float f) { return {emulator::bf16_bits(f)}; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }

// ---------------------------------------------------------------------------------------------- ptx.cu's functions
struct MBarrier { uint16_t count, pending; int32_t state; };  // state: bytes under way · 2 + phase
static_assert(sizeof(MBarrier) == 8, "as large as the GPU's");
inline void barrier_turn(MBarrier* b) {
  if (b->pending == 0 && b->state >> 1 == 0) b->state ^= 1, b->pending = b->count;
}
inline void barrier_init(uint64_t* p, int n) { emulator::check_shared(p, 8, 8); *(MBarrier*)p = {(uint16_t)n, (uint16_t)n, 0}; }
inline void barriers_ready() {}
inline void barrier_count(uint64_t* p) {
  MBarrier* b = (MBarrier*)p;
  if (b->pending-- == 0) emulator::fail("an mbarrier got more arrivals than it counts");
  barrier_turn(b);
}
inline void barrier_arrive(uint64_t* p) {
  if (emulator::self->reading) emulator::fail("a stage is released with no fence between the proxies since it was waited for");
  barrier_count(p);
}
inline void barrier_expect(uint64_t* p, int bytes) { ((MBarrier*)p)->state += bytes * 2; barrier_count(p); }
inline bool barrier_try(uint64_t* p, uint32_t parity) {
  if ((uint32_t)(((MBarrier*)p)->state & 1) != parity) return true;
  emulator::yield();
  return false;
}
inline void barrier_wait(uint64_t* b, uint32_t parity) { while (!barrier_try(b, parity)) {} emulator::self->reading = true; }
inline uint64_t evict_first() { return 0; }
inline uint64_t evict_last() { return 0; }
inline void before_copies() {}
inline void before_overwriting() { emulator::self->reading = false; }
inline uint32_t count_one(uint32_t* p) { emulator::check_shared(p, 4, 4); return (*p)++; }
inline void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier, uint64_t) {
  emulator::check_shared(to, bytes, 16);
  if ((uintptr_t)from % 16 || bytes % 16) emulator::fail("a bulk copy whose source or size is no multiple of 16");
  std::memcpy(to, from, bytes);
  ((MBarrier*)barrier)->state -= bytes * 2;
  barrier_turn((MBarrier*)barrier);
}
template <class T> inline T load_dependent(const T* p) { return *p; }
inline uint32_t clock_now() { static uint32_t now = 0; return now += 64; }
template <class T> inline T* computed(T* p) { return p; }
inline void wait_for_previous() {}
inline void let_next_start() {}
template <int N> inline void sync_some() { emulator::wait_at(emulator::self->block->some, [] { return N; }); }

inline void copy_ahead(void* to, const void* from, bool there) {
  emulator::check_shared(to, 16, 16);
  emulator::self->open.push_back({to, there ? from : nullptr, 16});
}
inline void close_copies() { emulator::self->groups.push_back(std::move(emulator::self->open)); emulator::self->open.clear(); }
template <int LEFT> inline void wait_copies() {  // what was not waited for has not arrived
  auto& groups = emulator::self->groups;
  while (groups.size() > (size_t)LEFT) emulator::land(groups.front()), groups.erase(groups.begin());
}
inline void cluster_arrive() {}  // a wait is both, which no thread passes before all have arrived
inline void cluster_wait() {
  emulator::wait_at(emulator::self->block->cluster->barrier, [] { return emulator::self->block->cluster->live; });
}
inline void barrier_wait_for_peers(uint64_t* b, uint32_t parity) { while (!barrier_try(b, parity)) {} }
template <class T> inline void send_peer(T* own, int rank, const T& v, uint64_t* barrier) {
  emulator::Block& b = *emulator::self->block;
  emulator::check_shared(own, sizeof v, sizeof v), emulator::check_shared(barrier, 8, 8);
  auto theirs = [&](const void* p) { return b.cluster->blocks[rank].shared + ((const uint8_t*)p - b.shared); };
  MBarrier* counts = (MBarrier*)theirs(barrier);
  std::memcpy(theirs(own), &v, sizeof v);
  counts->state -= (int)sizeof v * 2;
  if (counts->state < 0) emulator::fail("an mbarrier got more bytes than it expects");
  barrier_turn(counts);
}

// Fragments as the PTX ISA lays them out (mma.m16n8k16, ldmatrix, movmatrix): lane = 4 · row + column pair.
inline void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed) {
  emulator::check_shared(row, 16, 16);
  auto& slots = emulator::exchange(&row, sizeof row);
  const int g = emulator::lane() / 4, q = emulator::lane() % 4;
  for (int i = 0; i < 4; i++) {
    uint16_t two[2];
    for (int e = 0; e < 2; e++) {
      const uint16_t* line;
      std::memcpy(&line, slots[i * 8 + (transposed ? q * 2 + e : g)], sizeof line);
      two[e] = line[transposed ? g : q * 2 + e];
    }
    r[i] = two[0] | (uint32_t)two[1] << 16;
  }
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { ldmatrix(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { ldmatrix(r, row, true); }
inline uint32_t transpose_matrix(uint32_t v) {
  auto& slots = emulator::exchange(&v, sizeof v);
  const int g = emulator::lane() / 4, q = emulator::lane() % 4;
  uint16_t two[2];
  for (int e = 0; e < 2; e++) std::memcpy(&two[e], slots[(q * 2 + e) * 4 + g / 2] + g % 2 * 2, 2);
  return two[0] | (uint32_t)two[1] << 16;
}
template <float (*VALUE)(uint16_t)>
inline void mma_any(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
  auto& slots = emulator::exchange(mine, sizeof mine);
  const int g = emulator::lane() / 4, q = emulator::lane() % 4;
  for (int i = 0; i < 4; i++) {
    const int row = g + i / 2 * 8, column = q * 2 + i % 2;
    float sum = 0.f;
    for (int k = 0; k < 16; k++) {
      uint16_t a, b;
      std::memcpy(&a, slots[row % 8 * 4 + k % 8 / 2] + (row / 8 + 2 * (k / 8)) * 4 + k % 2 * 2, 2);
      std::memcpy(&b, slots[column * 4 + k % 8 / 2] + (4 + k / 8) * 4 + k % 2 * 2, 2);
      sum += VALUE(a) * VALUE(b);
    }
    c[i] += sum;
  }
}
namespace emulator { inline float bf16_value(uint16_t b) { return __uint_as_float((uint32_t)b << 16); } }
inline void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) { mma_any<emulator::half_value>(c, a0, a1, a2, a3, b0, b1); }
inline void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) { mma_any<emulator::bf16_value>(c, a0, a1, a2, a3, b0, b1); }
template <class A>
inline void mma_bytes(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {  // m16n8k32
  const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
  auto& slots = emulator::exchange(mine, sizeof mine);
  const int g = emulator::lane() / 4, q = emulator::lane() % 4;
  for (int i = 0; i < 4; i++) {
    const int row = g + i / 2 * 8, column = q * 2 + i % 2;
    for (int k = 0; k < 32; k++) {
      A a;
      int8_t b;
      std::memcpy(&a, slots[row % 8 * 4 + k % 16 / 4] + (row / 8 + 2 * (k / 16)) * 4 + k % 4, 1);
      std::memcpy(&b, slots[column * 4 + k % 16 / 4] + (4 + k / 16) * 4 + k % 4, 1);
      c[i] += (int)a * (int)b;
    }
  }
}
inline void mma_u8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) { mma_bytes<uint8_t>(c, a0, a1, a2, a3, b0, b1); }
inline void mma_s8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) { mma_bytes<int8_t>(c, a0, a1, a2, a3, b0, b1); }
template <class T, class Join> inline T over_warp(T v, Join join) {
  auto& slots = emulator::exchange(&v, sizeof v);
  for (int i = 0; i < 32; i++) {
    T other;
    std::memcpy(&other, slots[i], sizeof other);
    v = i ? join(v, other) : other;
  }
  return v;
}
inline uint32_t warp_max(uint32_t v) { return over_warp(v, [](uint32_t a, uint32_t b) { return max(a, b); }); }
inline int warp_sum(int v) { return over_warp(v, [](int a, int b) { return a + b; }); }
inline uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t pick) {
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t from = pick >> (4 * i) & 15, byte = ((from & 4 ? b : a) >> (8 * (from & 3))) & 255;
    r |= (from & 8 ? (byte & 128 ? 255 : 0) : byte) << (8 * i);  // bit 3: its sign, eight times
  }
  return r;
}
inline uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) { return (a & mask) | (b & ~mask); }
inline uint32_t in_register(uint32_t v) { return v; }
inline uint32_t e4m3_to_halves(uint32_t w, int high) {
  uint32_t r = 0;
  for (int i = 0; i < 2; i++) {
    const uint32_t b = w >> (16 * high + 8 * i) & 255, e = b >> 3 & 15, m = b & 7;
    const float v = (b & 127) == 127 ? NAN : e ? std::ldexp((float)(m | 8), (int)e - 10) : std::ldexp((float)m, -9);
    r |= (uint32_t)emulator::half_bits(b & 128 ? -v : v) << (16 * i);
  }
  return r;
}
inline uint32_t floats_to_e4m3(float low, float high) {  // rounds to nearest, ties to even
  uint32_t r = 0;
  const float both[2] = {low, high};
  for (int i = 0; i < 2; i++) {
    const float a = min(std::fabs(both[i]), 448.f);
    int e;
    std::frexp(a, &e);  // a < 2^e
    const float step = std::ldexp(1.f, max(e - 1, -6) - 3);
    const float n = std::nearbyint(a / step);  // of steps: 0 to 16
    const int exponent = max(e - 1, -6) + 7;   // biased; 1 is also that of what is below 2^-6
    const uint32_t code = n < 8 ? (uint32_t)n : ((uint32_t)exponent << 3) + (uint32_t)n - 8;
    r |= (std::isnan(both[i]) ? 0x7fu : code | (std::signbit(both[i]) ? 0x80u : 0)) << (8 * i);
  }
  return r;
}
inline uint32_t subtract_halves(uint32_t a, uint32_t b) {
  uint32_t r = 0;
  for (int i = 0; i < 32; i += 16)
    r |= (uint32_t)emulator::half_bits(emulator::half_value((uint16_t)(a >> i)) - emulator::half_value((uint16_t)(b >> i))) << i;
  return r;
}
