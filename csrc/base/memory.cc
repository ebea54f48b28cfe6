#include "base/memory.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <vector>

#include "base/check.h"

namespace gingham {
namespace {

constexpr size_t kUnlimited = std::numeric_limits<size_t>::max();

std::optional<size_t> number_in(const std::string& path) {
  std::ifstream file(path);
  size_t value = 0;
  if (file >> value) return value;  // "max" is no number
  return std::nullopt;
}

// The sum of the named lines of a file of "name value" lines.
size_t lines_of(const std::string& path, const std::vector<std::string>& names) {
  std::ifstream file(path);
  std::string name, rest;
  size_t value = 0, sum = 0;
  while (file >> name >> value && std::getline(file, rest))
    for (const std::string& wanted : names) sum += name == wanted ? value : 0;
  return sum;
}

// A hierarchy of groups: where it is mounted, which of its folders is mounted there, and the files' names in its version.
struct Hierarchy {
  std::string mount, top, limit, usage;
  std::vector<std::string> files;
};

std::optional<Hierarchy> hierarchy_of(const std::string& line) {
  std::istringstream words(line);
  std::string number, parent, device, top, mount, word, type, source, options;
  words >> number >> parent >> device >> top >> mount;
  while (words >> word && word != "-") continue;
  words >> type >> source >> options;
  if (type == "cgroup2") return Hierarchy{mount, top, "memory.max", "memory.current", {"active_file", "inactive_file"}};
  if (type == "cgroup" && concat(",", options, ",").find(",memory,") != std::string::npos)
    return Hierarchy{mount, top, "memory.limit_in_bytes", "memory.usage_in_bytes", {"total_active_file", "total_inactive_file"}};
  return std::nullopt;
}

// The process's group in each version, as /proc/self/cgroup names it: "0::/a/b", "4:memory:/a/b".
std::string group_of(const std::string& root, bool second) {
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'), next = line.find(':', first + 1);
    if (next == std::string::npos) continue;
    const std::string controllers = concat(",", line.substr(first + 1, next - first - 1), ",");
    if (second ? controllers == ",," : controllers.find(",memory,") != std::string::npos) return line.substr(next + 1);
  }
  return "/";
}

void least_of_group(const std::string& root, const Hierarchy& h, const std::string& folder, MemoryLeft* least) {
  const std::string at = root + h.mount + folder + "/";
  const auto limit = number_in(at + h.limit), usage = number_in(at + h.usage);
  if (!limit || !usage) return;
  const size_t taken = *usage - std::min(*usage, lines_of(at + "memory.stat", h.files));
  const size_t left = *limit - std::min(*limit, taken);
  if (left < least->bytes) *least = {left, concat("the memory cgroup ", h.mount, folder)};
}

}  // namespace

MemoryLeft memory_left(const std::string& root) {
  MemoryLeft least{kUnlimited, "the host"};
  if (const size_t kib = lines_of(root + "/proc/meminfo", {"MemAvailable:"})) least.bytes = kib << 10;
  std::ifstream mounts(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(mounts, line);) {
    const auto h = hierarchy_of(line);
    if (!h) continue;
    // in a container the mounted folder is often the process's own group
    std::string folder = group_of(root, h->limit == "memory.max");
    if (h->top != "/" && folder.compare(0, h->top.size(), h->top) == 0) folder = folder.substr(h->top.size());
    while (!folder.empty() && folder != "/") {
      least_of_group(root, *h, folder, &least);
      folder.resize(folder.find_last_of('/'));
    }
    least_of_group(root, *h, "", &least);
  }
  return least;
}

}  // namespace gingham
