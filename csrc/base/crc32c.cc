#include "base/crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define GINGHAM_CRC_INSTRUCTION 1
#include <nmmintrin.h>
#endif

namespace gingham {
namespace {

constexpr uint32_t polynomial = 0x82f63b78;  // x^32 + x^28 + .., bits reversed
using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[j][b]: what byte b leaves in the sum after j more bytes of zero.
constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t sum = byte;
    for (int bit = 0; bit < 8; ++bit) sum = (sum >> 1) ^ (sum & 1 ? polynomial : 0);
    tables[0][byte] = sum;
  }
  for (size_t j = 1; j < 8; ++j) {
    for (size_t byte = 0; byte < 256; ++byte) tables[j][byte] = (tables[j - 1][byte] >> 8) ^ tables[0][tables[j - 1][byte] & 255];
  }
  return tables;
}

constexpr Tables tables = make_tables();

uint64_t load(const unsigned char* at) {
  uint64_t word;
  std::memcpy(&word, at, 8);
  return word;
}

uint32_t by_tables(uint32_t sum, const unsigned char* at, size_t bytes) {
  for (; bytes >= 8; at += 8, bytes -= 8) {
    uint64_t word = 0;
    for (int j = 0; j < 8; ++j) word |= uint64_t{at[j]} << (8 * j);  // one load on little-endian machines
    word ^= sum;
    sum = 0;
    for (size_t j = 0; j < 8; ++j) sum ^= tables[7 - j][(word >> (8 * j)) & 255];
  }
  for (; bytes > 0; ++at, --bytes) sum = (sum >> 8) ^ tables[0][(sum ^ *at) & 255];
  return sum;
}

#ifdef GINGHAM_CRC_INSTRUCTION
// One instruction takes 3 cycles but a new one may start in each: three streams of `lane` bytes keep the unit busy.
constexpr size_t lane = 4096;
using Shift = std::array<std::array<uint32_t, 256>, 4>;

// shift[j][b]: what byte j of a sum becomes after `lane` bytes of zero.
Shift make_shift() {
  static const unsigned char zeros[lane] = {};
  Shift shift{};
  for (size_t j = 0; j < 4; ++j) {
    for (uint32_t byte = 0; byte < 256; ++byte) shift[j][byte] = by_tables(byte << (8 * j), zeros, lane);
  }
  return shift;
}

uint32_t shifted(const Shift& shift, uint32_t sum) {
  return shift[0][sum & 255] ^ shift[1][(sum >> 8) & 255] ^ shift[2][(sum >> 16) & 255] ^ shift[3][sum >> 24];
}

__attribute__((target("sse4.2"))) uint32_t by_instruction(uint32_t sum, const unsigned char* at, size_t bytes) {
  static const Shift shift = make_shift();
  for (; bytes >= 3 * lane; at += 3 * lane, bytes -= 3 * lane) {
    uint64_t first = sum, second = 0, third = 0;
    for (size_t i = 0; i < lane; i += 8) {
      first = _mm_crc32_u64(first, load(at + i));
      second = _mm_crc32_u64(second, load(at + lane + i));
      third = _mm_crc32_u64(third, load(at + 2 * lane + i));
    }
    sum = shifted(shift, shifted(shift, uint32_t(first)) ^ uint32_t(second)) ^ uint32_t(third);
  }
  uint64_t wide = sum;
  for (; bytes >= 8; at += 8, bytes -= 8) wide = _mm_crc32_u64(wide, load(at));
  sum = uint32_t(wide);
  for (; bytes > 0; ++at, --bytes) sum = _mm_crc32_u8(sum, *at);
  return sum;
}
#endif

}  // namespace

uint32_t crc32c_by_tables(uint32_t before, const void* data, size_t bytes) {
  return ~by_tables(~before, static_cast<const unsigned char*>(data), bytes);
}

uint32_t crc32c(uint32_t before, const void* data, size_t bytes) {
#ifdef GINGHAM_CRC_INSTRUCTION
  if (__builtin_cpu_supports("sse4.2")) return ~by_instruction(~before, static_cast<const unsigned char*>(data), bytes);
#endif
  return crc32c_by_tables(before, data, bytes);
}

}  // namespace gingham
