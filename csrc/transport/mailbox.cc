#include "transport/mailbox.h"

#include <string.h>

#include <algorithm>
#include <memory>

namespace gingham {
namespace {

constexpr const char* kDoing = "a message between stages of a pipeline";

}  // namespace

Mailbox::Mailbox(Job& job, Program& program, int letters)
    : segment_(job.segment()), heap_(job.heap()), program_(program), letters_(letters), theirs_(static_cast<size_t>(program.size())) {
  CHECK(MeshError, letters > 0, "a mailbox of ", letters, " letters, expected at least 1");
  const auto count = static_cast<size_t>(letters);
  mine_ = static_cast<Letter*>(heap_.allocate(count * sizeof(Letter), Heap::Kind::control));
  std::uninitialized_value_construct_n(mine_, count);
}

Mailbox::~Mailbox() { heap_.free(mine_); }

void Mailbox::open(int peer, uint64_t offset) {
  CHECK(MeshError, peer >= 0 && peer < program_.size() && program_.here(peer), "rank ", program_.member(program_.rank()),
        ": a mailbox is opened for a member of this host, got member ", peer, " of ", program_.size());
  CHECK(MeshError, offset + static_cast<size_t>(letters_) * sizeof(Letter) <= segment_.bytes(), "a mailbox at ", offset, " of a memory of ",
        segment_.bytes(), " bytes");
  theirs_[static_cast<size_t>(peer)] = static_cast<Letter*>(segment_.at(offset));
}

void Mailbox::check(int letter) const { CHECK(MeshError, letter >= 0 && letter < letters_, "letter ", letter, " of a mailbox of ", letters_); }

Letter& Mailbox::at(int peer, int letter) const {
  check(letter);
  CHECK(MeshError, peer >= 0 && peer < program_.size() && theirs_[static_cast<size_t>(peer)], "rank ", program_.member(program_.rank()),
        " has not opened the mailbox of member ", peer);
  return theirs_[static_cast<size_t>(peer)][letter];
}

void Mailbox::send(int peer, int letter, const void* data, const std::string& dtype, const std::vector<int64_t>& shape) {
  Letter& theirs = at(peer, letter);
  check_fits(theirs, dtype, shape);
  const bool empty = std::find(shape.begin(), shape.end(), 0) != shape.end();
  CHECK(MeshError, empty || segment_.holds(data), "a message that does not lie in the memory that the ranks share");
  write(theirs, peer, empty ? 0 : segment_.offset_of(data), dtype, shape);
}

void Mailbox::tell(int peer, int letter, const std::string& dtype, const std::vector<int64_t>& shape) {
  Letter& theirs = at(peer, letter);
  check_fits(theirs, dtype, shape);
  write(theirs, peer, 0, dtype, shape);
}

void Mailbox::check_fits(const Letter& letter, const std::string& dtype, const std::vector<int64_t>& shape) {
  CHECK(ShapeError, shape.size() <= std::size(letter.shape.dims) && dtype.size() < sizeof(letter.dtype), "a message of ", shape.size(),
        " dims and dtype ", dtype, ", expected at most ", std::size(letter.shape.dims), " dims");
}

void Mailbox::write(Letter& theirs, int peer, uint64_t offset, const std::string& dtype, const std::vector<int64_t>& shape) {
  const uint32_t number = theirs.sent.load();
  program_.wait(theirs.taken, number, peer, kDoing);
  theirs.offset = offset;
  theirs.shape = {};
  theirs.shape.ndim = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), theirs.shape.dims);
  memset(theirs.dtype, 0, sizeof(theirs.dtype));
  memcpy(theirs.dtype, dtype.data(), dtype.size());
  theirs.sent.store(number + 1);
}

void Mailbox::await_taken(int peer, int letter) {
  Letter& theirs = at(peer, letter);
  program_.wait(theirs.taken, theirs.sent.load(), peer, kDoing);
}

const Letter& Mailbox::await(int peer, int letter) {
  check(letter);
  Letter& mine = mine_[letter];
  program_.wait(mine.sent, mine.taken.load() + 1, peer, kDoing);
  return mine;
}

void Mailbox::take(int letter, void* data, size_t bytes) {
  Letter& mine = mine_[letter];
  if (bytes) memcpy(data, segment_.at(mine.offset), bytes);
  mine.taken.add(1);
}

}  // namespace gingham
