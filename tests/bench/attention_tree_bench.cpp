// Near-linear scalar-distance attention at long sequences, and decoding from sorted runs (CPU).
#include "kernels/attention_tree.h"

#include <memory>

#include "kernels/attention_runs.h"
#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

struct Shape {
    std::int32_t count, length, heads, width;
    bool causal;
    std::int32_t leaf = 0;  // 0: each direction's own
    bool dense = false;     // by the dense kernels too, to see where they meet
};

// The same by the dense family.
void add_dense(Suite& suite, const std::string& name, const AttentionTreeForward<Storage>& f,
               const AttentionTreeBackward<Storage>& b) {
    const auto set = [&](auto& p) {
        p.a = f.a, p.b = f.b, p.F = f.F, p.v = f.v, p.seq = f.seq, p.heads = f.heads, p.causal = f.causal;
    };
    AttentionForward<Storage> forward;
    set(forward);
    forward.o = f.o, forward.lse = f.lse;
    const auto scratch = attention_forward_scratch_elements(f.v.rows, f.heads, 1);
    forward.scratch = {suite.zeros<Accum>(scratch), scratch};
    AttentionBackward<Storage> backward;
    set(backward);
    backward.da = b.da, backward.db = b.db, backward.dF = b.dF, backward.dv = b.dv, backward.delta = b.delta;
    backward.o = b.o, backward.do_ = b.do_, backward.lse = b.lse;
    const auto partial = attention_partial_elements(f.seq, 0, f.heads, f.v.cols / f.heads, 1, 0, f.causal);
    backward.partial = {suite.zeros<Accum>(partial), partial};
    suite.add(
        "dense forward " + name, traffic(forward), [=, &suite] { attention_forward(suite.device, forward); }, true);
    suite.add(
        "dense backward " + name, traffic(backward), [=, &suite] { attention_backward(suite.device, backward); }, true);
}

void add_shape(Suite& suite, const Shape& s) {
    const std::int64_t n = std::int64_t(s.count) * s.length, values = std::int64_t(s.heads) * s.width,
                       scalars = n * s.heads;
    const auto numbers = [&](Accum* data) { return Mat<Accum>(data, n, s.heads); };
    const auto rows = [&](Storage* data) { return Mat<Storage>(data, n, values); };
    AttentionTreeForward<Storage> f;
    f.o = rows(suite.zeros<Storage>(n * values)), f.lse = numbers(suite.zeros<Accum>(scalars));
    f.a = numbers(suite.random<Accum>(scalars)), f.b = numbers(suite.random<Accum>(scalars));
    if (s.causal) f.F = numbers(suite.zeros<Accum>(scalars));  // open gate: nothing may be skipped
    f.v = rows(suite.random<Storage>(n * values));
    f.seq = Packed::uniform(s.count, s.length);
    f.heads = s.heads, f.causal = s.causal;

    AttentionTreeBackward<Storage> b;
    b.da = numbers(suite.zeros<Accum>(scalars)), b.db = numbers(suite.zeros<Accum>(scalars));
    if (s.causal) b.dF = numbers(suite.zeros<Accum>(scalars));
    b.dv = rows(suite.zeros<Storage>(n * values)), b.delta = numbers(suite.zeros<Accum>(scalars));
    b.a = f.a, b.b = f.b, b.F = f.F, b.v = f.v, b.o = f.o, b.lse = f.lse;
    b.do_ = rows(suite.random<Storage>(n * values));
    b.seq = f.seq, b.heads = f.heads, b.causal = f.causal;
    if (s.leaf > 0) f.tuning.leaf = b.tuning.leaf = s.leaf;
#if FIEDLER_BENCH_CUDA
    const auto scratch = [&](std::int64_t bytes) {
        return Vec<unsigned char>(reinterpret_cast<unsigned char*>(suite.zeros<Accum>((bytes + 3) / 4)), bytes);
    };
    f.scratch = scratch(attention_tree_forward_bytes(f.seq, 0, s.heads, s.width, s.causal, f.tuning));
    b.scratch = scratch(attention_tree_backward_bytes(f.seq, 0, s.heads, s.width, s.causal, b.tuning));
#endif
    attention_tree_forward(suite.device, f);  // o and lse as the backward pass finds them

    const std::string name = std::to_string(s.count) + "x" + std::to_string(s.length) + " H" + std::to_string(s.heads) +
                             " D" + std::to_string(s.width) + (s.causal ? "" : " bidirectional") +
                             (s.leaf == 0 ? "" : " leaf " + std::to_string(s.leaf));
    suite.add(
        "forward " + name, traffic(f), [=, &suite] { attention_tree_forward(suite.device, f); }, true);
    suite.add(
        "backward " + name, traffic(b), [=, &suite] { attention_tree_backward(suite.device, b); }, true);
    if (s.dense) add_dense(suite, name, f, b);
}

#if !FIEDLER_BENCH_CUDA
// CPU, one thread: one token of one head at a context of `length` keys: sorted runs, and the direct sum that they replace.
void add_decode(Suite& suite, std::int32_t length, std::int32_t width) {
    const float *b = suite.random<float>(length), *v = suite.random<float>(std::int64_t(length) * width);
    const auto runs = std::make_shared<AttentionRuns<float>>(width);
    for (std::int64_t j = 0; j < length; ++j) runs->append(b[j], 0, v + j * width);
    float *o = suite.zeros<float>(width), *gate = suite.zeros<float>(length), *a = suite.random<float>(1);
    const double n = length, row = width + 2, looked_at = 34 * std::log2(n / 64);  // rows: two sums and a tile a run
    const Traffic by_runs{4 * looked_at * row, looked_at * (2 * row + 1)}, direct{4 * n * row, n * (2.0 * width + 3)};
    const std::string name = std::to_string(length) + " keys D" + std::to_string(width);
    // An append and a query; the keys that are added are few beside those there are.
    suite.add("decode by runs " + name, by_runs, [=] {
        runs->append(b[runs->length() % length], 0, v + runs->length() % length * width);
        runs->query(a[0], 0, o);
    });
    // What the appends cost, all merges included.
    const std::int32_t some = 65536;
    suite.add("append " + std::to_string(some) + " keys D" + std::to_string(width),
              {8 * some * row * std::log2(some / 64.0), 2 * some * row * std::log2(some / 64.0)}, [=] {
                  AttentionRuns<float> fresh(width);
                  for (std::int64_t k = 0; k < some; ++k) fresh.append(b[k], 0, v + k * width);
              });
    AttentionDecode<float> d;
    d.o = {o, width}, d.a = Vec<float>(a, 1), d.b = Mat<float>(const_cast<float*>(b), length, 1);
    d.F = Mat<float>(gate, length, 1), d.v = Mat<float>(const_cast<float*>(v), length, width);
    suite.add("decode direct " + name, direct, [=, &suite] { attention_decode(suite.device, d); });
}
#endif

}  // namespace

FIEDLER_BENCH(attention_tree) {
    if (suite.small) {
        add_shape(suite, {1, 4096, 2, 32, true});
        add_shape(suite, {1, 4096, 2, 32, false});
    } else {
#if FIEDLER_BENCH_CUDA
        add_shape(suite, {16, 4096, 6, 64, true, 0, true});
        add_shape(suite, {4, 16384, 6, 64, true, 0, true});
#endif
        for (const std::int32_t length : {8192, 65536}) add_shape(suite, {1, length, 6, 64, true, 0, true});
#if FIEDLER_BENCH_CUDA
        for (const std::int32_t length : {262144, 1048576}) add_shape(suite, {1, length, 6, 64, true});
        for (const std::int32_t leaf : {512, 2048}) add_shape(suite, {1, 65536, 6, 64, true, leaf});
        add_shape(suite, {1, 65536, 6, 64, false, 0, true});
#endif
    }
#if !FIEDLER_BENCH_CUDA
    add_decode(suite, 1 << 20, 64);
#endif
}

}  // namespace fiedler::bench
