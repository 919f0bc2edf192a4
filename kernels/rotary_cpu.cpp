// kernels/rotary_cpu.cpp: per-head RMS norm and rotary position embedding on the CPU (see rotary.h).
#include <algorithm>
#include <vector>

#include "kernels/parallel.h"
#include "kernels/rotary.h"
#include "kernels/rotary_turn.h"

namespace fiedler {
namespace {

using namespace turning;

// body(token, head, cosine, sine) for every token and head.
template <class T, class P, class Body>
void for_each_head(const Cpu& cpu, const P& p, Body&& body) {
    const std::int64_t half = p.x.cols / p.heads / 2;
    const std::vector<T> frequency = inverse_frequencies<T>(2 * half, double(p.theta));
    constexpr std::int64_t kTokens = 32;
    parallel_for(cpu, (p.x.rows + kTokens - 1) / kTokens, [&](std::int64_t chunk) {
        std::vector<T> angles(static_cast<std::size_t>(2 * half));
        T *cosine = angles.data(), *sine = cosine + half;
        for (std::int64_t i = chunk * kTokens; i < std::min(p.x.rows, (chunk + 1) * kTokens); ++i) {
            const std::int64_t position = i - p.seq.first(std::int32_t(i)) + std::int64_t(p.position_offset);
            token_angles(frequency, position, p.rotate, cosine, sine);
            for (std::int64_t h = 0; h < p.heads; ++h) body(i, h, cosine, sine);
        }
    });
}

}  // namespace

template <class T>
void rotary_forward(const Cpu& cpu, const RotaryForward<T>& p) {
    check(p);
    const std::int64_t width = p.x.cols / p.heads;
    for_each_head<T>(cpu, p, [&](std::int64_t i, std::int64_t h, const T* cosine, const T* sine) {
        forward_head(p, p.x.row(i) + h * width, p.y.row(i) + h * width, width / 2, cosine, sine);
    });
}

template <class T>
void rotary_backward(const Cpu& cpu, const RotaryBackward<T>& p) {
    check(p);
    const std::int64_t width = p.x.cols / p.heads;
    for_each_head<T>(cpu, p, [&](std::int64_t i, std::int64_t h, const T* cosine, const T* sine) {
        const std::int64_t at = h * width;
        backward_head(p, p.dy.row(i) + at, p.x.row(i) + at, p.dx.row(i) + at, width / 2, cosine, sine);
    });
}

template void rotary_forward(const Cpu&, const RotaryForward<float>&);
template void rotary_forward(const Cpu&, const RotaryForward<double>&);
template void rotary_backward(const Cpu&, const RotaryBackward<float>&);
template void rotary_backward(const Cpu&, const RotaryBackward<double>&);

}  // namespace fiedler
