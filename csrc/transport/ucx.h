// An engine over UCX tag messages: a worker that one mutex of ours guards, and endpoints that tell when a peer dies.
//   tag of UCX, 64 bits: the sender's rank in the upper half, the message's tag in the lower, whose top bit marks the engine's own messages
// Who waits progresses the worker itself and sleeps in poll() in between. A helper thread does so only while no caller does: so messages
// move while Python or BLAS computes, and a waiting caller shares the worker with nobody.
#pragma once
#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "transport/engine.h"
#include "transport/ucx_api.h"

namespace gingham {

class UcxEngine final : public Engine {
 public:
  // settings: of UCX by its names without UCX_, for example {"NET_DEVICES", "eth0"}. What the environment sets wins over them.
  explicit UcxEngine(int rank, const std::map<std::string, std::string>& settings = {});
  ~UcxEngine() override;
  UcxEngine(const UcxEngine&) = delete;
  UcxEngine& operator=(const UcxEngine&) = delete;

  const char* name() const override { return "ucx"; }
  std::string address() const override { return address_; }
  void connect(const std::vector<EnginePeer>& peers, double seconds) override;
  Ticket post_send(int peer, uint32_t tag, const void* data, size_t bytes) override;
  Ticket post_recv(int peer, uint32_t tag, void* data, size_t bytes) override;
  bool done(Ticket ticket) override;
  void withdraw(Ticket ticket) override;
  uint64_t changes() const override { return changes_.load(std::memory_order_acquire); }
  void rest(double seconds, uint64_t since) override;
  std::string failure(int peer) override;
  bool left(int peer) override;
  void close(double seconds) override;

 private:
  enum Word : uint32_t { kHello = 1, kBye = 2, kRead = 3, kDrop = 4 };  // the engine's own messages, of a tag each
  using Lock = std::unique_lock<std::mutex>;

  struct Remote {
    UcxEngine* engine = nullptr;
    int rank = -1;
    std::string where;  // for people: the peer's host and addresses
    ucp_ep_h endpoint = nullptr;
    void* listening = nullptr;  // the receive of the next word of it
    uint32_t heard = 0;         // of kDrop: the tag
    std::vector<uint32_t> drops;
    bool listens = false, met = false, left = false, read_bye = false, owes_read = false, broken = false, silent = false;
    ucs_status_t status = UCS_OK;
  };
  struct Operation {
    UcxEngine* engine = nullptr;
    Remote* peer = nullptr;
    bool receives = false, ended = false;
    uint32_t tag = 0;
    size_t bytes = 0;
    void* request = nullptr;
    ucs_status_t status = UCS_OK;
    ucp_tag_recv_info_t info{};
  };

  struct SentWord {
    UcxEngine* engine = nullptr;
    uint32_t tag = 0;
  };

  static void on_sent(void* request, ucs_status_t status, void* operation);
  static void on_received(void* request, ucs_status_t status, const ucp_tag_recv_info_t* info, void* operation);
  static void on_word_sent(void* request, ucs_status_t status, void* nothing);
  static void on_word(void* request, ucs_status_t status, const ucp_tag_recv_info_t* info, void* remote);
  static void on_dropped(void* request, ucs_status_t status, const ucp_tag_recv_info_t* info, void* engine);
  static void on_error(void* remote, ucp_ep_h endpoint, ucs_status_t status);

  void open(const std::map<std::string, std::string>& settings);
  void describe();
  void release();
  Remote& remote(int peer);
  void begin(const EnginePeer& peer);
  void listen(Remote& peer);
  void hear(Remote& peer, uint32_t word);
  void say(Remote& peer, Word word, uint32_t tag = 0);
  void drop(const Remote& peer, uint32_t tag);
  void change() { changes_.fetch_add(1, std::memory_order_acq_rel); }
  Ticket post(Operation operation, const void* data);
  void end(Operation& operation, ucs_status_t status);
  bool progress();  // what moved; the mutex is held, as in all below
  void settle();    // what callbacks left to do, since they must not call UCX
  void wake(uint64_t before);
  bool armed_sleep(Lock& lock, double seconds);
  void rest_locked(Lock& lock, double seconds, uint64_t since);
  bool wait_until(Lock& lock, double seconds, const std::function<bool()>& met);
  void cancel(Operation& operation);
  void judge(const Operation& operation) const;
  std::string why(const Remote& peer) const;
  void flush_endpoints(Lock& lock, double end);
  void help();

  const int rank_;
  const pid_t pid_;
  const UcxApi& api_;
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  int descriptor_ = -1;
  std::string address_;

  std::mutex mutex_;
  std::condition_variable others_;  // callers that rest while another drives
  std::condition_variable helper_;
  std::atomic<uint64_t> changes_{0};
  std::unordered_map<int, std::unique_ptr<Remote>> remotes_;
  std::unordered_map<Ticket, Operation> operations_;
  std::vector<void*> closing_;  // endpoints' last requests
  Ticket next_ = 1;
  double silenced_ = 0;  // when a link was last found silent, on now()'s clock
  uint64_t turns_ = 0;   // of callers: the helper stays away while it moves
  int resting_ = 0;      // callers that wait for others_
  int sleepers_ = 0;     // threads in poll(): the driver, which is a caller (driven_), and the helper
  bool driven_ = false, unsettled_ = false, stopping_ = false, closed_ = false, helper_naps_ = false;
  std::thread thread_;
};

}  // namespace gingham
