// The kernels of attention under a plain name, as host.cc has the others.
#include "host.h"
#include "kernels/attention.h"
#include "kernels/cast.h"

using namespace gingham;

extern "C" {

struct HostAttention {
  int64_t batch, heads, kv_heads, width, causal, time;
  int64_t query_runs, key_runs;
  const int64_t *queries, *keys;  // of each run: row, count, position, column
  int64_t mask_strides[4];
  double scale, p;
  Matrix mask;  // none: no data
};

// lse and sum: [batch heads, time]; narrow: out in the operands' type.
int host_attention(const HostAttention* call, const Matrix* q, const Matrix* k, const Matrix* v, const Matrix* dout, const Matrix* out,
                   const Matrix* narrow, const Matrix* lse, const Matrix* sum, const Matrix* delta, const Matrix* dq, const Matrix* dk,
                   const Matrix* dv) {
  return guarded(false, [&](const Stream& stream) {
    Attention a;
    a.batch = call->batch;
    a.heads = call->heads;
    a.kv_heads = call->kv_heads;
    a.width = call->width;
    a.scale = call->scale;
    a.causal = call->causal != 0;
    a.mask = call->mask.data;
    a.mask_dtype = call->mask.dtype;
    for (int i = 0; i < 4; i++) a.mask_strides[i] = call->mask_strides[i];
    a.dropout = {7, 5, 3, call->p};
    a.all_heads = call->heads;
    a.time = call->time;
    const auto run = [](const int64_t* at) { return Run{at[0], at[1], at[2], at[3]}; };
    const AttentionSums sums{*out, *lse, *sum};
    cuda::attention_begin(sums, stream);
    for (int64_t j = 0; j < call->key_runs; j++)
      for (int64_t i = 0; i < call->query_runs; i++)
        if (sees(a, run(call->queries + 4 * i), run(call->keys + 4 * j)))
          cuda::attention_forward(a, *q, run(call->queries + 4 * i), *k, *v, run(call->keys + 4 * j), sums, stream);
    cuda::attention_finish(a, sums, stream);
    cuda::cast(*out, *narrow, stream);
    cuda::attention_delta(a, *dout, *narrow, *delta, stream);
    for (int64_t j = 0; j < call->key_runs; j++)
      for (int64_t i = 0; i < call->query_runs; i++)
        if (sees(a, run(call->queries + 4 * i), run(call->keys + 4 * j)))
          cuda::attention_backward(a, *q, run(call->queries + 4 * i), *k, *v, run(call->keys + 4 * j), *dout, *lse, *delta, {*dq, *dk, *dv}, stream);
  });
}

}  // extern "C"
