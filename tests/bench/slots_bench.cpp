// Names: what slots x length x heads x width. Every slot is at the same length: the last one that fits.
#include "kernels/slots.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

struct Shape {
    std::int64_t slots, length, heads, width;
    std::int64_t columns() const { return heads * width; }
    std::int64_t rows() const { return slots * length; }
    std::string name() const {
        return std::to_string(slots) + "x" + std::to_string(length) + "x" + std::to_string(heads) + "x" +
               std::to_string(width);
    }
};

Vec<const std::int32_t> lengths(Suite& s, const Shape& n) {
    const std::vector<std::int32_t> host(std::size_t(n.slots), std::int32_t(n.length - 1));
    auto* all = s.zeros<std::int32_t>(n.slots);
    copy_to_device(s.device, all, host.data(), host.size() * sizeof(std::int32_t));
    return {all, n.slots};
}
Vec<Accum> partial(Suite& s, const Shape& n) {
    const std::int64_t elements = slot_partial_elements(n.slots, n.length, n.heads, n.width);
    return {s.zeros<Accum>(elements + 1), elements + 1};
}

void add_attention(Suite& s, const Shape& n, std::int64_t scalars) {
    const std::int64_t c = n.columns(), hr = n.heads * scalars;
    SlotAttention<Storage> p;
    p.o = Mat<Storage>(s.zeros<Storage>(n.slots * c), n.slots, c);
    p.a = Mat<const Accum>(s.random<Accum>(n.slots * hr), n.slots, hr);
    p.b = Mat<const Accum>(s.random<Accum>(n.rows() * hr), n.rows(), hr);
    p.F = Mat<const Accum>(s.zeros<Accum>(n.rows() * n.heads), n.rows(), n.heads);
    p.v = Mat<const Storage>(s.random<Storage>(n.rows() * c), n.rows(), c);
    p.length = lengths(s, n), p.partial = partial(s, n);
    p.heads = std::int32_t(n.heads), p.scalars = std::int32_t(scalars);
    s.add("attention R" + std::to_string(scalars) + " " + n.name(), traffic(p, n.length),
          [p, &s] { slot_attention(s.device, p); });
}

void add_dot(Suite& s, const Shape& n) {
    const std::int64_t c = n.columns();
    SlotDot<Storage> p;
    p.o = Mat<Storage>(s.zeros<Storage>(n.slots * c), n.slots, c);
    p.q = Mat<const Storage>(s.random<Storage>(n.slots * c), n.slots, c);
    p.k = Mat<const Storage>(s.random<Storage>(n.rows() * c), n.rows(), c);
    p.v = Mat<const Storage>(s.random<Storage>(n.rows() * c), n.rows(), c);
    p.length = lengths(s, n), p.partial = partial(s, n);
    p.heads = std::int32_t(n.heads), p.scale = Accum(0.125);
    s.add("dot " + n.name(), traffic(p, n.length), [p, &s] { slot_dot(s.device, p); });
}

void add_append(Suite& s, const Shape& n, std::int64_t scalars) {
    const std::int64_t c = n.columns(), hr = n.heads * scalars, past = kSlotPast * n.slots;
    SlotAppend<Storage> p;
    p.length = lengths(s, n), p.capacity = n.length;
    p.v = Mat<Storage>(s.zeros<Storage>(n.rows() * c), n.rows(), c);
    p.x = Mat<const Storage>(s.random<Storage>(n.slots * c), n.slots, c);
    p.w = Mat<const Accum>(s.random<Accum>(c * 4), c, 4);
    p.past = Mat<Storage>(s.zeros<Storage>(past * c), past, c);
    p.a = Mat<Accum>(s.zeros<Accum>(n.slots * hr), n.slots, hr);
    p.b = Mat<Accum>(s.zeros<Accum>(n.rows() * hr), n.rows(), hr);
    p.s = Mat<const Accum>(s.random<Accum>(n.slots * 2 * hr), n.slots, 2 * hr);
    p.w_scalars = Mat<const Accum>(s.random<Accum>(2 * hr * 4), 2 * hr, 4);
    p.past_scalars = Mat<Accum>(s.zeros<Accum>(past * 2 * hr), past, 2 * hr);
    p.log_temp = {s.zeros<Accum>(n.heads), n.heads};
    p.F = Mat<Accum>(s.zeros<Accum>(n.rows() * n.heads), n.rows(), n.heads);
    p.z = Mat<const Accum>(s.random<Accum>(n.slots * n.heads), n.slots, n.heads);
    p.bias = {s.zeros<Accum>(n.heads), n.heads};
    p.carry = Mat<Accum>(s.zeros<Accum>(n.slots * n.heads), n.slots, n.heads);
    s.add("append R" + std::to_string(scalars) + " " + n.name(), traffic(p), [p, &s] { slot_append(s.device, p); });
}

#if !FIEDLER_BENCH_CUDA
void add_product(Suite& s, std::int64_t rows, std::int64_t depth, std::int64_t out) {
    SlotProduct<Storage> p;
    p.y = Mat<Storage>(s.zeros<Storage>(rows * out), rows, out);
    p.x = Mat<const Storage>(s.random<Storage>(rows * depth), rows, depth);
    p.w = Mat<const Storage>(s.random<Storage>(out * depth), out, depth);
    s.add("product " + std::to_string(rows) + "x" + std::to_string(depth) + "x" + std::to_string(out), traffic(p),
          [p, &s] { slot_product(s.device, p); });
}
#endif

}  // namespace

FIEDLER_BENCH(slots) {
    const std::vector<Shape> shapes =
        suite.small
            ? std::vector<Shape>{{4, 256, 6, 64}}
            : std::vector<Shape>{
                  {1, 1024, 6, 64}, {16, 1024, 6, 64}, {64, 1024, 6, 64}, {256, 1024, 6, 64}, {1, 65536, 6, 64}};
    for (const Shape& n : shapes) {
        add_attention(suite, n, 1);
        add_attention(suite, n, 8);
        add_dot(suite, n);
    }
    add_append(suite, shapes[0], 8);
    if (!suite.small) add_append(suite, shapes[3], 8);
#if !FIEDLER_BENCH_CUDA
    add_product(suite, 1, 384, 1536);
    add_product(suite, 16, 384, 1536);
#endif
}

}  // namespace fiedler::bench
