#include "engine/token_graph.h"

#include <cmath>
#include <map>
#include <set>

#include "engine/prepare.h"
#include "tests/engine/temp_folder.h"

namespace fiedler::test {
namespace {

using Tokens = std::vector<std::int32_t>;
using Pair = std::pair<std::int32_t, std::int32_t>;

std::string write_shard(const TempFolder& t, const std::string& name, const Tokens& tokens, std::int32_t vocab) {
    ShardWriter writer(t / name, vocab);
    writer.append(tokens);
    return writer.finish().path;
}

// The text as three shards of uneven size, one of them empty.
std::vector<std::string> write_shards(const TempFolder& t, const Tokens& tokens, std::int32_t vocab) {
    const auto cut = static_cast<std::ptrdiff_t>(tokens.size() / 3);
    return {write_shard(t, "a.bin", {tokens.begin(), tokens.begin() + cut}, vocab), write_shard(t, "b.bin", {}, vocab),
            write_shard(t, "c.bin", {tokens.begin() + cut, tokens.end()}, vocab)};
}

// Tokens of very uneven frequency; token 1 now and then.
Tokens random_text(std::int64_t count, std::int32_t vocab, std::uint64_t seed) {
    Tokens tokens;
    for (std::int64_t i = 0; i < count; ++i) {
        const double u = rng::uniform(seed, 0, static_cast<std::uint64_t>(i));
        const auto token = static_cast<std::int32_t>(vocab * u * u * u);
        tokens.push_back(rng::uniform(seed, 1, static_cast<std::uint64_t>(i)) < 0.02 ? 1 : token);
    }
    return tokens;
}

TokenGraphOptions everything() {  // the graph of all pairs
    TokenGraphOptions o;
    o.min_count = 1;
    o.neighbours = 1024;
    return o;
}

Graph graph_of(const Tokens& tokens, std::int32_t vocab, const TokenGraphOptions& o,
               TokenGraphReport* report = nullptr) {
    const TempFolder t;
    TokenGraphReport mine;
    return token_graph(write_shards(t, tokens, vocab), vocab, o, report ? *report : mine);
}

// n_ij from the definition, i < j.
std::map<Pair, double> brute_counts(const Tokens& tokens, const TokenGraphOptions& o) {
    const std::set<std::int32_t> excluded(o.excluded.begin(), o.excluded.end());
    std::map<Pair, double> counts;
    const auto size = static_cast<std::int64_t>(tokens.size());
    for (std::int64_t i = 0; i < size; ++i)
        for (std::int64_t j = i + 1; j < size && j - i <= o.window; ++j) {
            const std::int32_t a = tokens[static_cast<std::size_t>(i)], b = tokens[static_cast<std::size_t>(j)];
            bool apart = false;
            for (std::int64_t k = i; k <= j; ++k) apart |= tokens[static_cast<std::size_t>(k)] == o.separator;
            if (apart || a == b || excluded.contains(a) || excluded.contains(b)) continue;
            counts[std::minmax(a, b)] += o.inverse_distance ? 1 / static_cast<double>(j - i) : 1;
        }
    return counts;
}

std::map<Pair, double> brute_weights(const std::map<Pair, double>& counts, const TokenGraphOptions& o) {
    std::map<Pair, double> weights;
    std::map<std::int32_t, double> n;
    double sum = 0, smooth = 0;
    for (const auto& [pair, count] : counts) {
        n[pair.first] += count;
        n[pair.second] += count;
        sum += 2 * count;
    }
    for (const auto& [token, count] : n) smooth += std::pow(count, o.smoothing);
    for (const auto& [pair, count] : counts) {
        if (count < static_cast<double>(o.min_count) - 1e-9) continue;
        const auto [i, j] = pair;
        const auto p = [&](std::int32_t k) { return n[k] / sum; };
        const auto q = [&](std::int32_t k) { return std::pow(n[k], o.smoothing) / smooth; };
        weights[pair] = o.weight == TokenWeight::count
                            ? count
                            : 0.5 * std::log(count / sum / (p(i) * q(j))) + 0.5 * std::log(count / sum / (p(j) * q(i)));
    }
    return weights;
}

std::map<Pair, float> edges_of(const Graph& g) {
    std::map<Pair, float> edges;
    for (std::int64_t i = 0; i < g.nodes; ++i)
        for (auto e = static_cast<std::size_t>(g.offsets[static_cast<std::size_t>(i)]);
             e < static_cast<std::size_t>(g.offsets[static_cast<std::size_t>(i) + 1]); ++e) {
            const auto from = static_cast<std::int32_t>(i);
            EXPECT_TRUE(edges.emplace(Pair(from, g.columns[e]), g.weights[e]).second);
            EXPECT_TRUE(e == static_cast<std::size_t>(g.offsets[static_cast<std::size_t>(i)]) ||
                        g.columns[e - 1] < g.columns[e]);
        }
    std::map<Pair, float> once;
    for (const auto& [pair, weight] : edges) {
        const auto back = edges.find({pair.second, pair.first});
        EXPECT_TRUE(back != edges.end() && back->second == weight) << pair.first << " " << pair.second;
        if (pair.first < pair.second) once.emplace(pair, weight);
    }
    return once;
}

// The edges that stay when every node keeps its m heaviest, from the definition.
std::map<Pair, float> keep_heaviest(const std::map<Pair, float>& all, std::int32_t m) {
    std::map<std::int32_t, std::set<std::pair<float, std::int32_t>>> of;  // (-weight, neighbour): heaviest first
    for (const auto& [pair, weight] : all) {
        of[pair.first].insert({-weight, pair.second});
        of[pair.second].insert({-weight, pair.first});
    }
    std::map<Pair, float> kept;
    for (const auto& [node, neighbours] : of) {
        std::int32_t rank = 0;
        for (const auto& [minus, other] : neighbours)
            if (rank++ < m) kept[std::minmax(node, other)] = -minus;
    }
    return kept;
}

bool same(const Graph& a, const Graph& b) {
    return a.nodes == b.nodes && a.offsets == b.offsets && a.columns == b.columns && a.weights == b.weights;
}

TEST(TokenGraph, AgreesWithTheDefinition) {
    constexpr std::int32_t vocab = 60;
    std::uint64_t seed = 0;
    for (const std::int32_t window : {1, 2, 5, 16}) {
        const TempFolder t;
        const Tokens tokens = random_text(2000, vocab, ++seed);
        const auto shards = write_shards(t, tokens, vocab);
        for (const bool inverse : {false, true})
            for (const auto& [weight, smoothing, least] :
                 {std::tuple(TokenWeight::count, 0.75, 1), std::tuple(TokenWeight::count, 0.75, 4),
                  std::tuple(TokenWeight::ppmi, 0.75, 2), std::tuple(TokenWeight::ppmi, 1.0, 1),
                  std::tuple(TokenWeight::ppmi, 0.0, 1)}) {
                SCOPED_TRACE(
                    fmt::format("window {} inverse {} weight {} s {}", window, inverse, name_of(weight), smoothing));
                TokenGraphOptions o = everything();
                o.window = window;
                o.inverse_distance = inverse;
                o.weight = weight;
                o.smoothing = smoothing;
                o.min_count = least;
                o.separator = 1;
                o.excluded = {0, 7};
                TokenGraphReport report;
                const auto edges = edges_of(token_graph(shards, vocab, o, report));
                const auto counts = brute_counts(tokens, o);
                const auto expected = brute_weights(counts, o);
                std::int64_t positive = 0;
                for (const auto& [pair, value] : expected) {
                    const auto edge = edges.find(pair);
                    if (std::abs(value) < 1e-12) continue;  // rounding decides whether it is an edge
                    ASSERT_EQ(edge != edges.end(), value > 0) << pair.first << " " << pair.second << " " << value;
                    if (value < 0) continue;
                    ++positive;
                    EXPECT_NEAR(edge->second, value, std::ldexp(value, -24) + 1e-13);  // rounded to float once
                }
                EXPECT_GT(positive, 10);
                EXPECT_EQ(report.distinct_pairs, static_cast<std::int64_t>(counts.size()));
                EXPECT_EQ(report.frequent_pairs, static_cast<std::int64_t>(expected.size()));
                EXPECT_EQ(report.edges, static_cast<std::int64_t>(edges.size()));
                EXPECT_EQ(report.tokens, 2000);
                TokenGraphOptions whole = o;
                whole.inverse_distance = false;
                double pairs = 0;
                for (const auto& [pair, count] : brute_counts(tokens, whole)) pairs += count;
                EXPECT_EQ(report.pairs, static_cast<std::int64_t>(pairs));
                for (const std::int32_t m : {1, 3, 8}) {
                    o.neighbours = m;
                    EXPECT_EQ(edges_of(token_graph(shards, vocab, o, report)), keep_heaviest(edges, m)) << m;
                }
            }
    }
}

TEST(TokenGraph, PpmiByHand) {
    // Neighbours in 0 1 0 1 0 2: n_01 = 4, n_02 = 1, N = 10, so p = (5, 4, 1) / 10.
    TokenGraphOptions o = everything();
    o.window = 1;
    o.smoothing = 1;
    const auto log2 = static_cast<float>(std::log(2.0));  // 0.4 / (0.5 0.4), 0.1 / (0.5 0.1)
    auto edges = edges_of(graph_of({0, 1, 0, 1, 0, 2}, 3, o));
    ASSERT_EQ(edges.size(), 2u);
    EXPECT_FLOAT_EQ((edges[{0, 1}]), log2);
    EXPECT_FLOAT_EQ((edges[{0, 2}]), log2);
    o.smoothing = 0;  // q = 1/3 for all: log(0.4 * 3 / sqrt(0.5 * 0.4)), log(0.1 * 3 / sqrt(0.5 * 0.1))
    edges = edges_of(graph_of({0, 1, 0, 1, 0, 2}, 3, o));
    EXPECT_FLOAT_EQ((edges[{0, 1}]), static_cast<float>(std::log(1.2 / std::sqrt(0.2))));
    EXPECT_FLOAT_EQ((edges[{0, 2}]), static_cast<float>(std::log(0.3 / std::sqrt(0.05))));
    // In 0 1 2 3 2 3 2 3 0 1, n_12 = n_03 = 1, n_01 = 2, n_23 = 5, N = 18: rarer than chance are none but 1-2 and 0-3,
    // 1/18 against 3/18 6/18.
    o.smoothing = 1;
    edges = edges_of(graph_of({0, 1, 2, 3, 2, 3, 2, 3, 0, 1}, 4, o));
    ASSERT_EQ(edges.size(), 2u);
    EXPECT_FLOAT_EQ((edges[{0, 1}]), static_cast<float>(std::log(4.0)));
    EXPECT_FLOAT_EQ((edges[{2, 3}]), static_cast<float>(std::log(5.0 / 18 * 9)));
}

TEST(TokenGraph, PairsStayInTheirDocument) {
    TokenGraphOptions o = everything();
    o.weight = TokenWeight::count;
    o.window = 2;
    o.separator = 9;
    o.excluded = {8};
    using Edges = std::map<Pair, float>;
    EXPECT_EQ(edges_of(graph_of({0, 1, 9, 2, 3, 9, 9, 4, 0}, 10, o)), (Edges{{{0, 1}, 1}, {{2, 3}, 1}, {{0, 4}, 1}}));
    // 8 takes a place, 9 parts even where it lies inside the window, 5 5 is no pair.
    EXPECT_EQ(edges_of(graph_of({0, 8, 1, 8, 8, 2, 9, 3, 5, 5}, 10, o)), (Edges{{{0, 1}, 1}, {{3, 5}, 2}}));
    o.separator = 8;  // as separator, though it is among the excluded ones too
    EXPECT_EQ(edges_of(graph_of({0, 8, 1, 2}, 10, o)), (Edges{{{1, 2}, 1}}));
    o.separator = -1;
    o.excluded = {};
    EXPECT_EQ(edges_of(graph_of({0, 9, 2}, 10, o)), (Edges{{{0, 9}, 1}, {{2, 9}, 1}, {{0, 2}, 1}}));
}

TEST(TokenGraph, NodesKeepTheirHeaviestNeighbours) {
    // Counts: 0-1 3, 0-2 2, 0-3 2, 4-0 1.
    Tokens tokens;
    for (const auto& [a, b, times] :
         {std::tuple(0, 1, 3), std::tuple(0, 3, 2), std::tuple(2, 0, 2), std::tuple(4, 0, 1)})
        for (int i = 0; i < times; ++i) tokens.insert(tokens.end(), {a, b, 9});
    tokens.insert(tokens.end(), {2, 5, 9, 2, 5, 9, 2, 5, 9, 3, 6, 9, 3, 6, 9, 3, 6});  // 2-5 3, 3-6 3
    TokenGraphOptions o = everything();
    o.weight = TokenWeight::count;
    o.separator = 9;
    o.neighbours = 2;
    using Edges = std::map<Pair, float>;
    // 0 keeps 1, and 2 rather than 3; 3 keeps 0 itself; 4 keeps its only neighbour.
    const Edges all{{{0, 1}, 3}, {{0, 2}, 2}, {{0, 3}, 2}, {{0, 4}, 1}, {{2, 5}, 3}, {{3, 6}, 3}};
    EXPECT_EQ(edges_of(graph_of(tokens, 10, o)), all);
    o.neighbours = 1;  // 2 and 3 prefer 5 and 6, 0 prefers 1
    EXPECT_EQ(edges_of(graph_of(tokens, 10, o)), (Edges{{{0, 1}, 3}, {{0, 4}, 1}, {{2, 5}, 3}, {{3, 6}, 3}}));
    // Equal weights: the smaller token. 5 - {3, 2, 4}, where 2 and 3 and 4 prefer others.
    tokens.clear();
    for (const std::int32_t token : {3, 2, 4}) {
        tokens.insert(tokens.end(), {5, token, 9});
        for (int i = 0; i < 2; ++i) tokens.insert(tokens.end(), {token, token + 4, 9});
    }
    EXPECT_EQ(edges_of(graph_of(tokens, 10, o)), (Edges{{{2, 6}, 2}, {{3, 7}, 2}, {{4, 8}, 2}, {{2, 5}, 1}}));
}

TEST(TokenGraph, RarePairsAreLeftOut) {
    TokenGraphOptions o = everything();
    o.weight = TokenWeight::count;
    o.window = 3;
    o.min_count = 2;
    o.separator = 9;
    using Edges = std::map<Pair, float>;
    TokenGraphReport report;
    EXPECT_EQ(edges_of(graph_of({0, 1, 9, 1, 0, 2, 9, 3, 1}, 10, o, &report)), (Edges{{{0, 1}, 2}}));
    EXPECT_EQ(report.distinct_pairs, 4);
    EXPECT_EQ(report.frequent_pairs, 1);
    EXPECT_EQ(report.isolated, 8);
    EXPECT_EQ(report.unseen, 6);  // the separator among them
    o.inverse_distance = true;    // the weighted count is meant: 3 x 1/3 + 1, exactly, and 5 x 1/3
    EXPECT_EQ(edges_of(graph_of({0, 4, 4, 1, 9, 0, 5, 5, 1, 9, 0, 6, 6, 1, 9, 0, 1, 9, 0, 7, 7, 2, 9}, 10, o)),
              (Edges{{{0, 1}, 2}}));
}

TEST(TokenGraph, DependsNeitherOnThreadsNorOnMemory) {
    constexpr std::int32_t vocab = 400;
    const Tokens tokens = random_text(20000, vocab, 5);
    const TempFolder t;
    const auto shards = write_shards(t, tokens, vocab);
    for (const bool inverse : {false, true}) {
        TokenGraphOptions o;
        o.separator = 1;
        o.inverse_distance = inverse;
        o.neighbours = 12;
        o.threads = 1;
        TokenGraphReport first;
        const Graph expected = token_graph(shards, vocab, o, first);
        EXPECT_EQ(first.passes, 1);
        for (const int threads : {1, 2, 5})
            for (const std::size_t memory : {32768u + 8u * vocab, 150000u, 1u << 19, 1u << 30}) {
                SCOPED_TRACE(fmt::format("{} threads, {} bytes", threads, memory));
                o.threads = threads;
                o.memory = memory;
                TokenGraphReport report;
                EXPECT_TRUE(same(token_graph(shards, vocab, o, report), expected));
                EXPECT_LE(report.peak_bytes, memory);
                EXPECT_EQ(report.passes > 1, memory < 1u << 30);
                EXPECT_EQ(report.distinct_pairs, first.distinct_pairs);
                EXPECT_EQ(report.frequent_pairs, first.frequent_pairs);
                EXPECT_EQ(report.pairs, first.pairs);
            }
    }
}

TEST(TokenGraph, ShardsAreOneText) {
    const TempFolder t;
    const Tokens tokens = random_text(5000, 70000, 6);
    const TokenGraphOptions o = everything();
    TokenGraphReport report;
    const std::string one = write_shard(t, "one.bin", tokens, 70000);  // 32-bit tokens
    const Graph g = token_graph({one}, 70000, o, report);
    EXPECT_TRUE(same(token_graph(write_shards(t, tokens, 70000), 70000, o, report), g));
    std::vector<std::string> tiny;  // shards shorter than the window
    for (std::size_t i = 0; i < 300; i += 2)
        tiny.push_back(write_shard(t, fmt::format("{}.bin", i), {tokens[i], tokens[i + 1]}, 70000));
    const Tokens start(tokens.begin(), tokens.begin() + 300);
    EXPECT_TRUE(same(token_graph(tiny, 70000, o, report), graph_of(start, 70000, o)));
}

TEST(TokenGraph, ReadsForeignShards) {
    const TempFolder t;
    const std::int32_t header[256] = {20240520, 1, 6};
    const std::uint16_t tokens[] = {50256, 3, 4, 50256, 4, 5};  // the separator begins a document
    const std::string path = t.put("gpt2.bin", std::string(reinterpret_cast<const char*>(header), sizeof header) +
                                                   std::string(reinterpret_cast<const char*>(tokens), sizeof tokens));
    TokenGraphOptions o = everything();
    o.weight = TokenWeight::count;
    o.separator = 50256;
    TokenGraphReport report;
    EXPECT_EQ(edges_of(token_graph({path}, 50257, o, report)), (std::map<Pair, float>{{{3, 4}, 1}, {{4, 5}, 1}}));
    EXPECT_EQ(report.unseen, 50257 - 3);
    EXPECT_EQ(report.isolated, 50257 - 3);
    EXPECT_HAS(input_error_of([&] { token_graph({path}, 50256, {}, report); }), "gpt2.bin: holds token 50256");
}

TEST(TokenGraph, OfADatasetTakesItsTrainingPart) {
    const TempFolder t;
    for (int i = 0; i < 10; ++i)
        t.put(fmt::format("corpus/{}.txt", i), code_like(20000, static_cast<std::uint64_t>(i)));
    PrepareOptions p;
    p.corpus.paths = {t / "corpus"};
    p.vocab_size = 400;
    prepare(p, t / "data", nullptr);
    const Dataset dataset = Dataset::open(t / "data");
    TokenGraphReport report;
    const Graph g = token_graph(dataset, {}, report);
    EXPECT_EQ(g.nodes, 400);
    EXPECT_EQ(report.tokens, dataset.train().size());
    for (const std::size_t token : {0u, 1u}) EXPECT_EQ(g.offsets[token], g.offsets[token + 1]);  // unknown, separator
    TokenGraphOptions o;
    o.separator = 1;
    EXPECT_TRUE(same(token_graph({t / "data/train_000000.bin"}, 400, o, report), g));
    EXPECT_HAS(report.text(), "isolated");
    EXPECT_HAS(report.text(), "1 pass after");
}

TEST(TokenGraph, RefusesWhatCannotBe) {
    const TempFolder t;
    const std::string shard = write_shard(t, "s.bin", random_text(1000, 50, 7), 50);
    TokenGraphReport report;
    const auto error = [&](auto&& change, std::int32_t vocab = 50) {
        TokenGraphOptions o;
        change(o);
        return input_error_of([&] { token_graph({shard}, vocab, o, report); });
    };
    EXPECT_HAS(error([](auto& o) { o.window = 0; }), "window 0 is not possible; choose one from 1 to 16");
    EXPECT_HAS(error([](auto& o) { o.window = 17; }), "window 17");
    EXPECT_HAS(error([](auto& o) { o.smoothing = 1.5; }), "smoothing 1.5");
    EXPECT_HAS(error([](auto& o) { o.smoothing = std::nan(""); }), "smoothing nan");
    EXPECT_HAS(error([](auto& o) { o.min_count = 0; }), "smallest count 0");
    EXPECT_HAS(error([](auto& o) { o.neighbours = 0; }), "0 neighbours");
    EXPECT_HAS(error([](auto& o) { o.separator = 50; }), "separator 50");
    EXPECT_HAS(error([](auto& o) { o.excluded = {3, -1}; }), "excluded token -1");
    EXPECT_HAS(error([](auto& o) { o.memory = 33000; }), "give at least 33.2 kB");
    EXPECT_HAS(error([](auto&) {}, 49), "s.bin: holds token 49, and the vocabulary has only 49");
    EXPECT_HAS(error([](auto&) {}, 1), "vocabulary of 1");
    EXPECT_HAS(error([](auto& o) { o.min_count = 100000; }), "lower the smallest count");
    EXPECT_HAS(input_error_of([&] { token_graph({t / "none.bin"}, 50, {}, report); }), "none.bin");
    std::ofstream(t / "s.bin", std::ios::binary | std::ios::in).seekp(1024 + 10).write("\7", 1);
    EXPECT_HAS(error([](auto&) {}), "checksum");

    EXPECT_HAS(input_error_of([&] { graph_of({}, 50, {}); }), "no pair of different tokens");
    EXPECT_HAS(input_error_of([&] { token_graph(std::vector<std::string>{}, 50, {}, report); }),
               "no pair of different");
    EXPECT_HAS(input_error_of([&] { graph_of({4, 4, 4, 4}, 50, {}); }), "no pair of different tokens");
    // 0 and 1 meet five times, but each meets a hundred others: 5 / 410 against (105 / 410)^2.
    Tokens hubs;
    for (int i = 0; i < 5; ++i) hubs.insert(hubs.end(), {0, 1, 9});
    for (std::int32_t i = 10; i < 110; ++i) hubs.insert(hubs.end(), {0, i, 9, 1, 100 + i, 9});
    TokenGraphOptions o;
    o.window = 1;
    o.smoothing = 1;
    o.separator = 9;
    o.min_count = 6;
    EXPECT_HAS(input_error_of([&] { graph_of(hubs, 210, o); }), "none of the 201 distinct pairs is counted 6 times");
    o.min_count = 5;
    EXPECT_HAS(input_error_of([&] { graph_of(hubs, 210, o); }), "no pair is more frequent than chance has it");
    o.weight = TokenWeight::count;
    EXPECT_EQ(edges_of(graph_of(hubs, 210, o)), (std::map<Pair, float>{{{0, 1}, 5}}));
}

TEST(TokenGraph, TellsHowFarItIsAndStops) {
    const Tokens tokens = random_text(20000, 300, 8);
    TokenGraphOptions o;
    o.memory = 40000;
    std::vector<TokenGraphProgress> seen;
    o.progress = [&](const TokenGraphProgress& p) { seen.push_back(p); };
    TokenGraphReport report;
    graph_of(tokens, 300, o, &report);
    ASSERT_GT(report.passes, 2);
    ASSERT_FALSE(seen.empty());
    EXPECT_EQ(seen.front().pass, 0);
    EXPECT_EQ(seen.back().pass, report.passes);
    EXPECT_EQ(seen.back().passes, report.passes);
    for (std::size_t i = 0; i < seen.size(); ++i) {
        EXPECT_EQ(seen[i].total, 20000);
        if (i == 0) continue;
        const auto &a = seen[i - 1], &b = seen[i];
        EXPECT_TRUE(a.pass == b.pass ? a.tokens < b.tokens : a.tokens == 20000 && b.pass == a.pass + 1);
    }
    int asked = 0;
    o.stop = [&] { return ++asked == 12; };
    EXPECT_THROW(graph_of(tokens, 300, o), RunError);
    EXPECT_EQ(asked, 12);
}

}  // namespace
}  // namespace fiedler::test
