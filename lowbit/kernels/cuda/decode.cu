// ---------------------------------------------------------------------------------------------- what a stage holds
// Integer formats, and e2m1 (mxfp4, nvfp4), as a lane of a warp finds them in a stage (lowbit/kernels/stream_order.py writes
// them so): codes as bytes of operand A of mma.m16n8k32, scales as floats. For one vector (product.cu) and for several.
//
// A lane holds rows g and g + 8 (g = lane / 4) and, of every 64 columns, 16: those from quarter * 16 on, which are 8 of each
// of the two mma that take them. Where 32 columns share a scale (WGROUP 32) they are 8 from quarter * 8 on and the 8 that
// lie 32 further: an mma's columns then have one scale. x lies in that order (place_of).
//
// Nothing is shifted that a mask can leave in place: a field that does not lie at the lowest bits of its byte is worth more,
// which the sum undoes (WORTH). 3 bits are a 2-bit and a 1-bit plane, 3/8 byte a weight: of a group's first 64 columns the
// low two bits lie in the first plane, of its second 64 the high two, so that one LOP3 joins the third at the right place.
// e2m1 codes choose bytes of a table: prmt reads 3 bits of a code, and its 4th, the sign, makes the byte 0 or 0xff by the
// table's own sign. Twice the value of a code is what two tables give together, one asked with the code, one with its sign
// turned: magnitude + 1 (negative: 0), and minus the magnitude (positive: -1, but for 0).
struct Words { uint4 a, b; };          // of a lane, for 64 columns; b: row g + 8 (8 bits) or the plane of third bits
struct Rows { uint32_t low, high; };   // 4 columns of row g and of row g + 8

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
__device__ __forceinline__ constexpr int place_of(int k) { return SPLIT ? (k & ~63) | (k >> 3 & 3) << 4 | (k >> 5 & 1) << 3 : k; }  // k in whole eights
// Over SUM_COLUMNS columns, of which 32 lanes hold 8 each, one after the other
__device__ __forceinline__ int sum_of_columns(int sum) {
  return over_lanes<SUM_COLUMNS / 8>(sum, [](int a, int b) { return a + b; }, warp_sum);
}
// The lane's words of the first or second 64 columns of a group of 128; `lane_words` is the stage plus the lane.
template <int KU> __device__ __forceinline__ Words words_at(const uint4* lane_words, int group, int half) {
  Words w;
  if constexpr (BITS == 8) w.a = lane_words[(group * 4 + half * 2) * 32], w.b = lane_words[(group * 4 + half * 2 + 1) * 32];
  else if constexpr (BITS == 4) w.a = lane_words[(group * 2 + half) * 32];
  else if constexpr (BITS == 1) w.a = lane_words[group / 2 * 32];
  else {
    w.a = lane_words[group * 32];
    if constexpr (BITS == 3) w.b = lane_words[(KU / GROUP + group / 2) * 32];
  }
  return w;
}
// Bytes that e2m1's codes 0 to 3 and 4 to 7 choose: of positive values, and, their signs turned, of negative ones
struct Tables { uint32_t positive[2], negative[2]; };
__device__ __forceinline__ Tables tables() {
  Tables t = {};
  if constexpr (E2M1) t = {{in_register(0x04030200u), 0x0d090705u}, {in_register(0xfdfeff00u), 0xf4f8fafcu}};
  return t;
}
// Word i (0 to 3) of them as operand A; e2m1: the first of two.
__device__ __forceinline__ Rows rows_of(const Words& w, int i, int half, int group, const Tables& t) {
  constexpr uint32_t ONES = 0x01010101u;
  const uint32_t a = word_of(w.a, i);
  if constexpr (BITS == 8) return {a, word_of(w.b, i)};
  else if constexpr (E2M1) return {pick_bytes(t.positive[0], t.positive[1], a), pick_bytes(t.positive[0], t.positive[1], a >> 16)};
  else if constexpr (BITS == 4) return {a & 0xf * ONES, a & 0xf0 * ONES};
  else if constexpr (BITS == 2) return half ? Rows{a & 0x30 * ONES, a & 0xc0 * ONES} : Rows{a & 0x3 * ONES, a & 0xc * ONES};
  else if constexpr (BITS == 1) return {a & ONES << ((group & 1) * 2 + half), a & ONES << (4 + (group & 1) * 2 + half)};
  else {
    const uint32_t third = word_of(w.b, i), b = !(group & 1) ? third : half ? third << 1 : third >> 1;
    const uint32_t m = half ? 0xcc * ONES : 0x33 * ONES, joined = select_bits(m, a, b);
    return half ? Rows{joined & 0x0e * ONES, joined & 0xe0 * ONES} : Rows{joined & 0x07 * ONES, joined & 0x70 * ONES};
  }
}
__device__ __forceinline__ Rows negatives_of(const Words& w, int i, const Tables& t) {  // e2m1: the second
  const uint32_t turned = word_of(w.a, i) ^ 0x88888888u;
  return {pick_bytes(t.negative[0], t.negative[1], turned), pick_bytes(t.negative[0], t.negative[1], turned >> 16)};
}
// e2m1 in one operand and not two: twice the value, and 12 more, so that both tables give 0 where they are not asked
__device__ __forceinline__ Tables lifted_tables() { return {{in_register(0x0f0e0d0cu), 0x18141210u}, {in_register(0x090a0b0cu), 0x00040608u}}; }
__device__ __forceinline__ Rows lifted_of(const Words& w, int i, const Tables& t) {
  const uint32_t a = word_of(w.a, i), turned = a ^ 0x88888888u;
  return {pick_bytes(t.positive[0], t.positive[1], a) | pick_bytes(t.negative[0], t.negative[1], turned),
          pick_bytes(t.positive[0], t.positive[1], a >> 16) | pick_bytes(t.negative[0], t.negative[1], turned >> 16)};
}
__device__ __forceinline__ constexpr int third_at(int odd, int half) { return odd ? (half ? 0 : 3) : half ? 1 : 2; }  // 3 bits: in its nibble
__device__ __forceinline__ float e2m1_value(uint32_t code) {  // a half's exponent and mantissa begin with e2m1's
  return __half2float(__ushort_as_half((uint16_t)((code & 8) << 12 | (code & 7) << 9))) * 16384.f;
}
// What an integer sum is to be divided by, for row g and g + 8. SHIFT: the first 64 columns' fields are worth 2^SHIFT times
// less than the second's. 1 bit: of a group of odd number, 4 times as much; 2 of it is that a code 1 stands for +1, 0 for -1.
constexpr int SHIFT = BITS == 2 ? 4 : (BITS == 3 || BITS == 1) ? 1 : 0;
constexpr float WORTH0 = BITS == 2 ? 16.f : (BITS == 3 || E2M1) ? 2.f : 1.f;
constexpr float WORTH1 = BITS == 2 ? 64.f : BITS == 3 ? 32.f : E2M1 ? 2.f : (BITS == 4 || BITS == 1) ? 16.f : 1.f;

// ---------------------------------------------------------------------------------------------- scales
constexpr int SUBS = GROUP / SCALE_COLUMNS;  // scales of a row per 128 columns
struct Scales { float scale[SUBS][2], zero[SUBS][2]; };               // of rows g and g + 8
template <int N> __device__ __forceinline__ void load_scale_words(uint32_t (&w)[N], const uint8_t* from) {
  if constexpr (N == 1) w[0] = *(const uint32_t*)from;
  else if constexpr (N == 2) { const uint2 u = *(const uint2*)from; w[0] = u.x, w[1] = u.y; }
  else {
#pragma unroll
    for (int i = 0; i < N; i += 4) { const uint4 u = ((const uint4*)from)[i / 4]; w[i] = u.x, w[i + 1] = u.y, w[i + 2] = u.z, w[i + 3] = u.w; }
  }
}
__device__ __forceinline__ float2 halves_of(uint32_t w) { return __half22float2(*(const __half2*)&w); }
__device__ __forceinline__ float e8m0_value(uint32_t byte) { return __uint_as_float(max(byte << 23, 0x400000u)); }  // 2^(byte - 127); 0 is a subnormal
// Of a group of 128 columns, rows g and g + 8. Not for nvfp4, whose lanes have other groups (product.cu).
template <int KU> __device__ __forceinline__ Scales scales_at(const uint8_t* stage, int group, int g) {
  constexpr int BYTES = SUBS * 2 * (GROUPED ? SCALE_BYTES : 2);  // without scales nothing calls this
  uint32_t w[BYTES / 4];
  load_scale_words(w, stage + code_bytes(KU) + (group * 8 + g) * BYTES);
  Scales s;
#pragma unroll
  for (int i = 0; i < SUBS * 2; i++) {
    float& scale = s.scale[i / 2][i % 2];
    s.zero[i / 2][i % 2] = 0.f;
    if constexpr (SCALE_BYTES == 4) { const float2 both = halves_of(w[i]); scale = both.x, s.zero[i / 2][i % 2] = both.y; }
    else if constexpr (SCALE_BYTES == 2) { const float2 rows = halves_of(w[i / 2]); scale = i % 2 ? rows.y : rows.x; }
    else scale = e8m0_value(w[i / 4] >> (8 * (i % 4)) & 255);
  }
  return s;
}
// The same for one row and column.
template <int KU> __device__ __forceinline__ float2 scale_at(const uint8_t* stage, int g, int high, int column) {
  const uint8_t* scales = stage + code_bytes(KU);
  if constexpr (FORMAT == NVFP4) {
    const uint32_t byte = scales[((g * 4 + column % 64 / 16) * (KU / 64) + column / 64) * 2 + high];
    return make_float2(halves_of(e4m3_to_halves(byte, 0)).x, 0.f);
  } else {
    const int at = ((column / GROUP * 8 + g) * SUBS + column % GROUP / SCALE_COLUMNS) * 2 + high;
    if constexpr (SCALE_BYTES == 4) return halves_of(((const uint32_t*)scales)[at]);
    else if constexpr (SCALE_BYTES == 2) return make_float2(__half2float(__ushort_as_half(((const uint16_t*)scales)[at])), 0.f);
    else return make_float2(e8m0_value(scales[at]), 0.f);
  }
}

// ---------------------------------------------------------------------------------------------- times one vector
// 4 words of x's digits times the lane's 16 columns of a stage: 8 in one mma, 8 in another; the sums may be the same.
__device__ __forceinline__ void multiply(int (&c0)[4], int (&c1)[4], const Words& w, int half, int group, const uint4& x, const Tables& t) {
  const Rows a = rows_of(w, 0, half, group, t), b = rows_of(w, 1, half, group, t);
  mma(c0, a.low, a.high, b.low, b.high, x.x, x.y);
  const Rows c = rows_of(w, 2, half, group, t), d = rows_of(w, 3, half, group, t);
  mma(c1, c.low, c.high, d.low, d.high, x.z, x.w);
  if constexpr (E2M1) {
    const Rows na = negatives_of(w, 0, t), nb = negatives_of(w, 1, t), nc = negatives_of(w, 2, t), nd = negatives_of(w, 3, t);
    mma(c0, na.low, na.high, nb.low, nb.high, x.x, x.y), mma(c1, nc.low, nc.high, nd.low, nd.high, x.z, x.w);
  }
}
// 256 d0 + d1 of sums that were begun at MAGIC_BITS, over `worth`: exact but for its own rounding
__device__ __forceinline__ float total(int sum0, int sum1, float worth) {
  return __int_as_float(sum1) * (1.f / worth) + (__int_as_float(sum0) * (256.f / worth) - MAGIC * 257.f / worth);
}
// Rows g and g + 8 of a stage, this lane's share: one of the groups of 128 columns that lie side by side in an mma's columns.
// With more scales than one in those, each has sums of its own.
template <int K> __device__ __forceinline__ void groups_product(const uint8_t* stage, const float2* groups, const uint8_t* own, const uint8_t* zeros, float& r0, float& r1) {
  constexpr int KU = stage_columns(K), SETS = KU / GROUP > 4 ? 2 : 1, AT_ONCE = KU / GROUP / SETS;
  constexpr int SUMS = SUBS > 2 ? SUBS : 2;  // by scale, and by half, so that an mma need not wait for the one before
  const int lane = threadIdx.x & 31, g = lane >> 2, quarter = lane & 3;
  const Tables t = tables();
  const uint8_t* from[AT_ONCE];
#pragma unroll
  for (int n = 0; n < AT_ONCE; n++) from[n] = g >> 1 == n ? own : zeros;
  int c[SETS][SUMS][4];
#pragma unroll
  for (int i = 0; i < SETS * SUMS * 4; i++) c[i / 4 / SUMS][i / 4 % SUMS][i % 4] = SUBS > 1 || i / 4 % SUMS ? MAGIC_BITS : 0;
#pragma unroll
  for (int n = 0; n < AT_ONCE; n++)
#pragma unroll
    for (int set = 0; set < SETS; set++) {
      const int group = set * AT_ONCE + n;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint4 x = *(const uint4*)(from[n] + group * GROUP + half * 64);
        multiply(c[set][half * SUMS / 2], c[set][half * SUMS / 2 + (SUMS > 2)], words_at<KU>((const uint4*)stage + lane, group, half), half, group, x, t);
      }
    }
  r0 = r1 = 0.f;
#pragma unroll
  for (int set = 0; set < SETS; set++) {  // the lanes of a row: a group each
    const int group = set * AT_ONCE + min(quarter, AT_ONCE - 1);
    if constexpr (SUBS == 1) {
      const float2 x = groups[group];
      auto of_row = [&](int at, float worth) { return total((c[set][0][at] << SHIFT) + c[set][1][at], (c[set][0][at + 1] << SHIFT) + c[set][1][at + 1], worth); };
      const float t0 = of_row(0, WORTH0), t1 = of_row(2, WORTH1), sum = quarter < AT_ONCE ? x.y : 0.f;
      if constexpr (GROUPED && ZEROED) {  // w = scale q + zero
        const Scales s = scales_at<KU>(stage, group, g);
        r0 += s.scale[0][0] * x.x * t0 + s.zero[0][0] * sum, r1 += s.scale[0][1] * x.x * t1 + s.zero[0][1] * sum;
      } else if constexpr (GROUPED) {  // w = scale (q - 8)
        const Scales s = scales_at<KU>(stage, group, g);
        r0 += s.scale[0][0] * (x.x * t0 - 8.f * sum), r1 += s.scale[0][1] * (x.x * t1 - 8.f * sum);
      } else {  // ternary: w = q - 1, binary: w = 2 q - 1
        const float sub = FORMAT == TERNARY || FORMAT == BINARY ? sum : 0.f, scale = FORMAT == BINARY && group & 1 ? x.x * 0.25f : x.x;
        r0 += scale * t0 - sub, r1 += scale * t1 - sub;
      }
    } else {
      const Scales s = scales_at<KU>(stage, group, g);
#pragma unroll
      for (int i = 0; i < SUBS; i++) {
        const float2 x = groups[SUM_COLUMNS < GROUP ? group * SUBS + i : group];
        const float t0 = total(c[set][i][0], c[set][i][1], WORTH0), t1 = total(c[set][i][2], c[set][i][3], WORTH1);
        const float sum = FORMAT == INT4 && quarter < AT_ONCE ? x.y : 0.f;
        if constexpr (ZEROED) r0 += s.scale[i][0] * x.x * t0 + s.zero[i][0] * sum, r1 += s.scale[i][1] * x.x * t1 + s.zero[i][1] * sum;
        else if constexpr (FORMAT == INT4) r0 += s.scale[i][0] * (x.x * t0 - 8.f * sum), r1 += s.scale[i][1] * (x.x * t1 - 8.f * sum);
        else r0 += s.scale[i][0] * x.x * t0, r1 += s.scale[i][1] * x.x * t1;
      }
    }
  }
}
// The same for groups of 16, which are what a lane holds of 64 columns: of x, an mma's columns hold a quarter each.
template <int K> __device__ __forceinline__ void sixteens_product(const uint8_t* stage, const float2* groups, const uint8_t* own, const uint8_t* zeros, float& r0, float& r1) {
  constexpr int KU = stage_columns(K), BLOCKS = KU / 64;
  const int lane = threadIdx.x & 31, g = lane >> 2, quarter = lane & 3;
  // Zeros from other banks than those that the lanes beside read x from
  const uint8_t* from = g >> 1 == quarter ? own : zeros + ((g >> 1) * 16 ^ 32);
  const Tables t = tables();
  uint32_t scales[BLOCKS / 2];
  load_scale_words(scales, stage + code_bytes(KU) + lane * (BLOCKS * 2));
  r0 = r1 = 0.f;
#pragma unroll
  for (int block = 0; block < BLOCKS; block++) {
    int c[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
    multiply(c, c, words_at<KU>((const uint4*)stage + lane, block / 2, block % 2), block % 2, block / 2, *(const uint4*)(from + block * 64), t);
    const float2 scale = halves_of(e4m3_to_halves(scales[block / 2], block % 2));
    const float x = groups[block / 2].x;
    r0 += scale.x * x * total(c[0], c[1], WORTH0), r1 += scale.y * x * total(c[2], c[3], WORTH1);
  }
}
