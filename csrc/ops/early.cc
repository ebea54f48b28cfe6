#include "ops/early.h"

#include "kernels/cast.h"
#include "ops/step_call.h"

namespace gingham {
namespace {

Axis& axis_of(const Step::Config& config) { return *config.maps[0].w.axis; }

// A matrix like `own`, as a rank's part of W.
Matrix part_like(const Matrix& own, const Operand& w, int rank, Storage storage, const Step::Allocate& allocate) {
  const int64_t length = w.offsets[static_cast<size_t>(rank) + 1] - w.offsets[static_cast<size_t>(rank)];
  const int64_t rows = w.dim == 0 ? length : own.rows, cols = w.dim == 1 ? length : own.cols;
  return storage == Storage::column_major ? allocate(cols, rows).t() : allocate(rows, cols);
}

}  // namespace

bool Step::gathers_early() const {
  for (const Projection& map : config_.maps) {
    const Operand& w = map.w;
    if (in_w(config_.slice_dim) < 0 || !w.cut() || w.offsets.empty() || w.axis != &axis_of(config_)) return false;
    if (!w.axis->ring().queues() || w.axis->crosses_any() || w.axis->replays()) return false;
  }
  return true;
}

std::unique_ptr<EarlyWeights> Step::early(const std::vector<Matrix>& w, const Allocate& allocate) {
  CHECK(MeshError, gathers_early(), config_.name, ": its weights are not gathered early");
  Axis& axis = axis_of(config_);
  std::vector<Matrix> own;
  std::vector<std::vector<Matrix>> parts;
  std::vector<Scratch> packed;
  for (size_t i = 0; i < w.size(); i++) {
    const Operand& place = config_.maps[i].w;
    check_w(config_.maps[i], w[i], block_size(place, place.offsets, w[i], 0), w[0].dtype);
    own.push_back(config_.storage == Storage::column_major ? w[i].t() : w[i]);
    if (!own[i].flat()) {
      packed.emplace_back(stream_, own[i].bytes());
      const Matrix room = dense(packed.back().data(), own[i].rows, own[i].cols, own[i].dtype);
      cast(own[i], room, stream_);
      own[i] = room;
    }
    parts.emplace_back();
    for (int rank = 0; rank < axis.size(); rank++)
      parts[i].push_back(rank == axis.rank() ? w[i] : part_like(w[i], place, rank, config_.storage, allocate));
  }
  return std::make_unique<EarlyWeights>(axis, std::move(own), std::move(parts), std::move(packed));
}

// A call of its own: its record is that of a gather, so that ranks which gather another layer's weights, or none, are told.
void Step::gather(EarlyWeights& weights) {
  StepCall call(program_, stream_, config_, "gather", weights.parts(0)[0].dtype, -1);
  call.begin([] {});
  Session session(axis_of(config_));
  weights.begin();
  session.end();
}

void EarlyWeights::begin() {
  Ring& ring = axis_.ring();
  ring.group_start(*point_);
  for (size_t i = 0; i < own_.size(); i++)
    for (int hop = 1; hop < axis_.size(); hop++) {
      const Matrix& theirs = parts_[i][static_cast<size_t>(axis_.next(-hop))];
      ring.send(axis_.next(hop), own_[i].data, own_[i].bytes(), 0);
      ring.recv(axis_.next(-hop), theirs.data, theirs.bytes(), 0);
    }
  ring.group_end();
  group_ = ring.queued(0);
}

}  // namespace gingham
