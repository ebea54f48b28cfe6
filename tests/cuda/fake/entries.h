// NCCL's entry points over a class Comm, for the two libraries that stand in for NCCL. Included last, where these are known:
//   using Comm = ...;  static size_t Comm::file_bytes();  Comm(path, size, rank), collective;  Comm* Comm::split(color, key), collective;
//   void accept(op), where there is one: looks at an op as it is given;  void launch(stream, ops): queues one group;  void destroy();  void abort();
//   ncclResult_t error(): the asynchronous one
// What a call throws becomes its answer, the words are those of ncclGetErrorString in that thread.
// Not modelled: AllGather, ReduceScatter, AllReduce, which gingham calls in its microbenchmark only.
#pragma once
#include "meeting.h"

namespace standin {

struct Part {
  Comm* comm;
  cudaStream_t stream;
  std::vector<Op> ops;
};
inline thread_local int depth = 0;
inline thread_local std::vector<Part> waiting;

template <class Call>
ncclResult_t answer(Call&& call) {
  try {
    call();
    return ncclSuccess;
  } catch (const Refused& refused) {
    said = refused.what();
    return refused.result;
  }
}

inline ncclResult_t launch() {
  std::vector<Part> parts = std::exchange(waiting, {});
  return answer([&] {
    for (Part& part : parts) part.comm->launch(part.stream, part.ops);
  });
}

template <class AnyComm>
void look(AnyComm* comm, const Op& op) {
  if constexpr (requires { comm->accept(op); }) comm->accept(op);
}

inline ncclResult_t add(ncclComm_t handle, const Op& op, cudaStream_t stream) {
  Comm* comm = reinterpret_cast<Comm*>(handle);
  if (const ncclResult_t refused = answer([&] { look(comm, op); })) return refused;
  const auto same = [&](const Part& part) { return part.comm == comm && part.stream == stream; };
  auto part = std::find_if(waiting.begin(), waiting.end(), same);
  if (part == waiting.end()) part = waiting.insert(waiting.end(), {comm, stream, {}});
  part->ops.push_back(op);
  return depth == 0 ? launch() : ncclSuccess;
}

inline size_t bytes_of(size_t count, ncclDataType_t type) { return count * (type == ncclInt8 ? 1 : 4); }

inline ncclResult_t not_modelled() {
  said = "this library stands in for NCCL's messages between two ranks only; its collectives are not modelled";
  return ncclInvalidUsage;
}

}  // namespace standin

#pragma GCC visibility push(default)
extern "C" {

ncclResult_t ncclGetVersion(int* version) {
  *version = 22800;
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t) { return standin::said.c_str(); }
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  return standin::answer([&] { standin::SharedFile::create(id->internal, sizeof(id->internal), Comm::file_bytes()); });
}
ncclResult_t ncclCommInitRank(ncclComm_t* out, int size, ncclUniqueId id, int rank) {
  return standin::answer([&] {
    *out = reinterpret_cast<ncclComm_t>(new Comm(id.internal, size, rank));
    if (rank == 0) standin::SharedFile::forget(id.internal);
  });
}
ncclResult_t ncclCommSplit(ncclComm_t parent, int color, int key, ncclComm_t* out, ncclConfig_t*) {
  return standin::answer([&] { *out = reinterpret_cast<ncclComm_t>(reinterpret_cast<Comm*>(parent)->split(color, key)); });
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  return standin::answer([&] { reinterpret_cast<Comm*>(comm)->destroy(); });
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  return standin::answer([&] { reinterpret_cast<Comm*>(comm)->abort(); });
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  *error = reinterpret_cast<Comm*>(comm)->error();
  return ncclSuccess;
}
ncclResult_t ncclGroupStart() {
  standin::depth++;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd() { return --standin::depth == 0 ? standin::launch() : ncclSuccess; }
ncclResult_t ncclSend(const void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  return standin::add(comm, {true, peer, static_cast<char*>(const_cast<void*>(data)), standin::bytes_of(count, type)}, stream);
}
ncclResult_t ncclRecv(void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  return standin::add(comm, {false, peer, static_cast<char*>(data), standin::bytes_of(count, type)}, stream);
}
ncclResult_t ncclAllGather(const void*, void*, size_t, ncclDataType_t, ncclComm_t, cudaStream_t) { return standin::not_modelled(); }
ncclResult_t ncclReduceScatter(const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t) { return standin::not_modelled(); }
ncclResult_t ncclAllReduce(const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t) { return standin::not_modelled(); }

}  // extern "C"
#pragma GCC visibility pop
