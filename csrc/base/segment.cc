#include "base/segment.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/check.h"
#include "base/wait.h"

namespace gingham {

namespace {

// The words of an error, and what to do where a system call is not allowed.
std::string cause(const char* call, int error) {
  const std::string out = concat(call, ": ", strerror(error));
  if (error != EPERM && error != ENOSYS && error != EACCES && error != EOPNOTSUPP) return out;
  return concat(out, "; the system forbids this call or lacks it (a container's seccomp filter, or an old kernel): allow ", call,
                ", with docker run --security-opt seccomp=<profile that allows it>");
}

}  // namespace

Segment::Segment(size_t bytes) : bytes_(bytes) {
  fd_ = memfd_create("gingham", MFD_CLOEXEC);
  CHECK(MeshError, fd_ >= 0, "cannot make the memory that ranks share: ", cause("memfd_create", errno));
  if (ftruncate(fd_, static_cast<off_t>(bytes)) != 0) {
    const int error = errno;
    ::close(fd_);
    throw OutOfMemory(concat("cannot size the shared segment to ", bytes, " bytes: ", cause("ftruncate", error)));
  }
  map();
}

Segment::Segment(const std::string& path) {
  fd_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
  CHECK(MeshError, fd_ >= 0, "cannot open the memory that ranks share, at ", path, ": ", strerror(errno));
  struct stat info{};
  const bool sized = fstat(fd_, &info) == 0 && S_ISREG(info.st_mode) && info.st_size > 0;
  if (!sized) ::close(fd_);
  CHECK(MeshError, sized, "what lies at ", path, " is not the memory that ranks share");
  bytes_ = static_cast<size_t>(info.st_size);
  map();
}

void Segment::map() {
  void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd_, 0);
  if (p != MAP_FAILED) {
    base_ = static_cast<char*>(p);
    return;
  }
  const int error = errno;
  ::close(fd_);
  rlimit limit{};
  const bool limited = getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
  throw OutOfMemory(
      concat("cannot map ", bytes_, " bytes of address space, the heaps of all ranks: ", strerror(error),
             limited ? concat("; `ulimit -v` allows this process ", limit.rlim_cur, " bytes: raise it") : std::string("; free address space"),
             ", or give each rank a smaller heap with gingham.init(heap=bytes)"));
}

Segment::~Segment() {
  if (base_) munmap(base_, bytes_);
  if (fd_ >= 0) ::close(fd_);
}

std::string Segment::path() const { return concat("/proc/", getpid(), "/fd/", fd_); }

char* Segment::map_copy() const {
  void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd_, 0);
  return p == MAP_FAILED ? nullptr : static_cast<char*>(p);
}

void Segment::drop_copy(char* copy) const {
  if (copy) munmap(copy, bytes_);
}

void Segment::become_copy(char* copy) {
  const bool moved = copy && mremap(copy, bytes_, bytes_, MREMAP_MAYMOVE | MREMAP_FIXED, base_) != MAP_FAILED;
  // Rather a crash of the child than one that writes into the ranks' memory.
  if (!moved) mprotect(base_, bytes_, PROT_NONE);
}

bool Segment::reserve(uint64_t begin, size_t bytes) {
  int result;
  do {
    result = fallocate(fd_, 0, static_cast<off_t>(begin), static_cast<off_t>(bytes));
  } while (result != 0 && errno == EINTR);
  error_ = result == 0 ? 0 : errno;
  return result == 0;
}

std::string Segment::why_not_reserved() const {
  const int error = error_;
  return error == 0 || error == ENOSPC || error == ENOMEM ? "" : cause("fallocate", error);
}

bool Segment::release(uint64_t begin, size_t bytes) const {
  return fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(begin), static_cast<off_t>(bytes)) == 0;
}

GrowthLock::GrowthLock(Segment& segment) : fd_(segment.fd_) {
  for (const double start = now(); !(held_ = flock(fd_, LOCK_EX | LOCK_NB) == 0) && now() - start < 0.1;) usleep(200);
}

GrowthLock::~GrowthLock() {
  if (held_) flock(fd_, LOCK_UN);
}

}  // namespace gingham
