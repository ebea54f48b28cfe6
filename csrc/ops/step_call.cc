#include "ops/step_call.h"

#include <algorithm>

#include "ops/refusal.h"

namespace gingham {

int64_t block_size(const Operand& operand, const std::vector<int64_t>& offsets, const Matrix& local, int dim) {
  return operand.cut() && operand.dim == dim ? offsets.back() : local.size(dim);
}

int64_t own_size(const Operand& operand, const std::vector<int64_t>& offsets, int dim, int64_t block) {
  if (!operand.cut() || operand.dim != dim) return block;
  const size_t r = static_cast<size_t>(operand.axis->rank());
  return offsets[r + 1] - offsets[r];
}

std::vector<int64_t> chunk_rows(int64_t lead, int64_t inner, int parts) {
  std::vector<int64_t> points = chunk(lead, parts);
  for (int64_t& point : points) point *= inner;
  return points;
}

void check_rows(const std::vector<int64_t>& offsets, int64_t inner) {
  const int parts = static_cast<int>(offsets.size()) - 1;
  const std::vector<int64_t> expected = chunk_rows(inner > 0 ? offsets.back() / inner : 0, inner, parts);
  if (inner == 0 || offsets == expected) return;
  std::string got, wanted;
  for (size_t r = 0; r + 1 < offsets.size(); r++) {
    const char* comma = r ? ", " : "";
    got += concat(comma, (offsets[r + 1] - offsets[r]) / inner);
    wanted += concat(comma, (expected[r + 1] - expected[r]) / inner);
  }
  throw ShapeError(concat("the ranks have ", got, " rows, expected ", wanted, ", as torch.chunk and mesh.scatter cut them: results lie so"));
}

StepCall::StepCall(Program& program, const Stream& used, const Step::Config& step, const char* product, DType dtype, int64_t rows)
    : config(step), d(step.slice_dim), stream(used), pipeline(used), program_(program) {
  call_.set_name(concat(step.name, ".", product));
  call_.dtype = static_cast<int32_t>(dtype);
  std::copy(step.grid.begin(), step.grid.end(), call_.grid);
  call_.k = step.k;
  for (const Projection& m : step.maps) call_.n += m.n;
  call_.rows = rows;
  call_.flags = kStep | static_cast<uint64_t>(step.slices & 0xffffff) << 8 | static_cast<uint64_t>(step.slice_dim) << 1;
  groups.resize(d == Dim::N ? step.maps.size() : 1);
}

void StepCall::begin(const std::function<void()>& validate) { begin_or_refuse(program_, call_, config.name, validate); }

std::vector<int64_t> StepCall::learn(Axis& axis, int64_t rows) const {
  Session session(axis, {}, rows, true);
  std::vector<int64_t> offsets{0};
  for (int peer = 0; peer < axis.size(); peer++) offsets.push_back(offsets.back() + axis.board().rows(peer));
  session.end();
  return offsets;
}

void StepCall::cut(int64_t m, int64_t k, const std::vector<int64_t>& n) {
  for (size_t i = 0; i < groups.size(); i++) {
    Slices& slices = groups[i].slices;
    slices.slices = config.slices;
    slices.add({0, d == Dim::M ? m : d == Dim::K ? k : n[i]});
    const Projection& map = config.maps[i];
    if (config.x.cut() && in_x(d) >= 0) slices.add(x_cuts);
    if (map.w.cut() && in_w(d) >= 0) slices.add(map.w.offsets);
    if (map.y.cut() && in_y(d) >= 0) slices.add(y_cuts[i]);
  }
}

Matrix StepCall::accumulator(const Matrix& out, Storage storage) {
  return size_of(out.dtype) == 2 ? pipeline.workspace(out.rows, out.cols, DType::f32, storage) : out;
}

bool StepCall::rounded_by_gemm(const Operand& operand, const Group& group, DType dtype, bool adding) const {
  return stream.device() == Device::cuda && size_of(dtype) == 2 && (adding || !operand.shared()) && group.slices.intervals() > 0;
}

Matrix StepCall::sums_beside(const Matrix& out, Storage storage, bool rounded, int dim, const Group& group, size_t factors, bool adding) {
  const bool once = adding || (factors == 1 && (dim >= 0 || group.slices.slices * group.slices.intervals() == 1));
  if (!rounded || !once) return accumulator(out, storage);
  return dense(nullptr, out.rows, out.cols, DType::f32, storage);
}

namespace {

// What this rank's part must measure along the cut dim; -1: not known beforehand. Offsets may be given where nothing is cut.
int64_t expected_size(const Operand& operand) {
  if (operand.offsets.empty()) return -1;
  return operand.cut() ? own_size(operand, operand.offsets, operand.dim, 0) : operand.offsets.back();
}

void check_size(const char* what, const Matrix& m, int dim, int64_t expected) {
  CHECK(ShapeError, expected < 0 || m.size(dim) == expected, what, " block is [", m.rows, ",", m.cols, "], expected ", expected, " along dim ", dim,
        "; uneven sizes need the global shape, and every rank its own block");
}

}  // namespace

void check_x(const Operand& x, const Matrix& local) {
  CHECK(ShapeError, is_real(local.dtype), "dtype ", name_of(local.dtype), ", expected float32, float64, bfloat16 or float16");
  check_size("input", local, x.dim, expected_size(x));
}

void check_w(const Projection& map, const Matrix& w, int64_t k_block, DType dtype) {
  CHECK(ShapeError, w.dtype == dtype, "weight is ", name_of(w.dtype), ", input is ", name_of(dtype), "; cast one of them");
  const int64_t k = block_size(map.w, map.w.offsets, w, 0);
  CHECK(ShapeError, k == k_block, "input has ", k_block, " features in this column of ranks, weight has ", k);
  check_size("weight", w, map.w.dim, expected_size(map.w));
  if (map.y.dim == 1 && !map.y.offsets.empty() && (map.w.dim != 1 || !map.w.cut())) check_size("weight", w, 1, map.y.offsets.back());
}

void check_dy(const Projection& map, const Matrix& dy, int64_t n_block, DType dtype) {
  CHECK(ShapeError, dy.dtype == dtype, "gradients are ", name_of(dtype), " and ", name_of(dy.dtype));
  check_size("gradient", dy, map.y.dim, expected_size(map.y));
  const int64_t n = block_size(map.y, map.y.offsets, dy, 1);
  CHECK(ShapeError, n == n_block, "gradient has ", n, " features, weight has ", n_block);
}

}  // namespace gingham
