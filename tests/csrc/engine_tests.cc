// Engines between hosts, two in one process: two threads of each post and wait while messages cross. For the thread sanitizer above all.
#include <cstring>
#include <memory>
#include <thread>

#include "base/wait.h"
#include "core_tests.h"
#include "transport/handed.h"
#include "transport/ucx.h"

namespace gingham {
namespace {

using Engines = std::array<std::unique_ptr<Engine>, 2>;

void wait(Engine& engine, Engine::Ticket ticket) {
  const double end = now() + 20;
  for (;;) {
    const uint64_t seen = engine.changes();
    if (engine.done(ticket)) return;
    EXPECT(now() < end);
    engine.rest(0.5, seen);
  }
}

// 200 messages each way under a tag; their sizes differ, and two are always under way.
void exchange(Engine& engine, int rank, uint32_t tag) {
  const auto bytes = [&](int number) { return static_cast<size_t>(number % 7 == 6 ? 300000 : number * 37 % 5000); };
  std::vector<std::vector<char>> out(200), in(200);
  std::vector<Engine::Ticket> sends, receives;
  for (int i = 0; i < 200; i++) {
    const auto at = static_cast<size_t>(i);
    out[at].assign(bytes(i), static_cast<char>(i + rank));
    in[at].assign(bytes(i), 0);
    receives.push_back(engine.post_recv(1 - rank, tag, in[at].data(), in[at].size()));
    sends.push_back(engine.post_send(1 - rank, tag, out[at].data(), out[at].size()));
    if (i < 2) continue;
    wait(engine, receives[at - 2]);
    wait(engine, sends[at - 2]);
    EXPECT(in[at - 2] == std::vector<char>(bytes(i - 2), static_cast<char>(i - 2 + 1 - rank)));
  }
  for (size_t at : {198, 199}) {
    wait(engine, receives[at]);
    wait(engine, sends[at]);
  }
}

void exchange_on_two_threads(Engines& engines) {
  std::vector<std::string> errors(4);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < 4; i++)
    threads.emplace_back([&, i] {
      try {
        exchange(*engines[i % 2], static_cast<int>(i % 2), static_cast<uint32_t>(i / 2));
      } catch (const std::exception& e) {
        errors[i] = e.what();
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (const std::string& error : errors) CHECK(Failure, error.empty(), error);
}

void ucx_engine_serves_two_threads() {
  if (!ucx_found().found) return;  // GINGHAM_UCX names one
  Engines engines{std::make_unique<UcxEngine>(0), std::make_unique<UcxEngine>(1)};
  std::thread other([&] { engines[1]->connect({{0, engines[0]->address()}}, 20); });
  engines[0]->connect({{1, engines[1]->address()}}, 20);
  other.join();
  exchange_on_two_threads(engines);
  std::thread leaves([&] { engines[1]->close(5); });
  engines[0]->close(5);
  leaves.join();
}

// What a server does: a lane of one engine's sends into the same lane of the other's receives.
void serve(HandedEngine& from, HandedEngine& to, int sender, uint32_t tag) {
  const HandedEngine::Lane sends{1 - sender, tag, false}, receives{sender, tag, true};
  while (const auto sent = from.take(sends, 60)) {
    const auto received = to.take(receives, 60);
    if (!received) return;
    void* const data = from.begin(sent->ticket);
    if (sent->bytes > 0) std::memcpy(received->data, data, std::min(sent->bytes, received->bytes));
    from.ended(sent->ticket, sent->bytes, "");
    to.ended(received->ticket, sent->bytes, "");
  }
}

void handed_engine_serves_two_threads() {
  Engines engines;
  std::vector<HandedEngine*> handed;
  for (int rank = 0; rank < 2; rank++) {
    auto engine = std::make_unique<HandedEngine>(rank, "test");
    engine->connect({{1 - rank, ""}}, 1);
    handed.push_back(engine.get());
    engines[static_cast<size_t>(rank)] = std::move(engine);
  }
  std::vector<std::thread> servers;
  for (int sender = 0; sender < 2; sender++)
    for (uint32_t tag = 0; tag < 2; tag++)
      servers.emplace_back(serve, std::ref(*handed[static_cast<size_t>(sender)]), std::ref(*handed[static_cast<size_t>(1 - sender)]), sender, tag);
  exchange_on_two_threads(engines);
  for (HandedEngine* engine : handed) engine->close(0);
  for (std::thread& server : servers) server.join();
}

void handed_messages_are_withdrawn_and_judged() {
  HandedEngine engine(0, "test");
  engine.connect({{3, ""}}, 1);
  std::vector<char> data(10000, 'x');
  const HandedEngine::Lane sends{3, 5, false}, receives{3, 5, true};
  engine.withdraw(engine.post_send(3, 5, data.data(), data.size()));
  EXPECT(!engine.await_work(sends, 0));
  const Engine::Ticket taken = engine.post_send(3, 5, data.data(), data.size());
  EXPECT(engine.take(sends, 0)->ticket == taken);
  engine.withdraw(taken);
  data.assign(data.size(), 'y');
  EXPECT(*static_cast<char*>(engine.begin(taken)) == 'x');
  engine.ended(taken, data.size(), "");
  const Engine::Ticket short_one = engine.post_recv(3, 5, data.data(), data.size());
  engine.ended(engine.take(receives, 0)->ticket, 7, "");
  std::string error;
  try {
    engine.done(short_one);
  } catch (const ShapeError& e) {
    error = e.what();
  }
  EXPECT(has(error, "rank 0 expected 10000 bytes from rank 3 under tag 5, got a message of 7 bytes"));
}

}  // namespace

std::vector<Test> engine_tests() {
  return {{"UCX serves two threads", ucx_engine_serves_two_threads},
          {"a handed engine serves two threads", handed_engine_serves_two_threads},
          {"handed messages are withdrawn and judged", handed_messages_are_withdrawn_and_judged}};
}

}  // namespace gingham
