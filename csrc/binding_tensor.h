// torch tensors to views and back through DLPack's C exchange API: no torch header, one binary for every torch. A Python object's type
// gives the API once; the exchange itself costs about 0.1 us a tensor. Refused with a typed error: what is no tensor, wrapper subclasses
// (DTensor, FakeTensor: they would pass with a NULL pointer), other devices, complex dtypes, lazily negated and non-contiguous tensors.
#pragma once
#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/matrix.h"
#include "transport/job.h"

namespace gingham {

namespace py = pybind11;

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::string dtype_name;
  std::vector<int64_t> shape;

  // [..., cols] as a matrix; a vector is one row.
  Matrix matrix() const;
  int64_t count() const;
};

// job: where it must stand, a GPU job's tensors on its GPU, all others on the CPU (null: CPU).
Tensor tensor_of(py::handle object, const char* name, const Job* job);
inline Tensor tensor_of(py::handle object, const char* name, const std::shared_ptr<Job>& job) { return tensor_of(object, name, job.get()); }

// This rank in a program, and the job that it is part of; null: on no mesh.
struct Member {
  std::shared_ptr<Job> job;
  std::shared_ptr<Program> program;
};

// A call of the program, or one beside it on its memory. While in scope its kernels go to the stream on which torch computes in this
// thread. Over the tests' fake runtime, whose tensors are torch's CPU tensors, the scope's end waits for them. The tensors made in it live at
// least as long, so that those of a call that an error leaves are free only once their stream has been told to wait for what is under way.
class OnCallersStream {
 public:
  explicit OnCallersStream(const Member& member);
  ~OnCallersStream();
  OnCallersStream(const OnCallersStream&) = delete;
  static void keep(const py::object& made);  // in this thread's innermost scope

 private:
  Job* job_;
  Program* program_;
  Calling calling_;
  const int errors_;  // on their way where it began
  OnCallersStream* const outer_;
  std::vector<py::object> made_;
  static thread_local OnCallersStream* innermost;
  std::optional<OnDevice> device_;  // torch's code goes on with the device that it had
};

// Of the rank's GPU, whose stream is torch's in this thread: see Gpu. Without a GPU they throw MeshError. beside gives the stream, which must be
// torch's current one until back(): workspace is torch's.
uintptr_t beside(Job& job, uint64_t mark);
uint64_t mark(Job& job);
void back(Job& job);
void join(Job& job);

// Moves this rank to a GPU: workspace comes from torch's allocator. tf32: fp32 products may be rounded for the tensor cores.
void use_gpu(Job& job, int ordinal, bool tf32);

// A new tensor in the job's shared heap, or on its GPU from torch's allocator; `like` names the dtype as torch does ("float32").
struct Made {
  py::object object;
  void* data;
};
Made make_tensor(const std::shared_ptr<Job>& job, const std::vector<int64_t>& shape, const std::string& dtype_name,
                 Heap::Kind kind = Heap::Kind::tensor);
DType dtype_of(const std::string& name);

}  // namespace gingham
