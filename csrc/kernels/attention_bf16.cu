#include "kernels/attention_widths.cuh"

namespace gingham::cuda {

void attention_forward(const AttentionPart& p, const ForwardViews<Bf16>& views, const Stream& stream) { forward_of_width(p, views, stream); }
void attention_backward(const AttentionPart& p, const BackwardViews<Bf16>& views, const Stream& stream) { backward_of_width(p, views, stream); }

}  // namespace gingham::cuda
