// A CUDA runtime without a GPU: every stream is a thread that does its work in order, an event is a ticket that the thread punches, device
// memory is host memory. Made for the host side of the real backend, against the toolkit's real headers. Environment:
//   FAKE_CUDA_DEVICES  number of devices (8)            FAKE_CUDA_JITTER  up to so many microseconds of sleep before each piece of work
//   FAKE_CUDA_SEED     of the jitter                    FAKE_CUDA_SLOW  device,microseconds that its threads take to record an event
//   FAKE_CUDA_QUEUES   n: the streams of a device share n queues, each of which does its work in the order in which the host queued it
//   FAKE_CUDA_GRAPHS   seed: a captured graph runs on one stream, in a random order that its dependencies allow
// Each stream also keeps a vector clock: what of the other streams' work it has waited for, known when the work is queued and so the same
// in every run. fake_unjoined() counts the streams with work that a stream has not waited for (what would break a graph capture and let
// memory be used again too early), fake_host_waits() the calls that made the host wait, fake_legacy_uses() those of the default stream,
// fake_legacy_joins() the waits between it and streams that were made without cudaStreamNonBlocking.
// Freed memory is poisoned with NaN bit patterns when the stream gets there, new memory too: what is read too early shows. What is freed under a
// message that is still to come or to go ends the process: on a device another tensor would be there by then.
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <string.h>

#include "stream.h"
#include "windows.h"

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

void enqueue(cudaStream_t stream, std::function<void()> work) { entered(stream).add(std::move(work)); }
int device_of(cudaStream_t stream) { return stream_of(stream).device; }

}  // namespace fake

using fake::event_of;
using fake::stream_of;

namespace {
using fake::current_device;
std::atomic<uint64_t> kept{0};  // bytes that a pool keeps when it is asked to give back
void take_time() {
  int device = 0, microseconds = 0;
  const char* slow = getenv("FAKE_CUDA_SLOW");
  if (slow && sscanf(slow, "%d,%d", &device, &microseconds) == 2 && device == current_device) fake::nap(microseconds);
}
int devices() {
  static const int count = fake::number("FAKE_CUDA_DEVICES", 8);
  return count;
}
}  // namespace

extern "C" {

// As a launch: the stream must be one of the thread's device.
cudaError_t fake_enqueue(cudaStream_t stream, void (*work)(void*), void* data) {
  if (stream_of(stream).device != current_device) return cudaErrorInvalidResourceHandle;
  fake::enqueue(stream, [work, data] { work(data); });
  return cudaSuccess;
}
unsigned long long fake_legacy_joins() { return fake::legacy_joins.load(); }
int fake_unjoined(cudaStream_t stream) { return stream_of(stream).unjoined(); }
unsigned long long fake_legacy_uses() { return fake::legacy_uses.load(); }
unsigned long long fake_pool_keeps() { return kept.load(); }
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
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined:
      return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation:
      return "dependency created on uncaptured work in another stream";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing blocking stream";
    case cudaErrorCapturedEvent:
      return "operation not permitted on an event last recorded in a capturing stream";
    default:
      return "an error of the fake runtime";
  }
}
const char* cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "cudaErrorFake"; }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  *stream = reinterpret_cast<cudaStream_t>(new fake::Stream(current_device, (flags & cudaStreamNonBlocking) == 0));
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) { return cudaStreamCreateWithFlags(stream, flags); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete reinterpret_cast<fake::Stream*>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  fake::host_waits++;
  if (const auto capture = stream_of(stream).capture()) return capture->fail(cudaErrorStreamCaptureUnsupported);
  stream_of(stream).ticket()->wait();
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  fake::host_waits++;
  return fake::refused_beside_capture();
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const auto ticket = event_of(event).get();
  const auto capture = stream_of(stream).capture(), other = ticket ? ticket->capture : nullptr;
  if (capture && capture->broken) return cudaErrorStreamCaptureInvalidated;
  if (other != capture) {
    if (!other || (capture && other->ended)) return capture->fail(cudaErrorStreamCaptureIsolation);
    if (capture) return other->fail(capture->fail(cudaErrorStreamCaptureMerge));
    if (other->ended) return cudaErrorCapturedEvent;
    if (!stream) return other->fail(cudaErrorStreamCaptureImplicit);
    const std::lock_guard lock(fake::captures_mutex);
    stream_of(stream).join(other);
  }
  if (ticket) stream_of(stream).wait_for(ticket);
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  auto* made = new fake::Event;
  made->device = current_device;
  made->timed = (flags & cudaEventDisableTiming) == 0;
  *event = reinterpret_cast<cudaEvent_t>(made);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<fake::Event*>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  take_time();
  if (event_of(event).device != fake::entered(stream).device) return cudaErrorInvalidResourceHandle;
  const auto capture = stream_of(stream).capture();
  if (capture && capture->broken) return cudaErrorStreamCaptureInvalidated;
  auto ticket = stream_of(stream).ticket();
  const std::lock_guard lock(event_of(event).mutex);
  event_of(event).latest = ticket;
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  auto ticket = event_of(event).get();
  if (ticket && ticket->capture) return ticket->capture->fail(cudaErrorCapturedEvent);
  const cudaError_t refused = fake::refused_beside_capture();
  return refused != cudaSuccess ? refused : !ticket || ticket->done() ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  const auto first = event_of(begin).get(), last = event_of(end).get();
  if (!first || !last || !event_of(begin).timed || !event_of(end).timed) return cudaErrorInvalidResourceHandle;
  if (!first->done() || !last->done()) return cudaErrorNotReady;
  *milliseconds = std::chrono::duration<float, std::milli>(last->when() - first->when()).count();
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  fake::host_waits++;
  auto ticket = event_of(event).get();
  if (ticket && ticket->capture) return ticket->capture->fail(cudaErrorCapturedEvent);
  if (ticket) ticket->wait();
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  fake::trace_copy(stream_of(stream), to, from, bytes);
  fake::enqueue(stream, [=, pending = std::make_shared<fake::PendingCopy>(to, from, bytes)] { memcpy(to, from, bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (const cudaError_t refused = fake::refused_beside_capture()) return refused;
  memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  fake::enqueue(stream, [=] { memset(to, value, bytes); });
  return cudaSuccess;
}
// A pool is a sign only: freed memory goes back at once, and is poisoned.
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device) {
  *pool = reinterpret_cast<cudaMemPool_t>(static_cast<uintptr_t>(device) + 1);
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr attribute, void* value) {
  if (attribute != cudaMemPoolAttrReleaseThreshold) return cudaErrorInvalidValue;
  kept.store(*static_cast<uint64_t*>(value));
  return cudaSuccess;
}
// The size stands in the 64 bytes before the block, so that the poison knows how far it may go.
cudaError_t cudaMallocAsync(void** out, size_t bytes, cudaStream_t) {
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
  if (p && !fake::release(p)) free(static_cast<char*>(p) - 64);
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) {
  fake::enqueue(stream, [p] {
    size_t bytes = 0;
    memcpy(&bytes, static_cast<char*>(p) - 64, sizeof(bytes));
    if (fake::under_way(p, bytes) || fake::PendingCopy::any(p, bytes)) {
      fprintf(stderr, "fake CUDA: memory of a message or copy under way is used again\n");
      abort();
    }
    memset(p, 0xff, bytes);
    cudaFree(p);
  });
  return cudaSuccess;
}

}  // extern "C"
