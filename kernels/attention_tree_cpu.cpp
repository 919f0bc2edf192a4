// Near-linear scalar-distance attention on the CPU: the reference in double and real training in float. A unit is one
// sequence and head. Scans are never stored: a walk along the merged order of keys and queries carries the decayed sum
// of what it has passed.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/attention_tree.h"
#include "kernels/decayed_sum.h"
#include "kernels/parallel.h"

namespace fiedler {
namespace {

constexpr std::int32_t kLeaf = 64;  // tokens of a dense leaf
using Order = std::vector<std::int32_t>;

// One sequence and head: its scalars and gate, contiguous, and the tree. Node is told of every leaf and node.
template <class T>
class Tree {
  public:
    Tree(Mat<const T> a_all, Mat<const T> b_all, Mat<const T> F_all, std::int32_t head, std::int32_t begin,
         std::int32_t n)
        : n(n), a(std::size_t(n)), b(std::size_t(n)), F(std::size_t(n)) {
        for (std::int32_t i = 0; i < n; ++i) {
            a[std::size_t(i)] = a_all.row(begin + i)[head], b[std::size_t(i)] = b_all.row(begin + i)[head];
            F[std::size_t(i)] = F_all ? F_all.row(begin + i)[head] : T(0);
        }
    }
    // leaf(lo, hi): all causal pairs within. node(mid, keys, queries): keys before token mid, the others from it on, both
    // in the order of their scalars.
    template <class Leaf, class Node>
    void run(bool causal, Leaf&& leaf, Node&& node) {
        Order keys, queries;
        sort(0, n, causal, keys, queries, leaf, node);
        if (!causal) node(0, keys, queries);
    }
    std::int32_t n;
    std::vector<T> a, b, F;
    T key(std::int32_t j) const { return b[std::size_t(j)]; }
    T query(std::int32_t i) const { return a[std::size_t(i)]; }
    T gate(std::int32_t i) const { return F[std::size_t(i)]; }

  private:
    template <class Leaf, class Node>
    void sort(std::int32_t lo, std::int32_t hi, bool causal, Order& keys, Order& queries, Leaf& leaf, Node& node) {
        const auto by = [](const std::vector<T>& x) {
            return [&x](std::int32_t i, std::int32_t j) {
                const T y = x[std::size_t(i)], z = x[std::size_t(j)];
                if (y < z || z < y) return y < z;
                return std::isnan(y) != std::isnan(z) ? std::isnan(z) : i < j;  // NaN last
            };
        };
        if (hi - lo <= kLeaf) {
            for (std::int32_t i = lo; i < hi; ++i) keys.push_back(i);
            queries = keys;
            std::sort(keys.begin(), keys.end(), by(b));
            std::sort(queries.begin(), queries.end(), by(a));
            if (causal) leaf(lo, hi);
            return;
        }
        std::int32_t half = kLeaf;
        while (half < hi - lo - half) half *= 2;
        Order more_keys, more_queries;
        sort(lo, lo + half, causal, keys, queries, leaf, node);
        sort(lo + half, hi, causal, more_keys, more_queries, leaf, node);
        if (causal) node(lo + half, keys, more_queries);
        merge(keys, more_keys, by(b));
        merge(queries, more_queries, by(a));
    }
    template <class Less>
    static void merge(Order& x, const Order& y, Less less) {
        Order out(x.size() + y.size());
        std::merge(x.begin(), x.end(), y.begin(), y.end(), out.begin(), less);
        x.swap(out);
    }
};

// The walk along two sorted orders, upwards or downwards, one scalar at a time: at(x, first and last place of either).
template <class T, class At>
void walk(const Tree<T>& tree, const Order& keys, const Order& queries, bool upwards, At&& at) {
    const std::size_t k = keys.size(), q = queries.size();
    const auto key = [&](std::size_t i) { return tree.key(keys[upwards ? i : k - 1 - i]); };
    const auto query = [&](std::size_t i) { return tree.query(queries[upwards ? i : q - 1 - i]); };
    std::size_t i = 0, j = 0;
    while (i < k || j < q) {
        const bool from_keys = j >= q || (i < k && (upwards ? key(i) <= query(j) : key(i) >= query(j)));
        const T x = from_keys ? key(i) : query(j);
        std::size_t i_end = i, j_end = j;
        while (i_end < k && key(i_end) == x) ++i_end;
        while (j_end < q && query(j_end) == x) ++j_end;
        if (i_end == i && j_end == j) {  // NaN has no place: its leaf shows it
            ++(from_keys ? i : j);
            continue;
        }
        at(x, i, i_end, j, j_end);
        i = i_end, j = j_end;
    }
}

template <class T>
class ForwardUnit {
  public:
    ForwardUnit(const AttentionTreeForward<T>& p, std::int32_t head, std::int32_t begin, std::int32_t end)
        : p_(p),
          head_(head),
          begin_(begin),
          width_(p.v.cols / p.heads),
          tree_(p.a, p.b, p.F, head, begin, end - begin),
          scale_(std::size_t(tree_.n), -std::numeric_limits<T>::infinity()),
          sum_(std::size_t(tree_.n)),
          passed_(width_) {}

    void run() {
        for (std::int32_t i = 0; i < tree_.n; ++i) std::fill_n(out(i), width_, T(0));
        tree_.run(
            p_.causal, [&](std::int32_t lo, std::int32_t hi) { leaf(lo, hi); },
            [&](std::int32_t mid, const Order& keys, const Order& queries) {
                node(mid, keys, queries, true);
                node(mid, keys, queries, false);
            });
        for (std::int32_t i = 0; i < tree_.n; ++i) {
            const T factor = 1 / sum_[std::size_t(i)];
            for (std::int64_t d = 0; d < width_; ++d) out(i)[d] *= factor;
            p_.lse.row(begin_ + i)[head_] = scale_[std::size_t(i)] + std::log(sum_[std::size_t(i)]);
        }
    }

  private:
    T* out(std::int32_t i) const { return p_.o.row(begin_ + i) + head_ * width_; }
    const T* value(std::int32_t j) const { return p_.v.row(begin_ + j) + head_ * width_; }
    // exp(scale) (vector, weight) to the sums of query i.
    void add(std::int32_t i, T scale, const T* vector, T weight) {
        T &top = scale_[std::size_t(i)], &sum = sum_[std::size_t(i)];
        if (p_.skip && scale < top && std::exp(scale - top) * weight < kNothing * sum) return;
        T* __restrict o = out(i);
        if (scale <= top) {
            const T factor = std::exp(scale - top);
            axpy(factor, vector, o, width_);
            sum += factor * weight;
        } else {
            const T keep = std::exp(top - scale);  // 0 at first
            for (std::int64_t d = 0; d < width_; ++d) o[d] = o[d] * keep + vector[d];
            sum = sum * keep + weight;
            top = scale;
        }
    }
    void leaf(std::int32_t lo, std::int32_t hi) {
        T scores[kLeaf];
        for (std::int32_t i = lo; i < hi; ++i) {
            T &top = scale_[std::size_t(i)], &sum = sum_[std::size_t(i)];
            for (std::int32_t j = lo; j <= i; ++j) {
                scores[j - lo] = tree_.gate(i) - tree_.gate(j) - std::abs(tree_.query(i) - tree_.key(j));
                top = scores[j - lo] <= top ? top : scores[j - lo];  // NaN is taken, and shows
            }
            for (std::int32_t j = lo; j <= i; ++j) {
                const T weight = std::exp(scores[j - lo] - top);
                axpy(weight, value(j), out(i), width_);
                sum += weight;
            }
        }
    }
    // The keys below the queries, ties included; or those above.
    void node(std::int32_t mid, const Order& keys, const Order& queries, bool upwards) {
        const std::size_t k = keys.size(), q = queries.size();
        const T gate = mid > 0 ? tree_.gate(mid - 1) : T(0);
        passed_.clear();
        const auto look_up = [&](T x, std::size_t from, std::size_t to) {
            for (std::size_t j = from; j < to && !passed_.empty(); ++j) {
                const std::int32_t query = queries[upwards ? j : q - 1 - j];
                add(query, passed_.scale_at(x) + (p_.causal ? tree_.gate(query) - gate : T(0)), passed_.vector(),
                    passed_.number());
            }
        };
        walk(tree_, keys, queries, upwards,
             [&](T x, std::size_t i, std::size_t i_end, std::size_t j, std::size_t j_end) {
                 if (!upwards) look_up(x, j, j_end);
                 for (; i < i_end; ++i) {
                     const std::int32_t key = keys[upwards ? i : k - 1 - i];
                     passed_.add(p_.causal ? gate - tree_.gate(key) : T(0), x, value(key), 1);
                 }
                 if (upwards) look_up(x, j, j_end);
             });
    }

    static constexpr T kNothing = std::numeric_limits<T>::epsilon() / 4;  // below every rounding

    const AttentionTreeForward<T>& p_;
    std::int64_t head_;
    std::int32_t begin_;
    std::int64_t width_;
    Tree<T> tree_;
    std::vector<T> scale_, sum_;
    DecayedSum<T> passed_;
};

template <class T>
class BackwardUnit {
  public:
    BackwardUnit(const AttentionTreeBackward<T>& p, std::int32_t head, std::int32_t begin, std::int32_t end)
        : p_(p),
          head_(head),
          begin_(begin),
          width_(p.v.cols / p.heads),
          tree_(p.a, p.b, p.F, head, begin, end - begin),
          passed_keys_(width_),
          passed_queries_(width_),
          here_(width_) {}

    void run() {
        for (std::int32_t i = 0; i < tree_.n; ++i) {
            const std::int32_t t = begin_ + i;
            std::fill_n(dv(i), width_, T(0));
            p_.da.row(t)[head_] = p_.db.row(t)[head_] = 0;
            if (p_.dF) p_.dF.row(t)[head_] = 0;
            p_.delta.row(t)[head_] = dot(dout(i), p_.o.row(t) + head_ * width_, width_);
        }
        tree_.run(
            p_.causal, [&](std::int32_t lo, std::int32_t hi) { leaf(lo, hi); },
            [&](std::int32_t mid, const Order& keys, const Order& queries) {
                node(mid, keys, queries, true);
                node(mid, keys, queries, false);
            });
    }

  private:
    T* dv(std::int32_t j) const { return p_.dv.row(begin_ + j) + head_ * width_; }
    const T* dout(std::int32_t i) const { return p_.do_.row(begin_ + i) + head_ * width_; }
    const T* value(std::int32_t j) const { return p_.v.row(begin_ + j) + head_ * width_; }
    T delta(std::int32_t i) const { return p_.delta.row(begin_ + i)[head_]; }
    T lse(std::int32_t i) const { return p_.lse.row(begin_ + i)[head_]; }
    void add_to_gate(std::int32_t j, T ds) const {
        if (p_.dF) p_.dF.row(begin_ + j)[head_] -= ds;
    }

    void leaf(std::int32_t lo, std::int32_t hi) {
        for (std::int32_t i = lo; i < hi; ++i)
            for (std::int32_t j = lo; j <= i; ++j) {
                const T x = tree_.query(i), y = tree_.key(j), sign = x > y ? T(1) : x < y ? T(-1) : T(0);
                const T weight = std::exp(tree_.gate(i) - tree_.gate(j) - std::abs(x - y) - lse(i));
                const T ds = weight * (dot(dout(i), value(j), width_) - delta(i));
                axpy(weight, dout(i), dv(j), width_);
                p_.da.row(begin_ + i)[head_] -= sign * ds;
                p_.db.row(begin_ + j)[head_] += sign * ds;
                add_to_gate(j, ds);
            }
    }
    // Upwards: what the keys below give the queries and the queries below the keys, and the ties; downwards: those above.
    void node(std::int32_t mid, const Order& keys, const Order& queries, bool upwards) {
        const std::size_t k = keys.size(), q = queries.size();
        const T gate = mid > 0 ? tree_.gate(mid - 1) : T(0), side = upwards ? T(1) : T(-1);  // sign of a - b
        passed_keys_.clear(), passed_queries_.clear();
        walk(tree_, keys, queries, upwards,
             [&](T x, std::size_t i, std::size_t i_end, std::size_t j, std::size_t j_end) {
                 here_.clear();
                 for (std::size_t n = j; n < j_end; ++n) {
                     const std::int32_t query = queries[upwards ? n : q - 1 - n];
                     const T weight = (p_.causal ? tree_.gate(query) - gate : T(0)) - lse(query);
                     to_query(query, x, weight, side);
                     here_.add(weight, x, dout(query), delta(query));
                 }
                 for (std::size_t n = i; n < i_end; ++n) {
                     const std::int32_t key = keys[upwards ? n : k - 1 - n];
                     const T weight = p_.causal ? gate - tree_.gate(key) : T(0);
                     to_key(passed_queries_, key, x, weight, -side);
                     if (upwards) to_key(here_, key, x, weight, 0);
                 }
                 for (std::size_t n = i; n < i_end; ++n) {
                     const std::int32_t key = keys[upwards ? n : k - 1 - n];
                     passed_keys_.add(p_.causal ? gate - tree_.gate(key) : T(0), x, value(key), 1);
                 }
                 passed_queries_.add(here_);
             });
    }
    void to_query(std::int32_t i, T x, T log_weight, T sign) const {
        if (passed_keys_.empty()) return;
        const T weight = std::exp(passed_keys_.scale_at(x) + log_weight);
        const T ds = weight * (dot(dout(i), passed_keys_.vector(), width_) - delta(i) * passed_keys_.number());
        p_.da.row(begin_ + i)[head_] -= sign * ds;
    }
    void to_key(const DecayedSum<T>& passed, std::int32_t j, T x, T log_weight, T sign) const {
        if (passed.empty()) return;
        const T weight = std::exp(passed.scale_at(x) + log_weight);
        const T ds = weight * (dot(value(j), passed.vector(), width_) - passed.number());
        axpy(weight, passed.vector(), dv(j), width_);
        p_.db.row(begin_ + j)[head_] += sign * ds;
        add_to_gate(j, ds);
    }

    const AttentionTreeBackward<T>& p_;
    std::int64_t head_;
    std::int32_t begin_;
    std::int64_t width_;
    Tree<T> tree_;
    DecayedSum<T> passed_keys_, passed_queries_, here_;
};

template <class Unit, class P>
void run_units(const Cpu& device, const P& p) {
    check(p);
    parallel_for_uneven(device, std::int64_t(p.seq.count) * p.heads, [&](std::int64_t unit) {
        const auto s = std::int32_t(unit / p.heads);
        Unit(p, std::int32_t(unit % p.heads), p.seq.sequence_begin(s), p.seq.sequence_end(s)).run();
    });
}

}  // namespace

std::int64_t attention_tree_partial_floats(const Packed& seq, std::int32_t heads, std::int64_t width, bool causal,
                                           AttentionTreeTuning tuning) {
    if (!causal) return 0;
    Packed leaves = seq;
    if (seq.length > 0 && seq.length % tuning.leaf == 0)
        leaves = Packed::uniform(seq.tokens / tuning.leaf, tuning.leaf);
    else
        leaves.length = 0;
    return attention_partial_elements(leaves, tuning.leaf, heads, width, 1, 0, true);
}
std::int64_t attention_tree_forward_bytes(const Packed& seq, std::int32_t longest, std::int32_t heads,
                                          std::int64_t width, bool causal, AttentionTreeTuning tuning) {
    return attention_tree::Layout(seq, longest, heads, width, causal, tuning, false, 0).bytes;
}
std::int64_t attention_tree_backward_bytes(const Packed& seq, std::int32_t longest, std::int32_t heads,
                                           std::int64_t width, bool causal, AttentionTreeTuning tuning) {
    const auto partial = attention_tree_partial_floats(seq, heads, width, causal, tuning);
    return attention_tree::Layout(seq, longest, heads, width, causal, tuning, true, partial).bytes;
}

template <class T>
void attention_tree_forward(const Cpu& device, const AttentionTreeForward<T>& p) {
    run_units<ForwardUnit<T>>(device, p);
}
template <class T>
void attention_tree_backward(const Cpu& device, const AttentionTreeBackward<T>& p) {
    run_units<BackwardUnit<T>>(device, p);
}

template void attention_tree_forward(const Cpu&, const AttentionTreeForward<float>&);
template void attention_tree_forward(const Cpu&, const AttentionTreeForward<double>&);
template void attention_tree_backward(const Cpu&, const AttentionTreeBackward<float>&);
template void attention_tree_backward(const Cpu&, const AttentionTreeBackward<double>&);

}  // namespace fiedler
