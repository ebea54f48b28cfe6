#include "base/segment.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/check.h"

namespace gingham {

Segment::Segment(size_t bytes) : bytes_(bytes) {
  fd_ = memfd_create("gingham", MFD_CLOEXEC);
  CHECK(MeshError, fd_ >= 0, "memfd_create failed: ", strerror(errno), "; gingham needs Linux 3.17 or later");
  if (ftruncate(fd_, static_cast<off_t>(bytes)) != 0) {
    const int error = errno;
    ::close(fd_);
    throw OutOfMemory(concat("cannot size the shared segment to ", bytes, " bytes: ", strerror(error)));
  }
  map();
}

Segment::Segment(const std::string& path, size_t bytes) : bytes_(bytes) {
  fd_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  CHECK(MeshError, fd_ >= 0, "cannot open rank 0's shared memory at ", path, ": ", strerror(errno),
        "; all ranks must run on one host, as one user, in one PID namespace");
  struct stat info;
  const bool sized = fstat(fd_, &info) == 0 && static_cast<size_t>(info.st_size) == bytes;
  if (!sized) ::close(fd_);
  CHECK(MeshError, sized, "the shared memory at ", path, " has ", sized ? 0 : static_cast<int64_t>(info.st_size), " bytes, expected ", bytes,
        "; all ranks must run the same version of gingham with the same world size");
  map();
}

void Segment::map() {
  void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd_, 0);
  if (p == MAP_FAILED) {
    const int error = errno;
    ::close(fd_);
    throw OutOfMemory(concat("cannot map ", bytes_, " bytes of address space: ", strerror(error)));
  }
  base_ = static_cast<char*>(p);
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

bool Segment::reserve(uint64_t begin, size_t bytes) const {
  int result;
  do {
    result = fallocate(fd_, 0, static_cast<off_t>(begin), static_cast<off_t>(bytes));
  } while (result != 0 && errno == EINTR);
  return result == 0;
}

}  // namespace gingham
