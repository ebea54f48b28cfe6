#include "binding_layers.h"

#include <pybind11/stl.h>

#include "binding_axis.h"
#include "kernels/accumulate.h"
#include "kernels/cast.h"
#include "kernels/cross_entropy.h"
#include "kernels/embedding.h"
#include "kernels/indices.h"
#include "kernels/layer_norm.h"

namespace gingham {
namespace {

Matrix optional_of(const py::object& x, const char* name, const Member& member) {
  return x.is_none() ? Matrix{} : tensor_of(x, name, member.job).matrix();
}

// Two float64 a row, of which ranks exchange both, or of an RMS norm the second alone, since its first is 0.
Matrix pairs_at(void* data, int64_t rows) { return dense(data, rows, 2, DType::f64); }
Matrix exchanged_of(const Matrix& pairs, bool centred) { return centred ? pairs : pairs.slice(1, 1, 2); }

// What make(pairs) makes of x [..., features], as it is exchanged: [..., 2] or [..., 1].
template <class Make>
py::object exchange_of(const Member& member, const Tensor& x, bool centred, const Make& make) {
  std::vector<int64_t> shape = x.shape;
  shape.back() = centred ? 2 : 1;
  const Made out = make_tensor(member.job, shape, "float64");
  {
    py::gil_scoped_release nogil;
    const int64_t rows = x.matrix().rows;
    const Stream& stream = member.job->stream();
    const Scratch room(stream, static_cast<size_t>(rows) * 2 * sizeof(double));
    const Matrix pairs = pairs_at(room.data(), rows), to = dense(out.data, rows, shape.back(), DType::f64);
    make(pairs, stream);
    cast(exchanged_of(pairs, centred), to, stream);
  }
  return out.object;
}

Tensor rows_of(const py::object& x, const char* name, const Member& member) {
  Tensor t = tensor_of(x, name, member.job);
  CHECK(ShapeError, !t.shape.empty(), name, " has no dims, expected [..., features]");
  return t;
}

void check_alike(const Tensor& dy, const Tensor& x) {
  CHECK(ShapeError, dy.shape == x.shape && dy.dtype == x.dtype, "norm: the gradient and x differ in shape or dtype");
}

py::object norm_statistics(const Member& member, const py::object& x, bool centred) {
  const OnCallersStream on_stream(member);
  const Tensor in = rows_of(x, "x", member);
  return exchange_of(member, in, centred, [&](const Matrix& pairs, const Stream& stream) { row_statistics(in.matrix(), centred, pairs, stream); });
}

// parts: every rank's statistics, of counts columns each; none: all columns are here. Gives y and the statistics of whole rows.
py::tuple norm_forward(const Member& member, const py::object& x, const Objects& parts, const std::vector<int64_t>& counts, const py::object& gamma,
                       const py::object& beta, double eps, bool centred) {
  const OnCallersStream on_stream(member);
  const Tensor in = rows_of(x, "x", member);
  CHECK(ShapeError, parts.size() == counts.size(), "norm: ", parts.size(), " parts of ", counts.size(), " sizes");
  std::vector<int64_t> shape = in.shape;
  shape.back() = 2;
  const Made y = make_tensor(member.job, in.shape, in.dtype_name), statistics = make_tensor(member.job, shape, "float64");
  std::vector<Matrix> others;
  for (const py::object& part : parts) others.push_back(tensor_of(part, "statistics", member.job).matrix());
  Norm norm{{}, in.shape.back(), eps, optional_of(gamma, "weight", member), optional_of(beta, "bias", member), centred};
  {
    py::gil_scoped_release nogil;
    const Matrix m = in.matrix(), out = dense(y.data, m.rows, m.cols, m.dtype);
    const Stream& stream = member.job->stream();
    norm.statistics = pairs_at(statistics.data, m.rows);
    if (parts.empty()) {
      layer_norm_whole(m, norm, out, stream);
    } else {
      fill_zero(norm.statistics, stream);
      norm.count = 0;
      for (size_t i = 0; i < others.size(); i++) {
        if (!centred)
          accumulate(others[i], exchanged_of(norm.statistics, centred), stream);
        else if (counts[i] > 0)
          merge_statistics(others[i], counts[i], norm.statistics, norm.count, stream);
        norm.count += counts[i];
      }
      layer_norm(m, norm, out, stream);
    }
  }
  return py::make_tuple(y.object, statistics.object);
}

py::object norm_pieces(const Member& member, const py::object& dy, const py::object& x, const py::object& statistics, const py::object& gamma,
                       int64_t count, double eps, bool centred) {
  const OnCallersStream on_stream(member);
  const Tensor in = rows_of(x, "x", member), grad = rows_of(dy, "dy", member);
  check_alike(grad, in);
  const Norm norm{tensor_of(statistics, "statistics", member.job).matrix(), count, eps, optional_of(gamma, "weight", member), {}, centred};
  return exchange_of(member, in, centred,
                     [&](const Matrix& pairs, const Stream& stream) { layer_norm_pieces(grad.matrix(), in.matrix(), norm, pairs, stream); });
}

// pieces: every rank's; none: all columns are here. Gives dx or None, and the sums that are asked for of dgamma and dbeta, [how many, features]
// in the accumulator of x, or None.
py::tuple norm_backward(const Member& member, const py::object& dy, const py::object& x, const py::object& statistics, const Objects& pieces,
                        const py::object& gamma, int64_t count, double eps, bool centred, bool need_x, bool need_gamma, bool need_beta) {
  const OnCallersStream on_stream(member);
  const Tensor in = rows_of(x, "x", member), grad = rows_of(dy, "dy", member);
  check_alike(grad, in);
  const Norm norm{tensor_of(statistics, "statistics", member.job).matrix(), count, eps, optional_of(gamma, "weight", member), {}, centred};
  std::vector<Matrix> others;
  for (const py::object& part : pieces) others.push_back(tensor_of(part, "pieces", member.job).matrix());
  const int64_t features = in.shape.back(), asked = int64_t{need_gamma} + int64_t{need_beta};
  const Made none{py::none(), nullptr};
  const Made dx = need_x ? make_tensor(member.job, in.shape, in.dtype_name) : none;
  const std::string wide = in.dtype == DType::f64 ? "float64" : "float32";
  const Made sums = asked ? make_tensor(member.job, {asked, features}, wide, Heap::Kind::lasting) : none;
  {
    py::gil_scoped_release nogil;
    const Stream& stream = member.job->stream();
    const Matrix m = in.matrix(), slope = grad.matrix(), all = dense(sums.data, asked, features, dtype_of(wide));
    const Matrix to = need_x ? dense(dx.data, m.rows, m.cols, m.dtype) : Matrix{};
    const NormWeights weights{need_gamma ? all.slice(0, 0, 1) : Matrix{}, need_beta ? all.slice(0, asked - 1, asked) : Matrix{}};
    if (pieces.empty()) {
      layer_norm_whole_backward(slope, m, norm, to, weights, stream);
    } else {
      const Scratch room(stream, static_cast<size_t>(m.rows) * 2 * sizeof(double));
      const Matrix total = pairs_at(room.data(), m.rows);
      fill_zero(total, stream);
      for (const Matrix& other : others) accumulate(other, exchanged_of(total, centred), stream);
      layer_norm_backward(slope, m, norm, total, to, stream);
      layer_norm_weights(slope, m, norm, weights, stream);
    }
  }
  return py::make_tuple(dx.object, sums.object);
}

// Of rows whose targets are ids, [rows] int64.
Targets targets_of(const Tensor& ids, int64_t rows, int64_t ignore, int64_t first, int64_t vocabulary, double smoothing) {
  CHECK(ShapeError, ids.count() == rows && ids.dtype_name == "int64", "loss: ", ids.count(), " targets of ", ids.dtype_name, " for ", rows,
        " rows, expected as many of int64");
  return {static_cast<const int64_t*>(ids.data), ignore, first, vocabulary, smoothing};
}

// [rows, 4] float64 of this rank's columns: the largest m, and S, T, A about it (kernels/cross_entropy.h).
py::object loss_parts(const Member& member, const py::object& logits, const py::object& target, int64_t ignore, int64_t first, int64_t vocabulary,
                      double smoothing) {
  const OnCallersStream on_stream(member);
  const Tensor in = rows_of(logits, "logits", member), ids = tensor_of(target, "target", member.job);
  const Matrix x = in.matrix();
  const Targets targets = targets_of(ids, x.rows, ignore, first, vocabulary, smoothing);
  const Stream& stream = member.job->stream();
  const Made out = make_tensor(member.job, {x.rows, 4}, "float64");
  {
    py::gil_scoped_release nogil;
    const Matrix all = dense(out.data, x.rows, 4, DType::f64);
    softmax_parts(x, targets, all.slice(1, 0, 1), all.slice(1, 1, 4), stream);
  }
  return out.object;
}

// parts as joined over the ranks, [rows, 4]. Gives [rows, 2], each row's loss and whether it counts, and the sums of both, [1, 2]; float64.
py::tuple loss_sums(const Member& member, const py::object& parts, const py::object& target, int64_t ignore, int64_t vocabulary, double smoothing) {
  const OnCallersStream on_stream(member);
  const Matrix all = rows_of(parts, "parts", member).matrix();
  const Tensor ids = tensor_of(target, "target", member.job);
  const Targets targets = targets_of(ids, all.rows, ignore, 0, vocabulary, smoothing);
  const Made out = make_tensor(member.job, {all.rows, 2}, "float64"), sums = make_tensor(member.job, {1, 2}, "float64");
  {
    py::gil_scoped_release nogil;
    const Matrix rows = dense(out.data, all.rows, 2, DType::f64);
    losses(all.slice(1, 1, 4), targets, rows, member.job->stream());
    column_sums(rows, dense(sums.data, 1, 2, DType::f64), false, member.job->stream());
  }
  return py::make_tuple(out.object, sums.object);
}

// scale: [1], or one a row.
py::object loss_gradient(const Member& member, const py::object& logits, const py::object& parts, const py::object& target, const py::object& scale,
                         int64_t ignore, int64_t first, int64_t vocabulary, double smoothing) {
  const OnCallersStream on_stream(member);
  const Tensor in = rows_of(logits, "logits", member), ids = tensor_of(target, "target", member.job), by = tensor_of(scale, "scale", member.job);
  const Matrix all = rows_of(parts, "parts", member).matrix();
  const Made out = make_tensor(member.job, in.shape, in.dtype_name);
  {
    py::gil_scoped_release nogil;
    const Matrix x = in.matrix(), to = dense(out.data, x.rows, x.cols, x.dtype), scales = dense(by.data, by.count(), 1, by.dtype);
    const Targets targets = targets_of(ids, x.rows, ignore, first, vocabulary, smoothing);
    softmax_gradient(x, all.slice(1, 0, 1), all.slice(1, 1, 4), targets, scales, to, member.job->stream());
  }
  return out.object;
}

const int64_t* whole_numbers(const Tensor& t, const char* name) {
  CHECK(ShapeError, t.dtype_name == "int64", name, " are ", t.dtype_name, ", expected int64");
  return static_cast<const int64_t*>(t.data);
}

// table [count, width], ids [...]: [..., width].
py::object rows_gathered(const Member& member, const py::object& table, const py::object& ids) {
  const OnCallersStream on_stream(member);
  const Tensor from = rows_of(table, "table", member), which = tensor_of(ids, "ids", member.job);
  const int64_t* at = whole_numbers(which, "ids");
  std::vector<int64_t> shape = which.shape;
  shape.push_back(from.shape.back());
  const Made out = make_tensor(member.job, shape, from.dtype_name);
  {
    py::gil_scoped_release nogil;
    gather_rows(from.matrix(), at, dense(out.data, which.count(), shape.back(), from.dtype), member.job->stream());
  }
  return out.object;
}

// rows [..., width] of ids [...] -> [count, width] in their accumulator; order: None, or where the ids were before they were sorted.
py::object rows_scattered(const Member& member, const py::object& rows, const py::object& ids, const py::object& order, int64_t first, int64_t count,
                          int64_t skipped) {
  const OnCallersStream on_stream(member);
  const Tensor from = rows_of(rows, "rows", member), which = tensor_of(ids, "ids", member.job);
  const Matrix x = from.matrix();
  Places places{whole_numbers(which, "ids"), nullptr, first, skipped};
  CHECK(ShapeError, which.count() == x.rows, "scatter of ", x.rows, " rows with ", which.count(), " ids");
  if (!order.is_none()) {
    const Tensor sorted = tensor_of(order, "order", member.job);
    CHECK(ShapeError, sorted.count() == x.rows, "scatter of ", x.rows, " rows in an order of ", sorted.count());
    places.order = whole_numbers(sorted, "order");
  }
  const std::string wide = x.dtype == DType::f64 ? "float64" : "float32";
  const Made out = make_tensor(member.job, {count, x.cols}, wide, Heap::Kind::lasting);
  {
    py::gil_scoped_release nogil;
    scatter_rows(x, places, dense(out.data, count, x.cols, dtype_of(wide)), member.job->stream());
  }
  return out.object;
}

// [3] int64: the smallest and the largest index outside of 0 .. classes - 1 that is not `ignored`, and how many there are.
py::object wrong_found(const Member& member, const py::object& index, int64_t classes, int64_t ignored) {
  const OnCallersStream on_stream(member);
  const Tensor which = tensor_of(index, "index", member.job);
  const int64_t* ids = whole_numbers(which, "indices");
  const Made out = make_tensor(member.job, {3}, "int64");
  {
    py::gil_scoped_release nogil;
    find_wrong(ids, which.count(), classes, ignored, static_cast<int64_t*>(out.data), member.job->stream());
  }
  return out.object;
}

}  // namespace

void define_layers(py::module_& m) {
  m.def("gather_rows", &rows_gathered, py::arg("program"), py::arg("table"), py::arg("ids"));
  m.def("scatter_rows", &rows_scattered, py::arg("program"), py::arg("rows"), py::arg("ids"), py::arg("order"), py::arg("first"), py::arg("count"),
        py::arg("skipped"));
  m.def("find_wrong", &wrong_found, py::arg("program"), py::arg("index"), py::arg("classes"), py::arg("ignored"));
  m.def("norm_statistics", &norm_statistics, py::arg("program"), py::arg("x"), py::arg("centred"));
  m.def("norm_forward", &norm_forward, py::arg("program"), py::arg("x"), py::arg("parts"), py::arg("counts"), py::arg("weight"), py::arg("bias"),
        py::arg("eps"), py::arg("centred"));
  m.def("norm_pieces", &norm_pieces, py::arg("program"), py::arg("dy"), py::arg("x"), py::arg("statistics"), py::arg("weight"), py::arg("features"),
        py::arg("eps"), py::arg("centred"));
  m.def("norm_backward", &norm_backward, py::arg("program"), py::arg("dy"), py::arg("x"), py::arg("statistics"), py::arg("pieces"), py::arg("weight"),
        py::arg("features"), py::arg("eps"), py::arg("centred"), py::arg("need_x"), py::arg("need_weight"), py::arg("need_bias"));
  m.def("loss_parts", &loss_parts, py::arg("program"), py::arg("logits"), py::arg("target"), py::arg("ignore_index"), py::arg("first"),
        py::arg("vocabulary"), py::arg("smoothing"));
  m.def("loss_sums", &loss_sums, py::arg("program"), py::arg("parts"), py::arg("target"), py::arg("ignore_index"), py::arg("vocabulary"),
        py::arg("smoothing"));
  m.def("loss_gradient", &loss_gradient, py::arg("program"), py::arg("logits"), py::arg("parts"), py::arg("target"), py::arg("scale"),
        py::arg("ignore_index"), py::arg("first"), py::arg("vocabulary"), py::arg("smoothing"));
}

}  // namespace gingham
