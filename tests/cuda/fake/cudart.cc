// A CUDA runtime without a GPU: every stream is a thread that does its work in order, an event is a ticket that the thread punches, device
// memory is host memory. Made for the host side of the real backend, against the toolkit's real headers. Environment:
//   FAKE_CUDA_DEVICES  number of devices (8)            FAKE_CUDA_JITTER  up to so many microseconds of sleep before each piece of work
//   FAKE_CUDA_SEED     of the jitter
// Freed memory is poisoned with NaN bit patterns when the stream gets there, new memory too: what is read too early shows.
#include <cuda_runtime_api.h>
#include <string.h>

#include <condition_variable>
#include <memory>
#include <mutex>

#include "fake.h"

namespace fake {
namespace {

int number(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text ? atoi(text) : otherwise;
}

std::atomic<unsigned> lives{0};

}  // namespace

std::atomic<uint64_t> host_waits{0};

void nap(int microseconds) { std::this_thread::sleep_for(std::chrono::microseconds(microseconds)); }

Jitter::Jitter() : limit_(number("FAKE_CUDA_JITTER", 0)), engine_(static_cast<unsigned>(number("FAKE_CUDA_SEED", 1)) * 7919u + lives++) {}
void Jitter::pause() {
  if (limit_ > 0 && engine_() % 4 == 0) nap(static_cast<int>(engine_() % static_cast<unsigned>(limit_)));
}

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
};

class Stream {
 public:
  Stream() : thread_([this] { run(); }) {}
  ~Stream() {
    {
      const std::lock_guard lock(mutex_);
      ended_ = true;
      changed_.notify_all();
    }
    thread_.join();
  }
  void add(std::function<void()> work) {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(work));
    changed_.notify_all();
  }
  std::shared_ptr<Ticket> ticket() {
    auto ticket = std::make_shared<Ticket>();
    add([ticket] { ticket->punch(); });
    return ticket;
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
  if (auto ticket = event_of(event).get()) fake::enqueue(stream, [ticket] { ticket->wait(); });
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
