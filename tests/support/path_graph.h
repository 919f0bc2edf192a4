// tests/support/path_graph.h: Laplacian of the path graph on n nodes, as CSR and with its eigenpairs in closed form:
//   mu_m = 2 - 2 cos(pi m / n),  u_m(i) = sqrt(2 / n) cos(pi m (i + 1/2) / n) for m > 0,  u_0(i) = 1 / sqrt(n).
#pragma once
#include <cmath>
#include <cstdint>
#include <numbers>
#include <vector>

namespace fiedler::test {

struct PathGraph {
    std::vector<std::int32_t> offsets{0}, columns;
    std::vector<double> values;
    std::vector<double> eigenvectors;  // [n, n], row m = u_m
    std::vector<double> eigenvalues;   // ascending

    explicit PathGraph(int n) {
        for (int i = 0; i < n; ++i) {
            const bool left = i > 0, right = i + 1 < n;
            if (left) add(i - 1, -1);
            add(i, double(left) + double(right));
            if (right) add(i + 1, -1);
            offsets.push_back(static_cast<std::int32_t>(columns.size()));
        }
        for (int m = 0; m < n; ++m) {
            eigenvalues.push_back(2 - 2 * std::cos(std::numbers::pi * m / n));
            for (int i = 0; i < n; ++i)
                eigenvectors.push_back(m == 0 ? 1 / std::sqrt(double(n))
                                              : std::sqrt(2.0 / n) * std::cos(std::numbers::pi * m * (i + 0.5) / n));
        }
    }

  private:
    void add(int column, double value) {
        columns.push_back(column);
        values.push_back(value);
    }
};

}  // namespace fiedler::test
