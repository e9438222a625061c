// ---------------------------------------------------------------------------------------------- back to a matrix
// Rows of a stream as a 16-bit matrix, for products with many tokens: dequantize, then a library's GEMM. One thread takes
// the 16 bytes that a lane takes above: 16 columns of a row (8 bits), or of rows g and g + 8 of a tile (4 bits; 2 bits:
// twice 16, 3 bits too, with the third from another place; 1 bit: four times; bf16: 4). Where they lie side by side, two
// neighbouring lanes exchange 8 bytes of codes first, so that they store 32 bytes next to each other at a time, a whole
// sector: one written by halves costs L2 two writes. `half`: the stream holds two matrices, 8 rows of each in a tile; 0: it
// does not, 1: write the first, 2: the second.
struct Unpack { const uint8_t* weights; const float* row_scale; uint16_t* out; int row0, rows, k, half, bf16_out; };
constexpr int UNPACKED_ROWS = BITS == 8 ? 1 : 2;                                        // of 16 columns (bf16: 4), per thread
constexpr int UNPACKED_BLOCKS = BITS == 2 || BITS == 3 ? 2 : BITS == 1 ? 4 : 1;  // of 64 columns, 16 of them per thread

__device__ __forceinline__ uint32_t pair16(float a, float b, int bf16_out) {
  if (bf16_out) return (uint32_t)__bfloat16_as_ushort(__float2bfloat16(a)) | ((uint32_t)__bfloat16_as_ushort(__float2bfloat16(b)) << 16);
  return (uint32_t)__half_as_ushort(__float2half_rn(a)) | ((uint32_t)__half_as_ushort(__float2half_rn(b)) << 16);
}
// Byte e of a word as a float: its place in the mantissa of 2^23, which a conversion takes four times as long for
__device__ __forceinline__ float byte_to_float(uint32_t w, int e) { return __uint_as_float(pick_bytes(w, 0x4b000000u, 0x7440u + e)) - 8388608.f; }
// Even lanes: columns 0 to 7 of both lanes of a pair; odd ones: columns 8 to 15 of both
__device__ __forceinline__ void exchange(uint32_t (&w)[4], bool odd) {
  const uint32_t got0 = __shfl_xor_sync(~0u, odd ? w[0] : w[2], 1), got1 = __shfl_xor_sync(~0u, odd ? w[1] : w[3], 1);
  if (odd) w[0] = got0, w[1] = got1;
  else w[2] = got0, w[3] = got1;
}
template <int KU> __global__ void __launch_bounds__(256) unpack_kernel(const __grid_constant__ Unpack u) {
  constexpr int PER_STAGE = 2 * KU * (BITS == 3 ? 2 : BITS) / 16, STAGE_BYTES = stage_bytes(KU);  // threads and bytes of a stage
  const int chunks = u.k / KU, first = u.half ? 0 : u.row0 / 16;
  const uint32_t i = blockIdx.x * 256 + threadIdx.x, stage_index = i / PER_STAGE, in_stage = i % PER_STAGE;
  const int tile = first + stage_index / chunks, chunk = stage_index % chunks, j = in_stage / 32, lane = in_stage % 32;
  const int g = lane >> 2, q4 = lane & 3;
  if (tile * (u.half ? 8 : 16) >= u.row0 + u.rows) return;
  const uint8_t* stage = u.weights + ((size_t)tile * chunks + chunk) * STAGE_BYTES;
  const uint4 four = ((const uint4*)stage)[in_stage];
  uint32_t w[4] = {four.x, four.y, four.z, four.w};
  [[maybe_unused]] uint32_t third[4] = {};
  if constexpr (BITS == 3) {
    const uint4 u = ((const uint4*)stage)[(KU / GROUP + j / 2) * 32 + lane];
    third[0] = u.x, third[1] = u.y, third[2] = u.z, third[3] = u.w;
  }
  constexpr bool EXCHANGED = FORMAT != BF16 && !SPLIT;
  const bool odd = EXCHANGED && lane & 1;
  if constexpr (EXCHANGED) exchange(w, odd);
  if constexpr (EXCHANGED && BITS == 3) exchange(third, odd);
#pragma unroll
  for (int r = 0; r < UNPACKED_ROWS; r++) {
    const int high = UNPACKED_ROWS == 1 ? j & 1 : r;
    if (u.half == 2 - high) continue;
    const int row = tile * 16 + high * 8 + g, to = u.half ? tile * 8 + g : row - u.row0;
    if (to < 0 || to >= u.rows) continue;
    const float row_scale = ROW_SCALED ? u.row_scale[row] : 1.f;
    uint16_t* out = u.out + (size_t)to * u.k + chunk * KU;
    if constexpr (FORMAT == BF16) {
      const float2 a = from16x2(w[high]), b = from16x2(w[2 + high]);
      *(uint2*)(out + j / 2 * 32 + q4 * 8 + j % 2 * 4) = make_uint2(pair16(a.x, a.y, u.bf16_out), pair16(b.x, b.y, u.bf16_out));
      continue;
    }
#pragma unroll
    for (int b = 0; b < UNPACKED_BLOCKS; b++) {
      const int block = (j / (3 - UNPACKED_ROWS) * UNPACKED_BLOCKS + b) * 64;
      float v[16];
#pragma unroll
      for (int e = 0; e < 16; e++) {
        [[maybe_unused]] const uint32_t byte = w[e / 4] >> (8 * (e % 4));
        if constexpr (FORMAT == INT8) v[e] = byte_to_float(w[e / 4] ^ 0x80808080u, e % 4) - 128.f;
        else if constexpr (FORMAT == FP8) v[e] = __half2float(__ushort_as_half((uint16_t)(e4m3_to_halves(w[e / 4], e % 4 >= 2) >> (16 * (e & 1)))));
        else if constexpr (E2M1) v[e] = e2m1_value(w[e / 4] >> (16 * high + 4 * (e % 4)));
        else if constexpr (FORMAT == INT4) v[e] = byte_to_float(w[e / 4] >> (high * 4) & 0x0f0f0f0fu, e % 4) - (ZEROED ? 0.f : 8.f);
        else if constexpr (FORMAT == BINARY) v[e] = (float)((byte >> (high * 4 + b) & 1) * 2) - 1.f;
        else if constexpr (FORMAT == INT3) {
          const uint32_t two = byte >> (high * 4 + b * 2) & 3, one = third[e / 4] >> (8 * (e % 4) + high * 4 + third_at(j & 1, b)) & 1;
          v[e] = (float)(b ? two << 1 | one : two | one << 2);
        } else v[e] = byte_to_float(w[e / 4] >> (b * 4 + high * 2) & 0x03030303u, e % 4) - (FORMAT == TERNARY ? 1.f : 0.f);
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int column = block + (SPLIT ? h * 32 + q4 * 8 : (q4 - odd + h) * 16 + odd * 8);
        float2 scale = make_float2(row_scale, 0.f);
        if constexpr (GROUPED) scale = scale_at<KU>(stage, g, high, column), scale.x *= row_scale;
        uint32_t o[4];
#pragma unroll
        for (int i = 0; i < 4; i++) o[i] = pair16(v[h * 8 + 2 * i] * scale.x + scale.y, v[h * 8 + 2 * i + 1] * scale.x + scale.y, u.bf16_out);
        *(uint4*)(out + column) = make_uint4(o[0], o[1], o[2], o[3]);
      }
    }
  }
}
