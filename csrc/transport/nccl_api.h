// The part of NCCL's C interface that gingham uses, found at run time: the library that torch has loaded into this process, else
// GINGHAM_NCCL, else the path that the package found (the nvidia-nccl wheel), else the system's. Nothing links to NCCL, so that one
// binary imports where there is none. Declared here and compared with the real nccl.h by a test (2.18 to 2.32: NCCL keeps its ABI).
#pragma once
#include <cuda_runtime_api.h>

#include <string>

#ifndef NCCL_H_
struct ncclComm;
using ncclComm_t = ncclComm*;
struct ncclUniqueId {
  char internal[128];
};
struct ncclConfig_t;
enum ncclResult_t { ncclSuccess = 0, ncclInvalidUsage = 5, ncclRemoteError = 6, ncclInProgress = 7 };
enum ncclDataType_t { ncclInt8 = 0, ncclFloat32 = 7 };
enum ncclRedOp_t { ncclSum = 0 };
#endif

namespace gingham {

struct NcclApi {
  ncclResult_t (*GetVersion)(int*);
  ncclResult_t (*GetUniqueId)(ncclUniqueId*);
  ncclResult_t (*CommInitRank)(ncclComm_t*, int, ncclUniqueId, int);
  ncclResult_t (*CommSplit)(ncclComm_t, int, int, ncclComm_t*, ncclConfig_t*);
  ncclResult_t (*CommDestroy)(ncclComm_t);
  ncclResult_t (*CommAbort)(ncclComm_t);
  ncclResult_t (*CommGetAsyncError)(ncclComm_t, ncclResult_t*);
  const char* (*GetErrorString)(ncclResult_t);
  ncclResult_t (*GroupStart)();
  ncclResult_t (*GroupEnd)();
  ncclResult_t (*Send)(const void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t);
  ncclResult_t (*Recv)(void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t);
  // The yardsticks of the microbenchmark.
  ncclResult_t (*AllGather)(const void*, void*, size_t, ncclDataType_t, ncclComm_t, cudaStream_t);
  ncclResult_t (*ReduceScatter)(const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t);
  ncclResult_t (*AllReduce)(const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t);
};

struct NcclFound {
  bool found = false;
  int version = 0;        // 22803 is 2.28.3
  bool same_gpu = false;  // ranks may share a GPU: it exports ncclSameGpu, as the stand-in of the tests does and no NCCL
  std::string from;       // where it was found, or why it was not
};

const NcclFound& nccl_found();  // looks once
const NcclApi& nccl();          // throws DeviceError where there is none

#define NCCL_CHECK(call)                                                                                                \
  do {                                                                                                                  \
    const ncclResult_t nccl_check_status = (call);                                                                      \
    CHECK(::gingham::DeviceError, nccl_check_status == ncclSuccess || nccl_check_status == ncclInProgress, #call, ": ", \
          ::gingham::nccl().GetErrorString(nccl_check_status));                                                         \
  } while (0)

}  // namespace gingham
