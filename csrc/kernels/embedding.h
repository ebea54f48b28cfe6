// Rows of a table whose vocabulary is cut over ranks: this one holds ids first .. first + rows.
//   gather_rows       out[n] = table[ids[n] - first], zeros where the id lies elsewhere: summed over the ranks, the lookup
//   scatter_add_rows  table[ids[n] - first] += rows[n] for every n whose id lies here, in the order of n: the same bits every time
#pragma once
#include "base/matrix.h"
#include "base/stream.h"

namespace gingham {

// ids: one per row of out; table and out of one dtype.
void gather_rows(const Matrix& table, const int64_t* ids, int64_t first, const Matrix& out, const Stream& stream);
// table: in the accumulator of rows.
void scatter_add_rows(const Matrix& rows, const int64_t* ids, int64_t first, const Matrix& table, const Stream& stream);

namespace cuda {
void gather_rows(const Matrix& table, const int64_t* ids, int64_t first, const Matrix& out, const Stream& stream);
void scatter_add_rows(const Matrix& rows, const int64_t* ids, int64_t first, const Matrix& table, const Stream& stream);
}  // namespace cuda

}  // namespace gingham
