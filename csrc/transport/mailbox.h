// Tensors between ranks of a program that share memory, beside its calls. Each message goes by a letter of its receiver's, a number that
// both know, so that messages are taken in any order and nobody waits but for what it asks for. The sender says where the data stand, the
// receiver copies them from there: one copy, and nothing is queued.
//   [ letter | letter | .. ]   in the heap of the receiver, who tells the others where
#pragma once
#include <string>
#include <vector>

#include "transport/job.h"

namespace gingham {

struct Letter {
  Word sent, taken;  // messages that it has carried
  uint64_t offset;   // of the data in the shared memory
  Shape shape;
  char dtype[16];  // as torch names it
};

class Mailbox {
 public:
  // letters: this rank's, from 0. Between its last message and its end lies a call of the program, or the job's failure: who waits until a
  // message was taken looks into its receiver's mailbox.
  Mailbox(Job& job, Program& program, int letters);
  ~Mailbox();
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;

  uint64_t offset() const { return segment_.offset_of(mine_); }
  // Where a member of this host has its letters, which are as many.
  void open(int peer, uint64_t offset);
  // data: contiguous, in the shared memory, unchanged until await_taken(). Waits where the letter's last message was not taken.
  void send(int peer, int letter, const void* data, const std::string& dtype, const std::vector<int64_t>& shape);
  void await_taken(int peer, int letter);
  // A letter alone: what a message is whose data travel another way. Who takes it gives no room for them.
  void tell(int peer, int letter, const std::string& dtype, const std::vector<int64_t>& shape);
  // Of the next message of an own letter, which `peer` sends: what it is; then its data.
  const Letter& await(int peer, int letter);
  void take(int letter, void* data, size_t bytes);

 private:
  Letter& at(int peer, int letter) const;
  void check(int letter) const;
  static void check_fits(const Letter& letter, const std::string& dtype, const std::vector<int64_t>& shape);
  void write(Letter& theirs, int peer, uint64_t offset, const std::string& dtype, const std::vector<int64_t>& shape);

  Segment& segment_;
  Heap& heap_;
  Program& program_;
  const int letters_;
  Letter* mine_;
  std::vector<Letter*> theirs_;
};

}  // namespace gingham
