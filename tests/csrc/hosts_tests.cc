// An axis whose ranks are on several hosts: the results of the same ranks on one host to the bit, and its bytes counted.
#include "collectives/exchange.h"
#include "virtual_hosts.h"

namespace gingham {
namespace {

using Results = std::vector<std::string>;  // each rank's, as bytes
using Case = Measured (*)(const Options&);

// A case's results on these hosts; `measured` where it is asked for.
Results results_on(const Layout& hosts, Via via, Case run, Options o, Measured* measured) {
  Results results(kRanks);
  o.rounds = 2;
  o.warmup = 0;
  o.fractions = true;
  o.see = [&results](int rank, const Matrix& m) {
    DISPATCH(m.dtype, T, {
      for (int64_t i = 0; i < m.rows; i++)
        for (int64_t j = 0; j < m.cols; j++)
          results[static_cast<size_t>(rank)].append(
              reinterpret_cast<const char*>(static_cast<const T*>(m.data) + i * m.row_stride + j * m.col_stride), sizeof(T));
    });
  };
  o.start = [&](const RankBody& body) { return rows_on_hosts(hosts, via, body); };
  *measured = run(o);
  return results;
}

// Whether some line of ranks goes over several hosts.
bool crosses(const Layout& hosts, const std::vector<std::vector<int>>& lines) {
  const auto host_of = [&](int rank) {
    for (size_t host = 0; host < hosts.size(); host++)
      for (int each : hosts[host])
        if (each == rank) return host;
    return hosts.size();
  };
  for (const std::vector<int>& line : lines)
    for (int rank : line)
      if (host_of(rank) != host_of(line[0])) return true;
  return false;
}

// small: there may be nothing for some ranks to send.
void same_on_all_layouts(const std::string& what, Case run, const Options& o, const std::vector<std::vector<int>>& lines, bool small) {
  Measured one;
  const Results expected = results_on(kOne, Via::queues, run, o, &one);
  CHECK(Failure, one.bytes == one.formula && one.crossed == 0, what, " on one host: ", one.bytes, " bytes, expected ", one.formula);
  for (const Layout& hosts : kLayouts)
    for (Via via : {Via::queues, Via::handed}) {
      if (via == Via::handed && (small || hosts.size() == kRanks)) continue;
      Measured here;
      const bool same = results_on(hosts, via, run, o, &here) == expected;
      const std::string where = concat(what, " on ", name_of(hosts), via == Via::handed ? ", handed: " : ": ");
      CHECK(Failure, same, where, "other bits than on one host");
      CHECK(Failure, here.bytes == one.bytes, where, here.bytes, " bytes received, on one host ", one.bytes);
      const bool least = crosses(hosts, lines) && !small;
      CHECK(Failure, here.crossed <= here.bytes && (least ? here.crossed > 0 : small || here.crossed == 0), where, here.crossed,
            " bytes from other hosts of ", here.bytes);
    }
}

// Ranks of a grid that share an axis of more than one.
std::vector<std::vector<int>> lines_of(std::array<int, 3> grid) {
  const auto [pm, pn, pk] = grid;
  std::vector<std::vector<int>> lines;
  const auto add = [&](int first, int stride, int count) {
    std::vector<int>& line = lines.emplace_back();
    for (int i = 0; i < count; i++) line.push_back(first + i * stride);
  };
  for (int rank = 0; rank < pm * pn * pk; rank++) {
    if (rank % pm == 0) add(rank, 1, pm);
    if (rank / pm % pn == 0) add(rank, pm, pn);
    if (rank / (pm * pn) == 0) add(rank, pm * pn, pk);
  }
  return lines;
}

void steps_are_the_same_on(std::array<int, 3> grid) {
  for (const char* name : {"matmul", "backward"})
    for (bool swapped : {false, true})
      for (int slices : {1, 3})
        for (std::array<int64_t, 3> shape : {std::array<int64_t, 3>{37, 19, 53}, {3, 1, 2}}) {
          Options o;
          o.name = name;
          o.grid = grid;
          o.swapped = swapped;
          o.slices = slices;
          o.m = shape[0];
          o.k = shape[1];
          o.n = shape[2];
          same_on_all_layouts(concat(name, " ", grid[0], "x", grid[1], "x", grid[2], " slices ", slices, " swapped ", swapped, " m ", o.m),
                              run_matmul, o, lines_of(grid), o.m == 3);
        }
}

void collectives_are_the_same() {
  for (const char* name : {"all_gather", "reduce_scatter", "all_reduce", "broadcast", "reduce"})
    for (int64_t n : {1, 7, 1000, 200000}) {
      Options o;
      o.name = name;
      o.ranks = kRanks;
      o.n = n;
      same_on_all_layouts(concat(name, " n ", n), run_collective, o, {everyone(kRanks)}, n == 1);
    }
}

// Every rank's numbers to all, and a ragged all-to-all by messages: rank i sends 10 i + j numbers to rank j, itself left out.
Row exchanges(Job& job, Program& program) {
  const auto axis = job.axis(program, 0, everyone(kRanks));
  const int me = job.rank();
  Row row;
  for (int round = 0; round < 3; round++) {
    program.begin(named("sizes"));
    for (const auto& numbers : exchange_sizes(*axis, std::vector<int64_t>(static_cast<size_t>(me % 3), me + round)))
      for (int64_t number : numbers) row.push_back(static_cast<double>(number));
    std::vector<Room> rooms;
    Messages sends, receives;
    rooms.reserve(2 * kRanks);
    for (int peer = 0; peer < kRanks; peer++) {
      if (peer == me) continue;
      rooms.emplace_back(job, 1, 10 * me + peer, DType::f32);
      for (int64_t i = 0; i < rooms.back().view().cols; i++)
        static_cast<float*>(rooms.back().view().data)[i] = static_cast<float>(100 * me + peer + i);
      sends.push_back({peer, rooms.back().view()});
      rooms.emplace_back(job, 1, 10 * peer + me, DType::f32);
      receives.push_back({peer, rooms.back().view()});
    }
    program.begin(named("exchange"));
    exchange(*axis, sends, receives, -1, job.stream());
    for (const auto& [peer, m] : receives)
      for (int64_t i = 0; i < m.cols; i++) EXPECT(static_cast<const float*>(m.data)[i] == static_cast<float>(100 * peer + me + i));
  }
  const Traffic traffic = axis->traffic(true);
  row.push_back(static_cast<double>(traffic.bytes_received));
  row.push_back(static_cast<double>(traffic.messages));
  return row;
}

void exchanges_are_the_same() {
  const std::vector<Row> expected = rows_on_hosts(kOne, Via::queues, exchanges);
  for (const Layout& hosts : kLayouts)
    for (Via via : {Via::queues, Via::handed}) CHECK(Failure, rows_on_hosts(hosts, via, exchanges) == expected, "on ", name_of(hosts));
}

}  // namespace

std::vector<Test> hosts_tests() {
  std::vector<Test> tests{{"over hosts: collectives are the same", collectives_are_the_same},
                          {"over hosts: exchanges are the same", exchanges_are_the_same}};
  for (std::array<int, 3> grid : {std::array<int, 3>{2, 2, 1}, {2, 1, 2}, {1, 2, 2}, {4, 1, 1}, {1, 4, 1}, {1, 1, 4}})
    tests.push_back({"over hosts: steps are the same", [grid] { steps_are_the_same_on(grid); }});
  return tests;
}

}  // namespace gingham
