// What the forward and the backward run of a step share: the call's record, the cut points (those along M learned from the posted rows),
// where each operand lies, and the groups of maps that run over one set of slices.
#pragma once
#include <string>
#include <vector>

#include "ops/pipeline.h"
#include "ops/step.h"

namespace gingham {

// Where the slice dim lies in each operand as written: X [M, K], W [K, N], Y [M, N]; -1: nowhere.
inline int in_x(Dim d) { return d == Dim::M ? 0 : d == Dim::K ? 1 : -1; }
inline int in_w(Dim d) { return d == Dim::K ? 0 : d == Dim::N ? 1 : -1; }
inline int in_y(Dim d) { return d == Dim::M ? 0 : d == Dim::N ? 1 : -1; }

// Size along dim of the whole block of which `local` is this rank's part, and the reverse: this rank's part of a block.
int64_t block_size(const Operand& operand, const std::vector<int64_t>& offsets, const Matrix& local, int dim);
int64_t own_size(const Operand& operand, const std::vector<int64_t>& offsets, int dim, int64_t block);

// Where torch.chunk cuts `lead` x `inner` rows, by the first of them. The rows of an input must lie so, since those of results do: elsewhere a rank
// would get back other ranks' rows. Every rank of the axis sees the same points, and raises.
std::vector<int64_t> chunk_rows(int64_t lead, int64_t inner, int parts);
void check_rows(const std::vector<int64_t>& offsets, int64_t inner);

class StepCall {
 public:
  StepCall(Program& program, const Stream& stream, const Step::Config& config, const char* product, DType dtype, int64_t rows);

  void flag(int bit, bool on) { call_.flags |= static_cast<uint64_t>(on) << (32 + bit); }
  void begin(const std::function<void()>& validate);
  // Cut points along M from the rows that every rank of the axis says it holds.
  std::vector<int64_t> learn(Axis& axis, int64_t rows) const;

  // m, k: block sizes; n: one per map. Fills every group's slices; call after x_cuts and y_cuts are known.
  void cut(int64_t m, int64_t k, const std::vector<int64_t>& n);
  Pipeline::Placement x_place() const { return {config.x, x_cuts, in_x(d), Storage::row_major, !config.x.by_posted_rows()}; }
  Pipeline::Placement w_place(size_t i) const { return {config.maps[i].w, config.maps[i].w.offsets, in_w(d), config.storage, false}; }
  Pipeline::Placement y_place(size_t i) const { return {config.maps[i].y, y_cuts[i], in_y(d), Storage::row_major, config.maps[i].y.dim == 1}; }
  // An activation whose panels may decide the order of a group's intervals: it is cut along the slice dim, on a ring that queues.
  bool leads(const Operand& operand, int dim) const { return operand.cut() && dim >= 0 && operand.axis->ring().queues(); }
  Group& group(size_t map) { return groups[d == Dim::N ? map : 0]; }
  // Sums of 16-bit operands are kept in fp32 beside `out` and cast when done.
  Matrix accumulator(const Matrix& out, Storage storage);
  // Whether the last product into a 16-bit result rounds it as it stores, which spares the cast: on GPUs (the CPU's gemm ends with a pass of
  // its own anyway), where nothing of the result is summed over ranks afterwards, or `adding`: by products that add to what arrives (see
  // adds_to_arrivals); and the slice dim is not empty.
  bool rounded_by_gemm(const Operand& operand, const Group& group, DType dtype, bool adding = false) const;
  // Whether a result's sums over the operand's axis go through Pipeline::adding. dim: the slice dim in the result, -1 for nowhere; beside: the group
  // makes other products too.
  bool adds_to_arrivals(const Operand& operand, int dim, bool beside) const {
    return operand.cut() && dim >= 0 && beside && operand.axis->ring().queues();
  }
  // With rounded_by_gemm: where each of its elements has one product, or the sums stay in messages, no sum is kept either.
  Matrix sums_beside(const Matrix& out, Storage storage, bool rounded, int dim, const Group& group, size_t factors, bool adding = false);

  const Step::Config& config;
  const Dim d;
  const Stream& stream;
  Pipeline pipeline;
  std::vector<int64_t> x_cuts;
  std::vector<std::vector<int64_t>> y_cuts;
  std::vector<Group> groups;

 private:
  Program& program_;
  Call call_;
};

void check_x(const Operand& x, const Matrix& local);
void check_w(const Projection& map, const Matrix& w, int64_t k_block, DType dtype);
void check_dy(const Projection& map, const Matrix& dy, int64_t n_block, DType dtype);

}  // namespace gingham
