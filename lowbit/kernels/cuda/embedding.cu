// ---------------------------------------------------------------------------------------------- embedding
// The row of the token, as the fp32 residual stream. The table is 16-bit or an integer format of kernels/weights in its
// canonical storage: a value is (code * step + offset) * scale + zero, little-endian along the row.
struct Embed {
  const uint8_t* table;   // [vocabulary][HIDDEN * bits / 8]
  const void* scale;      // [vocabulary][HIDDEN / group] fp16, or fp32 if `wide`; unused at 16 bits
  const uint16_t* zero;   // likewise, fp16, or null
  const int64_t* token;   // [BATCH]
  float* x;               // [BATCH][HIDDEN]
  int bits, group, offset, step, wide;
};
__global__ void embed_kernel(const __grid_constant__ Embed e) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int sequence = BATCH > 1 ? blockIdx.y : 0;
  const size_t row = (size_t)e.token[sequence];
  float* x = e.x + sequence * HIDDEN;
  if (i < HIDDEN) {
    const uint8_t* codes = e.table + row * (HIDDEN / 8 * e.bits);
    if (e.bits == 16) x[i] = from16(((const uint16_t*)codes)[i]);
    else {
      const int bit = i * e.bits, code = codes[bit / 8] >> bit % 8 & ((1 << e.bits) - 1);
      const size_t at = row * (HIDDEN / e.group) + i / e.group;
      const float scale = e.wide ? ((const float*)e.scale)[at] : __half2float(__ushort_as_half(((const uint16_t*)e.scale)[at]));
      const float zero = e.zero ? __half2float(__ushort_as_half(e.zero[at])) : 0.f;
      x[i] = (float)(code * e.step + e.offset) * scale + zero;
    }
  }
  let_next_start();
}
