// Errors: what, where, got against expected, and the fix, in the message. The library never prints or exits.
//   CHECK(ShapeError, a == b, "x has ", a, " columns, expected ", b);
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace gingham {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct ShapeError : Error {
  using Error::Error;
};
struct MeshError : Error {
  using Error::Error;
};
// Raised in ranks that wait for the named peer (a global rank) or learn of its fate from the control block.
struct PeerError : Error {
  PeerError(int peer, const std::string& message) : Error(message), rank(peer) {}
  int rank;
};
struct PeerDied : PeerError {
  using PeerError::PeerError;
};
struct PeerStalled : PeerError {
  using PeerError::PeerError;
};
// An allocation failed on the named peer, in a call of all: each rank gives the call up, and the mesh goes on.
struct PeerOutOfMemory : PeerError {
  using PeerError::PeerError;
};
struct OutOfMemory : Error {
  using Error::Error;
};
// A call of CUDA or NCCL that failed.
struct DeviceError : Error {
  using Error::Error;
};

template <class... Values>
std::string concat(const Values&... values) {
  std::ostringstream out;
  (out << ... << values);
  return out.str();
}

#define CHECK(Type, cond, ...)                               \
  do {                                                       \
    if (!(cond)) throw Type(::gingham::concat(__VA_ARGS__)); \
  } while (0)

}  // namespace gingham
