#include "transport/device.h"

#include <map>

#ifdef GINGHAM_CUDA
#include "transport/copy.h"
#include "transport/nccl.h"
#endif

namespace gingham {

#ifdef GINGHAM_CUDA
namespace {

// What the runtime says of memory that it allocates on the current device.
bool allocates_on_host() {
  void* room = nullptr;
  CUDA_CHECK(cudaMalloc(&room, 64));
  cudaPointerAttributes found{};
  const cudaError_t status = cudaPointerGetAttributes(&found, room);
  cudaFree(room);
  CUDA_CHECK(status);
  return found.type == cudaMemoryTypeHost;
}

// Of the highest priority: its kernels are small, and messages wait for them.
class SideStream {
 public:
  SideStream() = default;
  SideStream(const SideStream&) = delete;
  ~SideStream() {
    if (stream_) cudaStreamDestroy(stream_);
  }
  void make() { stream_ = urgent_stream(); }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class CudaGpu : public Gpu {
 public:
  CudaGpu(int ordinal, Carrier carrier) : stream_(ordinal), order_(stream_), carrier_(carrier) {
    memory_is_host_ = allocates_on_host();
    stream_.broken_off = [this] { break_off(); };
  }
  Stream& stream() override { return stream_; }
  int ordinal() const override { return stream_.ordinal(); }
  bool memory_is_host() const override { return memory_is_host_; }
  void begin(std::optional<void*> stream) override {
    stream_.enter();
    if (stream && !beside_) stream_.follow(static_cast<cudaStream_t>(*stream));
  }
  uint64_t mark(std::optional<void*> stream) override {
    begin(stream);
    marks_.try_emplace(++marked_).first->second.record(native(stream_));
    return marked_;
  }
  void beside(std::optional<void*> stream, uint64_t mark) override {
    CHECK(DeviceError, !beside_, "a call beside the caller's inside of another");
    begin(stream);
    if (!side_.get()) side_.make();
    callers_ = native(stream_);
    const auto marked = marks_.find(mark);
    CHECK(DeviceError, mark == 0 || marked != marks_.end(), "a call beside the caller's after a mark that is not one");
    if (mark == 0) forked_.record(callers_);
    (mark ? marked->second : forked_).hold_back(side_.get());
    if (mark) marks_.erase(marked);
    stream_.follow(side_.get());
    beside_ = unjoined_ = true;
  }
  void back() override {
    if (!beside_) return;
    stream_.follow(callers_);
    beside_ = false;
  }
  void join(std::optional<void*> stream) override {
    back();
    begin(stream);
    marks_.clear();
    if (!unjoined_) return;
    joined_.record(side_.get());
    joined_.hold_back(native(stream_));
    unjoined_ = false;
  }
  void break_off() override {
    try {
      order_.break_off();
      if (!unjoined_) return;
      joined_.record(side_.get());
      joined_.hold_back(beside_ ? callers_ : native(stream_));
    } catch (const Error&) {
      cudaGetLastError();  // the device or a capture has gone before: there is nothing to wait for
    }
  }
  int enter(int ordinal) override {
    int before = 0;
    cudaGetDevice(&before);
    if (before != ordinal) cudaSetDevice(ordinal);
    return before;
  }
  void take_memory_from(std::shared_ptr<DeviceMemory> memory) override { stream_.take_memory_from(std::move(memory)); }
  Heap::Usage usage() const override { return stream_.usage(); }
  void reset_peak() override { stream_.reset_peak(); }
  void tell_refusals(std::function<void(const std::string&)> tell) override { stream_.refused = std::move(tell); }
  void fail_next() override { stream_.fail_next(); }
  void refuse_injected() const override { stream_.refuse_injected(); }
  void synchronize() override { CUDA_CHECK(cudaStreamSynchronize(native(stream_))); }
  void upload(void* device, const void* host, size_t bytes) override {
    CUDA_CHECK(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, native(stream_)));
    synchronize();
  }
  void download(void* host, const void* device, size_t bytes) override {
    CUDA_CHECK(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, native(stream_)));
    synchronize();
  }
  double seconds(const std::function<void()>& lead, const std::function<void()>& timed) override {
    const Event begin(cudaEventDefault), end(cudaEventDefault);
    lead();
    begin.record(native(stream_));
    timed();
    end.record(native(stream_));
    synchronize();
    float milliseconds = 0;
    CUDA_CHECK(cudaEventElapsedTime(&milliseconds, begin.get(), end.get()));
    return milliseconds * 1e-3;
  }
  std::unique_ptr<Axis> axis(Program& program, std::unique_ptr<Axis> shared, AxisMemory memory, const std::vector<int>& members) override {
    stream_.enter();
    if (carrier_ == Carrier::copy || program.size() == 1) return std::make_unique<Copy>(std::move(shared), order_, program, memory, members);
    if (!program.attachment) program.attachment = std::make_shared<NcclWorld>(program, stream_);
    return std::make_unique<Nccl>(std::move(shared), order_, program, memory, *std::static_pointer_cast<NcclWorld>(program.attachment), members);
  }

 private:
  CudaStream stream_;
  GroupOrder order_;
  Carrier carrier_;
  bool memory_is_host_ = false;
  SideStream side_;
  Event forked_, joined_;
  std::map<uint64_t, Event> marks_;
  uint64_t marked_ = 0;
  cudaStream_t callers_ = nullptr;
  bool beside_ = false, unjoined_ = false;
};

int visible_devices() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace

std::unique_ptr<Gpu> make_gpu(Control& control, int ordinal, Carrier carrier) {
  const int count = visible_devices();
  CHECK(DeviceError, count > 0, "rank ", control.rank(), ": no CUDA device is visible (", device_report().missing, ")");
  CHECK(DeviceError, carrier == Carrier::copy || ordinal < count || nccl_found().same_gpu, "rank ", control.rank(), " wants GPU ", ordinal, " of ",
        count, ": NCCL needs a GPU for every rank; start at most ", count, " ranks on this host");
  return std::make_unique<CudaGpu>(ordinal % count, carrier);
}

DeviceReport device_report() {
  DeviceReport out;
  out.built = true;
  cudaRuntimeGetVersion(&out.runtime);
  cudaDriverGetVersion(&out.driver);
  const cudaError_t status = cudaGetDeviceCount(&out.devices);
  if (status != cudaSuccess) {
    out.devices = 0;
    out.missing = out.driver == 0 ? "no NVIDIA driver" : cudaGetErrorString(status);
  }
  for (int i = 0; i < out.devices; i++) {
    cudaDeviceProp properties;
    out.names.push_back(cudaGetDeviceProperties(&properties, i) == cudaSuccess
                            ? concat(properties.name, " (sm_", properties.major, properties.minor, ", ", properties.totalGlobalMem >> 20, " MiB)")
                            : "unreadable");
  }
  out.nccl = nccl_found().found;
  out.same_gpu = nccl_found().same_gpu;
  out.nccl_version = nccl_found().version;
  out.nccl_from = nccl_found().from;
  return out;
}
#else
void set_nccl_path(const std::string&) {}

std::unique_ptr<Gpu> make_gpu(Control& control, int, Carrier) { throw DeviceError(concat("rank ", control.rank(), ": ", device_report().missing)); }

DeviceReport device_report() {
  DeviceReport out;
  out.missing = "gingham was built without CUDA (no nvcc was found, or WITH_CUDA=OFF): install the CUDA toolkit and build again with WITH_CUDA=ON";
  return out;
}
#endif

}  // namespace gingham
