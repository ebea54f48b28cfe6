#include "control/program.h"

#include <string.h>

#include <algorithm>

namespace gingham {
namespace {

constexpr size_t kLine = 64;
size_t lines(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }
size_t block_bytes() { return lines(sizeof(ProgramBlock)); }
size_t record_bytes(size_t members) { return lines(sizeof(ProgramRecord) * members); }

}  // namespace

// A member that waits for another.
struct Program::Mine : Waiter {
  Mine(Program& program, int peer, const char* words = nullptr) : program(program), peer(peer), words(words) {}
  void check() override { program.check(); }
  void compare(double waited, bool left) override {
    if (!program.recovering_) program.compare(peer, waited, left);
  }
  bool left() const override { return peer >= 0 && program.here(peer) && program.record(peer).closed.load() != 0; }
  std::string doing() const override {
    if (program.recovering_) return "the first call after memory ran out";
    return words ? words : program.mine_.name;
  }
  double timeout() const override { return program.timeout_; }
  int thread() const override { return program.beside_ ? 1 : 0; }
  Program& program;
  int peer;
  const char* words;
};

Program::Program(Control& control, Segment& segment, Heap& heap, uint64_t id, std::vector<int> members, std::vector<int> lines, size_t room,
                 double timeout)
    : control_(control), segment_(segment), heap_(heap), members_(std::move(members)), lines_(std::move(lines)), id_(id), timeout_(timeout) {
  CHECK(MeshError, !members_.empty(), "a program without ranks");
  for (int r : members_) CHECK(MeshError, r >= 0 && r < control.size(), "rank ", r, " of a job of ", control.size());
  rank_ = place_of(control.rank());
  CHECK(MeshError, rank_ < size(), "rank ", control.rank(), " is not among the ranks of its own program, ", list_of(members_));
  while (!here(first_)) first_++;
  for (int r = 0; r < size(); r++) locals_ += here(r);
  spans_ = locals_ < members_.size();
  join(id, block_bytes() + record_bytes(members_.size()) + room);
}

ProgramRecord* records_of(ProgramBlock* block) { return reinterpret_cast<ProgramRecord*>(reinterpret_cast<char*>(block) + block_bytes()); }

// Its first member makes the memory, the others find it.
void Program::join(uint64_t id, size_t bytes) {
  if (rank_ == first_) {
    control_.sweep(heap_);
    char* memory = static_cast<char*>(heap_.allocate(bytes, Heap::Kind::control));
    memset(memory, 0, bytes);
    new (memory) ProgramBlock;
    auto* block = reinterpret_cast<ProgramBlock*>(memory);
    block->size = size();
    for (int r = 0; r < size(); r++) (new (records_of(block) + r) ProgramRecord)->rank = member(r);
    entry_ = control_.make_entry(id, segment_.offset_of(memory));
  }
  struct Finding : Waiter {
    explicit Finding(Program& program) : program(program) {}
    void check() override { program.control_.check(); }
    std::string doing() const override { return "the start of a mesh"; }
    double timeout() const override { return program.timeout_; }
    Program& program;
  } finding(*this);
  for (const double start = now(); !entry_ && !(entry_ = control_.program(id));) {
    control_.look(member(first_));
    nap(0.0005);
    if (Control::interrupt) Control::interrupt();
    if (now() - start < timeout_) continue;
    control_.fail(Kind::stalled, member(0),
                  concat("rank ", member(0), " did not begin the mesh that it makes with ", list_of(members_), " within ", timeout_, " s"));
    control_.raise();
  }
  char* memory = static_cast<char*>(segment_.at(entry_->offset.load()));
  block_ = reinterpret_cast<ProgramBlock*>(memory);
  records_ = records_of(block_);
  room_ = memory + block_bytes() + record_bytes(members_.size());
  record(rank_).joined.store(1);
  for (int r = 0; r < size(); r++)
    if (here(r)) control_.wait(record(r).joined, 1, member(r), finding);
}

Program::~Program() {
  if (background_) background_->main_ = nullptr;
  close();
  if (control_.orphaned() || !block_) return;
  block_->left.add(1);
  if (rank_ == first_) control_.keep_until_left(entry_, &block_->left, static_cast<uint32_t>(locals_), block_);
}

void Program::begin(const Call& call) {
  const int rank = control_.rank();
  CHECK(MeshError, !control_.orphaned(), "rank ", rank, ": ", call.name, " in a process forked from this rank, such as a data loader's worker,",
        " which is no rank of the mesh: call layers, gather and other collectives in the rank itself; mesh.scatter works in both");
  CHECK(MeshError, !closed_.load(), "rank ", rank, ": ", call.name, " on a mesh after destroy; call gingham.init again");
  if (told_) recover();
  ProgramRecord& me = record(rank_);
  const uint32_t sequence = me.sequence.load() + 1;
  mine_ = call;
  if (label_) {
    mine_.options = label_->hash;
    copy_text(mine_.label, sizeof(mine_.label), label_->text);
    label_.reset();
  }
  me.calls[sequence % kHistory].store(mine_);
  key_ = mixed(history_, mine_.key());
  history_ = mixed(history_, mine_.history());
  inside_ = true;
  me.sequence.store(sequence);
  check();
  asked_ = 0;
  if (call.invalid && spans_) control_.fail([&] { return disagreement(logs(), {}, sequence); });  // peers elsewhere see no record
  if (!beside_ && control_.strikes(call.name) && fail_allocation) fail_allocation();
}

void Program::note(std::shared_ptr<const Label> label) {
  say(std::move(label));
  Call call;
  call.set_name("called");
  begin(call);
}

void Program::check() {
  control_.check();
  if (block_->refused.load() != 3 * epoch()) raise_refusal(false);
  CHECK(MeshError, !abandoned_.load(), "rank ", control_.rank(), ": this sum over depth was given up: memory ran out on a rank");
}

void Program::wait(Word& word, uint32_t target, int peer, const char* doing) {
  Mine mine(*this, peer, doing);
  control_.wait(word, target, peer < 0 ? -1 : member(peer), mine);
}

void Program::wait(Condition& condition, int peer) {
  Mine mine(*this, peer);
  control_.wait(condition, member(peer), mine);
}

void Program::sleep_until(double time) {
  Mine mine(*this, -1);
  control_.sleep_until(time, mine);
}

void Program::share(char* bytes, size_t count) {
  CHECK(MeshError, count <= sizeof(block_->notice), "a notice of ", count, " bytes, expected at most ", sizeof(block_->notice));
  if (spans_) {
    const std::string told = control_.elsewhere()->share(id_, rank_ == 0, std::string(bytes, count));
    CHECK(MeshError, told.size() == count, "rank ", control_.rank(), ": the first rank told ", told.size(), " bytes, expected ", count);
    memcpy(bytes, told.data(), count);
    return;
  }
  if (rank_ == 0) {
    memcpy(block_->notice, bytes, count);
    block_->shared.store(1);
  }
  wait(block_->shared, 1, 0);
  memcpy(bytes, block_->notice, count);
}

bool Program::awaited() const {
  const uint32_t mine = record(rank_).sequence.load();
  for (int rank = 0; rank < size(); rank++)
    if (here(rank) && static_cast<int32_t>(record(rank).sequence.load() - mine) > 0) return true;
  return false;
}

int Program::behind() const {
  int odd = rank_;
  for (int r = 0; r < size(); r++) {
    if (!here(r)) continue;
    if (record(r).closed.load() || control_.left(member(r))) return member(r);
    if (static_cast<int32_t>(record(r).sequence.load() - record(odd).sequence.load()) < 0) odd = r;
  }
  return member(odd);
}

void Program::pair_with(std::shared_ptr<Program> background) {
  background_ = std::move(background);
  background_->main_ = this;
  background_->beside_ = true;
}

void Program::close() {
  if (closed_.exchange(true) || control_.orphaned() || !block_) return;
  record(rank_).closed.store(1);
}

}  // namespace gingham
