// tests/engine/smallest_distance.h: whether a model stands clear of the kinks of its attention.
#pragma once
#include <algorithm>
#include <cmath>

#include "engine/activations.h"

namespace fiedler {

// The smallest |a - b| of any head's scalars, of Runner or SampleRunner in double: finite differences must not cross the
// kink of the absolute value.
template <class R>
double smallest_distance(R& runner) {
    double least = 1e30;
    for (int l = 0; l < runner.spec().layers(); ++l) {
        const LayerActivations<double>& act = runner.model().layer_activations(l);
        for (std::int64_t i = 0; i < act.a.rows; ++i)
            for (std::int64_t j = 0; j < act.a.rows; ++j)
                for (std::int64_t r = 0; r < act.a.cols; ++r)
                    least = std::min(least, std::abs(act.a.row(i)[r] - act.b.row(j)[r]));
    }
    return least;
}

}  // namespace fiedler
