// Matrix Market coordinate files: https://math.nist.gov/MatrixMarket/formats.html
#include <algorithm>
#include <charconv>
#include <tuple>

#include "engine/error.h"
#include "engine/graph_table.h"

namespace fiedler {
namespace {

using Size = std::size_t;
constexpr std::string_view kBanner = "%%MatrixMarket";

struct MarketHeader {
    bool pattern = false, symmetric = false;
    std::int64_t nodes = 0, entries = 0;
    std::int64_t size_line = 0;  // its number
    std::string_view body;
};

void check_banner(const std::string& path, std::string_view line, MarketHeader& h) {
    LineFields words(kBlanks);
    words.split(line);
    if (words.count() != 5 || !equal_no_case(words[0], kBanner))
        input_error(
            "{}:1: {} where \"%%MatrixMarket matrix coordinate real symmetric\" or the like is expected; correct the "
            "line or choose another format",
            path, shown(line));
    const auto one_of = [&](Size word, std::initializer_list<std::string_view> allowed, const char* advice) {
        for (const std::string_view a : allowed)
            if (equal_no_case(words[word], a)) return;
        input_error("{}:1: {} is not read; {}", path, shown(words[word]), advice);
    };
    one_of(1, {"matrix"}, "write the graph as a matrix");
    one_of(2, {"coordinate"}, "write the matrix as coordinate (sparse), not as a dense array");
    one_of(3, {"real", "integer", "pattern"}, "weights must be real or integer, or absent (pattern)");
    one_of(4, {"symmetric", "general"},
           "the matrix of an undirected graph is symmetric (or general and equal to its transpose)");
    h.pattern = equal_no_case(words[3], "pattern");
    h.symmetric = equal_no_case(words[4], "symmetric");
}

std::int64_t parse_count(std::string_view text, std::string_view line) {
    std::int64_t value = -1;
    const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc{} || stop != text.data() + text.size() || value < 0)
        line_fault("{} where \"rows columns entries\" is expected; correct the line", shown(line));
    return value;
}

void check_size(std::string_view line, MarketHeader& h) {
    LineFields words(kBlanks);
    words.split(line);
    if (words.count() != 3) line_fault("{} where \"rows columns entries\" is expected; correct the line", shown(line));
    h.nodes = parse_count(words[0], line);
    const std::int64_t columns = parse_count(words[1], line);
    h.entries = parse_count(words[2], line);
    if (h.nodes != columns) line_fault("{} rows and {} columns; the matrix of a graph is square", h.nodes, columns);
    if (h.nodes > std::numeric_limits<std::int32_t>::max())
        line_fault("{} rows; a graph has at most 2147483647 nodes", h.nodes);
    constexpr std::int64_t kNodesAnEntry = 16, kFew = 1000000;
    if (h.nodes > kFew && (h.nodes - kFew) / kNodesAnEntry > h.entries)
        line_fault("{} rows for {} entries; correct the line (or leave rows without entries out)", h.nodes, h.entries);
    if (h.nodes == 0) line_fault("a matrix without rows: a graph needs nodes");
}

MarketHeader read_header(const TextFile& file) {
    MarketHeader h;
    std::string_view rest = file.text();
    check_banner(file.path(), take_line(rest), h);
    for (h.size_line = 2; !rest.empty(); ++h.size_line) {
        const std::string_view line = take_line(rest);
        if (trimmed(line).empty() || line[0] == '%') continue;
        try {
            check_size(line, h);
        } catch (const LineFault& fault) {
            input_error("{}:{}: {}", file.path(), h.size_line, fault.what);
        }
        h.body = rest;
        return h;
    }
    input_error("{}: ends before the line \"rows columns entries\"; it may be cut off", file.path());
}

struct MarketRows {
    const MarketHeader* header;
    LineFields fields{kBlanks};
    std::vector<Edge> edges{};

    std::int32_t index(std::string_view text) const {
        std::int64_t value = 0;
        const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        if (error == std::errc::invalid_argument || stop != text.data() + text.size())
            line_fault("index {} is not an integer; correct it", shown(text));
        if (error != std::errc{} || value < 1 || value > header->nodes)
            line_fault("index {} is outside the declared {} x {}; correct it or the declared size", text, header->nodes,
                       header->nodes);
        return static_cast<std::int32_t>(value - 1);
    }
    void line(std::string_view line) {
        fields.split(line);
        const Size width = header->pattern ? 2 : 3;
        if (fields.count() != width)
            line_fault("{} where \"{}\" is expected; correct the line (or the file is cut off)", shown(line),
                       header->pattern ? "row column" : "row column value");
        Edge e{index(fields[0]), index(fields[1]), header->pattern ? 1.0f : parse_weight(fields[2])};
        if (header->symmetric && e.to > e.from)
            line_fault(
                "entry ({}, {}) is above the diagonal of a symmetric matrix; write only the lower triangle, or "
                "call it general",
                e.from + 1, e.to + 1);
        edges.push_back(e);
    }
};

std::vector<Edge> read_entries(const TextFile& file, const MarketHeader& h) {
    std::vector<MarketRows> pieces = parse_lines(file.path(), h.body, h.size_line + 1, [&] { return MarketRows{&h}; });
    Size count = 0;
    for (const MarketRows& piece : pieces) count += piece.edges.size();
    if (static_cast<std::int64_t>(count) != h.entries)
        input_error("{}:{}: declares {} entries, but there are {}; {}", file.path(), h.size_line, h.entries, count,
                    static_cast<std::int64_t>(count) < h.entries ? "the file may be cut off" : "correct the number");
    std::vector<Edge> edges;
    edges.reserve(count);
    for (MarketRows& piece : pieces) {
        edges.insert(edges.end(), piece.edges.begin(), piece.edges.end());
        piece.edges = {};
    }
    return edges;
}

// Reads the entries again to name a pair that differs.
[[noreturn]] void not_symmetric(const TextFile& file, const MarketHeader& h, std::int64_t pairs) {
    struct Entry {
        std::int32_t low, high;
        bool mirrored;
        double value;
    };
    std::vector<Entry> entries;
    for (const Edge& e : read_entries(file, h))
        if (e.from != e.to)
            entries.push_back({std::min(e.from, e.to), std::max(e.from, e.to), e.from > e.to, e.weight});
    std::stable_sort(entries.begin(), entries.end(),
                     [](const Entry& a, const Entry& b) { return std::tie(a.low, a.high) < std::tie(b.low, b.high); });
    for (Size i = 0; i < entries.size();) {
        const Entry first = entries[i];
        double sums[2] = {0, 0};
        for (; i < entries.size() && entries[i].low == first.low && entries[i].high == first.high; ++i)
            sums[entries[i].mirrored] += entries[i].value;
        if (static_cast<float>(sums[0]) != static_cast<float>(sums[1]))
            input_error(
                "{}: general and not symmetric: entry ({}, {}) is {}, entry ({}, {}) is {} ({} such pairs); correct "
                "it, or ask for it to be symmetrised",
                file.path(), first.low + 1, first.high + 1, sums[0], first.high + 1, first.low + 1, sums[1], pairs);
    }
    input_error("{}: general and not symmetric", file.path());
}

}  // namespace

bool is_market(std::string_view text) { return equal_no_case(text.substr(0, kBanner.size()), kBanner); }

Graph read_market(const TextFile& file, const GraphFileOptions& o, GraphFileReport& report) {
    if (!o.nodes_file.empty() || o.nodes > 0)
        input_error("{}: a Matrix Market file declares its nodes; leave the {} out", file.path(),
                    o.nodes > 0 ? "number of nodes" : "file of nodes");
    if (o.first_id == 0 || o.ids == GraphIds::names)
        input_error("{}: indices of a Matrix Market file are numbers from 1; leave other kinds of ids out",
                    file.path());
    const MarketHeader h = read_header(file);
    if (h.symmetric && o.symmetrise) input_error("{}: symmetric as it is; leave the symmetrising out", file.path());
    Graph g = build_graph(h.nodes, read_entries(file, h), &report.notes);
    report.ids = GraphIds::numbers;
    report.first_id = 1;
    report.symmetric = h.symmetric;
    report.from = "row";
    report.to = "column";
    if (!h.pattern) report.weight = "values";
    for (std::int64_t i = 0; i < g.nodes; ++i) {
        const auto at = static_cast<Size>(i);
        report.gaps += g.offsets[at] == g.offsets[at + 1];
        g.names.push_back(std::to_string(i + 1));
    }
    if (!h.symmetric) {
        const std::int64_t differ = g.edges() - report.notes.both_ways + report.notes.unequal;
        if (differ > 0 && !o.symmetrise) not_symmetric(file, h, differ);
        report.symmetrised = differ;
    }
    return g;
}

}  // namespace fiedler
