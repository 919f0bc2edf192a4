// Names: kind rows x outputs, with the gradient: nodes' classes, molecules' properties, horizons of series.
#include "kernels/objective.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

void add(Suite& suite, const std::string& name, ObjectiveKind kind, std::int64_t rows, std::int64_t outputs) {
    const std::int64_t n = rows * outputs;
    Objective<Storage> p;
    p.outputs = Mat<const Accum>(suite.random<Accum>(n), rows, outputs);
    p.doutputs = Mat<Storage>(suite.zeros<Storage>(n), rows, outputs);
    p.losses = {suite.zeros<Accum>(rows), rows};
    p.counts = {suite.zeros<std::int32_t>(rows), rows};
    p.kind = kind;
    if (kind == ObjectiveKind::classes)
        p.classes = {suite.random<std::int32_t>(rows, double(outputs)), rows};
    else
        p.targets = Mat<const float>(suite.random<float>(n), rows, outputs);
    suite.add(name + " " + std::to_string(rows) + "x" + std::to_string(outputs), traffic(p),
              [p, &suite] { objective(suite.device, p); });
}

}  // namespace

FIEDLER_BENCH(objective) {
    add(suite, "classes", ObjectiveKind::classes, suite.small ? 2000 : 200000, 40);
    add(suite, "binary", ObjectiveKind::binary, suite.small ? 1000 : 16384, 12);
    add(suite, "squared", ObjectiveKind::squared, suite.small ? 100 : 4096, 720);
    ObjectiveSum<Accum> sum;
    const std::int64_t n = suite.small ? 1024 : 32768;
    sum.total = {suite.zeros<Accum>(1), 1};
    sum.count = {reinterpret_cast<std::int64_t*>(suite.zeros<std::byte>(8)), 1};
    sum.losses = {suite.random<Accum>(n), n}, sum.counts = {suite.zeros<std::int32_t>(n), n};
    suite.add("sum " + std::to_string(n), {double(n) * (sizeof(Accum) + 4), 2 * double(n)},
              [sum, &suite] { objective_sum(suite.device, sum); });
}

}  // namespace fiedler::bench
