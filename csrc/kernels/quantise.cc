#include "kernels/quantise.h"

#include <algorithm>
#include <vector>

#include "kernels/cast.h"

namespace gingham {

void check_quantise(const Matrix& x, const Matrix& codes, const Matrix& scales) {
  CHECK(ShapeError, codes.rows == x.rows && codes.cols == x.cols && codes.dtype == DType::bytes1, "codes [", codes.rows, ",", codes.cols, "] ",
        name_of(codes.dtype), " of [", x.rows, ",", x.cols, "], expected as many bytes1");
  CHECK(ShapeError, scales.rows == x.rows && scales.cols == (x.cols + kQuantiseBlock - 1) / kQuantiseBlock && scales.dtype == DType::f32, "scales [",
        scales.rows, ",", scales.cols, "] ", name_of(scales.dtype), " of [", x.rows, ",", x.cols, "], expected float32, one per ", kQuantiseBlock,
        " columns");
  CHECK(ShapeError, accumulator(x.dtype) == DType::f32 && is_real(x.dtype), "codes of ", name_of(x.dtype), ", expected 16 or 32 bits");
}

void quantise(const Matrix& x, const Matrix& codes, const Matrix& scales, Code code, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, quantise(x, codes, scales, code, stream));
  check_quantise(x, codes, scales);
  std::vector<float> row(static_cast<size_t>(x.cols));
  for (int64_t i = 0; i < x.rows; i++) {
    load_row(x, i, row.data(), stream);
    uint8_t* out = static_cast<uint8_t*>(codes.data) + i * codes.row_stride;
    float* scale = static_cast<float*>(scales.data) + i * scales.row_stride;
    for (int64_t begin = 0; begin < x.cols; begin += kQuantiseBlock) {
      const int64_t end = std::min(x.cols, begin + kQuantiseBlock);
      float most = 0;
      for (int64_t j = begin; j < end; j++) {
        const float size = std::fabs(row[static_cast<size_t>(j)]);
        if (size > most || size != size) most = size;  // a NaN stays: nothing is greater
      }
      scale[begin / kQuantiseBlock * scales.col_stride] = most / top_of(code);
      const float factor = most == 0 ? 0.f : top_of(code) / most;
      for (int64_t j = begin; j < end; j++) out[j * codes.col_stride] = encode(code, row[static_cast<size_t>(j)] * factor);
    }
  }
}

void dequantise(const Matrix& codes, const Matrix& scales, const Matrix& x, Code code, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, dequantise(codes, scales, x, code, stream));
  check_quantise(x, codes, scales);
  std::vector<float> row(static_cast<size_t>(x.cols));
  for (int64_t i = 0; i < x.rows; i++) {
    const uint8_t* in = static_cast<const uint8_t*>(codes.data) + i * codes.row_stride;
    const float* scale = static_cast<const float*>(scales.data) + i * scales.row_stride;
    for (int64_t j = 0; j < x.cols; j++)
      row[static_cast<size_t>(j)] = decode(code, in[j * codes.col_stride]) * scale[j / kQuantiseBlock * scales.col_stride];
    store_row(row.data(), x, i, stream);
  }
}

}  // namespace gingham
