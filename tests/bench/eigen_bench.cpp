// Names: operation, rows x columns [what is special].
#include "kernels/eigen.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

Vec<double> doubles(Suite& s, std::int64_t n) {
    return {reinterpret_cast<double*>(s.zeros<std::byte>(n * std::int64_t(sizeof(double)))), n};
}

void add_products(Suite& s, std::int64_t n, std::int64_t m) {
    const std::string shape = std::to_string(n) + "x" + std::to_string(m);
    const Mat<float> x(s.random<float>(n * m), n, m), y(s.random<float>(n * m), n, m);
    const Vec<double> scratch = doubles(s, eigen_scratch_elements(n, m, m));
    const Mat<double> g(doubles(s, m * m).data, m, m);
    const EigenGram<float> square{g, x, x, scratch}, pair{g, x, y, scratch};
    s.add("gram " + shape, traffic(square), [square, &s] { eigen_gram(s.device, square); });
    s.add("gram " + shape + " of two", traffic(pair), [pair, &s] { eigen_gram(s.device, pair); });
    // Zeros for Q: the same work, and Y stays finite however often it is added to.
    const Mat<const double> q(doubles(s, m * m).data, m, m);
    const EigenRotate<float> rotate{y, x, q, 1, 0, scratch}, update{y, x, q, -1, 1, scratch};
    s.add("rotate " + shape, traffic(rotate), [rotate, &s] { eigen_rotate(s.device, rotate); });
    s.add("rotate " + shape + " added", traffic(update), [update, &s] { eigen_rotate(s.device, update); });
}

void add_rows(Suite& s, std::int64_t n, std::int64_t m) {
    const std::string shape = std::to_string(n) + "x" + std::to_string(m);
    const Mat<float> x(s.random<float>(n * m), n, m), y(s.random<float>(n * m), n, m);
    const Vec<double> out = doubles(s, m), theta = doubles(s, m), scratch = doubles(s, eigen_scratch_elements(n, m, 1));
    const EigenNorms<float> norms{out, y, {}, {}, scratch}, residuals{out, y, x, theta, scratch};
    s.add("norms " + shape, traffic(norms), [norms, &s] { eigen_norms(s.device, norms); });
    s.add("norms " + shape + " residual", traffic(residuals), [residuals, &s] { eigen_norms(s.device, residuals); });

    EigenDeflate<float> deflate;
    deflate.x = x, deflate.v = {s.zeros<float>(n), n};
    for (const std::int64_t isolated : {std::int64_t(0), n / 2}) {  // one component, or half of the nodes alone
        std::vector<std::int64_t> offsets{0};
        for (std::int64_t i = n - isolated; i <= n; ++i) offsets.push_back(i);
        const auto count = std::int64_t(offsets.size());
        auto* p = reinterpret_cast<std::int64_t*>(doubles(s, count).data);
        copy_to_device(s.device, p, offsets.data(), offsets.size() * sizeof(std::int64_t));
        deflate.offsets = {p, count};
        deflate.scratch = doubles(s, eigen_deflate_scratch(n, m, count - 1));
        s.add("deflate " + shape + (isolated ? " many components" : ""), traffic(deflate),
              [deflate, &s] { eigen_deflate(s.device, deflate); });
    }
    const EigenGather<float> gather{y, x, {s.random<std::int32_t>(n, double(n)), n}, {s.random<float>(n), n}};
    s.add("gather " + shape, traffic(gather), [gather, &s] { eigen_gather(s.device, gather); });
    const EigenRandom<float> random{y, 1, 0};
    s.add("random " + shape, traffic(random), [random, &s] { eigen_random(s.device, random); });
}

}  // namespace

FIEDLER_BENCH(eigen) {
    const std::int64_t n = suite.small ? 10000 : 1000000;
    for (const std::int64_t m : {32, 64, 96, 128}) add_products(suite, n, m);
    add_products(suite, suite.small ? 2000 : 200000, 576);
    add_rows(suite, n, 96);
}

}  // namespace fiedler::bench
