// One run of a step: what it posts, its inputs and outputs over the slice dim, and the loop that drives them.
#pragma once
#include <functional>
#include <memory>
#include <vector>

#include "base/stream.h"
#include "collectives/resident.h"
#include "kernels/epilogue.h"
#include "ops/grid.h"
#include "ops/input.h"
#include "ops/output.h"

namespace gingham {

// out (+)= sum over factors of a b, each transposed where its flag says so.
struct Factor {
  Input* a;
  Input* b;
  bool a_transposed, b_transposed;
};
struct Product {
  Output* out;
  std::vector<Factor> factors;
  // What the product into this panel applies as it stores it; last: it is the last of all. Empty: nothing.
  std::function<Tail(int slice, int interval, bool last)> tail = {};
};

// The maps that share one set of slices: all of a step, or one map where the slice dim is its own N.
struct Group {
  Slices slices;
  std::vector<Input*> inputs;
  std::vector<Product> products;
  std::vector<std::function<void(int slice, int interval)>> visits;  // see every panel once: bias gradients
  Input* shared = nullptr;                                           // X, where several maps use it
  // Whose panels' order decides, where it moves: W may be here early. Else the farthest input of each interval does.
  Input* leader = nullptr;
};

class Pipeline {
 public:
  explicit Pipeline(const Stream& stream) : stream_(stream) {}

  // An operand as input or output; `place` says where its dim D lies (0, 1) or that it lacks it (-1).
  struct Placement {
    const Operand& operand;
    const std::vector<int64_t>& offsets;
    int dim;
    Storage storage;
    bool same_rows;  // the ranks of its axis hold the same rows of X and Y
  };
  enum class Role { input, output };
  // How an operand travels over its axis: its place among the posted panels (window), or its lane (ring); neither: it is not cut.
  struct Slot {
    int panel = -1, lane = -1;
  };
  // Declares a matrix on its axis.
  Slot declare(const Placement& place, const Matrix& m, Role role = Role::input);
  void post(int64_t rows);
  Input* input(const Placement& place, const Matrix& local, Slot slot, const Slices& slices);
  // With every rank's part here: see parts_input.
  Input* input(const Placement& place, const Matrix& local, const std::vector<Matrix>& parts, const Slices& slices);
  Output* output(const Placement& place, const Matrix& accumulator, Slot slot, const Slices& slices);
  // Of a sum over an axis whose ring queues, beside which the group has other products: see adding_output.
  Output* adding(const Placement& place, const Matrix& accumulator, Slot slot, const Slices& slices, const Matrix& rounded);
  void run(const Group& group);
  void close();  // finishes and retires every axis posted on, and gives back the workspace of inputs and outputs

  // The whole block of an operand that lacks the slice dim: itself, or gathered over its axis.
  Matrix gathered(const Operand& operand, const std::vector<int64_t>& offsets, const Matrix& local, Storage storage = Storage::row_major);
  // Where such an operand's products are summed: `own` itself, or a block of workspace that settle() reduce-scatters into own.
  Matrix block_for(const Operand& operand, const std::vector<int64_t>& offsets, const Matrix& own, Storage storage = Storage::row_major);
  void settle(const Operand& operand, const std::vector<int64_t>& offsets, const Matrix& block, const Matrix& own,
              Storage storage = Storage::row_major);
  Matrix workspace(int64_t rows, int64_t cols, DType dtype, Storage storage = Storage::row_major);

 private:
  static std::vector<int> order_of(const Group& group);
  struct Round {
    const Product* product;
    int number;
  };
  static bool takes_turns(const Group& group);
  static std::vector<Round> rounds_of(const Group& group);
  void run_standing(const Group& group, const std::vector<int>& order);
  void work(const Group& group, const Product& product, const std::vector<int>& order, int slice, int round);
  void multiply(const Group& group, const Product& product, int slice, int interval, bool last);
  struct Used {
    Axis* axis;
    std::vector<Matrix> panels;
    bool uneven;
    int gathers = 0, sums = kLanes / 2 - 1;  // the last lanes given; lane 0 is the collectives'
  };
  const Stream& stream_;
  std::vector<Used> axes_;
  std::vector<Session> sessions_;
  std::vector<Scratch> scratch_;
  std::vector<std::unique_ptr<Resident>> residents_;
  std::vector<std::unique_ptr<Input>> inputs_;
  std::vector<std::unique_ptr<Output>> outputs_;
};

}  // namespace gingham
