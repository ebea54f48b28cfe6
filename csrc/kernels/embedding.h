// Rows of a table, and sums of rows into those of one.
//   gather_rows   out[n] = table[ids[n]]; a row of NaNs where the table has none of that id
//   scatter_rows  table[i] = the sum of rows[order[p]] over all p with ids[p] = first + i, in the order of p: the same bits every time; 0 where
//                 there is none. Rows of the id `skipped`, and of ids that are not the table's, are in no sum.
#pragma once
#include "base/matrix.h"
#include "base/stream.h"

namespace gingham {

// Where rows belong: order[p] is a row, ids[p] its id.
struct Places {
  const int64_t* ids = nullptr;    // on cuda ascending
  const int64_t* order = nullptr;  // none: row p
  int64_t first = 0;               // the id of the table's first row
  int64_t skipped = -1;            // -1: no id
};

// ids: one per row of out; table and out of one dtype.
void gather_rows(const Matrix& table, const int64_t* ids, const Matrix& out, const Stream& stream);
// As many places as rows; table: in the accumulator of rows.
void scatter_rows(const Matrix& rows, const Places& places, const Matrix& table, const Stream& stream);

namespace cuda {
void gather_rows(const Matrix& table, const int64_t* ids, const Matrix& out, const Stream& stream);
void scatter_rows(const Matrix& rows, const Places& places, const Matrix& table, const Stream& stream);
}  // namespace cuda

}  // namespace gingham
