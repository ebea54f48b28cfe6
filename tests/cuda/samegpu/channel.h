// One way from one rank to another in one communicator: slots in host memory that both processes map and register with CUDA, and two
// counters of pieces. Devices wait for the counters and write them, in the order of their streams; no host ever waits.
//   sent    pieces that lie in their slots          taken    pieces that have been copied out of them
// The hosts announce the size of every message as they queue it, so that ends which differ are seen by whoever comes later.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "meeting.h"

namespace samegpu {

using standin::Refused;

constexpr int kSlots = 2, kAnnounced = 1024;
constexpr size_t kPiece = size_t{1} << 20;
constexpr uint32_t kFarAhead = 1u << 30;

struct Shared {
  alignas(4096) std::atomic<uint32_t> sent;
  alignas(128) std::atomic<uint32_t> taken;
  alignas(4096) std::atomic<uint64_t> announced[2][kAnnounced];  // by the sender, by the receiver: number + 1 above kSizeBits, bytes below
  alignas(4096) char slots[kSlots][kPiece];
};
static_assert(sizeof(Shared) % 4096 == 0 && sizeof(std::atomic<uint32_t>) == 4);

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw Refused(standin::kCudaError, std::string("same-GPU stand-in for NCCL: ") + what + ": " + cudaGetErrorString(status));
}

// The driver's operations on memory in the order of a stream; nothing links to libcuda.
class MemoryOperations {
 public:
  static const MemoryOperations& get() {
    static const MemoryOperations found;
    return found;
  }
  void wait(cudaStream_t stream, const char* address, uint32_t value) const { run(wait_, stream, address, value, "cuStreamWaitValue32"); }
  void write(cudaStream_t stream, const char* address, uint32_t value) const { run(write_, stream, address, value, "cuStreamWriteValue32"); }

 private:
  using Call = CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned);
  MemoryOperations() : wait_(find("cuStreamWaitValue32")), write_(find("cuStreamWriteValue32")) {}
  static Call find(const char* name) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &result), name);
    if (result != cudaDriverEntryPointSuccess || !function)
      throw Refused(standin::kCudaError, std::string("same-GPU stand-in for NCCL: this driver has no ") + name + " of CUDA 12 or newer");
    return reinterpret_cast<Call>(function);
  }
  // The defaults are what is wanted: GEQ, cyclic, for a wait; for a write all that the stream did before is seen first.
  static void run(Call call, cudaStream_t stream, const char* address, uint32_t value, const char* what) {
    const CUresult status = call(stream, reinterpret_cast<CUdeviceptr>(address), value, 0);
    if (status != CUDA_SUCCESS)
      throw Refused(standin::kCudaError, std::string("same-GPU stand-in for NCCL: ") + what + ": error " + std::to_string(status));
  }
  Call wait_, write_;
};

// This process' side of a channel.
class End {
 public:
  End(const standin::SharedFile& file, size_t offset, bool sends) : sends_(sends), shared_(static_cast<Shared*>(file.map(offset, sizeof(Shared)))) {
    cudaError_t status = cudaHostRegister(shared_, sizeof(Shared), cudaHostRegisterPortable | cudaHostRegisterMapped);
    registered_ = status == cudaSuccess;
    void* device = nullptr;
    if (registered_) status = cudaHostGetDevicePointer(&device, shared_, 0);
    device_ = static_cast<char*>(device);
    if (status == cudaSuccess) return;
    leave();
    check(status, "cudaHostRegister of a channel's memory");
  }
  End(const End&) = delete;
  ~End() { leave(); }
  bool sends() const { return sends_; }

  // The number of the message, and whether its other end is known to have another size: then `theirs` is that.
  bool differs(uint64_t bytes, uint64_t* number, uint64_t* theirs) {
    *number = messages_++;
    const size_t at = *number % kAnnounced;
    const uint64_t mark = (*number + 1) & kNumberMask;
    shared_->announced[sends_ ? 0 : 1][at].store(mark << kSizeBits | bytes);
    const uint64_t other = shared_->announced[sends_ ? 1 : 0][at].load();
    const uint64_t ahead = ((other >> kSizeBits) - mark) & kNumberMask;
    *theirs = other & ((uint64_t{1} << kSizeBits) - 1);
    if (ahead == 0) return *theirs != bytes;
    if (other != 0 && ahead < kNumberMask / 2)
      throw Refused(ncclInvalidUsage,
                    "one rank is more than " + std::to_string(kAnnounced) + " messages ahead of another: their sizes cannot be compared");
    return false;  // the other end comes later, and compares
  }

  // Queues the next piece of a message.
  void move(cudaStream_t stream, char* data, size_t bytes) {
    const MemoryOperations& memory = MemoryOperations::get();
    const uint32_t n = pieces_.load();
    char* slot = device_ + offsetof(Shared, slots) + n % kSlots * kPiece;
    char *sent = device_ + offsetof(Shared, sent), *taken = device_ + offsetof(Shared, taken);
    pieces_.store(n + 1);  // before it is queued: who releases the stream must not miss it
    memory.wait(stream, sends_ ? taken : sent, sends_ ? n + 1 - kSlots : n + 1);
    check(cudaMemcpyAsync(sends_ ? slot : data, sends_ ? data : slot, bytes, cudaMemcpyDefault, stream), "cudaMemcpyAsync");
    memory.write(stream, sends_ ? sent : taken, n + 1);
  }

  // Lets pass what is queued here, whatever the other rank does; its device may write the counter again.
  void release() { (sends_ ? shared_->taken : shared_->sent).store(pieces_.load() + kFarAhead); }

 private:
  static constexpr int kSizeBits = 40;
  static constexpr uint64_t kNumberMask = (uint64_t{1} << (64 - kSizeBits)) - 1;
  void leave() {
    if (registered_) cudaHostUnregister(shared_);
    munmap(shared_, sizeof(Shared));
  }
  const bool sends_;
  Shared* shared_;
  char* device_ = nullptr;
  bool registered_ = false;
  std::atomic<uint32_t> pieces_{0};  // queued so far: goes round
  uint64_t messages_ = 0;
};

}  // namespace samegpu
