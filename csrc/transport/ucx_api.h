// The part of UCX's C interface (libucp) that gingham uses, found at run time: GINGHAM_UCX (the library, or its folder), else what the
// process has loaded, else the system's, else the path that the package found (the libucx-cu12 or -cu13 wheel). Nothing links to UCX.
// Declared here and compared with the wheel's ucp.h by a test; UCX keeps its ABI from 1.10 on, and structs say by a mask what they hold.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#ifndef UCP_H_
struct ucp_config;
struct ucp_context;
struct ucp_worker;
struct ucp_ep;
struct ucp_address;
struct ucp_mem;
struct ucp_recv_desc;
using ucp_config_t = ucp_config;
using ucp_context_h = ucp_context*;
using ucp_worker_h = ucp_worker*;
using ucp_ep_h = ucp_ep*;
using ucp_address_t = ucp_address;
using ucp_mem_h = ucp_mem*;
using ucp_tag_message_h = ucp_recv_desc*;
using ucp_tag_t = uint64_t;
using ucp_datatype_t = uint64_t;
using ucs_status_ptr_t = void*;

enum ucs_status_t : int8_t {
  UCS_OK = 0,
  UCS_INPROGRESS = 1,
  UCS_ERR_MESSAGE_TRUNCATED = -9,
  UCS_ERR_BUSY = -15,
  UCS_ERR_CANCELED = -16,
  UCS_ERR_CONNECTION_RESET = -25,
  UCS_ERR_ENDPOINT_TIMEOUT = -80,
  UCS_ERR_LAST = -100
};
enum ucs_thread_mode_t { UCS_THREAD_MODE_SERIALIZED = 1 };
enum ucs_memory_type_t { UCS_MEMORY_TYPE_HOST = 0 };
enum ucp_err_handling_mode_t { UCP_ERR_HANDLING_MODE_PEER = 1 };
enum { UCP_PARAM_FIELD_FEATURES = 1 << 0, UCP_PARAM_FIELD_TAG_SENDER_MASK = 1 << 4, UCP_FEATURE_TAG = 1 << 0, UCP_FEATURE_WAKEUP = 1 << 4 };
enum { UCP_WORKER_PARAM_FIELD_THREAD_MODE = 1 << 0 };
enum { UCP_EP_PARAM_FIELD_REMOTE_ADDRESS = 1 << 0, UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE = 1 << 1, UCP_EP_PARAM_FIELD_ERR_HANDLER = 1 << 2 };
enum { UCP_OP_ATTR_FIELD_CALLBACK = 1 << 1, UCP_OP_ATTR_FIELD_USER_DATA = 1 << 2, UCP_OP_ATTR_FIELD_FLAGS = 1 << 4 };
enum { UCP_OP_ATTR_FIELD_MEMORY_TYPE = 1 << 6, UCP_OP_ATTR_FLAG_NO_IMM_CMPL = 1 << 16 };
enum { UCP_EP_CLOSE_FLAG_FORCE = 1 << 0 };

struct ucp_tag_recv_info_t {
  ucp_tag_t sender_tag;
  size_t length;
};
struct ucs_cpu_set_t {
  unsigned long ucs_bits[16];
};
struct ucs_sock_addr_t {
  const void* addr;
  uint32_t addrlen;
};
struct ucp_params_t {
  uint64_t field_mask, features;
  size_t request_size;
  void (*request_init)(void*);
  void (*request_cleanup)(void*);
  uint64_t tag_sender_mask;
  int mt_workers_shared;
  size_t estimated_num_eps, estimated_num_ppn;
  const char* name;
  size_t node_local_id;
};
struct ucp_worker_params_t {
  uint64_t field_mask;
  ucs_thread_mode_t thread_mode;
  ucs_cpu_set_t cpu_mask;
  unsigned events;
  void* user_data;
  int event_fd;
  uint64_t flags;
  const char* name;
  size_t am_alignment;
  uint64_t client_id;
};
struct ucp_err_handler_t {
  void (*cb)(void* arg, ucp_ep_h ep, ucs_status_t status);
  void* arg;
};
struct ucp_ep_params_t {
  uint64_t field_mask;
  const ucp_address_t* address;
  ucp_err_handling_mode_t err_mode;
  ucp_err_handler_t err_handler;
  void* user_data;
  unsigned flags;
  ucs_sock_addr_t sockaddr;
  void* conn_request;
  const char* name;
  ucs_sock_addr_t local_sockaddr;
};
struct ucp_request_param_t {
  uint32_t op_attr_mask, flags;
  void* request;
  union {
    void (*send)(void* request, ucs_status_t status, void* user_data);
    void (*recv)(void* request, ucs_status_t status, const ucp_tag_recv_info_t* info, void* user_data);
  } cb;
  ucp_datatype_t datatype;
  void* user_data;
  void* reply_buffer;
  ucs_memory_type_t memory_type;
  union {
    size_t* length;
    ucp_tag_recv_info_t* tag_info;
  } recv_info;
  ucp_mem_h memh;
  ucp_datatype_t remote_datatype;
  const void* remote;
  size_t remote_count;
};
#endif

namespace gingham {

struct UcxApi {
  void (*get_version)(unsigned*, unsigned*, unsigned*);
  ucs_status_t (*config_read)(const char*, const char*, ucp_config_t**);
  ucs_status_t (*config_modify)(ucp_config_t*, const char*, const char*);
  void (*config_release)(ucp_config_t*);
  ucs_status_t (*init_version)(unsigned, unsigned, const ucp_params_t*, const ucp_config_t*, ucp_context_h*);
  void (*cleanup)(ucp_context_h);
  ucs_status_t (*worker_create)(ucp_context_h, const ucp_worker_params_t*, ucp_worker_h*);
  void (*worker_destroy)(ucp_worker_h);
  ucs_status_t (*worker_get_address)(ucp_worker_h, ucp_address_t**, size_t*);
  void (*worker_release_address)(ucp_worker_h, ucp_address_t*);
  ucs_status_t (*worker_get_efd)(ucp_worker_h, int*);
  unsigned (*worker_progress)(ucp_worker_h);
  ucs_status_t (*worker_arm)(ucp_worker_h);
  ucs_status_t (*worker_signal)(ucp_worker_h);
  ucs_status_t (*ep_create)(ucp_worker_h, const ucp_ep_params_t*, ucp_ep_h*);
  ucs_status_ptr_t (*ep_close_nbx)(ucp_ep_h, const ucp_request_param_t*);
  ucs_status_ptr_t (*ep_flush_nbx)(ucp_ep_h, const ucp_request_param_t*);
  ucs_status_ptr_t (*tag_send_nbx)(ucp_ep_h, const void*, size_t, ucp_tag_t, const ucp_request_param_t*);
  ucs_status_ptr_t (*tag_recv_nbx)(ucp_worker_h, void*, size_t, ucp_tag_t, ucp_tag_t, const ucp_request_param_t*);
  ucp_tag_message_h (*tag_probe_nb)(ucp_worker_h, ucp_tag_t, ucp_tag_t, int, ucp_tag_recv_info_t*);
  ucs_status_ptr_t (*tag_msg_recv_nbx)(ucp_worker_h, void*, size_t, ucp_tag_message_h, const ucp_request_param_t*);
  ucs_status_t (*request_check_status)(void*);
  void (*request_cancel)(ucp_worker_h, void*);
  void (*request_free)(void*);
  const char* (*status_string)(ucs_status_t);  // of libucs
};

struct UcxFound {
  bool found = false;
  int version = 0;   // 12200 is 1.22.0
  std::string from;  // where it was found, or why it was not: everything that was tried
};

void set_ucx_path(const std::string& folder);  // of the wheel's libraries; before the first call of the others
const UcxFound& ucx_found();                   // looks once
const UcxApi& ucx();                           // throws MeshError where there is none

inline bool ucx_is_error(ucs_status_ptr_t p) { return reinterpret_cast<uintptr_t>(p) >= static_cast<uintptr_t>(intptr_t{UCS_ERR_LAST}); }
inline ucs_status_t ucx_status(ucs_status_ptr_t p) { return static_cast<ucs_status_t>(reinterpret_cast<intptr_t>(p)); }

}  // namespace gingham
