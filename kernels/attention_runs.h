// kernels/attention_runs.h: causal scalar-distance attention for generation: keys come one by one, and a query costs
// O(D log T) at the most (log2(T / 64) runs, for each a binary search, two look-ups and 32 pairs) instead of O(T D).
//
//   o = sum_j exp(s_j) v_j / sum_j exp(s_j),  s_j = -|a - b_j| + F - F_j  over all keys so far        (one head, R = 1)
//
// A binary counter of runs: 64 keys make a run, two neighbouring runs of one size merge into one of twice the size. A run
// holds its keys in the order of their scalars and, for every tile of 32, the decayed sums of the keys below and above
// it (DESIGN 2). An append costs O(D log T) amortised; the last of 2^k keys merges all of them, O(2^k D).
//
// Memory     for each key of width D: D + 2 numbers of T, and (D + 3) / 16 for the sums: for D = 64, 70 numbers, where a
//            plain cache has 66. While two runs merge, theirs twice.
// Numerics   all in T. Exact but for rounding: every pair counts. Same results in the same order of calls.
#pragma once
#include <numeric>

#include "kernels/decayed_sum.h"

namespace fiedler {

template <class T>  // float, double
class AttentionRuns {
  public:
    explicit AttentionRuns(std::int64_t width) : width_(width), tail_(width) {}

    // The next key: its scalar, gate sum (0: no gate) and value [width].
    void append(T b, T F, const T* v) {
        tail_.b.push_back(b), tail_.F.push_back(F);
        tail_.v.insert(tail_.v.end(), v, v + width_);
        ++length_;
        if (tail_.size() < kTail) return;
        Run run(width_);
        run.swap(tail_);
        run.sort();
        while (!runs_.empty() && runs_.back().size() == run.size()) {
            run = Run::merged(runs_.back(), run);
            runs_.pop_back();
        }
        run.scan();
        runs_.push_back(std::move(run));
    }
    // o [width] of a query with scalar a and gate sum F after at least one key.
    void query(T a, T F, T* o) const {
        Result result{o, width_};
        std::fill_n(o, width_, T(0));
        tail_.direct(a, F, 0, tail_.size(), result);
        for (std::size_t r = runs_.size(); r-- > 0;) runs_[r].query(a, F, result);
        for (std::int64_t d = 0; d < width_; ++d) o[d] /= result.sum;
    }
    std::int64_t length() const { return length_; }
    std::int64_t bytes() const {
        std::int64_t n = tail_.bytes();
        for (const Run& r : runs_) n += r.bytes();
        return n;
    }

  private:
    static constexpr std::int64_t kTail = 64, kTile = 32;

    // The unnormalised output, exp(-top) times too small.
    struct Result {
        T* o;
        std::int64_t width;
        T top = -std::numeric_limits<T>::infinity(), sum = 0;
        void raise(T scale) {
            if (scale <= top) return;
            const T keep = std::exp(top - scale);
            for (std::int64_t d = 0; d < width; ++d) o[d] *= keep;
            sum *= keep, top = scale;
        }
        void add(T scale, const T* vector, T weight) {  // exp(scale) (vector, weight)
            raise(scale);
            const T factor = std::exp(scale - top);
            axpy(factor, vector, o, width);
            sum += factor * weight;
        }
    };

    struct Run {
        std::int64_t width;
        std::vector<T> b, F, v;                   // [size], [size], [size, width]: by scalar once sorted
        T gate = 0;                               // of the latest key
        std::vector<T> below, above;              // [tiles, width + 1]: sums of the tiles below and above
        std::vector<T> scale_below, scale_above;  // at the nearest key of those tiles; -infinity: no such tile

        explicit Run(std::int64_t w) : width(w) {}
        void swap(Run& x) { b.swap(x.b), F.swap(x.F), v.swap(x.v); }
        std::int64_t size() const { return static_cast<std::int64_t>(b.size()); }
        std::int64_t bytes() const {
            return static_cast<std::int64_t>((b.capacity() + F.capacity() + v.capacity() + below.capacity() +
                                              above.capacity() + scale_below.capacity() + scale_above.capacity()) *
                                             sizeof(T));
        }
        const T* value(std::int64_t j) const { return v.data() + j * width; }
        void reserve(std::int64_t n) {
            b.reserve(std::size_t(n)), F.reserve(std::size_t(n)), v.reserve(std::size_t(n * width));
        }
        void take(const Run& from, std::int64_t j) {
            b.push_back(from.b[std::size_t(j)]), F.push_back(from.F[std::size_t(j)]);
            v.insert(v.end(), from.value(j), from.value(j) + width);
        }
        void sort() {
            std::vector<std::int64_t> order(b.size());
            std::iota(order.begin(), order.end(), 0);
            std::stable_sort(order.begin(), order.end(), [&](std::int64_t i, std::int64_t j) {
                const T x = b[std::size_t(i)], y = b[std::size_t(j)];
                return x < y || (std::isnan(y) && !std::isnan(x));
            });
            Run sorted(width);
            sorted.reserve(size());
            for (const std::int64_t j : order) sorted.take(*this, j);
            gate = F.back();
            swap(sorted);
        }
        static Run merged(const Run& x, const Run& y) {
            Run out(x.width);
            out.reserve(x.size() + y.size());
            std::int64_t i = 0, j = 0;
            while (i < x.size() || j < y.size()) {
                const bool first = j >= y.size() || (i < x.size() && !(y.b[std::size_t(j)] < x.b[std::size_t(i)]));
                first ? out.take(x, i++) : out.take(y, j++);
            }
            out.gate = y.gate;
            return out;
        }
        std::int64_t tiles() const { return (size() + kTile - 1) / kTile; }
        void scan() {
            const std::int64_t n = tiles();
            below.resize(std::size_t(n * (width + 1))), above.resize(below.size());
            scale_below.resize(std::size_t(n)), scale_above.resize(std::size_t(n));
            DecayedSum<T> passed(width);
            for (std::int64_t t = 0; t < n; ++t) {
                keep(passed, t > 0 ? b[std::size_t(t * kTile - 1)] : T(0), t, below, scale_below);
                for (std::int64_t j = t * kTile; j < std::min(size(), (t + 1) * kTile); ++j) pass(passed, j);
            }
            passed.clear();
            for (std::int64_t t = n; t-- > 0;) {
                keep(passed, t + 1 < n ? b[std::size_t((t + 1) * kTile)] : T(0), t, above, scale_above);
                for (std::int64_t j = std::min(size(), (t + 1) * kTile); j-- > t * kTile;) pass(passed, j);
            }
        }
        void pass(DecayedSum<T>& passed, std::int64_t j) const {
            passed.add(gate - F[std::size_t(j)], b[std::size_t(j)], value(j), 1);
        }
        void keep(const DecayedSum<T>& passed, T at, std::int64_t t, std::vector<T>& sums,
                  std::vector<T>& scales) const {
            scales[std::size_t(t)] = passed.empty() ? passed.scale : passed.scale_at(at);
            std::copy(passed.sum.begin(), passed.sum.end(), sums.begin() + t * (width + 1));
        }
        void query(T a, T F_query, Result& result) const {
            const auto place = std::upper_bound(b.begin(), b.end(), a) - b.begin();  // b[place - 1] <= a < b[place]
            const std::int64_t t = std::min<std::int64_t>(place, size() - 1) / kTile;
            const std::int64_t from = t * kTile, to = std::min(size(), from + kTile);
            const T gate_since = F_query - gate;
            if (from > 0) look_up(scale_below, below, t, gate_since - std::abs(a - b[std::size_t(from - 1)]), result);
            if (to < size()) look_up(scale_above, above, t, gate_since - std::abs(b[std::size_t(to)] - a), result);
            direct(a, F_query, from, to, result);
        }
        void look_up(const std::vector<T>& scales, const std::vector<T>& sums, std::int64_t t, T log_weight,
                     Result& result) const {
            const T* sum = sums.data() + t * (width + 1);
            result.add(scales[std::size_t(t)] + log_weight, sum, sum[width]);
        }
        void direct(T a, T F_query, std::int64_t from, std::int64_t to, Result& result) const {
            T scores[kTail];
            for (std::int64_t j = from; j < to; ++j)
                scores[j - from] = F_query - F[std::size_t(j)] - std::abs(a - b[std::size_t(j)]);
            for (std::int64_t j = from; j < to; ++j) result.raise(scores[j - from]);
            for (std::int64_t j = from; j < to; ++j) {
                const T weight = std::exp(scores[j - from] - result.top);
                axpy(weight, value(j), result.o, width);
                result.sum += weight;
            }
        }
    };

    std::int64_t width_, length_ = 0;
    Run tail_;
    std::vector<Run> runs_;  // oldest, and largest, first
};

}  // namespace fiedler
