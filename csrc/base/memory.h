// How much memory this process may still take: the least of what the host has to spare (MemAvailable) and what each memory cgroup above
// the process leaves (memory.max of version 2, memory.limit_in_bytes of version 1). A group that is over its limit is not told: the kernel
// kills one of its processes. So the heap asks first.
//   limit 1 GiB, 900 MiB used of which 200 MiB are pages of files, which the kernel takes back when asked  ->  324 MiB
#pragma once
#include <cstddef>
#include <string>

namespace gingham {

struct MemoryLeft {
  size_t bytes;
  std::string whose;  // "the host", or the cgroup's folder
};

// root: a folder that stands for / (tests).
MemoryLeft memory_left(const std::string& root = "");

}  // namespace gingham
