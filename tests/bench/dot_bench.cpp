// Names: pass tokens x length, mask; heads 6, width of a head 64 unless the name says otherwise.
#include "kernels/dot.h"

#include <cmath>

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

struct Shape {
    std::int32_t count, length, heads, width;
    bool causal = true;
    std::int32_t window = 0;
};
std::string name_of(const Shape& s) {
    std::string name = std::to_string(s.count) + "x" + std::to_string(s.length);
    name += s.causal ? " causal" : " bidirectional";
    if (s.window > 0) name += " window " + std::to_string(s.window);
    if (s.width != 64) name += " width " + std::to_string(s.width);
    return name;
}

template <class P>
void set_common(P& p, const Shape& s) {
    p.seq = Packed::uniform(s.count, s.length);
    p.heads = s.heads, p.window = s.window, p.causal = s.causal;
    p.scale = Accum(1 / std::sqrt(double(s.width)));
}

// general: and the path that every GPU takes, by itself.
void add_dot(Suite& suite, const Shape& s, [[maybe_unused]] bool general = false) {
    const std::int64_t n = std::int64_t(s.count) * s.length, c = std::int64_t(s.heads) * s.width;
    Storage* qkv = suite.random<Storage>(n * 3 * c);
    Storage* gradients = suite.zeros<Storage>(n * 3 * c);
    DotForward<Storage> f;
    set_common(f, s);
    f.q = Mat<Storage>(qkv, n, c, 3 * c), f.k = f.q.columns(c, c), f.v = f.q.columns(2 * c, c);
    f.o = Mat<Storage>(suite.zeros<Storage>(n * c), n, c);
    f.lse = Mat<Accum>(suite.zeros<Accum>(n * s.heads), n, s.heads);
    dot_forward(suite.device, f);  // the backward pass needs its lse and o
    DotBackward<Storage> b;
    set_common(b, s);
    b.q = f.q, b.k = f.k, b.v = f.v, b.o = f.o, b.lse = f.lse;
    b.do_ = Mat<Storage>(suite.random<Storage>(n * c), n, c);
    b.dq = Mat<Storage>(gradients, n, c, 3 * c), b.dk = b.dq.columns(c, c), b.dv = b.dq.columns(2 * c, c);
    b.delta = Mat<Accum>(suite.zeros<Accum>(n * s.heads), n, s.heads);
    suite.add(
        "forward " + name_of(s), traffic(f), [f, &suite] { dot_forward(suite.device, f); }, true);
    suite.add(
        "backward " + name_of(s), traffic(b), [b, &suite] { dot_backward(suite.device, b); }, true);
#if FIEDLER_BENCH_CUDA
    if (!general) return;
    suite.add(
        "forward " + name_of(s) + ", general", traffic(f),
        [f, &suite] { dot_forward_by_path(suite.device, f, DotPath::general); }, true);
    suite.add(
        "backward " + name_of(s) + ", general", traffic(b),
        [b, &suite] { dot_backward_by_path(suite.device, b, DotPath::general); }, true);
#endif
}

void add_decode(Suite& suite, std::int64_t length) {
    const std::int64_t heads = 6, c = heads * 64;
    DotDecode<Storage> p;
    p.o = Vec<Storage>(suite.zeros<Storage>(c), c);
    p.q = Vec<Storage>(suite.random<Storage>(c), c);
    p.k = Mat<Storage>(suite.random<Storage>(length * c), length, c);
    p.v = Mat<Storage>(suite.random<Storage>(length * c), length, c);
    p.heads = std::int32_t(heads), p.scale = Accum(0.125);
    const double values = double(length) * double(c);
    suite.add("decode " + std::to_string(length), {2 * values * sizeof(Storage), 4 * values + double(length * heads)},
              [p, &suite] { dot_decode(suite.device, p); });
}

}  // namespace

FIEDLER_BENCH(dot) {
    if (suite.small) {
        add_dot(suite, {1, 1024, 2, 64});
        add_dot(suite, {1, 1024, 2, 64, true, 128});
        add_dot(suite, {1, 1024, 2, 64, false});
        add_decode(suite, 1024);
        return;
    }
    add_dot(suite, {32, 1024, 6, 64}, true);
    add_dot(suite, {32, 1024, 6, 64, true, 256});
    add_dot(suite, {32, 1024, 6, 64, false});
    add_dot(suite, {8, 4096, 6, 64});
    add_dot(suite, {2, 16384, 6, 64});
    add_dot(suite, {1024, 32, 6, 64, false});  // molecules
    add_dot(suite, {32, 1024, 24, 16});
    add_dot(suite, {32, 1024, 12, 32});
    add_dot(suite, {32, 1024, 3, 128});
    add_decode(suite, 1024);
    add_decode(suite, 16384);
}

}  // namespace fiedler::bench
