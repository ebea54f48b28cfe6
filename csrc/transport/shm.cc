#include "transport/shm.h"

#include <string.h>

#include <algorithm>

namespace gingham {

Shm::Shm(Segment& segment, Program& program, AxisMemory memory, std::vector<int> members, bool windowed)
    : Axis(static_cast<int>(std::find(members.begin(), members.end(), program.rank()) - members.begin()), static_cast<int>(members.size())),
      segment_(segment),
      program_(program),
      memory_(memory),
      members_(std::move(members)),
      windowed_(windowed),
      checked_(members_.size()) {
  CHECK(MeshError, rank_ < size_, "rank ", program.member(program.rank()), " is not among the members of its own axis");
  call_ = notice(rank_).posted.load();  // an axis made anew goes on where the last of its number ended
  epoch_ = program_.epoch();
}

void Shm::post(std::span<const Matrix> panels, int64_t rows, bool uneven, const Shape& shape) {
  CHECK(MeshError, panels.size() <= kMaxPanels, "a call may post ", kMaxPanels, " panels, got ", panels.size());
  Notice& mine = notice(rank_);
  if (epoch_ != program_.epoch()) {
    epoch_ = program_.epoch();
    call_ = mine.posted.load();
  }
  Post& post = mine.post;
  post.key = program_.key();
  post.rows = rows;
  post.uneven = uneven;
  post.count = static_cast<int32_t>(panels.size());
  post.shape = shape;
  for (size_t i = 0; i < panels.size(); i++) {
    const Matrix& m = panels[i];
    post.panels[i] = {m.empty() ? 0 : segment_.offset_of(m.data), m.rows, m.cols, m.row_stride, m.col_stride, m.dtype};
  }
  std::fill(checked_.begin(), checked_.end(), 0);
  mine.posted.store(++call_);
}

const Post& Shm::post_of(int peer) {
  Notice& theirs = notice(peer);
  if (checked_[static_cast<size_t>(peer)]) return theirs.post;
  program_.wait(theirs.posted, call_, members_[static_cast<size_t>(peer)]);
  const Post& mine = notice(rank_).post;
  if (theirs.post.key != program_.key() || (!mine.uneven && theirs.post.rows != mine.rows)) program_.mismatch(members_);
  checked_[static_cast<size_t>(peer)] = 1;
  return theirs.post;
}

Matrix Shm::panel(int peer, int index) {
  const auto& p = post_of(peer).panels[index];
  return {segment_.at(p.offset), p.rows, p.cols, p.row_stride, p.col_stride, p.dtype};
}

int64_t Shm::rows(int peer) { return post_of(peer).rows; }

Shape Shm::shape(int peer) { return post_of(peer).shape; }

void Shm::finish() {
  // Every peer's key is compared even where nothing of it is read, so that no difference passes unseen.
  for (int peer = 0; peer < size_; peer++) post_of(peer);
  notice(rank_).finished.store(call_);
}

void Shm::retire() {
  for (int hop = 1; hop < size_; hop++) program_.wait(notice(next(hop)).finished, call_, members_[static_cast<size_t>(next(hop))]);
}

void Shm::advance() { notice(rank_).turns.add(1); }

void Shm::await_turn() { program_.wait(notice(next(-1)).turns, notice(rank_).turns.load(), members_[static_cast<size_t>(next(-1))]); }

Request Shm::begin_get(int peer, size_t bytes) {
  post_of(peer);
  count_received(bytes);
  return {};
}

void Shm::wait_get(Request request) {
  if (request.due > 0) program_.sleep_until(request.due);
}

void Shm::send_due(int peer, const void* data, size_t bytes, int lane, double due) {
  Channel& channel = this->channel(rank_, peer, lane);
  const uint32_t n = channel.sent.load();
  if (n - channel.consumed.load() >= kSlots) program_.wait(channel.consumed, n - kSlots + 1, members_[static_cast<size_t>(peer)]);
  channel.slots[n % kSlots] = {bytes ? segment_.offset_of(data) : 0, bytes, due, 0, 0};
  channel.sent.store(n + 1);
  count_sent(bytes);
}

bool Shm::ready(int peer, int lane) {
  Channel& channel = this->channel(peer, rank_, lane);
  const uint32_t n = channel.consumed.load();
  return reached(channel.sent.load(), n + 1) && channel.slots[n % kSlots].due <= now();
}

void Shm::recv(int peer, void* data, size_t bytes, int lane) {
  Channel& channel = this->channel(peer, rank_, lane);
  const uint32_t n = channel.consumed.load();
  program_.wait(channel.sent, n + 1, members_[static_cast<size_t>(peer)]);
  const auto& message = channel.slots[n % kSlots];
  CHECK(ShapeError, message.bytes == bytes, "rank ", program_.member(program_.rank()), " expected a message of ", bytes, " bytes from rank ",
        program_.member(members_[static_cast<size_t>(peer)]), ", got ", message.bytes);
  wait_get({message.due});
  if (bytes) memcpy(data, segment_.at(message.offset), bytes);
  count_received(bytes);
  channel.consumed.store(n + 1);
}

void Shm::drain(int peer, int lane, uint32_t left) {
  Channel& channel = this->channel(rank_, peer, lane);
  program_.wait(channel.consumed, channel.sent.load() - left, members_[static_cast<size_t>(peer)]);
}

}  // namespace gingham
