// What a rank queues on its fake device, written down in the order in which the host queued it, for the model of ../overlap.py.
// FAKE_TRACE=FOLDER: one file a device, a line each:
//   K stream what numbers..              a kernel: gemm m n k adds-to-C bytes-of-a-number-of-C; else its name and the bytes it moves
//   R stream ticket | W stream ticket    an event is recorded, waited for
//   G stream way,hall,peer,bytes ..      a group of messages; way s or r, peer by its rank in the job
//   P stream device bytes, L stream bytes            a copy into another device's window, one to or from this device's own
//   T stream flag began value, S stream flag began value     waited for until it has the value, set to it; began: what it held at first
//   M text                               a mark of the caller's (fake_mark)
// Work that is captured in a graph is written once, where it was queued.
#include <stdio.h>
#include <stdlib.h>

#include <map>
#include <mutex>
#include <string>

#include "stream.h"

namespace fake {
namespace {

std::mutex mutex;

void write(int device, const std::string& line) {
  static std::map<int, FILE*> files;
  const std::lock_guard lock(mutex);
  FILE*& file = files[device];
  if (!file) file = fopen((std::string(getenv("FAKE_TRACE")) + "/" + std::to_string(device) + ".txt").c_str(), "w");
  if (!file) abort();
  fputs((line + "\n").c_str(), file);
  fflush(file);
}

}  // namespace

bool tracing() {
  static const bool on = getenv("FAKE_TRACE") != nullptr;
  return on;
}

void trace(const Stream& stream, char what, const std::string& text) {
  if (tracing()) write(stream.device, std::string(1, what) + " " + std::to_string(stream.number) + " " + text);
}

}  // namespace fake

extern "C" void fake_note(cudaStream_t stream, const char* text) { fake::trace(fake::stream_of(stream), 'K', text); }
extern "C" void fake_mark(const char* text) {
  if (fake::tracing()) fake::write(fake::current_device, std::string("M ") + text);
}
