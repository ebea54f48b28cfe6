#include "virtual_hosts.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <latch>
#include <map>
#include <mutex>
#include <optional>
#include <thread>

#include "kernels/blas.h"

namespace gingham {
namespace {

constexpr int kAxes = 3;
constexpr size_t kHeap = size_t{64} << 20;

// What the hosts tell and ask each other, as the launcher's store does: one thread of each host hears what is told, and answers.
class News {
 public:
  explicit News(size_t hosts) : hosts_(hosts) {}
  Verdict publish(const Verdict& mine) {
    const std::lock_guard lock(mutex_);
    if (error_) return *error_;
    error_ = mine;
    tell({0, 0, true});
    return mine;
  }
  std::vector<std::string> ask(uint64_t program, size_t host) {
    std::unique_lock lock(mutex_);
    const size_t number = told_.size();
    tell({program, host, false});
    changed_.wait_for(lock, std::chrono::milliseconds(500), [&] { return answers_[number].size() + 1 == hosts_; });
    return answers_[number];
  }
  std::string share(uint64_t program, bool first, const std::string& bytes) {
    std::unique_lock lock(mutex_);
    if (first) shared_[program] = bytes;
    changed_.notify_all();
    changed_.wait(lock, [&] { return shared_.count(program) != 0; });
    return shared_[program];
  }
  void hear(Job& job, size_t host) {
    std::unique_lock lock(mutex_);
    for (size_t at = 0;; at++) {
      changed_.wait(lock, [&] { return over_ || told_.size() > at; });
      if (told_.size() <= at) return;
      const Message message = told_[at];
      if (!message.error && message.host == host) continue;
      const Verdict error = error_.value_or(Verdict{});
      lock.unlock();
      std::string answer;
      if (message.error)
        job.control().hear(error);
      else
        answer = job.told(message.program);
      lock.lock();
      if (!message.error) answers_[at].push_back(answer);
      changed_.notify_all();
    }
  }
  void end() {
    const std::lock_guard lock(mutex_);
    over_ = true;
    changed_.notify_all();
  }

 private:
  struct Message {
    uint64_t program;
    size_t host;  // who asks
    bool error;
  };
  void tell(const Message& message) {
    told_.push_back(message);
    changed_.notify_all();
  }
  const size_t hosts_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<Verdict> error_;
  std::deque<Message> told_;
  std::map<size_t, std::vector<std::string>> answers_;
  std::map<uint64_t, std::string> shared_;
  bool over_ = false;
};

struct Machine {
  Machine(const Layout& layout, Via via, double timeout) : layout(layout), timeout(timeout), news(layout.size()) {
    for (const std::vector<int>& ranks : layout) {
      segments.push_back(Job::make_segment(static_cast<int>(ranks.size()), kHeap));
      size += static_cast<int>(ranks.size());
    }
    host_of.resize(static_cast<size_t>(size));
    for (size_t host = 0; host < layout.size(); host++) {
      names.push_back(concat("h", host));
      for (int rank : layout[host]) host_of[static_cast<size_t>(rank)] = static_cast<int>(host);
    }
    network = via == Via::queues ? queue_network(size) : handed_network(size);
    out = std::make_unique<std::latch>(size);
  }
  void span(Job& job, const std::shared_ptr<Engine>& engine) {
    const auto host = static_cast<size_t>(host_of[static_cast<size_t>(job.rank())]);
    job.span(std::make_unique<Hosts>(
        job.rank(), host_of, names, engine,
        Hosts::Calls{[this](const Verdict& mine) { return news.publish(mine); }, [this, host](uint64_t program) { return news.ask(program, host); },
                     [this](uint64_t program, bool first, const std::string& bytes) { return news.share(program, first, bytes); }}));
  }
  const Layout& layout;
  const double timeout;
  int size = 0;
  News news;
  std::vector<std::shared_ptr<Segment>> segments;
  std::vector<int> host_of;
  std::vector<std::string> names;
  std::unique_ptr<Network> network;
  std::unique_ptr<std::latch> out;  // nobody's memory goes before all have left
};

// Runs the body and says how it ended. What it made is gone by then, as what a rank holds is when an error leaves its main function.
// The program of a rank that died is given back: it has not left it.
std::shared_ptr<Program> run_body(Machine& machine, Job& job, const std::shared_ptr<Engine>& engine, const RankBody& body, Ending& ending) {
  const auto note = [&ending](const char* kind, const std::exception& error, int rank = -1) {
    ending.kind = kind;
    ending.text = error.what();
    ending.rank = rank;
  };
  std::shared_ptr<Program> program;
  try {
    program = job.program(1, everyone(machine.size), std::vector<int>(kAxes, machine.size), machine.timeout);
    ending.row = body(job, *program);
  } catch (const Dies&) {
    machine.network->lose(job.rank());
    return program;
  } catch (const PeerDied& error) {
    note("PeerDied", error, error.rank);
  } catch (const PeerStalled& error) {
    note("PeerStalled", error, error.rank);
  } catch (const PeerOutOfMemory& error) {
    note("PeerOutOfMemory", error, error.rank);
  } catch (const ShapeError& error) {
    note("ShapeError", error);
  } catch (const MeshError& error) {
    note("MeshError", error);
  } catch (const std::exception& error) {
    note("Error", error);
  }
  program.reset();
  job.close();
  engine->close(1);
  return nullptr;
}

void run_rank(Machine& machine, int rank, const RankBody& body, Ending& ending) {
  const auto host = static_cast<size_t>(machine.host_of[static_cast<size_t>(rank)]);
  const std::vector<int>& locals = machine.layout[host];
  set_blas_threads(1);
  Job job(rank, machine.size, machine.segments[host], machine.timeout, locals);
  job.attach("test");
  const std::shared_ptr<Engine> engine = machine.network->engine(rank);
  if (machine.layout.size() > 1) machine.span(job, engine);
  std::thread hearing;
  if (rank == locals[0]) hearing = std::thread([&] { machine.news.hear(job, host); });
  const std::shared_ptr<Program> kept = run_body(machine, job, engine, body, ending);
  machine.out->arrive_and_wait();
  machine.news.end();
  if (hearing.joinable()) hearing.join();
}

}  // namespace

std::string name_of(const Layout& hosts) {
  std::string out;
  for (const std::vector<int>& ranks : hosts) out += concat(out.empty() ? "" : " | ", list_of(ranks));
  return out;
}

std::vector<Ending> run_on_hosts(const Layout& hosts, Via via, const RankBody& body, double timeout) {
  Machine machine(hosts, via, timeout);
  std::vector<Ending> endings(static_cast<size_t>(machine.size));
  std::vector<std::thread> threads;
  for (int r = 0; r < machine.size; r++) threads.emplace_back([&, r] { run_rank(machine, r, body, endings[static_cast<size_t>(r)]); });
  for (std::thread& thread : threads) thread.join();
  return endings;
}

std::vector<Row> rows_on_hosts(const Layout& hosts, Via via, const RankBody& body) {
  std::vector<Row> rows;
  for (Ending& ending : run_on_hosts(hosts, via, body)) {
    CHECK(Failure, ending.kind.empty(), ending.kind, ": ", ending.text);
    rows.push_back(std::move(ending.row));
  }
  return rows;
}

}  // namespace gingham
