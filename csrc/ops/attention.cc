#include "ops/attention.h"

#include <algorithm>

#include "collectives/resident.h"
#include "kernels/accumulate.h"
#include "kernels/cast.h"
#include "ops/panels.h"
#include "ops/refusal.h"

namespace gingham {
namespace {

int64_t total_of(const std::vector<int64_t>& lengths) {
  int64_t total = 0;
  for (int64_t each : lengths) total += each;
  return total;
}

// Of the keys, those that some query may see.
std::vector<Run> seen_of(const Attention& block, const std::vector<Run>& queries, const std::vector<Run>& keys) {
  std::vector<Run> out;
  for (const Run& run : keys)
    if (std::any_of(queries.begin(), queries.end(), [&](const Run& q) { return sees(block, q, run); })) out.push_back(run);
  return out;
}

// Narrowed to what the operands have, where that is 16 bits.
Matrix narrowed(const Matrix& sum, const Matrix& like, const std::function<Matrix(int64_t, int64_t, bool)>& allocate, const Stream& stream) {
  if (sum.dtype == like.dtype) return sum;
  const Matrix out = allocate(sum.rows, sum.cols, false);
  cast(sum, out, stream);
  return out;
}

}  // namespace

std::vector<Run> runs_of(const std::vector<int64_t>& lengths, int place, bool zigzag) {
  int64_t before = 0, halves = 0, later = 0;  // rows of the pieces before this one, of their first halves, of the pieces behind
  for (int i = 0; i < static_cast<int>(lengths.size()); i++) {
    const int64_t length = lengths[static_cast<size_t>(i)];
    if (i < place) halves += length - length / 2;
    (i < place ? before : later) += i == place ? 0 : length;
  }
  const int64_t own = lengths[static_cast<size_t>(place)], first = own - own / 2;
  if (!zigzag) return {{0, own, before, before}};
  return {{0, first, halves, before}, {first, own / 2, halves + first + later, before + first}};
}

RingAttention::RingAttention(Program& program, Axis* axis, const Stream& stream, AttentionCall call)
    : program_(program), axis_(axis && axis->size() > 1 ? axis : nullptr), stream_(stream), call_(std::move(call)) {
  CHECK(ShapeError, call_.place >= 0 && call_.place < static_cast<int>(call_.lengths.size()), "attention of piece ", call_.place, " of ",
        call_.lengths.size());
  CHECK(ShapeError, !axis_ || (call_.past == 0 && call_.lengths.size() == static_cast<size_t>(axis_->size()) && call_.place == axis_->rank()),
        "attention of ", call_.lengths.size(), " pieces over ", axis_->size(), " ranks, after ", call_.past, " keys");
  queries_ = runs_of(call_.lengths, call_.place, call_.zigzag);
  for (Run& run : queries_) run.position += call_.past;
}

void RingAttention::check(const Matrix& q, const Matrix& k, const Matrix& v) const {
  const Attention& a = call_.block;
  CHECK(ShapeError, is_real(q.dtype), "q is ", name_of(q.dtype), ", expected float32, float64, bfloat16 or float16");
  CHECK(ShapeError, k.dtype == q.dtype && v.dtype == q.dtype, "q is ", name_of(q.dtype), ", k ", name_of(k.dtype), ", v ", name_of(v.dtype),
        "; cast them alike");
  CHECK(ShapeError, a.kv_heads > 0 && a.heads % a.kv_heads == 0, a.heads, " heads share ", a.kv_heads,
        " heads of keys and values; those must divide them");
  CHECK(ShapeError, a.width <= widest_head(q.dtype, stream_), "heads of ", a.width, " ", name_of(q.dtype), " numbers on a GPU, whose kernels take ",
        widest_head(q.dtype, stream_), "; ring=False, without order='zigzag', leaves attention to torch");
  const int64_t own = call_.lengths[static_cast<size_t>(call_.place)], keys = axis_ ? own : call_.past + total_of(call_.lengths);
  CHECK(ShapeError, q.rows == own && k.rows == keys && v.rows == keys, "q, k, v have ", q.rows, ", ", k.rows, ", ", v.rows,
        " places of the sequence, expected ", own, ", ", keys, ", ", keys);
  const int64_t wide = a.batch * a.heads * a.width, narrow = a.batch * a.kv_heads * a.width;
  CHECK(ShapeError, q.cols == wide && k.cols == narrow && v.cols == narrow, "q, k, v have ", q.cols, ", ", k.cols, ", ", v.cols,
        " numbers a place, expected ", wide, ", ", narrow, ", ", narrow);
}

void RingAttention::begin(const char* name, const Matrix& q, const Matrix& k, const Matrix& v) {
  if (!axis_) return check(q, k, v);
  const Attention& a = call_.block;
  Call call;
  call.set_name(name);
  call.dtype = static_cast<int32_t>(q.dtype);
  call.k = a.batch * a.kv_heads * a.width;
  call.n = a.batch * a.heads * a.width;
  call.rows = q.rows;
  const auto flag = [](bool is, AttentionBit bit) { return static_cast<uint64_t>(is) << bit; };
  call.flags = kAttention | flag(a.causal, kCausal) | flag(call_.zigzag, kZigzag) | flag(call_.masked, kMasked) | flag(a.dropout.p > 0, kDropping);
  begin_or_refuse(program_, call, name, [&] { check(q, k, v); });
}

std::vector<Run> RingAttention::keys_of(int place) const { return runs_of(call_.lengths, place, call_.zigzag); }

std::vector<Run> RingAttention::keys_here() const {
  std::vector<Run> out;
  if (call_.past > 0) out.push_back({0, call_.past, 0, 0});
  int64_t row = call_.past;
  for (size_t place = 0; place < call_.lengths.size(); place++) {
    for (Run run : keys_of(static_cast<int>(place))) out.push_back({row + run.row, run.count, run.position + call_.past, run.column + call_.past});
    row += call_.lengths[place];
  }
  return out;
}

namespace {

// Posts what peers read in place, checks that all ranks mean the same sequence, and ends.
class Passage {
 public:
  Passage(Axis& axis, const Stream& stream, std::vector<int64_t> lengths, const std::function<std::vector<Run>(int, int)>& looked_at)
      : call_{axis, stream, std::move(lengths), looked_at} {}

  void post(const Pair& own, const Pair* room) {
    std::vector<Matrix> posted;
    if (call_.axis.window()) {
      for (const Matrix& m : {own.k, own.v}) add(m, posted);
      if (room)
        for (const Matrix& m : {room->k, room->v}) add(m, posted);
    }
    session_ = std::make_unique<Session>(call_.axis, posted, own.k.rows, true);
    for (int hop = 1; hop < call_.axis.size(); hop++) {
      const int peer = call_.axis.next(hop);
      CHECK(ShapeError, call_.axis.board().rows(peer) == call_.length(-hop), "attention: place ", peer, " of the axis has ",
            call_.axis.board().rows(peer), " places of the sequence, expected ", call_.length(-hop));
    }
    if (call_.axis.window())
      panels_ = window_panels(call_, 0);
    else
      panels_ = ring_panels(call_, own);
    if (room) sums_ = call_.axis.window() ? window_sums(call_, *room, 2) : ring_sums(call_, *room);
    panels_->begin();
  }
  void end() {
    panels_->end();
    session_->end();
  }
  const PanelCall& call() const { return call_; }
  Panels& panels() { return *panels_; }
  Sums& sums() { return *sums_; }

 private:
  void add(const Matrix& m, std::vector<Matrix>& posted) {
    residents_.push_back(std::make_unique<Resident>(m, call_.axis, call_.stream));
    posted.push_back(residents_.back()->view());
  }
  PanelCall call_;
  std::vector<std::unique_ptr<Resident>> residents_;
  std::unique_ptr<Session> session_;
  std::unique_ptr<Panels> panels_;
  std::unique_ptr<Sums> sums_;
};

}  // namespace

RingAttention::Result RingAttention::forward(const Matrix& q, const Matrix& k, const Matrix& v) {
  begin("attention.forward", q, k, v);
  const Attention& a = call_.block;
  const int64_t lines = a.batch * a.heads;
  const DType wide = accumulator(q.dtype);
  const bool narrow = q.dtype != wide;
  const Scratch sum_room(stream_, static_cast<size_t>(lines * q.rows) * size_of(wide));
  const Scratch out_room(stream_, narrow ? static_cast<size_t>(q.count()) * size_of(wide) : 0);
  AttentionSums sums{narrow ? dense(out_room.data(), q.rows, q.cols, wide) : call_.allocate(q.rows, q.cols, true), call_.allocate_lse(lines, q.rows),
                     dense(sum_room.data(), lines, q.rows, wide)};
  attention_begin(sums, stream_);
  const auto visit = [&](const Matrix& keys, const Matrix& values, const std::vector<Run>& runs) {
    for (const Run& run : runs)
      for (const Run& queries : queries_) attention_forward(a, q, queries, keys, values, run, sums, stream_);
  };
  if (!axis_) {
    visit(k, v, keys_here());
  } else {
    Passage passage(*axis_, stream_, call_.lengths, [this](int reader, int owner) { return looked_at(reader, owner); });
    passage.post({k, v}, nullptr);
    visit(k, v, keys_of(call_.place));
    for (int hop = 1; hop < axis_->size(); hop++) {
      const Pair panels = passage.panels().at(hop);
      for (const Run& run : passage.call().of(hop)) {
        visit(panels.k, panels.v, {run});
        passage.panels().pump();
      }
    }
    passage.end();
  }
  attention_finish(a, sums, stream_);
  return {narrowed(sums.out, q, call_.allocate, stream_), sums.top};
}

std::vector<Run> RingAttention::looked_at(int reader, int owner) const {
  return seen_of(call_.block, runs_of(call_.lengths, reader, call_.zigzag), runs_of(call_.lengths, owner, call_.zigzag));
}

RingAttention::Gradients RingAttention::backward(const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& dout, const Result& kept) {
  begin("attention.backward", q, k, v);
  const Attention& a = call_.block;
  const int64_t lines = a.batch * a.heads;
  const DType wide = accumulator(q.dtype);
  std::vector<Scratch> rooms;
  const auto scratch = [&](const Matrix& like) {
    rooms.emplace_back(stream_, static_cast<size_t>(like.count()) * size_of(wide));
    return dense(rooms.back().data(), like.rows, like.cols, wide);
  };
  const auto zeros = [&](const Matrix& like) {
    const Matrix m = like.dtype == wide ? call_.allocate(like.rows, like.cols, true) : scratch(like);
    fill_zero(m, stream_);
    return m;
  };
  const Scratch delta_room(stream_, static_cast<size_t>(lines * q.rows) * size_of(wide));
  const Matrix delta = dense(delta_room.data(), lines, q.rows, wide);
  attention_delta(a, dout, kept.out, delta, stream_);
  const AttentionGradients own{zeros(q), zeros(k), zeros(v)};
  const auto visit = [&](const Pair& panels, const std::vector<Run>& runs, const AttentionGradients& sums) {
    for (const Run& run : runs)
      for (const Run& queries : queries_) attention_backward(a, q, queries, panels.k, panels.v, run, dout, kept.lse, delta, sums, stream_);
  };
  if (!axis_) {
    visit({k, v}, keys_here(), own);
  } else {
    const int64_t longest = *std::max_element(call_.lengths.begin(), call_.lengths.end());
    const Pair product{scratch(dense(nullptr, longest, k.cols, wide)), scratch(dense(nullptr, longest, v.cols, wide))};
    const bool windows = axis_->window() != nullptr;
    const Pair room = windows ? Pair{scratch(k), scratch(v)} : Pair{dense(nullptr, k.rows, k.cols, wide), dense(nullptr, v.rows, v.cols, wide)};
    Passage passage(*axis_, stream_, call_.lengths, [this](int reader, int owner) { return looked_at(reader, owner); });
    passage.post({k, v}, &room);
    visit({k, v}, keys_of(call_.place), own);
    for (int hop = 1; hop < axis_->size(); hop++) {
      passage.sums().expect(hop);
      const Pair panels = passage.panels().at(hop), made = product.rows(0, passage.call().length(hop));
      fill_zero(made.k, stream_);
      fill_zero(made.v, stream_);
      for (const Run& run : passage.call().of(hop)) {
        visit(panels, {run}, {own.dq, made.k, made.v});
        passage.panels().pump();
      }
      passage.sums().add(hop, made);
    }
    passage.sums().take({own.dk, own.dv});
    passage.end();
  }
  return {narrowed(own.dq, q, call_.allocate, stream_), narrowed(own.dk, k, call_.allocate, stream_), narrowed(own.dv, v, call_.allocate, stream_)};
}

}  // namespace gingham
