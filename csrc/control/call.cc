#include "control/call.h"

#include <string.h>

#include <algorithm>
#include <type_traits>

#include "base/check.h"

namespace gingham {

void copy_text(char* to, size_t room, const std::string& text) {
  const size_t n = std::min(room - 1, text.size());
  memcpy(to, text.data(), n);
  to[n] = 0;
}

static_assert(std::is_trivially_copyable_v<Call>);

void KeptCall::store(const Call& call) {
  uint64_t words[kWords] = {};
  memcpy(words, &call, sizeof(call));
  for (size_t i = 0; i < kWords; i++) words_[i].store(words[i], std::memory_order_release);
}

Call KeptCall::load() const {
  uint64_t words[kWords];
  for (size_t i = 0; i < kWords; i++) words[i] = words_[i].load(std::memory_order_acquire);
  Call call;
  memcpy(static_cast<void*>(&call), words, sizeof(call));
  return call;
}

uint64_t mixed(uint64_t h, uint64_t v) {
  h = (h ^ v) * 1099511628211ull;
  return h ^ h >> 29;
}

Label::Label(std::string words) : text(std::move(words)), hash(kSeed) {
  for (char c : text) hash = mixed(hash, static_cast<uint64_t>(static_cast<unsigned char>(c)));
}

void Call::set_name(const std::string& text) { copy_text(name, sizeof(name), text); }

uint64_t Call::history() const {
  uint64_t h = kSeed;
  auto mix = [&h](uint64_t v) { h = mixed(h, v); };
  for (const char* c = name; *c; c++) mix(static_cast<uint64_t>(*c));
  mix(static_cast<uint64_t>(dtype));
  for (int g : grid) mix(static_cast<uint64_t>(g));
  if (flags & kStep) {
    mix(static_cast<uint64_t>(k));
    mix(static_cast<uint64_t>(n));
  }
  mix(flags);
  mix(options);
  if (invalid)
    for (const char* c = note; *c; c++) mix(static_cast<uint64_t>(*c));
  return h;
}

uint64_t Call::key() const { return mixed(mixed(history(), static_cast<uint64_t>(k)), static_cast<uint64_t>(n)); }

std::string Call::text() const {
  if (invalid) return concat(label, label[0] ? ": " : "", name, " refused: ", note);
  std::string out = label[0] ? concat(label, ": ", name) : std::string(name);
  out += concat("(dtype=", name_of(static_cast<DType>(dtype)));
  if (k || n) out += concat(", K=", k, ", N=", n);
  if (rows >= 0) out += concat(", local rows=", rows);
  if (grid[0] * grid[1] * grid[2] > 1) out += concat(", grid=", grid[0], "x", grid[1], "x", grid[2]);
  if (flags & kAttention) {
    static const char* options[] = {" causal", " in zigzag order", " with a mask", " with dropout"};
    out += ", attention";
    for (int bit = kCausal; bit <= kDropping; bit++) out += flags >> bit & 1 ? options[bit] : "";
    return out + ")";
  }
  if (!(flags & kStep)) return out + concat(", axis ", flags, ")");
  auto has = [this](int bit) { return (flags >> (32 + bit) & 1) != 0; };
  out += concat(", slices=", flags >> 8 & 0xffffff, ", of");
  static const char* words[] = {" the input's gradient", " the weights' gradients", " sums over depth"};
  for (int bit = 0; bit < 3; bit++) out += has(bit) ? words[bit] : "";
  for (int map = 0; map < kMapBits; map++) out += has(kBiasGradient + map) ? concat(" bias ", map, "'s gradient") : "";
  out += has(kEpilogue) ? " the output with gelu" : "";
  out += has(kEarly) ? " weights gathered ahead" : "";
  for (int map = 0; map < kMapBits; map++) out += has(kBias + map) ? concat(" bias ", map) : "";
  return out + ")";
}

}  // namespace gingham
