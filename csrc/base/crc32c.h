// CRC-32C (Castagnoli, reflected, as in iSCSI and ext4): crc32c(0, "123456789") == 0xe3069283. It finds every change of up to 32 bits in a
// row. Goes on from the sum of what came before: crc32c(crc32c(0, a), b) == crc32c(0, a + b). On x86 with SSE 4.2 by its instruction, three
// streams at a time; elsewhere by tables, eight bytes at a time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gingham {

uint32_t crc32c(uint32_t before, const void* data, size_t bytes);

// The same by tables on every machine; for tests.
uint32_t crc32c_by_tables(uint32_t before, const void* data, size_t bytes);

}  // namespace gingham
