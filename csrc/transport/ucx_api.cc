#include "transport/ucx_api.h"

#include <dirent.h>
#include <dlfcn.h>
#include <sys/stat.h>

#include <cstdlib>
#include <utility>
#include <vector>

#include "base/check.h"

namespace gingham {
namespace {

std::string given_folder;

constexpr const char* kName = "libucp.so.0";

// What libucs reads once, as it is loaded. It would take SIGHUP, SIGSEGV and others, print, start a thread that serves files and hook
// malloc; only RDMA devices need the last. A user's own setting stays. The environment is as it was when loading is over.
class LoadSettings {
 public:
  LoadSettings() {
    set("UCX_DEBUG_SIGNO", "0");
    set("UCX_HANDLE_ERRORS", "none");
    set("UCX_LOG_LEVEL", "fatal");
    set("UCX_WARN_UNUSED_ENV_VARS", "n");
    set("UCX_VFS_ENABLE", "n");
    set("UCX_MODULES", "^cuda,rocm,ze,cma,xpmem,knem");
    if (!has_rdma()) set("UCX_MEM_EVENTS", "n");
  }
  ~LoadSettings() {
    for (const char* name : set_) unsetenv(name);
  }

 private:
  void set(const char* name, const char* value) {
    if (!getenv(name) && setenv(name, value, 0) == 0) set_.push_back(name);
  }
  static bool has_rdma() {
    DIR* devices = opendir("/sys/class/infiniband");
    if (!devices) return false;
    bool any = false;
    while (const dirent* entry = readdir(devices)) any = any || entry->d_name[0] != '.';
    closedir(devices);
    return any;
  }
  std::vector<const char*> set_;
};

template <class Fn>
bool resolve(void* handle, const char* name, Fn* out) {
  *out = reinterpret_cast<Fn>(dlsym(handle, name));
  return *out != nullptr;
}

bool resolve_all(void* handle, UcxApi& a) {
  return resolve(handle, "ucp_get_version", &a.get_version) && resolve(handle, "ucp_config_read", &a.config_read) &&
         resolve(handle, "ucp_config_modify", &a.config_modify) && resolve(handle, "ucp_config_release", &a.config_release) &&
         resolve(handle, "ucp_init_version", &a.init_version) && resolve(handle, "ucp_cleanup", &a.cleanup) &&
         resolve(handle, "ucp_worker_create", &a.worker_create) && resolve(handle, "ucp_worker_destroy", &a.worker_destroy) &&
         resolve(handle, "ucp_worker_get_address", &a.worker_get_address) &&
         resolve(handle, "ucp_worker_release_address", &a.worker_release_address) && resolve(handle, "ucp_worker_get_efd", &a.worker_get_efd) &&
         resolve(handle, "ucp_worker_progress", &a.worker_progress) && resolve(handle, "ucp_worker_arm", &a.worker_arm) &&
         resolve(handle, "ucp_worker_signal", &a.worker_signal) && resolve(handle, "ucp_ep_create", &a.ep_create) &&
         resolve(handle, "ucp_ep_close_nbx", &a.ep_close_nbx) && resolve(handle, "ucp_ep_flush_nbx", &a.ep_flush_nbx) &&
         resolve(handle, "ucp_tag_send_nbx", &a.tag_send_nbx) && resolve(handle, "ucp_tag_recv_nbx", &a.tag_recv_nbx) &&
         resolve(handle, "ucp_tag_probe_nb", &a.tag_probe_nb) && resolve(handle, "ucp_tag_msg_recv_nbx", &a.tag_msg_recv_nbx) &&
         resolve(handle, "ucp_request_check_status", &a.request_check_status) && resolve(handle, "ucp_request_cancel", &a.request_cancel) &&
         resolve(handle, "ucp_request_free", &a.request_free) && resolve(handle, "ucs_status_string", &a.status_string);
}

struct Library {
  UcxApi api{};
  UcxFound found;

  // Takes what dlopen gave, or notes in `tried` why it does not serve.
  bool take(void* handle, const std::string& from, std::string* tried) {
    if (!handle) {
      const char* why = dlerror();
      *tried += concat("; ", from, ": ", why ? why : "not loaded");
      return false;
    }
    if (!resolve_all(handle, api)) {
      *tried += concat("; ", from, " is older than 1.10: ", dlerror());
      return false;
    }
    unsigned major = 0, minor = 0, release = 0;
    api.get_version(&major, &minor, &release);
    found = {true, static_cast<int>(major * 10000 + minor * 100 + release), from};
    return true;
  }
};

// libucp of one folder; its companions first, by their paths, since the loader would look for them elsewhere.
void* open_folder(const std::string& folder) {
  for (const char* companion : {"libucs.so.0", "libuct.so.0"})
    if (!dlopen((folder + "/" + companion).c_str(), RTLD_NOW | RTLD_LOCAL)) return nullptr;
  return dlopen((folder + "/" + kName).c_str(), RTLD_NOW | RTLD_LOCAL);
}

void* open_path(const std::string& path) {
  struct stat found{};
  if (stat(path.c_str(), &found) == 0 && S_ISDIR(found.st_mode)) return open_folder(path);
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash);
  struct stat beside{};
  if (stat(path.c_str(), &found) == 0 && stat((folder + "/libucs.so.0").c_str(), &beside) == 0) return open_folder(folder);
  return dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
}

Library load() {
  const LoadSettings settings;
  Library out;
  std::string tried;
  if (const char* wanted = getenv("GINGHAM_UCX")) {
    if (!out.take(open_path(wanted), concat("GINGHAM_UCX=", wanted), &tried))
      out.found.from = concat("not found", tried, "; GINGHAM_UCX names libucp.so.0 or its folder: mend it, or unset it");
    return out;
  }
  if (void* handle = dlopen(kName, RTLD_NOW | RTLD_NOLOAD)) {
    if (out.take(handle, "the process (loaded by another library)", &tried)) return out;
  }
  if (out.take(dlopen(kName, RTLD_NOW | RTLD_LOCAL), concat("the system's ", kName), &tried)) return out;
  if (!given_folder.empty() && out.take(open_folder(given_folder), given_folder, &tried)) return out;
  if (given_folder.empty()) tried += "; the wheel libucx-cu12 or libucx-cu13: not installed";
  out.found.from = concat("not found", tried, "; pip install 'gingham[hosts]', or set GINGHAM_UCX to a libucp.so.0 of 1.10 or newer");
  return out;
}

const Library& library() {
  static const Library loaded = load();
  return loaded;
}

}  // namespace

void set_ucx_path(const std::string& folder) { given_folder = folder; }

const UcxFound& ucx_found() { return library().found; }

const UcxApi& ucx() {
  CHECK(MeshError, library().found.found, "UCX ", library().found.from);
  return library().api;
}

}  // namespace gingham
