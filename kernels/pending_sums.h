// kernels/pending_sums.h: sums over blocks that backward kernels leave in memory, added up for all of them by one launch.
//
//   to[c] += sum over r < rows of partial[r row_step + c column_step],  c < columns,   for each pending sum
//
// A gradient of few numbers (a gate's bias, temperatures, a convolution's taps) is a sum over all tokens: each block of a
// kernel leaves its part, and another kernel adds them up. That is short, and costs a launch: a backward pass has dozens
// of them. Given a PendingSums, a kernel family notes where its parts are instead, and finish_sums() does all at once.
//
// Shapes     to: [columns] A; partial: what take() gave, rows and columns in it by their steps
// Lifetime   what take() gives is its caller's until finish_sums(), which empties the list: so the same memory serves pass
//            after pass. Nothing else may read or write `to` in between.
// Writes     to accumulated (+=)
// Aliasing   no two pending sums have an element of `to` in common: add() refuses it (contract)
// Numerics   in A, in a fixed order: bit-equal from run to run
#pragma once
#include <vector>

#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/traffic.h"
#include "kernels/view.h"

namespace fiedler {

template <class A>
struct PendingSum {
    A* to = nullptr;
    const A* partial = nullptr;
    std::int64_t row_step = 0, column_step = 0;
    std::int32_t rows = 0, columns = 0;
};

template <class A>
class PendingSums {
  public:
    PendingSums() = default;
    explicit PendingSums(Vec<A> memory) : memory_(memory) {}

    // Elements that take(n) needs: pieces are 256-byte aligned if the memory is.
    static constexpr std::int64_t elements(std::int64_t n) {
        constexpr std::int64_t kPiece = 256 / std::int64_t(sizeof(A));
        return (n + kPiece - 1) / kPiece * kPiece;
    }
    // The next n elements of the memory, not initialised.
    Vec<A> take(std::int64_t n) {
        FIEDLER_REQUIRE("pending_sums", used_ + elements(n) <= memory_.size);
        const Vec<A> piece = memory_.slice(used_, n);
        used_ += elements(n);
        return piece;
    }
    void add(const PendingSum<A>& sum) {
        if (sum.columns == 0) return;
        FIEDLER_REQUIRE("pending_sums", sum.to && sum.partial && sum.rows > 0 && sum.columns > 0);
        for (const PendingSum<A>& other : sums_)
            FIEDLER_REQUIRE("pending_sums", sum.to + sum.columns <= other.to || other.to + other.columns <= sum.to);
        sums_.push_back(sum);
    }
    const std::vector<PendingSum<A>>& sums() const { return sums_; }
    void clear() { sums_.clear(), used_ = 0; }

  private:
    Vec<A> memory_;
    std::int64_t used_ = 0;
    std::vector<PendingSum<A>> sums_;
};

template <class A>
Traffic traffic(const PendingSums<A>& p) {
    Traffic t{};
    for (const PendingSum<A>& s : p.sums()) {
        t.bytes += (double(s.rows) + 2) * double(s.columns) * sizeof(A);
        t.flops += double(s.rows) * double(s.columns);
    }
    return t;
}

template <class A>  // float, double
void finish_sums(const Cpu&, PendingSums<A>&);
void finish_sums(const Cuda&, PendingSums<float>&);

}  // namespace fiedler
