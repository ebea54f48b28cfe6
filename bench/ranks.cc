#include "ranks.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <thread>

#include "cases.h"
#include "kernels/blas.h"

namespace gingham {
namespace {

constexpr int kNumbers = 64, kAxes = 16;
struct Slot {
  int count;
  double numbers[kNumbers];
  char error[512];
};

void run_one(int rank, int size, const std::shared_ptr<Segment>& segment, const RankBody& body, double timeout, Slot& slot) {
  try {
    set_blas_threads(1);
    Job job(rank, size, segment, timeout);
    job.attach("microbench");
    std::vector<int> members(static_cast<size_t>(size));
    std::iota(members.begin(), members.end(), 0);
    const auto program = job.program(1, members, std::vector<int>(kAxes, size), timeout);
    const Row row = body(job, *program);
    slot.count = static_cast<int>(std::min<size_t>(row.size(), kNumbers));
    std::copy_n(row.begin(), slot.count, slot.numbers);
    job.close();
  } catch (const std::exception& error) {
    strncpy(slot.error, error.what(), sizeof(slot.error) - 1);
  }
}

}  // namespace

std::vector<Row> run_ranks(int size, As as, const RankBody& body, double timeout) {
  const auto segment = Job::make_segment(size);
  const size_t bytes = sizeof(Slot) * static_cast<size_t>(size);
  void* shared = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  CHECK(OutOfMemory, shared != MAP_FAILED, "cannot map ", bytes, " bytes");
  Slot* slots = static_cast<Slot*>(shared);
  if (as == As::threads) {
    std::vector<std::thread> threads;
    for (int r = 0; r < size; r++) threads.emplace_back([&, r] { run_one(r, size, segment, body, timeout, slots[r]); });
    for (auto& t : threads) t.join();
  } else {
    std::vector<pid_t> pids;
    for (int r = 0; r < size; r++) {
      const pid_t pid = fork();
      if (pid == 0) {
        run_one(r, size, segment, body, timeout, slots[r]);
        _exit(0);
      }
      pids.push_back(pid);
    }
    for (pid_t pid : pids) {
      int status = 0;
      waitpid(pid, &status, 0);
      const auto at = std::find(pids.begin(), pids.end(), pid) - pids.begin();
      if (status != 0 && !slots[at].error[0])
        snprintf(slots[at].error, sizeof(slots[at].error), "rank %d ended with status %d", static_cast<int>(at), status);
    }
  }
  std::vector<Row> rows;
  std::string error;
  for (int r = 0; r < size; r++) {
    rows.emplace_back(slots[r].numbers, slots[r].numbers + slots[r].count);
    if (error.empty() && slots[r].error[0]) error = slots[r].error;
  }
  munmap(shared, bytes);
  if (!error.empty()) throw Error(error);
  return rows;
}

namespace {
Matrix laid_out(void* data, int64_t rows, int64_t cols, DType dtype, bool turned) {
  return turned ? dense(data, cols, rows, dtype).t() : dense(data, rows, cols, dtype);
}
}  // namespace

Room::Room(Job& job, int64_t rows, int64_t cols, DType dtype, bool turned) : job_(job) {
  const size_t bytes = static_cast<size_t>(rows * cols) * size_of(dtype);
  host_room_ = Scratch(job.host_stream(), bytes);
  if (job.gpu()) room_ = Scratch(job.stream(), bytes);
  host_ = laid_out(host_room_.data(), rows, cols, dtype, turned);
  view_ = laid_out(job.gpu() ? room_.data() : host_room_.data(), rows, cols, dtype, turned);
}

void Room::upload() {
  if (job_.gpu() && !view_.empty()) job_.gpu()->upload(view_.data, host_.data, host_.bytes());
}

void Room::download() const {
  if (job_.gpu() && !view_.empty()) job_.gpu()->download(host_.data, view_.data, host_.bytes());
}

void enter(Job& job, const Options& options) {
  if (options.device != Device::cuda) return;
  job.use_gpu(job.rank(), options.carrier);
  if (options.entered) options.entered(job);
}

std::unique_ptr<Axis> as_asked(std::unique_ptr<Axis> axis, const Options& options) {
  const char* asked = getenv("GINGHAM_COPY_ENGINES");
  if (options.insists && options.carrier == Carrier::nccl && options.device == Device::cuda && asked && *asked && axis->size() > 1)
    CHECK(DeviceError, axis->carried_by() == "copy engines", "GINGHAM_COPY_ENGINES is set, but messages go by ", axis->carried_by());
  return axis;
}

void settle(Job& job) {
  if (job.gpu()) job.gpu()->synchronize();
}

double median_of_rounds(const Options& options, const std::function<void()>& prepare, const std::function<void()>& once,
                        const std::function<void()>& warm) {
  std::vector<double> times;
  for (int i = -options.warmup; i < options.rounds; i++) {
    if (i == 0) warm();
    prepare();
    const double start = now();
    once();
    if (i >= 0) times.push_back(now() - start);
  }
  const auto middle = times.begin() + options.rounds / 2;
  std::nth_element(times.begin(), middle, times.end());
  return *middle;
}

std::vector<Row> start(const Options& options, const RankBody& body) {
  return options.start ? options.start(body) : run_ranks(options.size(), options.as, body);
}

Measured over_ranks(const std::vector<Row>& rows) {
  Measured out;
  for (const Row& r : rows) {
    out.seconds = std::max(out.seconds, r[0]);
    out.bytes += r[1];
    out.messages += r[2];
    out.wrong = r[3] < 0 ? -1 : out.wrong + r[3];
    out.workspace = std::max(out.workspace, r.size() > 4 ? r[4] : 0);
    out.crossed += r.size() > 5 ? r[5] : 0;
  }
  return out;
}

}  // namespace gingham
