#include "transport/nccl_api.h"

#include <dlfcn.h>

#include <array>
#include <cstdlib>

#include "base/check.h"
#include "transport/device.h"

namespace gingham {
namespace {

std::string given_path;

struct Library {
  NcclApi api{};
  NcclFound found;
};

void* open(std::string* from) {
  constexpr const char* kName = "libnccl.so.2";
  if (const char* wanted = getenv("GINGHAM_NCCL")) {
    void* handle = dlopen(wanted, RTLD_NOW | RTLD_LOCAL);
    *from = handle ? wanted : concat("GINGHAM_NCCL: ", dlerror());
    return handle;
  }
  if (void* handle = dlopen(kName, RTLD_NOW | RTLD_NOLOAD)) {
    *from = "the process (loaded by torch)";
    return handle;
  }
  for (const std::string& path : std::array<std::string, 2>{given_path, kName}) {
    if (path.empty()) continue;
    if (void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
      *from = path;
      return handle;
    }
  }
  *from = "not found: neither in the process, nor GINGHAM_NCCL, nor the nvidia-nccl wheel, nor the system; pip install nvidia-nccl-cu13";
  return nullptr;
}

template <class Fn>
bool resolve(void* handle, const char* name, Fn* out) {
  *out = reinterpret_cast<Fn>(dlsym(handle, name));
  return *out != nullptr;
}

Library load() {
  Library out;
  void* handle = open(&out.found.from);
  if (!handle) return out;
  NcclApi& a = out.api;
  const bool all = resolve(handle, "ncclGetVersion", &a.GetVersion) && resolve(handle, "ncclGetUniqueId", &a.GetUniqueId) &&
                   resolve(handle, "ncclCommInitRank", &a.CommInitRank) && resolve(handle, "ncclCommSplit", &a.CommSplit) &&
                   resolve(handle, "ncclCommDestroy", &a.CommDestroy) && resolve(handle, "ncclCommAbort", &a.CommAbort) &&
                   resolve(handle, "ncclCommGetAsyncError", &a.CommGetAsyncError) && resolve(handle, "ncclGetErrorString", &a.GetErrorString) &&
                   resolve(handle, "ncclGroupStart", &a.GroupStart) && resolve(handle, "ncclGroupEnd", &a.GroupEnd) &&
                   resolve(handle, "ncclSend", &a.Send) && resolve(handle, "ncclRecv", &a.Recv) && resolve(handle, "ncclAllGather", &a.AllGather) &&
                   resolve(handle, "ncclReduceScatter", &a.ReduceScatter) && resolve(handle, "ncclAllReduce", &a.AllReduce);
  if (!all) {
    out.found.from += concat(" is too old, ncclCommSplit wants 2.18 or newer: ", dlerror());
    return out;
  }
  a.GetVersion(&out.found.version);
  out.found.same_gpu = dlsym(handle, "ncclSameGpu") != nullptr;
  out.found.found = true;
  return out;
}

const Library& library() {
  static const Library loaded = load();
  return loaded;
}

}  // namespace

const NcclFound& nccl_found() { return library().found; }

const NcclApi& nccl() {
  CHECK(DeviceError, library().found.found, "NCCL ", library().found.from);
  return library().api;
}

void set_nccl_path(const std::string& path) { given_path = path; }

}  // namespace gingham
