// Device memory that other processes can open: cudaMalloc's, and the handles for it. FAKE_CUDA_WINDOWS=none: no handle can be had;
// closed: none can be opened; private: what is opened is a copy that nobody else sees. The last two count for ranks behind the first only.
#pragma once
#include <cuda_runtime_api.h>

namespace fake {

class Stream;

bool release(void* p);                        // whether it is memory of cudaMalloc's, which is given back
bool in_window(const void* p, size_t bytes);  // of this process or opened
int device_of_opened(const void* p);          // -1: not opened
void trace_copy(const Stream& stream, const void* to, const void* from, size_t bytes);

// A copy from when it is queued to when it is done or dropped.
class PendingCopy {
 public:
  PendingCopy(void* to, const void* from, size_t bytes);
  PendingCopy(const PendingCopy&) = delete;
  ~PendingCopy();
  static bool any(const void* p, size_t bytes);  // that reads or writes there

 private:
  const char *to_, *from_;
  size_t bytes_;
};

}  // namespace fake
