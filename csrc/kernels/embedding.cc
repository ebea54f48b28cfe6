#include "kernels/embedding.h"

#include <vector>

#include "kernels/cast.h"

namespace gingham {

void gather_rows(const Matrix& table, const int64_t* ids, int64_t first, const Matrix& out, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, gather_rows(table, ids, first, out, stream));
  CHECK(ShapeError, table.cols == out.cols && table.dtype == out.dtype, "rows of ", table.cols, " ", name_of(table.dtype), " into rows of ", out.cols,
        " ", name_of(out.dtype));
  for (int64_t n = 0; n < out.rows; n++) {
    const int64_t at = ids[n] - first;
    if (at >= 0 && at < table.rows)
      cast(table.slice(0, at, at + 1), out.slice(0, n, n + 1), stream);
    else
      fill_zero(out.slice(0, n, n + 1), stream);
  }
}

void scatter_add_rows(const Matrix& rows, const int64_t* ids, int64_t first, const Matrix& table, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, scatter_add_rows(rows, ids, first, table, stream));
  CHECK(ShapeError, rows.cols == table.cols && table.dtype == accumulator(rows.dtype), "rows of ", rows.cols, " ", name_of(rows.dtype),
        " added to rows of ", table.cols, " ", name_of(table.dtype));
  DISPATCH(table.dtype, T, {
    std::vector<T> row(static_cast<size_t>(rows.cols));
    for (int64_t n = 0; n < rows.rows; n++) {
      const int64_t at = ids[n] - first;
      if (at < 0 || at >= table.rows) continue;
      load_row(rows, n, row.data(), stream);
      T* out = static_cast<T*>(table.data) + at * table.row_stride;
      for (size_t j = 0; j < row.size(); j++) out[static_cast<int64_t>(j) * table.col_stride] += row[j];
    }
  });
}

}  // namespace gingham
