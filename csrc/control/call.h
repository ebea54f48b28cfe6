// What a rank says of the call it is in: a plain record that any control plane can carry, with the keys by which ranks compare theirs.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "base/dtype.h"

namespace gingham {

constexpr size_t kLabel = 200;

// What a layer or function says of itself, made once: its kind, number and all options on which the ranks must agree.
struct Label {
  explicit Label(std::string words);
  std::string text;
  uint64_t hash;
};

// A step's flags: bits 1 to 7 its slice dim, 8 to 31 the slices, and from 32 on what it computes.
constexpr uint64_t kStep = uint64_t{1} << 63;
enum StepBit { kInputGradient, kWeightGradient, kDepthSum, kBiasGradient, kBiasSum = 11, kEpilogue = 12, kBias, kEarly = 21 };
// Of attention over a cut sequence: what it does.
constexpr uint64_t kAttention = uint64_t{1} << 62;
enum AttentionBit { kCausal, kZigzag, kMasked, kDropping };
constexpr int kMapBits = 8;  // maps of a step that have bits of their own

// What a rank says of the call it is in; all fields but `rows` must be equal on all ranks of the job.
struct Call {
  char name[32] = {};
  int32_t dtype = 0;
  int32_t grid[3] = {1, 1, 1};
  int64_t k = 0, n = 0;
  uint64_t flags = 0;   // of a step or attention see the bits above; else the axis' number
  int64_t rows = -1;    // local rows; equal only among ranks that share them
  int32_t invalid = 0;  // this rank refused its own arguments: `note` says why
  char note[240] = {};

  void set_name(const std::string& text);
  uint64_t options = 0;     // hash of the label
  char label[kLabel] = {};  // the layer or function whose call this is, with its options

  uint64_t key() const;      // hash of all on which the ranks of the call's axis must agree
  uint64_t history() const;  // of what all ranks of the job must agree on: without the sizes of a collective, which may be uneven
  std::string text() const;
};

// A call in shared memory. Its rank stores the next one in its place while others may read it: in words, which a later look at the rank's
// sequence tells to be of one call or not (a word of a newer call is seen only after the sequence that came before it).
class KeptCall {
 public:
  void store(const Call& call);
  Call load() const;

 private:
  static constexpr size_t kWords = (sizeof(Call) + sizeof(uint64_t) - 1) / sizeof(uint64_t);
  std::atomic<uint64_t> words_[kWords] = {};
};

constexpr uint64_t kSeed = 1469598103934665603ull;
uint64_t mixed(uint64_t h, uint64_t v);
void copy_text(char* to, size_t room, const std::string& text);

}  // namespace gingham
