// engine/token_graph.h: the co-occurrence graph of a corpus' tokens.
//
// Nodes are the tokens of the vocabulary. Two different tokens d places apart in the same document, 1 <= d <= window,
// are a pair; n_ij is the number of pairs of i and j (either order), each counted 1, or 1/d with inverse_distance.
// With n_i = sum_j n_ij, N = sum_i n_i, p_ij = n_ij / N, p_i = n_i / N and, for the smoothing exponent s,
// q_i = n_i^s / sum_k n_k^s, the weight of the edge (i, j) is
//
//   ppmi    max(0, log(p_ij / sqrt(p_i q_j p_j q_i)))     count    n_ij
//
// This is positive pointwise mutual information with context distribution smoothing (Levy, Goldberg and Dagan 2015,
// "Improving Distributional Similarity with Lessons Learned from Word Embeddings", TACL 3, section 3: log(p_ij / (p_i
// q_j)), s = 0.75), made symmetric: the mean over the two roles that a token of the pair can have. s = 1: plain PPMI.
// Pairs with n_ij < min_count and weights that are not positive are left out (n_i and N still count them). Of the rest
// each node keeps its `neighbours` heaviest, the smaller token first among equals; an edge stays if either end keeps it.
//
// Counting is exact, in whole numbers (of 1/lcm(1..window) with inverse_distance): the graph depends neither on the
// number of threads nor on the memory. One reading of the text finds n_i; then each pass reads it once more and counts
// as many whole rows of n_ij as the memory holds, as counters over the vocabulary or, where that is smaller, as the
// list of the row's neighbours. A row's best neighbours are kept and its counts forgotten.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "engine/dataset.h"
#include "engine/graph.h"

namespace fiedler {

enum class TokenWeight { ppmi, count };
const char* name_of(TokenWeight);

struct TokenGraphProgress {
    std::int64_t pass = 0, passes = 0;   // pass 0: the first reading, when the number of passes is not known yet (0)
    std::int64_t tokens = 0, total = 0;  // of the text, in this pass
};

// The defaults are measured on a hundred novels (19M tokens, vocabulary 16,384): with min_count = 5, or counts as
// weights, rare tokens form loose clusters, and about half of the 64 smallest eigenvectors, or nearly all, live on fewer
// than 50 nodes; with 2 it is 4 of 64.
struct TokenGraphOptions {
    std::int32_t window = 5;        // 1 to 16
    bool inverse_distance = false;  // a pair d places apart counts 1/d instead of 1
    TokenWeight weight = TokenWeight::ppmi;
    double smoothing = 0.75;       // s, 0 to 1; ppmi only
    std::int64_t min_count = 2;    // smallest n_ij of an edge
    std::int32_t neighbours = 32;  // kept by each node
    std::int32_t separator = -1;   // stands between documents: never part of a pair, and no pair spans it; -1: none
    std::vector<std::int32_t> excluded;  // control tokens: never part of a pair, but pairs may span them
    int threads = 0;                     // 0: all
    // Bytes for counts and for the text at hand; what is kept of each node (8 bytes a neighbour) and a few numbers for
    // each token and thread come on top. Mapped shards are the operating system's.
    std::size_t memory = std::size_t{1} << 30;
    std::function<void(const TokenGraphProgress&)> progress;  // now and then; may be empty
    std::function<bool()> stop;                               // asked now and then: true ends with a RunError
};

struct TokenGraphReport {
    std::int64_t vocab = 0;
    std::int64_t tokens = 0;          // of the text, separators and control tokens among them
    std::int64_t pairs = 0;           // counted
    std::int64_t distinct_pairs = 0;  // unordered
    std::int64_t frequent_pairs = 0;  // of those, with n_ij >= min_count
    std::int64_t edges = 0;           // kept
    std::int64_t unseen = 0;          // tokens that are not in the text (separator and control tokens included)
    std::int64_t isolated = 0;        // nodes without an edge, the unseen ones among them
    std::int64_t passes = 0;          // over the text, after the first reading
    std::size_t peak_bytes = 0;       // largest sum of what options.memory bounds
    double seconds = 0;
    std::string text() const;  // some lines, each ending with '\n'
};

// The text is that of all shards in order, as one: documents go on from one shard to the next (prepare() cuts them
// anywhere). Throws InputError for options out of range, a token beyond the vocabulary, memory that holds no row, and
// when no edge is left; what Shard refuses is refused. Node names stay empty.
Graph token_graph(const TokenStream& text, std::int32_t vocab, const TokenGraphOptions&, TokenGraphReport&);
Graph token_graph(const std::vector<std::string>& shard_paths, std::int32_t vocab, const TokenGraphOptions&,
                  TokenGraphReport&);
// Of the training part of a dataset: `separator` and `excluded` (tokens that stand for no text) are the dataset's own.
Graph token_graph(const Dataset&, TokenGraphOptions, TokenGraphReport&);

}  // namespace fiedler
