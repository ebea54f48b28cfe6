// What host.cc and host_sm90.cu share: a stream whose memory is the test's, and errors as return codes.
#pragma once
#include <exception>

#include "base/stream.h"

class TestStream : public gingham::Stream {
 public:
  gingham::Device device() const override { return gingham::Device::cuda; }
  void* allocate(size_t bytes, gingham::Heap::Kind) const override;
  void free(void*) const override {}
};

int failed(const std::exception& error);

template <class Fn>
int guarded(bool tf32, Fn fn) {
  TestStream stream;
  stream.math = tf32 ? gingham::Math::tf32 : gingham::Math::exact;
  try {
    fn(stream);
    return 0;
  } catch (const std::exception& error) {
    return failed(error);
  }
}
