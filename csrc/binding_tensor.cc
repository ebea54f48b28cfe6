#include "binding_tensor.h"

#include <dlpack.h>

#include <array>
#include <exception>
#include <map>
#include <mutex>
#include <unordered_map>

#include "kernels/hopper.h"

namespace gingham {
namespace {

struct Known {
  const char* name;
  DLDataTypeCode code;
  uint8_t bits;
  DType dtype;
};
constexpr std::array<Known, 9> kKnown{{{"float32", kDLFloat, 32, DType::f32},
                                       {"float64", kDLFloat, 64, DType::f64},
                                       {"bfloat16", kDLBfloat, 16, DType::bf16},
                                       {"float16", kDLFloat, 16, DType::f16},
                                       {"int64", kDLInt, 64, DType::bytes8},
                                       {"int32", kDLInt, 32, DType::bytes4},
                                       {"int16", kDLInt, 16, DType::bytes2},
                                       {"uint8", kDLUInt, 8, DType::bytes1},
                                       {"bool", kDLBool, 8, DType::bytes1}}};

const Known& known(const std::string& name) {
  for (const Known& k : kKnown)
    if (name == k.name) return k;
  throw ShapeError(concat("dtype ", name, ", expected float32, float64, bfloat16, float16, int16, int32, int64, uint8 or bool"));
}

const DLPackExchangeAPI* last_api = nullptr;  // of the last tensor seen: makes the results

const DLPackExchangeAPI* api_of(py::handle object, const char* name) {
  static std::unordered_map<PyTypeObject*, const DLPackExchangeAPI*> cache;
  PyTypeObject* type = Py_TYPE(object.ptr());
  auto it = cache.find(type);
  if (it != cache.end()) return last_api = it->second;
  py::object capsule = py::getattr(py::handle(reinterpret_cast<PyObject*>(type)), "__dlpack_c_exchange_api__", py::none());
  if (capsule.is_none()) throw py::type_error(concat(name, " is a ", type->tp_name, ", expected a torch.Tensor"));
  auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  Py_INCREF(type);  // the cache keeps the address
  cache.emplace(type, api);
  return last_api = api;
}

const DLPackExchangeAPI* maker() {
  if (!last_api) {
    py::object tensor = py::module_::import("torch").attr("empty")(0);
    api_of(tensor, "tensor");
  }
  return last_api;
}

// The GPU on which this job's tensors lie; none where its memory is the host's.
const Gpu* gpu_of(const Job* job) { return job && job->gpu() && !job->gpu()->memory_is_host() ? job->gpu() : nullptr; }

void check_device(const DLDevice& device, const char* name, const Job* job) {
  if (const Gpu* gpu = gpu_of(job))
    CHECK(ShapeError, device.device_type == kDLCUDA && device.device_id == gpu->ordinal(), name, " is on device ", device.device_type, ":",
          device.device_id, ", expected this rank's GPU ", gpu->ordinal(), "; use .to('cuda:", gpu->ordinal(), "')");
  else
    CHECK(ShapeError, device.device_type == kDLCPU, name, " is on device type ", static_cast<int>(device.device_type),
          ", expected a CPU tensor: this mesh computes on the CPU; use .cpu(), or gingham.init(device='cuda')");
}

// torch's own allocator through DLPack: usable without the GIL, ordered on torch's current stream.
DLManagedTensorVersioned* torch_tensor(const DLPackExchangeAPI* api, DLDevice device, const Known& type, std::vector<int64_t> shape) {
  DLTensor wanted{};
  wanted.device = device;
  wanted.ndim = static_cast<int32_t>(shape.size());
  wanted.dtype = {static_cast<uint8_t>(type.code), type.bits, 1};
  wanted.shape = shape.data();
  DLManagedTensorVersioned* out = nullptr;
  std::string why;
  const auto note = [](void* context, const char*, const char* message) { *static_cast<std::string*>(context) = message; };
  const int status = api->managed_tensor_allocator(&wanted, &out, &why, note);
  CHECK(OutOfMemory, status == 0 && out, "torch has no memory for a tensor on its GPU: ", why);
  return out;
}

// What make() makes; where it has no memory the other ranks are told.
template <class Make>
auto told(Job& job, const Make& make) {
  try {
    return make();
  } catch (const OutOfMemory& error) {
    job.out_of_memory(concat("rank ", job.rank(), ": ", error.what()));
    throw;
  }
}

class TorchMemory : public DeviceMemory {
 public:
  explicit TorchMemory(const DLPackExchangeAPI* api) : api_(api) {}
  // Torch's memory is used again in the order of torch's current stream, which must be the one that asks.
  void* allocate(size_t bytes, int device, void* stream) override {
    void* current = nullptr;
    const bool answered = api_->current_work_stream(kDLCUDA, device, &current) == 0;
    CHECK(DeviceError, answered && current == stream, "GPU ", device, ": workspace for a stream that is not torch's current one");
    DLManagedTensorVersioned* made = torch_tensor(api_, {kDLCUDA, device}, known("uint8"), {static_cast<int64_t>(bytes)});
    void* data = static_cast<char*>(made->dl_tensor.data) + made->dl_tensor.byte_offset;
    const std::lock_guard lock(mutex_);
    held_[data] = made;
    return data;
  }
  void free(void* p, void*) override {
    DLManagedTensorVersioned* made = nullptr;
    {
      const std::lock_guard lock(mutex_);
      const auto at = held_.find(p);
      made = at->second;
      held_.erase(at);
    }
    made->deleter(made);
  }

 private:
  const DLPackExchangeAPI* api_;
  std::mutex mutex_;
  std::unordered_map<void*, DLManagedTensorVersioned*> held_;
};

struct Owner {
  std::shared_ptr<Job> job;
  void* data;
  std::vector<int64_t> shape, strides;
};

}  // namespace

DType dtype_of(const std::string& name) { return known(name).dtype; }

int64_t Tensor::count() const {
  int64_t n = 1;
  for (int64_t s : shape) n *= s;
  return n;
}

Matrix Tensor::matrix() const {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); i++) rows *= shape[i];
  return dense(data, rows, shape.empty() ? 1 : shape.back(), dtype);
}

Tensor tensor_of(py::handle object, const char* name, const Job* job) {
  DLTensor t;
  if (api_of(object, name)->dltensor_from_py_object_no_sync(object.ptr(), &t) != 0) throw py::error_already_set();
  Tensor out;
  out.shape.assign(t.shape, t.shape + t.ndim);
  const char* type = Py_TYPE(object.ptr())->tp_name;
  check_device(t.device, name, job);
  for (const Known& k : kKnown)
    if (k.code == t.dtype.code && k.bits == t.dtype.bits && t.dtype.lanes == 1) {
      out.dtype = k.dtype;
      out.dtype_name = k.name;
    }
  CHECK(ShapeError, !out.dtype_name.empty(), name, " has an unsupported dtype (code ", static_cast<int>(t.dtype.code), ", ",
        static_cast<int>(t.dtype.bits), " bits), expected float32, float64, bfloat16 or float16");
  const int64_t count = out.count();
  CHECK(ShapeError, t.data || count == 0, name, " is a ", type,
        " without memory of its own, expected this rank's plain torch.Tensor; use .to_local()");
  int64_t stride = 1;
  for (int i = t.ndim; t.strides && count > 0 && i-- > 0;) {
    CHECK(ShapeError, t.shape[i] == 1 || t.strides[i] == stride, name, " is not contiguous; use .contiguous()");
    stride *= t.shape[i];
  }
  if (is_real(out.dtype) && py::cast<bool>(object.attr("is_neg")()))
    throw ShapeError(concat(name, " is a lazily negated view (its bits do not hold its values); use .resolve_neg()"));
  out.data = static_cast<char*>(t.data) + t.byte_offset;
  return out;
}

namespace {

// The stream on which torch computes in this thread; null is CUDA's default stream. None where the GPU's memory is the host's.
std::optional<void*> torch_stream(const Gpu& gpu) {
  if (gpu.memory_is_host()) return std::nullopt;
  void* stream = nullptr;
  if (maker()->current_work_stream(kDLCUDA, gpu.ordinal(), &stream) != 0) throw py::error_already_set();
  return stream;
}

}  // namespace

thread_local OnCallersStream* OnCallersStream::innermost = nullptr;

void OnCallersStream::keep(const py::object& made) {
  if (innermost) innermost->made_.push_back(made);
}

OnCallersStream::OnCallersStream(const Member& member)
    : job_(member.job.get()), program_(member.program.get()), calling_(program_), errors_(std::uncaught_exceptions()), outer_(innermost) {
  Gpu* gpu = job_ ? job_->gpu() : nullptr;
  if (!gpu) return;
  // CUDA is of no use there, and would say so in words of its own, or wait for ever.
  CHECK(MeshError, !job_->orphaned(), "rank ", job_->rank(), ": a call on a GPU mesh in a process forked from this rank, such as a data loader's",
        " worker, which is no rank: leave GPUs and collectives to the rank");
  device_.emplace(*gpu);
  gpu->begin(torch_stream(*gpu));
  innermost = this;
}

OnCallersStream::~OnCallersStream() {
  innermost = outer_;
  if (job_) job_->end_call(*program_);
  if (!job_ || !job_->gpu()) return;
  if (std::uncaught_exceptions() > errors_) job_->gpu()->break_off();
  if (!job_->gpu()->memory_is_host()) return;
  try {
    const py::gil_scoped_release nogil;
    job_->gpu()->synchronize();
  } catch (const Error&) {
    // the call that was to be waited for has thrown already
  }
}

namespace {

template <class Fn>
void on_gpu(Job& job, Fn fn) {
  CHECK(MeshError, job.gpu(), "rank ", job.rank(), " has no GPU to queue work on");
  const OnDevice device(*job.gpu());
  fn(*job.gpu());
}

}  // namespace

uint64_t mark(Job& job) {
  uint64_t made = 0;
  on_gpu(job, [&made](Gpu& gpu) { made = gpu.mark(torch_stream(gpu)); });
  return made;
}
uintptr_t beside(Job& job, uint64_t mark) {
  on_gpu(job, [mark](Gpu& gpu) { gpu.beside(torch_stream(gpu), mark); });
  return reinterpret_cast<uintptr_t>(job.gpu()->stream().native());
}
void back(Job& job) {
  on_gpu(job, [](Gpu& gpu) { gpu.back(); });
}
void join(Job& job) {
  on_gpu(job, [](Gpu& gpu) { gpu.join(torch_stream(gpu)); });
}

void use_gpu(Job& job, int ordinal, bool tf32) {
  const DLPackExchangeAPI* api = maker();
  {
    py::gil_scoped_release nogil;
    job.use_gpu(ordinal, Carrier::nccl);
  }
  job.gpu()->stream().math = tf32 ? Math::tf32 : Math::exact;
  if (job.gpu()->memory_is_host()) return;
  job.gpu()->take_memory_from(std::make_shared<TorchMemory>(api));
  job.gpu()->begin(torch_stream(*job.gpu()));  // torch's memory is used again in the order of torch's stream
  py::gil_scoped_release nogil;
  check_hopper(job.gpu()->stream());
}

namespace {

// torch.empty: its storage is the caching allocator's own, so that Tensor.record_stream and resize_ work on results (on memory that came
// through DLPack both do nothing, without a word).
Made from_torch(const Gpu* gpu, const Known& type, const std::vector<int64_t>& shape) {
  static const py::module_& torch = *new py::module_(py::module_::import("torch"));
  static const py::object& empty = *new py::object(torch.attr("empty"));
  static std::map<std::pair<const Known*, int>, py::dict>& known_options = *new std::map<std::pair<const Known*, int>, py::dict>;
  const int ordinal = gpu ? gpu->ordinal() : -1;
  const auto [at, fresh] = known_options.try_emplace({&type, ordinal});
  py::dict& options = at->second;
  if (fresh) {
    options["dtype"] = torch.attr(type.name);
    options["device"] = gpu ? torch.attr("device")("cuda", ordinal) : torch.attr("device")("cpu");
  }
  py::tuple sizes(shape.size());
  for (size_t i = 0; i < shape.size(); i++) sizes[i] = shape[i];
  py::object object;
  try {
    object = empty(sizes, **options);
  } catch (const py::error_already_set& error) {
    if (!error.matches(torch.attr("OutOfMemoryError"))) throw;
    throw OutOfMemory(concat("torch has no memory for a tensor on its GPU: ", error.what()));
  }
  DLTensor made;
  if (api_of(object, "result")->dltensor_from_py_object_no_sync(object.ptr(), &made) != 0) throw py::error_already_set();
  void* data = made.data ? static_cast<char*>(made.data) + made.byte_offset : nullptr;
  // An empty tensor has no memory, but results are told apart by theirs.
  return {object, data ? data : static_cast<void*>(object.ptr())};
}

}  // namespace

Made make_tensor(const std::shared_ptr<Job>& job, const std::vector<int64_t>& shape, const std::string& dtype_name, Heap::Kind kind) {
  const Known& type = known(dtype_name);
  if (job->orphaned()) return from_torch(gpu_of(job.get()), type, shape);
  if (job->gpu())
    return told(*job, [&] {
      job->gpu()->refuse_injected();
      Made made = from_torch(gpu_of(job.get()), type, shape);
      OnCallersStream::keep(made.object);
      return made;
    });
  auto owner = std::make_unique<Owner>();
  owner->job = job;
  owner->shape = shape;
  owner->strides.resize(shape.size());
  int64_t count = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    owner->strides[i] = count;
    count *= shape[i] > 0 ? shape[i] : 1;
  }
  for (int64_t s : shape)
    if (s == 0) count = 0;
  owner->data = job->heap().allocate(static_cast<size_t>(count) * size_of(type.dtype), kind);
  const DLPackExchangeAPI* api = maker();
  auto managed = std::make_unique<DLManagedTensorVersioned>();
  managed->version = api->header.version;
  managed->flags = 0;
  managed->dl_tensor = {owner->data,
                        {kDLCPU, 0},
                        static_cast<int32_t>(shape.size()),
                        {static_cast<uint8_t>(type.code), type.bits, 1},
                        owner->shape.data(),
                        owner->strides.data(),
                        0};
  managed->manager_ctx = owner.get();
  managed->deleter = [](DLManagedTensorVersioned* self) {
    auto* held = static_cast<Owner*>(self->manager_ctx);
    held->job->heap().free(held->data);
    delete held;
    delete self;
  };
  void* data = owner.release()->data;
  PyObject* object = nullptr;
  if (api->managed_tensor_to_py_object_no_sync(managed.release(), reinterpret_cast<void**>(&object)) != 0) throw py::error_already_set();
  return {py::reinterpret_steal<py::object>(object), data};
}

}  // namespace gingham
