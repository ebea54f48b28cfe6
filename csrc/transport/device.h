// A rank's GPU: its compute stream and the axes over it. Known by this interface only, which names nothing of CUDA, so that a build
// without CUDA has the same job; there make_gpu throws.
#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/stream.h"
#include "control/program.h"
#include "transport/shm.h"

namespace gingham {

// How messages travel between GPUs: nccl (ranks are processes) or copy (ranks are threads of one process, on any number of GPUs).
enum class Carrier { nccl, copy };

class Gpu {
 public:
  virtual ~Gpu() = default;
  virtual Stream& stream() = 0;
  virtual int ordinal() const = 0;
  virtual bool memory_is_host() const = 0;  // as over a runtime that stands in for a device: tensors are the CPU's
  // A call begins on this thread: its work goes to the stream on which the caller computes; null is CUDA's default stream, which is
  // torch's as well. Without one it stays where it was.
  virtual void begin(std::optional<void*> stream) = 0;
  // Calls from beside() to back() are queued on a stream of their own, after all that the caller has queued so far, or up to a mark() of its, and
  // run beside what the caller queues next; what it queues after join() comes after them. Their operands must last until then.
  virtual uint64_t mark(std::optional<void*> stream) = 0;  // for one beside(); 0 is none
  virtual void beside(std::optional<void*> stream, uint64_t mark = 0) = 0;
  virtual void back() = 0;
  virtual void join(std::optional<void*> stream) = 0;
  // A call was left by an error: what is queued from here on, and memory that is freed, comes after all that is under way, messages and calls beside.
  virtual void break_off() = 0;
  virtual void take_memory_from(std::shared_ptr<DeviceMemory> memory) = 0;
  virtual Heap::Usage usage() const = 0;
  virtual void reset_peak() = 0;
  virtual void tell_refusals(std::function<void(const std::string&)> tell) = 0;  // of workspace, before OutOfMemory is thrown
  virtual void fail_next() = 0;                                                  // the next allocation, of workspace or of a result
  virtual void refuse_injected() const = 0;  // throws OutOfMemory where that is the one of the caller, who makes a result
  // Makes device `ordinal` the calling thread's; which one it was.
  virtual int enter(int ordinal) = 0;
  // For measuring and tests, never inside a step: wait for all work of this rank, and copy to and from its memory.
  virtual void synchronize() = 0;
  virtual void upload(void* device, const void* host, size_t bytes) = 0;
  virtual void download(void* host, const void* device, size_t bytes) = 0;
  // What the device takes for `timed`, by its own clock; `lead`, queued before, keeps it busy until the host has queued all of that.
  virtual double seconds(const std::function<void()>& lead, const std::function<void()>& timed) = 0;
  // Collective over the program with Carrier::nccl.
  virtual std::unique_ptr<Axis> axis(Program& program, std::unique_ptr<Axis> shared, AxisMemory memory, const std::vector<int>& members) = 0;
};

// The rank's device is the thread's for this scope; then the one that was.
class OnDevice {
 public:
  explicit OnDevice(Gpu& gpu) : gpu_(gpu), before_(gpu.enter(gpu.ordinal())) {}
  ~OnDevice() { gpu_.enter(before_); }
  OnDevice(const OnDevice&) = delete;

 private:
  Gpu& gpu_;
  int before_;
};

// Throws DeviceError where the build, the device or NCCL is missing.
std::unique_ptr<Gpu> make_gpu(Control& control, int ordinal, Carrier carrier);

struct DeviceReport {
  bool built = false;
  int devices = 0, driver = 0, runtime = 0;  // versions as CUDA numbers them: 13000
  std::vector<std::string> names;
  bool nccl = false, same_gpu = false;  // same_gpu: what was found in NCCL's place lets ranks share a GPU
  int nccl_version = 0;
  std::string nccl_from, missing;
};
void set_nccl_path(const std::string& library);  // where NCCL lies, if neither the process nor GINGHAM_NCCL has it; before its first use
DeviceReport device_report();                    // for the doctor: what was built, what was found; never throws

}  // namespace gingham
