// The CPU's kernels as work of the fake runtime's streams: in place of the .cu files where a test is about the host side (order, events,
// messages) and the simulated ones would be slow.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <functional>
#include <limits>

#include "kernels/accumulate.h"
#include "kernels/attention.h"
#include "kernels/cast.h"
#include "kernels/cross_entropy.h"
#include "kernels/dropout.h"
#include "kernels/embedding.h"
#include "kernels/epilogue.h"
#include "kernels/gemm.h"
#include "kernels/gemm_sm90.cuh"
#include "kernels/indices.h"
#include "kernels/layer_norm.h"

void shim_enqueue(cudaStream_t stream, std::function<void()> work);
extern "C" void fake_note(cudaStream_t stream, const char* text);

namespace gingham {
namespace {

class Malloc : public Stream {
 public:
  void* allocate(size_t bytes, Heap::Kind) const override { return ::malloc(bytes); }
  void free(void* p) const override { ::free(p); }
};
const Malloc kHost;

void later(const Stream& stream, std::function<void()> work) { shim_enqueue(static_cast<cudaStream_t>(stream.native()), std::move(work)); }

// For the model of time (trace.cc).
template <class... Parts>
void note(const Stream& stream, const Parts&... parts) {
  fake_note(static_cast<cudaStream_t>(stream.native()), concat(parts...).c_str());
}
void note_product(const Stream& stream, const Matrix& a, const Matrix& b, bool adds, size_t stored) {
  note(stream, "gemm ", a.rows, " ", b.cols, " ", a.cols, " ", adds ? 1 : 0, " ", stored);
}

void forget(const Matrix& m) {
  DISPATCH(m.dtype, T, {
    for (int64_t i = 0; i < m.rows; i++)
      for (int64_t j = 0; j < m.cols; j++) static_cast<T*>(m.data)[i * m.row_stride + j * m.col_stride] = std::numeric_limits<T>::quiet_NaN();
  });
}

}  // namespace

namespace cuda {

void accumulate(const Matrix& a, const Matrix& b, const Stream& stream) {
  note(stream, "accumulate ", a.bytes() + 2 * b.bytes());
  later(stream, [=] { gingham::accumulate(a, b, kHost); });
}
void column_sums(const Matrix& a, const Matrix& out, bool add, const Stream& stream) {
  note(stream, "sums ", a.bytes());
  later(stream, [=] { gingham::column_sums(a, out, add, kHost); });
}
void cast(const Matrix& from, const Matrix& to, const Stream& stream) {
  note(stream, "cast ", from.bytes() + to.bytes());
  later(stream, [=] { gingham::cast(from, to, kHost); });
}
void fill_zero(const Matrix& m, const Stream& stream) {
  note(stream, "fill ", m.bytes());
  later(stream, [=] { gingham::fill_zero(m, kHost); });
}
void dropout(const void* x, void* y, DType dtype, const std::vector<int64_t>& local, const std::vector<int64_t>& global,
             const std::vector<int64_t>& offset, const DropoutKey& key, const Stream& stream) {
  later(stream, [=] { gingham::dropout(x, y, dtype, local, global, offset, key, kHost); });
}
void accumulate_into(const Matrix& a, const Matrix& b, const Matrix& out, const Stream& stream) {
  note(stream, "accumulate ", a.bytes() + b.bytes() + out.bytes());
  later(stream, [=] { gingham::accumulate_into(a, b, out, kHost); });
}
void epilogue(const Matrix& c, const Tail& tail, const Stream& stream) {
  note(stream, "epilogue ", c.bytes() + tail.z.bytes() + tail.y.bytes());
  later(stream, [=] { gingham::epilogue(c, tail, kHost); });
}
void activation_backward(const Matrix& dy, const Matrix& z, const Matrix& dz, Epilogue kind, const Stream& stream) {
  later(stream, [=] { gingham::activation_backward(dy, z, dz, kind, kHost); });
}
void gemm(const Matrix& a, const Matrix& b, const Matrix& c, bool accumulate, const Stream& stream) {
  note_product(stream, a, b, accumulate, size_of(c.dtype));
  later(stream, [=] { gingham::gemm(a, b, c, accumulate, kHost); });
}
void gemm(const Matrix& a, const Matrix& b, const Matrix& c, bool accumulate, const Tail& tail, const Stream& stream) {
  note_product(stream, a, b, accumulate, (tail.keeps_sum ? 4 : 0) + (tail.z.empty() ? 0 : size_of(tail.z.dtype)) + (tail.y.empty() ? 0 : 2));
  later(stream, [=] {
    gingham::gemm(a, b, c, accumulate, tail, kHost);
    if (!tail.keeps_sum && c.data) forget(c);  // a GPU's kernel does not store it
  });
}
int64_t widest_head(DType dtype, const Stream&) { return dtype == DType::f64 ? 128 : 256; }
void attention_begin(const AttentionSums& sums, const Stream& stream) {
  later(stream, [=] { gingham::attention_begin(sums, kHost); });
}
void attention_forward(const Attention& a, const Matrix& q, const Run& queries, const Matrix& k, const Matrix& v, const Run& keys,
                       const AttentionSums& sums, const Stream& stream) {
  later(stream, [=] { gingham::attention_forward(a, q, queries, k, v, keys, sums, kHost); });
}
void attention_finish(const Attention& a, const AttentionSums& sums, const Stream& stream) {
  later(stream, [=] { gingham::attention_finish(a, sums, kHost); });
}
void attention_delta(const Attention& a, const Matrix& dout, const Matrix& out, const Matrix& delta, const Stream& stream) {
  later(stream, [=] { gingham::attention_delta(a, dout, out, delta, kHost); });
}
void attention_backward(const Attention& a, const Matrix& q, const Run& queries, const Matrix& k, const Matrix& v, const Run& keys,
                        const Matrix& dout, const Matrix& lse, const Matrix& delta, const AttentionGradients& sums, const Stream& stream) {
  later(stream, [=] { gingham::attention_backward(a, q, queries, k, v, keys, dout, lse, delta, sums, kHost); });
}

void row_statistics(const Matrix& x, bool centred, const Matrix& statistics, const Stream& stream) {
  later(stream, [=] { gingham::row_statistics(x, centred, statistics, kHost); });
}
void merge_statistics(const Matrix& other, int64_t other_count, const Matrix& into, int64_t into_count, const Stream& stream) {
  later(stream, [=] { gingham::merge_statistics(other, other_count, into, into_count, kHost); });
}
void layer_norm(const Matrix& x, const Norm& norm, const Matrix& y, const Stream& stream) {
  later(stream, [=] { gingham::layer_norm(x, norm, y, kHost); });
}
void layer_norm_pieces(const Matrix& dy, const Matrix& x, const Norm& norm, const Matrix& pieces, const Stream& stream) {
  later(stream, [=] { gingham::layer_norm_pieces(dy, x, norm, pieces, kHost); });
}
void layer_norm_backward(const Matrix& dy, const Matrix& x, const Norm& norm, const Matrix& pieces, const Matrix& dx, const Stream& stream) {
  later(stream, [=] { gingham::layer_norm_backward(dy, x, norm, pieces, dx, kHost); });
}
void layer_norm_weights(const Matrix& dy, const Matrix& x, const Norm& norm, const NormWeights& out, const Stream& stream) {
  later(stream, [=] { gingham::layer_norm_weights(dy, x, norm, out, kHost); });
}
void layer_norm_whole(const Matrix& x, const Norm& norm, const Matrix& y, const Stream& stream) {
  later(stream, [=] { gingham::layer_norm_whole(x, norm, y, kHost); });
}
void layer_norm_whole_backward(const Matrix& dy, const Matrix& x, const Norm& norm, const Matrix& dx, const NormWeights& out, const Stream& stream) {
  later(stream, [=] { gingham::layer_norm_whole_backward(dy, x, norm, dx, out, kHost); });
}

void softmax_parts(const Matrix& logits, const Targets& targets, const Matrix& maxima, const Matrix& pieces, const Stream& stream) {
  later(stream, [=] { gingham::softmax_parts(logits, targets, maxima, pieces, kHost); });
}
void losses(const Matrix& pieces, const Targets& targets, const Matrix& out, const Stream& stream) {
  later(stream, [=] { gingham::losses(pieces, targets, out, kHost); });
}
void softmax_gradient(const Matrix& logits, const Matrix& maxima, const Matrix& pieces, const Targets& targets, const Matrix& scale,
                      const Matrix& gradient, const Stream& stream) {
  later(stream, [=] { gingham::softmax_gradient(logits, maxima, pieces, targets, scale, gradient, kHost); });
}

void gather_rows(const Matrix& table, const int64_t* ids, const Matrix& out, const Stream& stream) {
  later(stream, [=] { gingham::gather_rows(table, ids, out, kHost); });
}
void scatter_rows(const Matrix& rows, const Places& places, const Matrix& table, const Stream& stream) {
  later(stream, [=] { gingham::scatter_rows(rows, places, table, kHost); });
}
void find_wrong(const int64_t* ids, int64_t count, int64_t classes, int64_t ignored, int64_t* found, const Stream& stream) {
  later(stream, [=] { gingham::find_wrong(ids, count, classes, ignored, found, kHost); });
}

bool sm90_checked(const Stream&) { return false; }
std::string sm90_status() { return "off: not on a fake device"; }

}  // namespace cuda
}  // namespace gingham
