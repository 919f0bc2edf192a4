#include "engine/token_graph.h"

#include <omp.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <memory>
#include <numeric>
#include <span>

#include "engine/error.h"
#include "engine/progress.h"
#include "kernels/parallel.h"

namespace fiedler {

namespace {

constexpr std::int32_t kMaxWindow = 16;          // lcm(1..16) = 720,720: sums stay far below 2^63
constexpr std::int32_t kMaxVocab = 1 << 26;      // a list entry is 32 bits: token and distance
constexpr std::int32_t kMaxNeighbours = 1024;    // a dense graph is not what this is for
constexpr std::int64_t kBlockTokens = 4 << 20;   // text at hand: 32 MB with its index
constexpr std::int64_t kLeastBlock = 4 << 10;    // below it memory is spent on reading the text again and again
constexpr std::int64_t kBytesPerBlockToken = 8;  // its token and its place in the index
// In a block, what is not a node:
constexpr std::int32_t kBreak = -1;  // separator, or outside the text: no pair spans it
constexpr std::int32_t kSkip = -2;   // control token

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

struct Counting {
    std::int32_t window = 0;
    std::int64_t one = 1;             // what a pair of weight 1 adds
    std::vector<std::int64_t> units;  // [window + 1] what a pair d places apart adds
};

Counting counting_of(const TokenGraphOptions& o) {
    Counting c;
    c.window = o.window;
    if (o.inverse_distance)
        for (std::int64_t d = 2; d <= o.window; ++d) c.one = std::lcm(c.one, d);
    for (std::int64_t d = 0; d <= o.window; ++d)
        c.units.push_back(o.inverse_distance ? c.one / std::max<std::int64_t>(d, 1) : c.one);
    return c;
}

std::size_t least_memory(std::int32_t vocab) { return at(kLeastBlock * kBytesPerBlockToken + 8 * std::int64_t{vocab}); }

void check_options(const TokenGraphOptions& o, std::int32_t vocab) {
    if (vocab < 2 || vocab > kMaxVocab)
        input_error("token graph: a vocabulary of {} is not possible; from 2 to {}", vocab, kMaxVocab);
    if (o.window < 1 || o.window > kMaxWindow)
        input_error("token graph: window {} is not possible; choose one from 1 to {}", o.window, kMaxWindow);
    if (!(o.smoothing >= 0 && o.smoothing <= 1))
        input_error("token graph: smoothing {} is not possible; choose an exponent from 0 to 1", o.smoothing);
    if (o.min_count < 1 || o.min_count > 1'000'000'000)
        input_error("token graph: smallest count {} is not possible; choose one from 1 to 1000000000", o.min_count);
    if (o.neighbours < 1 || o.neighbours > kMaxNeighbours)
        input_error("token graph: {} neighbours are not possible; choose from 1 to {}", o.neighbours, kMaxNeighbours);
    if (o.separator < -1 || o.separator >= vocab)
        input_error("token graph: separator {} is no token of the vocabulary of {}; give one of it, or -1 for none",
                    o.separator, vocab);
    for (const std::int32_t token : o.excluded)
        if (token < 0 || token >= vocab)
            input_error("token graph: excluded token {} is not in the vocabulary of {}; leave it out", token, vocab);
    if (o.memory < least_memory(vocab))
        input_error("token graph: {} of memory do not hold one row of a vocabulary of {}; give at least {}",
                    format_bytes(static_cast<std::int64_t>(o.memory)), vocab,
                    format_bytes(static_cast<std::int64_t>(least_memory(vocab))));
}

// The text, a block at a time, with `window` places before and after it.
class BlockReader {
  public:
    BlockReader(const TokenStream& text, std::int32_t vocab, const TokenGraphOptions& o, const Cpu& cpu)
        : text_(text), options_(o), cpu_(cpu), alias_(at(vocab)) {
        std::iota(alias_.begin(), alias_.end(), 0);
        for (const std::int32_t token : o.excluded) alias_[at(token)] = kSkip;
        if (o.separator >= 0) alias_[at(o.separator)] = kBreak;
        const auto room = static_cast<std::int64_t>(o.memory) - 8 * std::int64_t{vocab};
        block_ = std::min({kBlockTokens, text.size(), std::max(kLeastBlock, room / 4 / kBytesPerBlockToken)});
        tokens_.resize(at(block_ + 2 * o.window));
    }
    std::int64_t block_tokens() const { return block_; }

    // body(tokens, count): tokens[-window .. count + window) may be read; tokens < 0: kBreak, kSkip.
    template <class Body>
    void for_blocks(TokenGraphProgress state, Body&& body) {
        state.total = text_.size();
        for (std::int64_t first = 0; first < text_.size(); first += block_) {
            if (options_.stop && options_.stop()) run_error("interrupted while counting pairs of tokens");
            const std::int64_t count = std::min(block_, text_.size() - first);
            load(first - options_.window, count + 2 * options_.window);
            body(tokens_.data() + options_.window, count);
            state.tokens = first + count;
            if (options_.progress) options_.progress(state);
        }
    }

  private:
    void load(std::int64_t first, std::int64_t count) {
        constexpr std::int64_t kPart = 64 << 10;
        parallel_for(cpu_, (count + kPart - 1) / kPart, [&](std::int64_t part) {
            const std::int64_t begin = part * kPart, end = std::min(begin + kPart, count);
            const std::int64_t from = std::clamp<std::int64_t>(first + begin, 0, text_.size());
            const std::int64_t to = std::clamp<std::int64_t>(first + end, 0, text_.size());
            std::int32_t *out = tokens_.data() + begin, *text = out + (from - first - begin),
                         *last = text + (to - from);
            if (from == to) text = last = tokens_.data() + end;  // nothing but the outside
            text_.copy(from, to - from, text);
            std::fill(out, text, kBreak);
            std::fill(last, tokens_.data() + end, kBreak);
            for (std::int32_t* t = text; t < last; ++t) *t = alias_[at(*t)];
        });
    }
    const TokenStream& text_;
    const TokenGraphOptions& options_;
    const Cpu& cpu_;
    std::vector<std::int32_t> alias_;  // [vocab] the token itself, kBreak or kSkip
    std::int64_t block_ = 0;
    std::vector<std::int32_t> tokens_;
};

// visit(distance, token) for what the token at `t` makes a pair with.
template <class Visit>
inline void for_context(const std::int32_t* t, std::int32_t window, Visit&& visit) {
    for (const int side : {-1, 1})
        for (std::int32_t d = 1; d <= window; ++d) {
            const std::int32_t other = t[side * d];
            if (other == kBreak) break;
            if (other != kSkip && other != *t) visit(d, other);
        }
}

struct TokenSums {
    std::int64_t occurrences = 0;
    std::int64_t entries = 0;  // pairs with it
    std::int64_t mass = 0;     // n_i, in units
};

// The first reading: what is to be known of each token.
std::vector<TokenSums> survey(BlockReader& reader, std::int32_t vocab, const Counting& counting, const Cpu& cpu,
                              std::size_t memory) {
    const auto sums_bytes = static_cast<std::int64_t>(sizeof(TokenSums)) * vocab;
    const auto most = static_cast<std::int64_t>(memory / 4) / sums_bytes;
    const std::int64_t parts = std::clamp<std::int64_t>(most, 1, thread_count(cpu));
    std::vector<std::vector<TokenSums>> of_part(at(parts), std::vector<TokenSums>(at(vocab)));
    reader.for_blocks({}, [&](const std::int32_t* tokens, std::int64_t count) {
        parallel_for(cpu, parts, [&](std::int64_t p) {
            TokenSums* sums = of_part[at(p)].data();
            for (std::int64_t i = count * p / parts; i < count * (p + 1) / parts; ++i) {
                if (tokens[i] < 0) continue;
                std::int64_t entries = 0, mass = 0;
                for_context(tokens + i, counting.window, [&](std::int32_t d, std::int32_t) {
                    ++entries;
                    mass += counting.units[at(d)];
                });
                TokenSums& s = sums[tokens[i]];
                ++s.occurrences;
                s.entries += entries;
                s.mass += mass;
            }
        });
    });
    for (std::int64_t p = 1; p < parts; ++p)
        for (std::int64_t t = 0; t < vocab; ++t) {
            TokenSums &sum = of_part[0][at(t)], &part = of_part[at(p)][at(t)];
            sum.occurrences += part.occurrences;
            sum.entries += part.entries;
            sum.mass += part.mass;
        }
    return std::move(of_part[0]);
}

// Where the tokens of a range of rows stand in a block: positions of row r, ascending, at [offsets[r], offsets[r + 1]).
class BlockIndex {
  public:
    BlockIndex(std::int64_t block_tokens, const Cpu& cpu) : cpu_(cpu), positions_(at(block_tokens)) {}

    void build(const std::int32_t* tokens, std::int64_t count, std::int32_t first_row, std::int32_t last_row) {
        const std::int64_t rows = last_row - first_row, parts = thread_count(cpu_);
        cursors_.assign(at(parts * rows), 0);
        offsets_.assign(at(rows + 1), 0);
        const auto for_part = [&](auto&& body) {
            parallel_for(cpu_, parts, [&](std::int64_t p) {
                std::uint32_t* cursor = cursors_.data() + p * rows;
                for (std::int64_t i = count * p / parts; i < count * (p + 1) / parts; ++i) {
                    const auto row = static_cast<std::uint32_t>(tokens[i]) - static_cast<std::uint32_t>(first_row);
                    if (tokens[i] >= 0 && row < static_cast<std::uint32_t>(rows)) body(i, cursor[row]);
                }
            });
        };
        for_part([](std::int64_t, std::uint32_t& counter) { ++counter; });
        std::uint32_t sum = 0;
        for (std::int64_t r = 0; r < rows; ++r) {
            offsets_[at(r)] = sum;
            for (std::int64_t p = 0; p < parts; ++p) sum += std::exchange(cursors_[at(p * rows + r)], sum);
        }
        offsets_[at(rows)] = sum;
        for_part([&](std::int64_t i, std::uint32_t& cursor) { positions_[cursor++] = static_cast<std::uint32_t>(i); });
    }
    std::span<const std::uint32_t> row(std::int64_t r) const {
        return {positions_.data() + offsets_[at(r)], positions_.data() + offsets_[at(r + 1)]};
    }

  private:
    const Cpu& cpu_;
    std::vector<std::uint32_t> positions_, cursors_, offsets_;
};

// The counts of a range of rows: counters over the vocabulary, or a list of what is to be counted if that is smaller.
class RowCounts {
  public:
    RowCounts(const std::vector<TokenSums>& sums, const Counting& counting)
        : sums_(sums), counting_(counting), token_bits_(std::bit_width(sums.size() - 1)) {}

    std::int64_t vocab() const { return static_cast<std::int64_t>(sums_.size()); }
    bool dense(std::int32_t row) const { return sums_[at(row)].entries > 2 * vocab(); }
    std::int64_t bytes(std::int32_t row) const { return dense(row) ? 8 * vocab() : 4 * sums_[at(row)].entries; }

    // The rows from `first` on that fit into `memory`, at least one. Returns their end.
    std::int32_t plan(std::int32_t first, std::int64_t memory) const {
        std::int32_t last = first;
        for (std::int64_t sum = 0; last < vocab() && (last == first || sum + bytes(last) <= memory); ++last)
            sum += bytes(last);
        return last;
    }
    std::size_t begin(std::int32_t first, std::int32_t last) {
        first_ = first;
        begin_.clear();
        used_.assign(at(last - first), 0);
        std::int64_t dense_size = 0, list_size = 0;
        for (std::int32_t row = first; row < last; ++row) {
            std::int64_t& size = dense(row) ? dense_size : list_size;
            begin_.push_back(size);
            size += dense(row) ? vocab() : sums_[at(row)].entries;
        }
        counters_ = {};  // the last pass' memory goes first
        list_.reset();
        counters_.resize(at(dense_size));
        list_ = std::make_unique_for_overwrite<std::uint32_t[]>(at(list_size));
        return at(8 * dense_size + 4 * list_size);
    }

    // Counts the pairs of row first + r at these positions. Rows are independent.
    void add(std::int64_t r, const std::int32_t* tokens, std::span<const std::uint32_t> positions) {
        if (dense(first_ + static_cast<std::int32_t>(r))) {
            std::int64_t* counters = counters_.data() + begin_[at(r)];
            for (const std::uint32_t i : positions)
                for_context(tokens + i, counting_.window,
                            [&](std::int32_t d, std::int32_t other) { counters[other] += counting_.units[at(d)]; });
            return;
        }
        std::uint32_t* out = list_.get() + begin_[at(r)] + used_[at(r)];
        const std::uint32_t* start = out;
        for (const std::uint32_t i : positions)
            for_context(tokens + i, counting_.window, [&](std::int32_t d, std::int32_t other) {
                *out++ = static_cast<std::uint32_t>(other) | static_cast<std::uint32_t>(d - 1) << token_bits_;
            });
        used_[at(r)] += out - start;
    }

    // visit(token, count) for every neighbour of row first + r. scratch: [vocab] zeros, and zeros again on return.
    template <class Visit>
    void for_neighbours(std::int64_t r, std::vector<std::int64_t>& scratch, Visit&& visit) const {
        if (dense(first_ + static_cast<std::int32_t>(r))) {
            const std::int64_t* counters = counters_.data() + begin_[at(r)];
            for (std::int32_t token = 0; token < vocab(); ++token)
                if (counters[token] > 0) visit(token, counters[token]);
            return;
        }
        const std::span<const std::uint32_t> entries(list_.get() + begin_[at(r)], at(used_[at(r)]));
        const std::uint32_t mask = (1u << token_bits_) - 1;
        for (const std::uint32_t e : entries) scratch[e & mask] += counting_.units[(e >> token_bits_) + 1];
        for (const std::uint32_t e : entries)
            if (const std::int64_t count = std::exchange(scratch[e & mask], 0); count > 0)
                visit(static_cast<std::int32_t>(e & mask), count);
    }

  private:
    const std::vector<TokenSums>& sums_;
    const Counting& counting_;
    int token_bits_;
    std::int32_t first_ = 0;
    std::vector<std::int64_t> begin_, used_;  // [rows] place in counters_ or list_, entries in the list
    std::vector<std::int64_t> counters_;
    std::unique_ptr<std::uint32_t[]> list_;
};

// The weight of an edge, the same bits for (i, j) and (j, i).
class Weights {
  public:
    Weights(const std::vector<TokenSums>& sums, const Counting& counting, const TokenGraphOptions& o)
        : kind_(o.weight), one_(static_cast<double>(counting.one)) {
        if (kind_ == TokenWeight::count) return;
        double smooth_sum = 0;
        std::int64_t sum = 0;
        for (const TokenSums& s : sums) {
            sum += s.mass;
            if (s.mass > 0) smooth_sum += std::pow(static_cast<double>(s.mass), o.smoothing);
        }
        log_sum_ = std::log(static_cast<double>(sum));
        for (const TokenSums& s : sums) {  // (log p_i + log q_i) / 2
            const double log_mass = s.mass > 0 ? std::log(static_cast<double>(s.mass)) : 0;
            half_.push_back(0.5 * (log_mass - log_sum_ + o.smoothing * log_mass - std::log(smooth_sum)));
        }
    }
    float operator()(std::int32_t i, std::int32_t j, std::int64_t count) const {
        const auto n = static_cast<double>(count);
        if (kind_ == TokenWeight::count) return static_cast<float>(n / one_);
        const double marginals = half_[at(i)] + half_[at(j)];
        return static_cast<float>(std::log(n) - log_sum_ - marginals);
    }

  private:
    TokenWeight kind_;
    double one_, log_sum_ = 0;
    std::vector<double> half_;
};

struct Neighbour {
    std::int32_t token = 0;
    float weight = 0;
};

// The neighbours that each node keeps, ascending.
class Kept {
  public:
    Kept(std::int32_t vocab, std::int32_t most) : most_(at(most)), of_(at(vocab)) {}

    void keep(std::int32_t node, std::vector<Neighbour>& candidates) {
        if (candidates.size() > most_) {
            const auto heavier = [](const Neighbour& a, const Neighbour& b) {
                return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
            };
            std::nth_element(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(most_),
                             candidates.end(), heavier);
            candidates.resize(most_);
        }
        std::sort(candidates.begin(), candidates.end(),
                  [](const Neighbour& a, const Neighbour& b) { return a.token < b.token; });
        of_[at(node)] = {candidates.begin(), candidates.end()};
    }
    // Each edge once: listed by its smaller end, or by the larger if the smaller does not keep it.
    std::vector<Edge> edges() const {
        std::vector<Edge> all;
        for (std::size_t i = 0; i < of_.size(); ++i)
            for (const Neighbour& n : of_[i]) {
                const auto node = static_cast<std::int32_t>(i);
                if (node < n.token || !keeps(n.token, node)) all.push_back({node, n.token, n.weight});
            }
        return all;
    }

  private:
    bool keeps(std::int32_t node, std::int32_t token) const {
        return std::binary_search(of_[at(node)].begin(), of_[at(node)].end(), Neighbour{token, 0},
                                  [](const Neighbour& a, const Neighbour& b) { return a.token < b.token; });
    }
    std::size_t most_;
    std::vector<std::vector<Neighbour>> of_;
};

// Passes over the text, as many rows in each as the memory holds.
class Counter {
  public:
    Counter(BlockReader& reader, const std::vector<TokenSums>& sums, const Counting& counting,
            const TokenGraphOptions& o, const Cpu& cpu)
        : reader_(reader),
          rows_(sums, counting),
          index_(reader.block_tokens(), cpu),
          weights_(sums, counting, o),
          least_(o.min_count * counting.one),
          cpu_(cpu),
          kept_(static_cast<std::int32_t>(rows_.vocab()), o.neighbours),
          memory_(static_cast<std::int64_t>(o.memory) - reader.block_tokens() * kBytesPerBlockToken) {}

    const Kept& run(TokenGraphReport& report) {
        const auto vocab = static_cast<std::int32_t>(rows_.vocab());
        TokenGraphProgress state;
        for (std::int32_t row = 0; row < vocab; row = rows_.plan(row, memory_)) ++state.passes;
        for (std::int32_t first = 0, last; first < vocab; first = last) {
            last = rows_.plan(first, memory_);
            ++state.pass;
            const std::size_t bytes = rows_.begin(first, last) + at(reader_.block_tokens() * kBytesPerBlockToken);
            report.peak_bytes = std::max(report.peak_bytes, bytes);
            reader_.for_blocks(state, [&](const std::int32_t* tokens, std::int64_t count) {
                index_.build(tokens, count, first, last);
                for_rows(last - first, [&](std::int64_t r) { rows_.add(r, tokens, index_.row(r)); });
            });
            select(first, last, report);
        }
        report.passes = state.passes;
        return kept_;
    }

  private:
    template <class Body>
    void for_rows(std::int64_t rows, Body&& body) const {  // frequent tokens stand together: small pieces
#pragma omp parallel for schedule(dynamic, 8) num_threads(thread_count(cpu_))
        for (std::int64_t r = 0; r < rows; ++r) body(r);
    }
    void select(std::int32_t first, std::int32_t last, TokenGraphReport& report) {
        std::int64_t distinct = 0, frequent = 0;
#pragma omp parallel num_threads(thread_count(cpu_)) reduction(+ : distinct, frequent)
        {
            std::vector<std::int64_t> scratch(at(rows_.vocab()));
            std::vector<Neighbour> candidates;
#pragma omp for schedule(dynamic, 8)
            for (std::int32_t node = first; node < last; ++node) {
                candidates.clear();
                rows_.for_neighbours(node - first, scratch, [&](std::int32_t other, std::int64_t count) {
                    if (node < other) ++distinct;
                    if (count < least_) return;
                    if (node < other) ++frequent;
                    const float weight = weights_(node, other, count);
                    if (weight > 0) candidates.push_back({other, weight});
                });
                kept_.keep(node, candidates);
            }
        }
        report.distinct_pairs += distinct;
        report.frequent_pairs += frequent;
    }

    BlockReader& reader_;
    RowCounts rows_;
    BlockIndex index_;
    Weights weights_;
    std::int64_t least_;
    const Cpu& cpu_;
    Kept kept_;
    std::int64_t memory_;
};

void check_tokens(const TokenStream& text, std::int32_t vocab) {
    for (const auto& shard : text.shards())
        if (shard->info().max_token >= vocab)
            input_error("{}: holds token {}, and the vocabulary has only {}; give the vocabulary it was made with",
                        shard->info().path, shard->info().max_token, vocab);
}

[[noreturn]] void no_edge(const TokenGraphOptions& o, const TokenGraphReport& report) {
    if (report.pairs == 0)
        input_error("token graph: the {} tokens of the text hold no pair of different tokens; give more text",
                    report.tokens);
    if (report.frequent_pairs == 0)
        input_error(
            "token graph: none of the {} distinct pairs is counted {} times; lower the smallest count, raise the "
            "window, or give more text",
            report.distinct_pairs, o.min_count);
    input_error(
        "token graph: no pair is more frequent than chance has it; take counts as weights, lower the smallest count, "
        "or give more text");
}

}  // namespace

const char* name_of(TokenWeight weight) { return weight == TokenWeight::ppmi ? "ppmi" : "count"; }

std::string TokenGraphReport::text() const {
    return fmt::format(
        "token graph: {} tokens, {} pairs, {} distinct, {} of them frequent enough\n"
        "kept {} edges between {} tokens; {} isolated, {} of them not in the text\n"
        "{} pass{} after the first reading, {} for counting, {:.1f} s\n",
        format_count(tokens), format_count(pairs), format_count(distinct_pairs), format_count(frequent_pairs),
        format_count(edges), vocab, isolated, unseen, passes, passes == 1 ? "" : "es",
        format_bytes(static_cast<std::int64_t>(peak_bytes)), seconds);
}

Graph token_graph(const TokenStream& text, std::int32_t vocab, const TokenGraphOptions& o, TokenGraphReport& report) {
    const auto start = std::chrono::steady_clock::now();
    check_options(o, vocab);
    check_tokens(text, vocab);
    report = {};
    report.vocab = vocab;
    report.tokens = text.size();
    const Cpu cpu{o.threads};
    const Counting counting = counting_of(o);
    BlockReader reader(text, vocab, o, cpu);
    const std::vector<TokenSums> sums = survey(reader, vocab, counting, cpu, o.memory);
    for (const TokenSums& s : sums) {
        report.pairs += s.entries;
        report.unseen += s.occurrences == 0;
    }
    report.pairs /= 2;
    Counter counter(reader, sums, counting, o, cpu);
    Graph graph = build_graph(vocab, counter.run(report).edges());
    report.edges = graph.edges();
    if (report.edges == 0) no_edge(o, report);
    for (std::int64_t i = 0; i < vocab; ++i) report.isolated += graph.offsets[at(i)] == graph.offsets[at(i + 1)];
    report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return graph;
}

Graph token_graph(const std::vector<std::string>& shard_paths, std::int32_t vocab, const TokenGraphOptions& o,
                  TokenGraphReport& report) {
    check_options(o, vocab);  // before the shards are read
    TokenStream text;
    for (const std::string& path : shard_paths) text.add(Shard(path));
    return token_graph(text, vocab, o, report);
}

Graph token_graph(const Dataset& dataset, TokenGraphOptions o, TokenGraphReport& report) {
    o.separator = dataset.info().separator;
    o.excluded.clear();
    if (const Tokenizer* tokenizer = dataset.tokenizer())
        for (std::int32_t token = 0; token < tokenizer->vocab_size(); ++token)
            if (tokenizer->byte_length(token) == 0) o.excluded.push_back(token);
    return token_graph(dataset.train(), dataset.info().vocab_size, o, report);
}

}  // namespace fiedler
