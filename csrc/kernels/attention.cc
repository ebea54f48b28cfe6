#include "kernels/attention.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "base/exponential.h"
#include "base/vectorise.h"
#include "kernels/cast.h"
#include "kernels/gemm.h"

namespace gingham {
namespace {

constexpr int64_t kQueries = 256, kKeys = 512;
constexpr int kLanes = 16;  // numbers that a row's maximum and sum are kept in side by side, so that they vectorise

template <class T>
constexpr T kNothing = -std::numeric_limits<T>::infinity();

template <class T>
VECTORISED T scale_and_max(T* row, int64_t n, T scale) {
  T most[kLanes];
  std::fill_n(most, kLanes, kNothing<T>);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int lane = 0; lane < kLanes; lane++) {
      const T value = row[j + lane] * scale;
      row[j + lane] = value;
      most[lane] = value > most[lane] ? value : most[lane];
    }
  for (; j < n; j++) {
    row[j] *= scale;
    most[0] = row[j] > most[0] ? row[j] : most[0];
  }
  return *std::max_element(most, most + kLanes);
}

// row becomes e^(row - top); their sum.
template <class T>
VECTORISED T exp_and_sum(T* row, int64_t n, T top) {
  T sums[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int lane = 0; lane < kLanes; lane++) {
      const T value = exp_of(row[j + lane] - top);
      row[j + lane] = value;
      sums[lane] += value;
    }
  for (; j < n; j++) sums[0] += row[j] = exp_of(row[j] - top);
  T sum = 0;
  for (int lane = 0; lane < kLanes; lane++) sum += sums[lane];
  return sum;
}

template <class T>
VECTORISED T dot(const T* a, const T* b, int64_t n) {
  T sums[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int lane = 0; lane < kLanes; lane++) sums[lane] += a[j + lane] * b[j + lane];
  for (; j < n; j++) sums[0] += a[j] * b[j];
  T sum = 0;
  for (int lane = 0; lane < kLanes; lane++) sum += sums[lane];
  return sum;
}

template <class T>
VECTORISED void multiply(T* row, const T* factors, int64_t n) {
  for (int64_t j = 0; j < n; j++) row[j] *= factors[j];
}

template <class T>
VECTORISED void multiply(T* row, T factor, int64_t n) {
  for (int64_t j = 0; j < n; j++) row[j] *= factor;
}

// scores -> p, and dp -> ds = p (dp - delta) scale.
template <class T>
VECTORISED void to_gradient(T* scores, T* dp, int64_t n, T scale, T lse, T delta) {
  for (int64_t j = 0; j < n; j++) {
    const T p = exp_of(scores[j] * scale - lse);
    dp[j] = p * (dp[j] - delta) * scale;
    scores[j] = p;
  }
}

// The columns of one head in all rows of m.
Matrix head_of(const Matrix& m, int64_t index, int64_t width) { return m.slice(1, index * width, (index + 1) * width); }

// A panel in the accumulator: itself, or a copy in `room`.
Matrix widened(const Matrix& m, char* room, const Stream& stream) {
  if (size_of(m.dtype) != 2) return m;
  const Matrix wide = dense(room, m.rows, m.cols, DType::f32);
  cast(m, wide, stream);
  return wide;
}

size_t wide_bytes(const Matrix& m, int64_t rows, int64_t width) { return size_of(m.dtype) == 2 ? static_cast<size_t>(rows * width) * 4 : 0; }

// One tile of scores: queries [i, i + rows) of the run and keys [j, j + cols).
template <class T>
struct Tile {
  const Attention& a;
  const Run &queries, &keys;
  int64_t b, h, i, rows, j, cols;
  T* data;

  T* row(int64_t r) const { return data + r * cols; }
  // How many of the keys, from the first on, a query may see.
  int64_t seen(int64_t r) const {
    if (!a.causal) return cols;
    return std::clamp<int64_t>(queries.position + i + r - keys.position - j + 1, 0, cols);
  }
  void add_mask(int64_t r, int64_t n) const {
    if (!a.mask) return;
    const int64_t* s = a.mask_strides;
    const int64_t at = b * s[0] + h * s[1] + (queries.row + i + r) * s[2] + (keys.column + j) * s[3];
    T* scores = row(r);
    if (a.mask_dtype == DType::bytes1) {
      const uint8_t* mask = static_cast<const uint8_t*>(a.mask) + at;
      for (int64_t c = 0; c < n; c++) scores[c] = mask[c * s[3]] ? scores[c] : kNothing<T>;
    } else {
      const T* mask = static_cast<const T*>(a.mask) + at;
      for (int64_t c = 0; c < n; c++) scores[c] += mask[c * s[3]];
    }
  }
  void factors(int64_t r, int64_t n, T* out) const {
    const int64_t line = ((a.first_batch + b) * a.all_heads + a.first_head + h) * a.time + queries.position + i + r;
    keep_run(out, static_cast<uint64_t>(line * a.time + keys.position + j), n, a.dropout);
  }
};

// Of a query's row: its place in [batch heads, time].
template <class T>
T& number(const Matrix& m, int64_t line, int64_t row) {
  return static_cast<T*>(m.data)[line * m.row_stride + row * m.col_stride];
}

template <class T>
void softmax(const Tile<T>& tile, const AttentionSums& sums, const Matrix& out, T* factors) {
  const Attention& a = tile.a;
  const int64_t line = tile.b * a.heads + tile.h;
  for (int64_t r = 0; r < tile.rows; r++) {
    T* row = tile.row(r);
    const int64_t n = tile.seen(r), at = tile.queries.row + tile.i + r;
    std::fill(row + n, row + tile.cols, T(0));
    T &top = number<T>(sums.top, line, at), &sum = number<T>(sums.sum, line, at);
    T most = scale_and_max(row, n, static_cast<T>(a.scale));
    if (a.mask) {
      tile.add_mask(r, n);
      most = scale_and_max(row, n, T(1));
    }
    const T higher = std::max(top, most);
    // Nothing seen so far: no sum goes on from here (a NaN is no maximum, and is met by the sum).
    const T from = higher == kNothing<T> ? T(0) : higher;
    const T before = top == kNothing<T> ? T(0) : exp_of(top - from);
    if (before != T(1)) multiply(static_cast<T*>(out.data) + r * out.row_stride, before, out.cols);
    sum = sum * before + exp_and_sum(row, n, from);
    top = higher;
    if (a.dropout.p > 0) {
      tile.factors(r, n, factors);
      multiply(row, factors, n);
    }
  }
}

template <class T>
void gradients(const Tile<T>& scores, const Tile<T>& dp, const Matrix& lse, const Matrix& delta, T* factors) {
  const Attention& a = scores.a;
  const int64_t line = scores.b * a.heads + scores.h;
  for (int64_t r = 0; r < scores.rows; r++) {
    T *row = scores.row(r), *other = dp.row(r);
    const int64_t n = scores.seen(r), at = scores.queries.row + scores.i + r;
    std::fill(row + n, row + scores.cols, T(0));
    std::fill(other + n, other + scores.cols, T(0));
    const T own = number<T>(lse, line, at), sum = own == kNothing<T> ? -kNothing<T> : own;
    T scale = static_cast<T>(a.scale);
    const bool drops = a.dropout.p > 0;
    if (drops) {
      scores.factors(r, n, factors);
      multiply(other, factors, n);
    }
    if (a.mask) {
      multiply(row, scale, n);
      scores.add_mask(r, n);
      to_gradient(row, other, n, T(1), sum, number<T>(delta, line, at));
      multiply(other, scale, n);
    } else {
      to_gradient(row, other, n, scale, sum, number<T>(delta, line, at));
    }
    if (drops) multiply(row, factors, n);
  }
}

void check_block(const Attention& a, const Matrix& q, const Run& queries, const Matrix& k, const Matrix& v, const Run& keys) {
  const int64_t wide = a.batch * a.heads * a.width, narrow = a.batch * a.kv_heads * a.width;
  CHECK(ShapeError, q.cols == wide && k.cols == narrow && v.cols == narrow && a.heads % a.kv_heads == 0, "attention of q [", q.rows, ",", q.cols,
        "], k [", k.rows, ",", k.cols, "], v [", v.rows, ",", v.cols, "], expected ", wide, " and ", narrow, " columns");
  CHECK(ShapeError, k.dtype == q.dtype && v.dtype == q.dtype, "attention of ", name_of(q.dtype), " q, ", name_of(k.dtype), " k and ",
        name_of(v.dtype), " v");
  CHECK(ShapeError, queries.row + queries.count <= q.rows && keys.row + keys.count <= std::min(k.rows, v.rows), "attention of rows beyond the end");
  CHECK(ShapeError, !a.mask || a.mask_dtype == DType::bytes1 || a.mask_dtype == accumulator(q.dtype), "attention mask of ", name_of(a.mask_dtype),
        " for q of ", name_of(q.dtype));
}

// Tiles of one head's queries and of the keys that they may see: visit(i, rows, j, cols), which makes so many products of each.
template <class Visit>
void for_tiles(const Attention& a, const Run& queries, const Run& keys, int64_t products, const Visit& visit) {
  for (int64_t i = 0; i < queries.count; i += kQueries) {
    const int64_t rows = std::min(kQueries, queries.count - i);
    const int64_t all = a.causal ? std::clamp<int64_t>(queries.position + i + rows - keys.position, 0, keys.count) : keys.count;
    for (int64_t j = 0; j < all; j += kKeys) visit(i, rows, j, std::min(kKeys, all - j));
    if (a.multiplied) *a.multiplied += products * rows * all * a.width;
  }
}

template <class T>
void forward(const Attention& a, const Matrix& q, const Run& queries, const Matrix& k, const Matrix& v, const Run& keys, const AttentionSums& sums,
             const Stream& stream) {
  const Scratch wide_k(stream, wide_bytes(k, keys.count, a.width)), wide_v(stream, wide_bytes(v, keys.count, a.width)),
      wide_q(stream, wide_bytes(q, kQueries, a.width));
  const Scratch room(stream, (kQueries * kKeys + kKeys) * sizeof(T));
  T *scores = reinterpret_cast<T*>(room.data()), *factors = scores + kQueries * kKeys;
  const Matrix q_run = q.slice(0, queries.row, queries.row + queries.count), out_run = sums.out.slice(0, queries.row, queries.row + queries.count);
  const Matrix k_run = k.slice(0, keys.row, keys.row + keys.count), v_run = v.slice(0, keys.row, keys.row + keys.count);
  const int64_t shared = a.heads / a.kv_heads;
  for (int64_t narrow = 0; narrow < a.batch * a.kv_heads; narrow++) {
    const Matrix kh = widened(head_of(k_run, narrow, a.width), wide_k.data(), stream);
    const Matrix vh = widened(head_of(v_run, narrow, a.width), wide_v.data(), stream);
    for (int64_t wide = narrow * shared; wide < (narrow + 1) * shared; wide++) {
      const Matrix qh = head_of(q_run, wide, a.width), out_h = head_of(out_run, wide, a.width);
      Matrix qi;
      int64_t last = -1;
      for_tiles(a, queries, keys, 2, [&](int64_t i, int64_t rows, int64_t j, int64_t cols) {
        if (std::exchange(last, i) != i) qi = widened(qh.slice(0, i, i + rows), wide_q.data(), stream);
        const Tile<T> tile{a, queries, keys, wide / a.heads, wide % a.heads, i, rows, j, cols, scores};
        const Matrix p = dense(scores, rows, cols, qi.dtype), out = out_h.slice(0, i, i + rows);
        gemm(qi, kh.slice(0, j, j + cols).t(), p, false, stream);
        softmax(tile, sums, out, factors);
        gemm(p, vh.slice(0, j, j + cols), out, true, stream);
      });
    }
  }
}

template <class T>
void backward(const Attention& a, const Matrix& q, const Run& queries, const Matrix& k, const Matrix& v, const Run& keys, const Matrix& dout,
              const Matrix& lse, const Matrix& delta, const AttentionGradients& sums, const Stream& stream) {
  const Scratch wide_k(stream, wide_bytes(k, keys.count, a.width)), wide_v(stream, wide_bytes(v, keys.count, a.width)),
      wide_q(stream, wide_bytes(q, kQueries, a.width)), wide_dout(stream, wide_bytes(dout, kQueries, a.width));
  const Scratch room(stream, (2 * kQueries * kKeys + kKeys) * sizeof(T));
  T *scores = reinterpret_cast<T*>(room.data()), *dp = scores + kQueries * kKeys, *factors = dp + kQueries * kKeys;
  const auto rows_of = [](const Matrix& m, const Run& run) { return m.slice(0, run.row, run.row + run.count); };
  const Matrix q_run = rows_of(q, queries), dout_run = rows_of(dout, queries), dq_run = rows_of(sums.dq, queries);
  const Matrix k_run = rows_of(k, keys), v_run = rows_of(v, keys), dk_run = rows_of(sums.dk, keys), dv_run = rows_of(sums.dv, keys);
  const int64_t shared = a.heads / a.kv_heads;
  for (int64_t narrow = 0; narrow < a.batch * a.kv_heads; narrow++) {
    const Matrix kh = widened(head_of(k_run, narrow, a.width), wide_k.data(), stream);
    const Matrix vh = widened(head_of(v_run, narrow, a.width), wide_v.data(), stream);
    const Matrix dkh = head_of(dk_run, narrow, a.width), dvh = head_of(dv_run, narrow, a.width);
    for (int64_t wide = narrow * shared; wide < (narrow + 1) * shared; wide++) {
      Matrix qi, douti;
      int64_t last = -1;
      for_tiles(a, queries, keys, 5, [&](int64_t i, int64_t rows, int64_t j, int64_t cols) {
        if (std::exchange(last, i) != i) {
          qi = widened(head_of(q_run, wide, a.width).slice(0, i, i + rows), wide_q.data(), stream);
          douti = widened(head_of(dout_run, wide, a.width).slice(0, i, i + rows), wide_dout.data(), stream);
        }
        const Tile<T> tile{a, queries, keys, wide / a.heads, wide % a.heads, i, rows, j, cols, scores};
        Tile<T> other = tile;
        other.data = dp;
        const Matrix p = dense(scores, rows, cols, qi.dtype), ds = dense(dp, rows, cols, qi.dtype), kj = kh.slice(0, j, j + cols);
        gemm(qi, kj.t(), p, false, stream);
        gemm(douti, vh.slice(0, j, j + cols).t(), ds, false, stream);
        gradients(tile, other, lse, delta, factors);
        gemm(p.t(), douti, dvh.slice(0, j, j + cols), true, stream);
        gemm(ds.t(), qi, dkh.slice(0, j, j + cols), true, stream);
        gemm(ds, kj, head_of(dq_run, wide, a.width).slice(0, i, i + rows), true, stream);
      });
    }
  }
}

template <class T>
void delta_of(const Attention& a, const Matrix& dout, const Matrix& out, const Matrix& delta, const Stream& stream) {
  const auto count = static_cast<size_t>(out.cols);
  std::vector<T> x(count), y(count);
  for (int64_t i = 0; i < out.rows; i++) {
    load_row(dout, i, x.data(), stream);
    load_row(out, i, y.data(), stream);
    for (int64_t line = 0; line < a.batch * a.heads; line++)
      number<T>(delta, line, i) = dot(x.data() + line * a.width, y.data() + line * a.width, a.width);
  }
}

}  // namespace

bool sees(const Attention& a, const Run& queries, const Run& keys) {
  return queries.count > 0 && keys.count > 0 && (!a.causal || keys.position < queries.position + queries.count);
}

int64_t widest_head([[maybe_unused]] DType dtype, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, widest_head(dtype, stream));
  return std::numeric_limits<int64_t>::max();
}

void attention_begin(const AttentionSums& sums, const Stream& stream) {
  DISPATCH_DEVICE(stream, attention_begin(sums, stream));
  fill_zero(sums.out, stream);
  fill_zero(sums.sum, stream);
  DISPATCH(sums.top.dtype, T, std::fill_n(static_cast<T*>(sums.top.data), sums.top.count(), kNothing<T>));
}

void attention_forward(const Attention& a, const Matrix& q, const Run& queries, const Matrix& k, const Matrix& v, const Run& keys,
                       const AttentionSums& sums, const Stream& stream) {
  check_block(a, q, queries, k, v, keys);
  if (!sees(a, queries, keys)) return;
  DISPATCH_DEVICE(stream, attention_forward(a, q, queries, k, v, keys, sums, stream));
  DISPATCH(accumulator(q.dtype), T, forward<T>(a, q, queries, k, v, keys, sums, stream));
}

void attention_finish(const Attention& a, const AttentionSums& sums, [[maybe_unused]] const Stream& stream) {
  DISPATCH_DEVICE(stream, attention_finish(a, sums, stream));
  DISPATCH(sums.out.dtype, T, {
    for (int64_t i = 0; i < sums.out.rows; i++)
      for (int64_t line = 0; line < a.batch * a.heads; line++) {
        const T sum = number<T>(sums.sum, line, i);
        T& top = number<T>(sums.top, line, i);
        multiply(static_cast<T*>(sums.out.data) + i * sums.out.row_stride + line * a.width, sum == T(0) ? T(0) : T(1) / sum, a.width);
        top = sum == T(0) ? kNothing<T> : top + std::log(sum);
      }
  });
}

void attention_delta(const Attention& a, const Matrix& dout, const Matrix& out, const Matrix& delta, const Stream& stream) {
  DISPATCH_DEVICE(stream, attention_delta(a, dout, out, delta, stream));
  DISPATCH(accumulator(out.dtype), T, delta_of<T>(a, dout, out, delta, stream));
}

void attention_backward(const Attention& a, const Matrix& q, const Run& queries, const Matrix& k, const Matrix& v, const Run& keys,
                        const Matrix& dout, const Matrix& lse, const Matrix& delta, const AttentionGradients& sums, const Stream& stream) {
  check_block(a, q, queries, k, v, keys);
  if (!sees(a, queries, keys)) return;
  DISPATCH_DEVICE(stream, attention_backward(a, q, queries, k, v, keys, dout, lse, delta, sums, stream));
  DISPATCH(accumulator(q.dtype), T, backward<T>(a, q, queries, k, v, keys, dout, lse, delta, sums, stream));
}

}  // namespace gingham
