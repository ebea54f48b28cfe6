// Casts, sums, epilogues and dropout against float64 or, where bits must agree, against their CPU twins.
#include <cmath>
#include <cstring>

#include "kernel_tests.h"
#include "kernels/accumulate.h"
#include "kernels/cast.h"
#include "kernels/dropout.h"
#include "kernels/epilogue.h"
#include "kernels/tree_sum.h"

namespace gingham::tests {
namespace {

const DType kReal[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

// The views every kernel meets: dense, padded so that rows stay aligned, padded so that they do not, one element off, columns first.
const std::vector<Layout>& layouts() {
  static const std::vector<Layout> all = {{false, 0, 0}, {false, 8, 8}, {false, 3, 0}, {false, 0, 1}, {true, 0, 0}, {true, 5, 1}};
  return all;
}

struct Size {
  int64_t rows, cols;
};
const std::vector<Size>& sizes() {
  static const std::vector<Size> quick = {{5, 64}, {37, 41}, {1, 1}}, all = {{5, 64}, {37, 41}, {1, 1}, {300, 7}, {3, 3000}, {129, 256}, {64, 1}};
  return full() ? all : quick;
}

double rounding(DType dtype) {
  switch (dtype) {
    case DType::bf16:
      return 4e-3;
    case DType::f16:
      return 5e-4;
    case DType::f32:
      return 2e-7;
    default:
      return 1e-15;
  }
}

void casts() {
  std::mt19937 random(3);
  std::vector<std::pair<DType, DType>> pairs = {
      {DType::f32, DType::bf16}, {DType::bf16, DType::f32}, {DType::f32, DType::f16}, {DType::f16, DType::f32}};
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::bytes1, DType::bytes8}) pairs.push_back({dtype, dtype});
  for (const auto& [from, to] : pairs)
    for (const Size& s : sizes())
      for (const Layout& x : layouts())
        for (const Layout& y : layouts()) {
          const Buffer in(s.rows, s.cols, from, x, random), before(s.rows, s.cols, to, y, random), got = before.copy(), want = before.copy();
          cast(in.view(), got.view(), DeviceStream());
          cast(in.view(), want.view(), HostStream());
          report(std::string("cast to ") + name_of(to), name_of(from), shape_of({s.rows, s.cols}), error_of(got.values(), want.values()), 0);
          expect(got.same_padding(before), "cast wrote beside its output");
        }
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::bytes1})
    for (const Size& s : sizes())
      for (const Layout& layout : layouts()) {
        const Buffer before(s.rows, s.cols, dtype, layout, random), got = before.copy();
        fill_zero(got.view(), DeviceStream());
        report("fill_zero", name_of(dtype), shape_of({s.rows, s.cols}),
               error_of(got.values(), std::vector<double>(static_cast<size_t>(s.rows * s.cols), 0.0)), 0);
        expect(got.same_padding(before), "fill_zero wrote beside its output");
      }
}

// The bits are those of the sum in fp32 that is then cast; also of three terms, where the last addition rounds.
void rounded_sums(const Buffer& a, const Buffer& b, const Size& s, const Layout& layout, const Stream& stream, const std::string& where) {
  std::mt19937 random(5);
  for (const DType dtype : {DType::bf16, DType::f16}) {
    const Buffer out(s.rows, s.cols, dtype, layout, random), got = out.copy(), want = out.copy(), sum = b.copy();
    accumulate(a.view(), sum.view(), stream);
    cast(sum.view(), want.view(), stream);
    accumulate_into(a.view(), b.view(), got.view(), stream);
    report("accumulate_into, rounded" + where, name_of(dtype), shape_of({s.rows, s.cols}), error_of(got.values(), want.values()), 0);
    expect(got.same_padding(out), "a rounded sum wrote beside its output");
    const Buffer tree = out.copy(), first = a.copy();
    accumulate(b.view(), sum.view(), stream);
    cast(sum.view(), want.view(), stream);
    const Term terms[] = {{0, 1, first.view(), true}, {1, 2, b.view(), false}, {2, 3, b.view(), false}};
    tree_sum(terms, tree.view(), stream);
    report("tree_sum, rounded" + where, name_of(dtype), shape_of({s.rows, s.cols}), error_of(tree.values(), want.values()), 0);
    expect(tree.same_padding(out), "a rounded sum of three wrote beside its output");
  }
}

void sums() {
  std::mt19937 random(4);
  for (const DType dtype : {DType::f32, DType::f64})
    for (const Size& s : sizes())
      for (const Layout& x : layouts())
        for (const Layout& y : layouts()) {
          const Buffer a(s.rows, s.cols, dtype, x, random), b(s.rows, s.cols, dtype, y, random), out(s.rows, s.cols, dtype, x, random);
          std::vector<double> want = a.values();
          const std::vector<double> more = b.values();
          for (size_t i = 0; i < want.size(); i++) want[i] += more[i];
          for (const bool device : {true, false}) {
            DeviceStream cuda;
            HostStream host;
            const Stream& stream = device ? static_cast<const Stream&>(cuda) : host;
            const std::string where = device ? "" : " (cpu)";
            const Buffer sum = b.copy(), into = out.copy();
            accumulate(a.view(), sum.view(), stream);
            accumulate_into(a.view(), b.view(), into.view(), stream);
            report("accumulate" + where, name_of(dtype), shape_of({s.rows, s.cols}), error_of(sum.values(), want), rounding(dtype));
            report("accumulate_into" + where, name_of(dtype), shape_of({s.rows, s.cols}), error_of(into.values(), want), rounding(dtype));
            expect(sum.same_padding(b) && into.same_padding(out), "accumulate wrote beside its output");
            if (dtype == DType::f32) rounded_sums(a, b, s, x, stream, where);
          }
        }
}

void column_totals() {
  std::mt19937 random(6);
  for (const DType dtype : kReal)
    for (const Size& s : {Size{5, 64}, Size{37, 41}, Size{1, 1}, Size{600, 70}, Size{513, 3}})
      for (const Layout& x : layouts())
        for (const bool add : {false, true}) {
          const Buffer a(s.rows, s.cols, dtype, x, random), before(1, s.cols, accumulator(dtype), {}, random), out = before.copy();
          std::vector<double> want = before.values();
          const std::vector<double> values = a.values();
          for (size_t j = 0; j < want.size(); j++) {
            want[j] = add ? want[j] : 0;
            for (size_t i = 0; i < static_cast<size_t>(s.rows); i++) want[j] += values[i * want.size() + j];
          }
          column_sums(a.view(), out.view(), add, DeviceStream());
          report("column_sums", name_of(dtype), shape_of({s.rows, s.cols}), error_of(out.values(), want), dtype == DType::f64 ? 1e-14 : 5e-7);
          if (add || size_of(dtype) > 2) continue;
          const Buffer rounded(1, s.cols, dtype, {}, random), twin = rounded.copy();
          column_sums(a.view(), rounded.view(), false, DeviceStream());
          cast(out.view(), twin.view(), DeviceStream());
          expect(rounded.values() == twin.values(), "column_sums rounds otherwise than a cast of its sums");
        }
}

double act(Epilogue kind, double z) {
  if (kind == Epilogue::gelu) return 0.5 * z * (1 + std::erf(z * std::sqrt(0.5)));
  return kind == Epilogue::silu ? z / (1 + std::exp(-z)) : z;
}

double slope_of(Epilogue kind, double z) {
  const double s = 1 / (1 + std::exp(-z));
  if (kind == Epilogue::gelu) return 0.5 * (1 + std::erf(z * std::sqrt(0.5))) + z * std::exp(-0.5 * z * z) / std::sqrt(2 * M_PI);
  return kind == Epilogue::silu ? s + z * s * (1 - s) : 1;
}

void epilogue_of(DType dtype, Size s, Layout layout, Epilogue kind, const Stream& stream, const char* where) {
  std::mt19937 random(8);
  const Buffer c(s.rows, s.cols, accumulator(dtype), layout, random), bias(1, s.cols, dtype, {}, random), z0(s.rows, s.cols, dtype, layout, random);
  const Buffer residual(s.rows, s.cols, dtype, layout, random), z = z0.copy(), y = z0.copy(), both = z0.copy(), dz = z0.copy();
  epilogue(c.view(), bias.view(), z.view(), y.view(), kind, stream);
  Tail tail;
  tail.kind = kind;
  tail.residual = residual.view();
  tail.y = both.view();
  epilogue(c.view(), tail, stream);
  activation_backward(residual.view(), z0.view(), dz.view(), kind, stream);
  std::vector<double> want_z = c.values(), want_y = want_z, want_both = want_z, want_dz = residual.values();
  const std::vector<double> shift = bias.values(), more = residual.values(), at = z0.values();
  for (size_t i = 0; i < want_z.size(); i++) {
    want_both[i] = act(kind, want_z[i]) + more[i];
    want_z[i] += shift[i % static_cast<size_t>(s.cols)];
    want_y[i] = act(kind, want_z[i]);
    want_dz[i] *= slope_of(kind, at[i]);
  }
  const std::string shape = shape_of({s.rows, s.cols}), name = std::string("epilogue") + where;
  report(name + " z", name_of(dtype), shape, error_of(z.values(), want_z), rounding(dtype));
  if (kind != Epilogue::none) report(name + " y", name_of(dtype), shape, error_of(y.values(), want_y), 2 * rounding(dtype));
  report(name + " residual", name_of(dtype), shape, error_of(both.values(), want_both), 2 * rounding(dtype));
  report(std::string("activation_backward") + where, name_of(dtype), shape, error_of(dz.values(), want_dz), 3 * rounding(dtype));
  for (const Buffer* out : {&z, &y, &both, &dz}) expect(out->same_padding(z0), "epilogue wrote beside its output");
}

void epilogues() {
  for (const DType dtype : kReal)
    for (const Size& s : sizes())
      for (const Layout& layout : layouts())
        for (const Epilogue kind : {Epilogue::none, Epilogue::gelu, Epilogue::silu}) {
          epilogue_of(dtype, s, layout, kind, DeviceStream(), "");
          epilogue_of(dtype, s, layout, kind, HostStream(), " (cpu)");
        }
}

void dropouts() {
  std::mt19937 random(10);
  const DropoutKey key{12345, 678, 9, 0.3};
  struct Place {
    std::vector<int64_t> local, global, offset;
  };
  const std::vector<Place> places = {{{64}, {64}, {0}},
                                     {{7, 33}, {7, 33}, {0, 0}},
                                     {{5, 12}, {20, 24}, {5, 12}},
                                     {{3, 7}, {9, 21}, {6, 7}},
                                     {{2, 3, 5}, {4, 6, 10}, {2, 0, 5}},
                                     {{2, 3, 16}, {4, 3, 16}, {2, 0, 0}},
                                     {{}, {}, {}},
                                     {{4, 1030}, {4, 2060}, {0, 1030}},
                                     {{9004}, {18000}, {8}},
                                     {{3, 8192}, {3, 8193}, {0, 1}}};
  for (const DType dtype : kReal)
    for (const Place& p : places) {
      int64_t count = 1;
      for (int64_t n : p.local) count *= n;
      for (const int64_t aside : {0, 4, 1}) {  // elements before the first: 16, 8 and 2 bytes of alignment in 16 bits
        const Buffer x(1, count, dtype, {false, 0, aside}, random), got = x.copy(), want = x.copy();
        dropout(x.view().data, got.view().data, dtype, p.local, p.global, p.offset, key, DeviceStream());
        dropout(x.view().data, want.view().data, dtype, p.local, p.global, p.offset, key, HostStream());
        report("dropout", name_of(dtype), shape_of({count}), error_of(got.values(), want.values()), 0);
        expect(got.same_padding(x), "dropout wrote beside its output");
      }
    }
}

const Register all[] = {{"cast", casts}, {"accumulate", sums}, {"column_sums", column_totals}, {"epilogue", epilogues}, {"dropout", dropouts}};

}  // namespace
}  // namespace gingham::tests
