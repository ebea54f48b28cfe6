// A CUDA runtime without a GPU: every stream is a thread that does its work in order, an event is a ticket that the thread punches, device
// memory is host memory. Made for the host side of the real backend, against the toolkit's real headers. Environment:
//   FAKE_CUDA_DEVICES  number of devices (8)            FAKE_CUDA_JITTER  up to so many microseconds of sleep before each piece of work
//   FAKE_CUDA_SEED     of the jitter
// Each stream also keeps a vector clock: what of the other streams' work it has waited for, known when the work is queued and so the same
// in every run. fake_unjoined() counts the streams with work that a stream has not waited for (what would break a graph capture and let
// memory be used again too early), fake_host_waits() the calls that made the host wait, fake_legacy_uses() those of the default stream.
// Freed memory is poisoned with NaN bit patterns when the stream gets there, new memory too: what is read too early shows.
#include <cuda_runtime_api.h>
#include <string.h>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <set>

#include "fake.h"

namespace fake {
namespace {

int number(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text ? atoi(text) : otherwise;
}

std::atomic<unsigned> lives{0};
std::atomic<uint64_t> legacy_uses{0};

}  // namespace

std::atomic<uint64_t> host_waits{0};

void nap(int microseconds) { std::this_thread::sleep_for(std::chrono::microseconds(microseconds)); }

Jitter::Jitter() : limit_(number("FAKE_CUDA_JITTER", 0)), engine_(static_cast<unsigned>(number("FAKE_CUDA_SEED", 1)) * 7919u + lives++) {}
void Jitter::pause() {
  if (limit_ > 0 && engine_() % 4 == 0) nap(static_cast<int>(engine_() % static_cast<unsigned>(limit_)));
}

class Stream;

// A point that a stream reaches.
class Ticket {
 public:
  void punch() {
    const std::lock_guard lock(mutex_);
    done_ = true;
    changed_.notify_all();
  }
  bool done() {
    const std::lock_guard lock(mutex_);
    return done_;
  }
  void wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return done_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;

 public:
  std::map<const Stream*, uint64_t> clock;  // of the stream where the event was recorded
};

class Stream {
 public:
  Stream() : thread_([this] { run(); }) {
    const std::lock_guard lock(all_mutex);
    all.insert(this);
  }
  ~Stream() {
    {
      const std::lock_guard lock(all_mutex);
      all.erase(this);
    }
    {
      const std::lock_guard lock(mutex_);
      ended_ = true;
      changed_.notify_all();
    }
    thread_.join();
  }
  void add(std::function<void()> work) {
    const std::lock_guard lock(mutex_);
    clock_[this]++;
    push(std::move(work));
  }
  std::shared_ptr<Ticket> ticket() {
    auto ticket = std::make_shared<Ticket>();
    const std::lock_guard lock(mutex_);
    ticket->clock = clock_;
    push([ticket] { ticket->punch(); });
    return ticket;
  }
  void wait_for(const std::shared_ptr<Ticket>& ticket) {
    const std::lock_guard lock(mutex_);
    for (const auto& [stream, work] : ticket->clock) clock_[stream] = std::max(clock_[stream], work);
    push([ticket] { ticket->wait(); });
  }
  std::map<const Stream*, uint64_t> clock() {
    const std::lock_guard lock(mutex_);
    return clock_;
  }
  int unjoined() {
    const auto known = clock();
    const std::lock_guard lock(all_mutex);
    int count = 0;
    for (Stream* other : all) {
      const auto theirs = other->clock();
      const auto own = theirs.find(other), seen = known.find(other);
      count += own != theirs.end() && (seen == known.end() || seen->second < own->second);
    }
    return count;
  }

 private:
  void run() {
    Jitter jitter;
    for (;;) {
      std::function<void()> work;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return ended_ || !queue_.empty(); });
        if (queue_.empty()) return;
        work = std::move(queue_.front());
        queue_.pop_front();
      }
      jitter.pause();
      work();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  void push(std::function<void()> work) {
    queue_.push_back(std::move(work));
    changed_.notify_all();
  }
  static inline std::mutex all_mutex;
  static inline std::set<Stream*> all;
  std::map<const Stream*, uint64_t> clock_;
  std::deque<std::function<void()>> queue_;
  bool ended_ = false;
  std::thread thread_;
};

struct Event {
  std::mutex mutex;
  std::shared_ptr<Ticket> latest;
  std::shared_ptr<Ticket> get() {
    const std::lock_guard lock(mutex);
    return latest;
  }
};

namespace {

Stream& stream_of(cudaStream_t handle) {
  static Stream& legacy = *new Stream;  // never joined: the process may end from any thread
  legacy_uses += handle == nullptr;
  return handle ? *reinterpret_cast<Stream*>(handle) : legacy;
}
Event& event_of(cudaEvent_t handle) { return *reinterpret_cast<Event*>(handle); }

}  // namespace

void enqueue(cudaStream_t stream, std::function<void()> work) { stream_of(stream).add(std::move(work)); }

}  // namespace fake

using fake::event_of;
using fake::stream_of;

namespace {
thread_local int current_device = 0;
int devices() {
  static const int count = fake::number("FAKE_CUDA_DEVICES", 8);
  return count;
}
}  // namespace

extern "C" {

void fake_enqueue(cudaStream_t stream, void (*work)(void*), void* data) {
  fake::enqueue(stream, [work, data] { work(data); });
}
int fake_unjoined(cudaStream_t stream) { return stream_of(stream).unjoined(); }
unsigned long long fake_legacy_uses() { return fake::legacy_uses.load(); }
unsigned long long fake_host_waits() { return fake::host_waits.load(); }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = devices();
  return *count > 0 ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaSetDevice(int device) {
  current_device = device;
  return device < devices() ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  memset(properties, 0, sizeof(*properties));
  strcpy(properties->name, "a fake device of the tests");
  properties->major = 8;
  properties->multiProcessorCount = 4;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 8 : attribute == cudaDevAttrMultiProcessorCount ? 4 : 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an error of the fake runtime"; }
const char* cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "cudaErrorFake"; }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = reinterpret_cast<cudaStream_t>(new fake::Stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) { return cudaStreamCreateWithFlags(stream, flags); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete reinterpret_cast<fake::Stream*>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  fake::host_waits++;
  stream_of(stream).ticket()->wait();
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  fake::host_waits++;
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (auto ticket = event_of(event).get()) stream_of(stream).wait_for(ticket);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new fake::Event);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<fake::Event*>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  auto ticket = stream_of(stream).ticket();
  const std::lock_guard lock(event_of(event).mutex);
  event_of(event).latest = ticket;
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  auto ticket = event_of(event).get();
  return !ticket || ticket->done() ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  fake::host_waits++;
  if (auto ticket = event_of(event).get()) ticket->wait();
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  fake::enqueue(stream, [=] { memcpy(to, from, bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  fake::enqueue(stream, [=] { memset(to, value, bytes); });
  return cudaSuccess;
}
// The size stands in the 64 bytes before the block, so that the poison knows how far it may go.
cudaError_t cudaMalloc(void** out, size_t bytes) {
  char* room = static_cast<char*>(aligned_alloc(64, (bytes + 127) / 64 * 64));
  if (!room) return cudaErrorMemoryAllocation;
  memcpy(room, &bytes, sizeof(bytes));
  memset(room + 64, 0xff, bytes);
  *out = room + 64;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* p) {
  *found = {};
  found->type = cudaMemoryTypeHost;
  found->devicePointer = found->hostPointer = const_cast<void*>(p);
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  if (p) free(static_cast<char*>(p) - 64);
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** out, size_t bytes, cudaStream_t) { return cudaMalloc(out, bytes); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) {
  fake::enqueue(stream, [p] {
    size_t bytes = 0;
    memcpy(&bytes, static_cast<char*>(p) - 64, sizeof(bytes));
    memset(p, 0xff, bytes);
    cudaFree(p);
  });
  return cudaSuccess;
}

}  // extern "C"
