// The kernels of layers under plain names, as host.cc does for the others.
#include "host.h"
#include "kernels/cross_entropy.h"
#include "kernels/embedding.h"
#include "kernels/indices.h"
#include "kernels/layer_norm.h"

using namespace gingham;

extern "C" {

// Two ranks' columns of one layer norm, halves of x: statistics apart, merged, and everything after with the merged ones.
int host_layer_norm(const Matrix* x, const Matrix* dy, const Matrix* gamma, const Matrix* beta, const Matrix* statistics, const Matrix* others,
                    const Matrix* y, const Matrix* pieces, const Matrix* dx, const Matrix* dgamma, const Matrix* dbeta, double eps, int centred) {
  return guarded(false, [&](const Stream& stream) {
    const int64_t half = x->cols / 2;
    cuda::row_statistics(x->slice(1, 0, half), centred != 0, *statistics, stream);
    cuda::row_statistics(x->slice(1, half, x->cols), centred != 0, *others, stream);
    cuda::merge_statistics(*others, x->cols - half, *statistics, half, stream);
    const Norm norm{*statistics, x->cols, eps, *gamma, *beta, centred != 0};
    cuda::layer_norm(*x, norm, *y, stream);
    cuda::layer_norm_pieces(*dy, *x, norm, *pieces, stream);
    cuda::layer_norm_backward(*dy, *x, norm, *pieces, *dx, stream);
    cuda::layer_norm_weights(*dy, *x, norm, {*dgamma, *dbeta}, stream);
  });
}

int host_layer_norm_whole(const Matrix* x, const Matrix* dy, const Matrix* gamma, const Matrix* beta, const Matrix* statistics, const Matrix* y,
                          const Matrix* dx, const Matrix* dgamma, const Matrix* dbeta, double eps, int centred) {
  return guarded(false, [&](const Stream& stream) {
    const Norm norm{*statistics, x->cols, eps, *gamma, *beta, centred != 0};
    cuda::layer_norm_whole(*x, norm, *y, stream);
    cuda::layer_norm_whole_backward(*dy, *x, norm, *dx, {*dgamma, *dbeta}, stream);
  });
}

int host_cross_entropy(const Matrix* logits, const int64_t* ids, double smoothing, const Matrix* maxima, const Matrix* pieces, const Matrix* out,
                       const Matrix* scale, const Matrix* gradient) {
  return guarded(false, [&](const Stream& stream) {
    const Targets targets{ids, -100, 0, logits->cols, smoothing};
    cuda::softmax_parts(*logits, targets, *maxima, *pieces, stream);
    cuda::losses(*pieces, targets, *out, stream);
    cuda::softmax_gradient(*logits, *maxima, *pieces, targets, *scale, *gradient, stream);
  });
}

int host_embedding(const Matrix* table, const int64_t* ids, const Matrix* out) {
  return guarded(false, [&](const Stream& stream) { cuda::gather_rows(*table, ids, *out, stream); });
}

int host_scatter(const Matrix* rows, const int64_t* ids, const int64_t* order, int64_t first, int64_t skipped, const Matrix* table) {
  return guarded(false, [&](const Stream& stream) { cuda::scatter_rows(*rows, {ids, order, first, skipped}, *table, stream); });
}

int host_find_wrong(const int64_t* ids, int64_t count, int64_t classes, int64_t ignored, int64_t* found) {
  return guarded(false, [&](const Stream& stream) { cuda::find_wrong(ids, count, classes, ignored, found, stream); });
}

}  // extern "C"
