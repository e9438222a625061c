// ---------------------------------------------------------------------------------------------- embedding
// The row of the token, as the fp32 residual stream. The table is 16-bit or a format of kernels/weights in its canonical
// storage, little-endian along the row: a value is (code * step + offset) * scale + zero, or that of an e4m3 or e2m1 code.
enum { CODE_INT = 0, CODE_E4M3 = 1, CODE_E2M1 = 2, SCALE_FP16 = 0, SCALE_FP32 = 1, SCALE_E8M0 = 2, SCALE_E4M3 = 3 };
struct Embed {
  const uint8_t* table;       // [vocabulary][HIDDEN * bits / 8]
  const void* scale;          // [vocabulary][HIDDEN / group], as `scale_kind` says; unused at 16 bits
  const void* zero;           // likewise, fp16 or fp32, or null
  const float* tensor_scale;  // one more factor of every scale, or null
  const int64_t* token;       // [BATCH]
  float* x;                   // [BATCH][HIDDEN]
  int bits, group, offset, step, code_kind, scale_kind;
};
__device__ __forceinline__ float stored_scale(const void* from, size_t at, int kind) {
  if (kind == SCALE_FP32) return ((const float*)from)[at];
  if (kind == SCALE_FP16) return __half2float(__ushort_as_half(((const uint16_t*)from)[at]));
  const uint32_t byte = ((const uint8_t*)from)[at];
  return kind == SCALE_E8M0 ? e8m0_value(byte) : halves_of(e4m3_to_halves(byte, 0)).x;
}
__global__ void embed_kernel(const __grid_constant__ Embed e) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int sequence = BATCH > 1 ? blockIdx.y : 0;
  const size_t row = (size_t)e.token[sequence];
  float* x = e.x + sequence * HIDDEN;
  if (i < HIDDEN) {
    const uint8_t* codes = e.table + row * (HIDDEN / 8 * e.bits);
    if (e.bits == 16) x[i] = from16(((const uint16_t*)codes)[i]);
    else {
      const int bit = i * e.bits;
      uint32_t code = codes[bit / 8];
      if (bit % 8 + e.bits > 8) code |= (uint32_t)codes[bit / 8 + 1] << 8;  // 3 bits may straddle two bytes
      code = code >> bit % 8 & ((1 << e.bits) - 1);
      const size_t at = row * (HIDDEN / e.group) + i / e.group;
      float scale = stored_scale(e.scale, at, e.scale_kind);
      if (e.tensor_scale) scale *= *e.tensor_scale;
      const float zero = e.zero ? stored_scale(e.zero, at, e.scale_kind) : 0.f;
      const float value = e.code_kind == CODE_INT ? (float)((int)code * e.step + e.offset) : e.code_kind == CODE_E2M1 ? e2m1_value(code) : halves_of(e4m3_to_halves(code, 0)).x;
      x[i] = value * scale + zero;
    }
  }
  let_next_start();
}
