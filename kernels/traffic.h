// kernels/traffic.h: the least work an operation can do. Each family declares it once, and benchmarks divide by it.
//
// bytes: every input read once and every output written once (an accumulated output counts twice), in bytes.
// flops: multiplies and adds of the formula in the contract, an exponential counted as one.
#pragma once

namespace fiedler {

struct Traffic {
    double bytes = 0;
    double flops = 0;
};

}  // namespace fiedler
