#include "transport/fork.h"

#include <pthread.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

#include "transport/job.h"

namespace gingham {
namespace {

std::mutex mutex;
std::vector<Job*> jobs;
std::map<Segment*, char*> copies;  // between a fork's beginning and its end

void prepare() {
  mutex.lock();
  for (Job* job : jobs) {
    Segment& segment = job->segment();
    job->heap().lock();
    if (!copies.count(&segment)) copies[&segment] = segment.map_copy();
    char* copy = copies[&segment];
    if (copy) job->heap().copy_tensors(copy);
  }
}

void release() {
  for (Job* job : jobs) job->heap().unlock();
  copies.clear();
  mutex.unlock();
}

void in_parent() {
  for (auto& [segment, copy] : copies) segment->drop_copy(copy);
  release();
}

void in_child() {
  for (auto& [segment, copy] : copies) segment->become_copy(copy);
  for (Job* job : jobs) job->orphan();
  release();
}

}  // namespace

void watch_forks(Job* job) {
  static const int registered = pthread_atfork(prepare, in_parent, in_child);
  CHECK(MeshError, registered == 0, "pthread_atfork failed: ", registered);
  std::lock_guard lock(mutex);
  jobs.push_back(job);
}

void forget_forks(Job* job) {
  std::lock_guard lock(mutex);
  jobs.erase(std::remove(jobs.begin(), jobs.end(), job), jobs.end());
}

}  // namespace gingham
