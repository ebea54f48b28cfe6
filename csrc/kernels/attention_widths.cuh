// The kernel for a head's width.
#pragma once
#include "kernels/attention_backward.cuh"
#include "kernels/attention_forward.cuh"

namespace gingham::cuda {

// go(width): the narrowest that holds a head.
template <class T, class Go>
void with_head_width(int64_t width, Go go) {
  if (width <= 64) return go(std::integral_constant<int, 64>{});
  if (width <= 128) return go(std::integral_constant<int, 128>{});
  if constexpr (sizeof(T) < 8) go(std::integral_constant<int, 256>{});
}

template <class T>
void forward_of_width(const AttentionPart& p, const ForwardViews<T>& views, const Stream& stream) {
  with_head_width<T>(p.a.width, [&](auto width) { run_forward<T, decltype(width)::value>(p, views, stream); });
}

template <class T>
void backward_of_width(const AttentionPart& p, const BackwardViews<T>& views, const Stream& stream) {
  with_head_width<T>(p.a.width, [&](auto width) {
    run_backward<T, decltype(width)::value, true>(p, views, stream);
    run_backward<T, decltype(width)::value, false>(p, views, stream);
  });
}

}  // namespace gingham::cuda
