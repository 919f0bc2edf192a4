#include "engine/graph_files.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <optional>
#include <tuple>

#include "engine/error.h"
#include "engine/graph_table.h"

namespace fiedler {
namespace {

using Size = std::size_t;
constexpr std::int64_t kMostNodes = std::numeric_limits<std::int32_t>::max();

// ---- rows of edges and of nodes ------------------------------------------------------------------------------------

struct EdgeColumns {
    Size from = 0, to = 1, width = 0;
    std::optional<Size> weight;
};

// One piece of the file: its edges, with ids as they are in the file or as numbered by the piece's own table of names.
struct EdgeRows {
    const Table* table;
    EdgeColumns columns;
    bool by_name;
    IdRange range;
    LineFields fields;
    NameTable names;
    std::vector<Edge> edges{};
    std::int32_t smallest = std::numeric_limits<std::int32_t>::max(), largest = -1;

    void line(std::string_view line) {
        if (table->is_comment(line)) return;
        fields.split(line);
        if (fields.count() != columns.width)
            line_fault("{} field{} where the first row has {}: {}; correct the line (or the file is cut off)",
                       fields.count(), fields.count() == 1 ? "" : "s", columns.width, shown(line));
        const std::string_view from = fields[columns.from], to = fields[columns.to];
        Edge e;
        e.from = by_name ? names.number_of(from) : parse_id(from, range);
        e.to = by_name ? names.number_of(to) : parse_id(to, range);
        if (columns.weight) e.weight = parse_weight(fields[*columns.weight]);
        smallest = std::min({smallest, e.from, e.to});
        largest = std::max({largest, e.from, e.to});
        edges.push_back(e);
    }
};

// The same of a file of nodes: the first field of each line.
struct NodeRows {
    const Table* table;
    bool by_name;
    IdRange range;
    LineFields fields;
    NameTable names;
    std::vector<std::int32_t> ids{};

    void line(std::string_view line) {
        if (table->is_comment(line)) return;
        fields.split(line);
        ids.push_back(by_name ? names.number_of(fields[0]) : parse_id(fields[0], range));
    }
};

// ---- how the files are laid out ------------------------------------------------------------------------------------

GraphFileFormat detect_format(const TextFile& file) {
    if (is_market(file.text())) return GraphFileFormat::matrix_market;
    const std::string extension = extension_of(file.path());
    if (extension == ".mtx") return GraphFileFormat::matrix_market;
    if (extension == ".csv") return GraphFileFormat::csv;
    if (extension == ".tsv" || extension == ".tab") return GraphFileFormat::tsv;
    const std::string_view first = first_row_of(file.text());
    if (first.find(',') != first.npos) return GraphFileFormat::csv;
    // Fields keep blanks inside them only where tabs separate.
    const bool both = first.find('\t') != first.npos && first.find(' ') != first.npos;
    return both ? GraphFileFormat::tsv : GraphFileFormat::edges;
}

Table open_edges(const TextFile& file, GraphFileFormat format, const GraphFileOptions& o) {
    TableOptions options;
    options.header = o.header;
    options.chosen = {o.from, o.to, o.weight == "none" ? "" : o.weight};
    options.comments = format == GraphFileFormat::edges;
    if (format == GraphFileFormat::tsv) options.separator = '\t';
    if (format == GraphFileFormat::csv) options.separator = csv_separator(file.text());
    return open_table(file, options);
}

Table open_nodes(const TextFile& file, bool by_name) {
    const std::string_view first = first_row_of(file.text());
    TableOptions options;
    options.single = true;
    options.separator = extension_of(file.path()) == ".csv" ? csv_separator(file.text())
                        : first.find('\t') != first.npos    ? '\t'
                        : by_name                           ? '\n'  // the whole line: names may have blanks
                                                            : kBlanks;
    options.comments = options.separator == kBlanks;
    return open_table(file, options);
}

// The weights' column that nobody named.
std::optional<Size> usual_weight(const Table& t, const EdgeColumns& c) {
    for (const char* name : {"weight", "weights", "w"})
        for (Size i = 0; i < t.names.size(); ++i)
            if (i != c.from && i != c.to && equal_no_case(t.names[i], name)) return i;
    Size next = 0;
    while (next == c.from || next == c.to) ++next;
    const bool numbers = next < c.width && !t.sample.empty() && t.all_of_sample(next, is_number);
    return t.names.empty() && numbers ? std::optional(next) : std::nullopt;
}

EdgeColumns choose_columns(const Table& t, const GraphFileOptions& o) {
    const std::string& path = t.file->path();
    EdgeColumns c;
    c.width = t.columns;
    if (c.width < 2)
        input_error("{}:{}: only one column; an edge needs two ids, here with {}s between them", path, t.first_line,
                    separator_text(t.separator));
    std::tie(c.from, c.to) = usual_columns(t.names);
    if (!o.from.empty()) c.from = find_column(path, o.from, t.names, c.width, "column of ids");
    if (!o.to.empty()) c.to = find_column(path, o.to, t.names, c.width, "column of ids");
    if (c.from == c.to && o.to.empty()) c.to = c.from == 0 ? 1 : 0;
    if (c.from == c.to && o.from.empty()) c.from = c.to == 0 ? 1 : 0;
    if (c.from == c.to)
        input_error("{}: both ids would be taken from {}; choose two columns", path, t.column_name(c.to));
    if (o.weight.empty()) {
        c.weight = usual_weight(t, c);
    } else if (o.weight != "none") {
        c.weight = find_column(path, o.weight, t.names, c.width, "column of weights");
        if (*c.weight == c.from || *c.weight == c.to)
            input_error("{}: ids and weights would both be taken from {}; choose another column", path,
                        t.column_name(*c.weight));
    }
    return c;
}

// A set of numbers below n, in n / 5 bytes: ids may be far apart.
class NumberSet {
  public:
    explicit NumberSet(std::int64_t n) : words_(static_cast<Size>(n) / 64 + 1, 0), before_(words_.size(), 0) {}
    void add(std::int32_t i) { words_[static_cast<Size>(i) / 64] |= std::uint64_t{1} << (i & 63); }
    std::int64_t count() {  // and makes rank() right
        std::int64_t sum = 0;
        for (Size w = 0; w < words_.size(); ++w) {
            before_[w] = static_cast<std::int32_t>(sum);
            sum += std::popcount(words_[w]);
        }
        return count_ = sum;
    }
    std::int64_t counted() const { return count_; }
    std::int32_t rank(std::int32_t i) const {  // how many are smaller
        const auto w = static_cast<Size>(i) / 64;
        return before_[w] + std::popcount(words_[w] & ((std::uint64_t{1} << (i & 63)) - 1));
    }
    template <class Body>
    void for_each(Body&& body) const {
        for (Size w = 0; w < words_.size(); ++w)
            for (std::uint64_t bits = words_[w]; bits != 0; bits &= bits - 1)
                body(static_cast<std::int64_t>(64 * w) + std::countr_zero(bits));
    }

  private:
    std::vector<std::uint64_t> words_;
    std::vector<std::int32_t> before_;
    std::int64_t count_ = 0;
};

// ---- from rows to a graph ------------------------------------------------------------------------------------------

class TableReader {
  public:
    TableReader(const TextFile& file, const GraphFileOptions& options, GraphFileReport& report)
        : o_(options), report_(report), table_(open_edges(file, report.format, options)) {
        if (table_.columns > 0) columns_ = choose_columns(table_, options);
        if (!options.nodes_file.empty()) node_file_.emplace(options.nodes_file);
        by_name_ = options.ids == GraphIds::names || (options.ids == GraphIds::automatic && !integers());
        if (node_file_) node_table_ = open_nodes(*node_file_, by_name_);
        if (by_name_ && (options.nodes > 0 || options.first_id >= 0))
            input_error("{}: its ids are names; a number of nodes or a first id are for ids that are numbers",
                        file.path());
        describe();
    }
    Graph read() { return by_name_ ? with_names() : with_numbers(); }

  private:
    bool integers() const {
        if (!table_.sample.empty())
            return table_.all_of_sample(columns_.from, is_integer) && table_.all_of_sample(columns_.to, is_integer);
        if (!node_file_) return true;
        const Table nodes = open_nodes(*node_file_, false);
        return nodes.sample.empty() || nodes.all_of_sample(0, is_integer);
    }
    void describe() {
        report_.ids = by_name_ ? GraphIds::names : GraphIds::numbers;
        report_.header = !table_.names.empty();
        if (table_.columns == 0) return;
        report_.from = table_.column_name(columns_.from);
        report_.to = table_.column_name(columns_.to);
        if (columns_.weight) report_.weight = table_.column_name(*columns_.weight);
        std::vector<std::string> rest;
        for (Size i = 0; i < columns_.width; ++i)
            if (i != columns_.from && i != columns_.to && columns_.weight != i) rest.push_back(table_.column_name(i));
        constexpr Size kShown = 8;
        const bool more = rest.size() > kShown;
        if (more) rest.resize(kShown);
        if (!rest.empty()) report_.remarks.push_back(fmt::format("not read: {}{}", list_of(rest), more ? ", ..." : ""));
    }
    std::vector<EdgeRows> edge_rows(const IdRange& range) const {
        return parse_lines(table_.file->path(), table_.body, table_.body_line, [&] {
            return EdgeRows{&table_, columns_, by_name_, range, LineFields(table_.separator), NameTable(table_.body)};
        });
    }
    std::vector<NodeRows> node_rows(const IdRange& range) const {
        if (!node_file_) return {};
        return parse_lines(node_file_->path(), node_table_.body, node_table_.body_line, [&] {
            return NodeRows{&node_table_, by_name_, range, LineFields(node_table_.separator),
                            NameTable(node_table_.body)};
        });
    }
    IdRange range_from(int first) const {
        if (o_.nodes > 0) return {first, first + o_.nodes - 1, fmt::format("{} nodes were asked for", o_.nodes)};
        return {first, first + kMostNodes - 1, first == 1 ? "counted from 1" : ""};
    }
    [[noreturn]] void no_nodes() const {
        input_error("{}: no edges and no nodes; give a file with a line for each edge", table_.file->path());
    }
    Graph with_numbers();
    Graph with_names();
    Graph build(std::int64_t nodes, std::vector<EdgeRows>& rows, const std::vector<std::vector<std::int32_t>>* numbers,
                std::int32_t first);
    NumberSet numbers_mentioned(std::int64_t nodes, std::int32_t first, const std::vector<EdgeRows>& rows,
                                const std::vector<NodeRows>& listed);
    void check_plausible(std::int64_t nodes, std::int64_t lines) const;
    void compare_with_comment();
    void remark_unlisted(std::int64_t unlisted) {
        if (unlisted > 0)
            report_.remarks.push_back(
                fmt::format("{} nodes have edges but are not in {}", fmt::group_digits(unlisted), o_.nodes_file));
    }

    const GraphFileOptions& o_;
    GraphFileReport& report_;
    Table table_, node_table_;
    EdgeColumns columns_;
    std::optional<TextFile> node_file_;
    bool by_name_ = false;
};

// Joins the pieces' edges. numbers[piece][id]: the node of an id; null: id - first.
Graph TableReader::build(std::int64_t nodes, std::vector<EdgeRows>& rows,
                         const std::vector<std::vector<std::int32_t>>* numbers, std::int32_t first) {
    std::vector<Size> starts(rows.size() + 1, 0);
    for (Size i = 0; i < rows.size(); ++i) starts[i + 1] = starts[i] + rows[i].edges.size();
    std::vector<Edge> edges(starts.back());
    parallel_for(Cpu{}, static_cast<std::int64_t>(rows.size()), [&](std::int64_t piece) {
        const auto i = static_cast<Size>(piece);
        const auto node = [&](std::int32_t id) { return numbers ? (*numbers)[i][static_cast<Size>(id)] : id - first; };
        Size to = starts[i];
        for (const Edge& e : rows[i].edges) edges[to++] = {node(e.from), node(e.to), e.weight};
        rows[i].edges = {};
    });
    Graph g = build_graph(nodes, std::move(edges), &report_.notes);
    compare_with_comment();
    return g;
}

Graph TableReader::with_names() {
    std::vector<EdgeRows> rows = edge_rows({});
    const std::vector<NodeRows> listed = node_rows({});
    NameTable all;
    const auto add = [&](const NameTable& piece) {
        try {
            return all.numbers_of(piece);
        } catch (const LineFault& fault) {
            input_error("{}: {}", table_.file->path(), fault.what);
        }
    };
    for (const NodeRows& piece : listed) add(piece.names);
    report_.listed_nodes = static_cast<std::int64_t>(all.size());
    std::vector<std::vector<std::int32_t>> numbers;
    for (EdgeRows& piece : rows) {
        numbers.push_back(add(piece.names));
        piece.names = NameTable();
    }
    if (all.size() == 0) no_nodes();
    if (node_file_) remark_unlisted(static_cast<std::int64_t>(all.size()) - report_.listed_nodes);
    Graph g = build(static_cast<std::int64_t>(all.size()), rows, &numbers, 0);
    g.names.reserve(all.size());
    for (Size i = 0; i < all.size(); ++i) g.names.emplace_back(all[i]);
    return g;
}

Graph TableReader::with_numbers() {
    const bool derived = o_.first_id < 0;
    const IdRange widest = derived ? IdRange{0, kMostNodes, ""} : range_from(o_.first_id);
    std::vector<EdgeRows> rows = edge_rows(widest);
    const std::vector<NodeRows> listed = node_rows(widest);
    std::int32_t smallest = std::numeric_limits<std::int32_t>::max(), largest = -1;
    std::int64_t lines = 0;
    for (const EdgeRows& piece : rows) {
        smallest = std::min(smallest, piece.smallest);
        largest = std::max(largest, piece.largest);
        lines += static_cast<std::int64_t>(piece.edges.size());
    }
    for (const NodeRows& piece : listed) {
        report_.listed_nodes += static_cast<std::int64_t>(piece.ids.size());
        for (const std::int32_t id : piece.ids) smallest = std::min(smallest, id), largest = std::max(largest, id);
    }
    if (largest < 0 && o_.nodes == 0) no_nodes();
    const int first = !derived ? o_.first_id : smallest == 0 || largest < 0 ? 0 : 1;
    report_.first_id = first;
    report_.first_id_seen = derived;
    const IdRange range = range_from(first);
    if (largest > range.last) {  // only now known: read again to find the line
        edge_rows(range);
        node_rows(range);
    }
    const std::int64_t nodes = o_.nodes > 0 ? o_.nodes : largest - first + 1;
    check_plausible(nodes, lines + report_.listed_nodes);

    const NumberSet numbers = numbers_mentioned(nodes, first, rows, listed);
    report_.gaps_dropped = report_.gaps > 0 && (o_.gaps == GraphGaps::dropped ||
                                                (o_.gaps == GraphGaps::automatic && node_file_ && o_.nodes == 0));
    Graph g;
    if (report_.gaps_dropped) {
        for (EdgeRows& piece : rows)
            for (Edge& e : piece.edges) {
                e.from = numbers.rank(e.from - first);
                e.to = numbers.rank(e.to - first);
            }
        g = build(numbers.counted(), rows, nullptr, 0);
        numbers.for_each([&](std::int64_t i) { g.names.push_back(std::to_string(i + first)); });
    } else {
        g = build(nodes, rows, nullptr, first);
        if (first == 1)  // node i is called "i" only when they are counted from 0
            for (std::int64_t i = 1; i <= nodes; ++i) g.names.push_back(std::to_string(i));
    }
    return g;
}

// The numbers (less `first`) that some line mentions; counts the gaps between them.
NumberSet TableReader::numbers_mentioned(std::int64_t nodes, std::int32_t first, const std::vector<EdgeRows>& rows,
                                         const std::vector<NodeRows>& listed) {
    NumberSet numbers(nodes);
    for (const NodeRows& piece : listed)
        for (const std::int32_t id : piece.ids) numbers.add(id - first);
    const std::int64_t in_list = numbers.count();
    for (const EdgeRows& piece : rows)
        for (const Edge& e : piece.edges) {
            numbers.add(e.from - first);
            numbers.add(e.to - first);
        }
    const std::int64_t all = numbers.count();
    report_.gaps = nodes - all;
    if (node_file_) remark_unlisted(all - in_list);
    return numbers;
}

void TableReader::check_plausible(std::int64_t nodes, std::int64_t lines) const {
    constexpr std::int64_t kNodesALine = 16, kFew = 1000000;
    if (o_.nodes > 0 && o_.gaps == GraphGaps::dropped)
        input_error("{}: a number of nodes and dropped gaps contradict each other; give one of them",
                    table_.file->path());
    if (o_.gaps == GraphGaps::automatic && !node_file_ && o_.nodes == 0 && nodes > kNodesALine * lines + kFew)
        input_error(
            "{}: {} nodes for {} lines, since ids go up to {}; say that gaps between ids are dropped or are isolated "
            "nodes",
            table_.file->path(), fmt::group_digits(nodes), fmt::group_digits(lines), nodes - 1 + report_.first_id);
}

// SNAP's files say "# Nodes: 5242 Edges: 14496" at their top.
void TableReader::compare_with_comment() {
    constexpr std::string_view kWord = "Edges:";
    const Size at = table_.top.find(kWord);
    if (at == table_.top.npos) return;
    std::string_view rest = table_.top.substr(at + kWord.size());
    const std::string_view number = trimmed(take_line(rest));
    std::int64_t said = 0;
    const auto [stop, error] = std::from_chars(number.data(), number.data() + number.size(), said);
    if (error == std::errc{} && said != report_.notes.lines)
        report_.remarks.push_back(fmt::format("its comment says {} edges, but it has {} lines: cut off?",
                                              fmt::group_digits(said), fmt::group_digits(report_.notes.lines)));
}

}  // namespace

// ---- the public functions ------------------------------------------------------------------------------------------

const char* name_of(GraphFileFormat format) {
    switch (format) {
        case GraphFileFormat::edges:
            return "edge list";
        case GraphFileFormat::csv:
            return "CSV";
        case GraphFileFormat::tsv:
            return "TSV";
        case GraphFileFormat::matrix_market:
            return "Matrix Market";
        default:
            return "automatic";
    }
}

Graph read_graph(const std::string& path, const GraphFileOptions& options, GraphFileReport& report) {
    report = {};
    report.path = path;
    if (options.first_id < -1 || options.first_id > 1)
        input_error("{}: first id {}: must be 0 or 1 (-1: found out)", path, options.first_id);
    if (options.nodes < 0 || options.nodes > kMostNodes)
        input_error("{}: {} nodes: must be from 1 to {} (0: up to the largest id)", path, options.nodes, kMostNodes);
    const TextFile file(path);
    report.format = options.format == GraphFileFormat::automatic ? detect_format(file) : options.format;
    if (report.format == GraphFileFormat::matrix_market) return read_market(file, options, report);
    if (options.symmetrise)
        input_error("{}: only a Matrix Market matrix is symmetrised, this is read as {}; leave that out", path,
                    name_of(report.format));
    return TableReader(file, options, report).read();
}

std::string GraphFileReport::text() const {
    const auto n = [](std::int64_t value) { return fmt::group_digits(value); };
    std::string text = fmt::format("{}: {}, {} {}", path, name_of(format), n(notes.lines),
                                   format == GraphFileFormat::matrix_market ? "entries" : "lines");
    if (format == GraphFileFormat::matrix_market)
        text += symmetric ? " (symmetric)" : " (general)";
    else if (!from.empty())
        text += fmt::format(", from {} to {}", from, to);
    text += weighted() ? fmt::format(", weights from {}", weight) : std::string(", no weights");
    if (ids == GraphIds::names)
        text += "\nids are names";
    else
        text += fmt::format("\nids are numbers from {}{}", first_id, first_id_seen ? " (seen)" : "");
    if (gaps > 0)
        text += fmt::format(", {} without a line {}", n(gaps), gaps_dropped ? "are dropped" : "are isolated nodes");
    std::vector<std::string> changes;
    const auto change = [&](std::int64_t count, const char* what) {
        if (count > 0) changes.push_back(fmt::format("{} {}", n(count), what));
    };
    change(notes.self_loops, "self loops dropped");
    change(notes.zeros, "zeros dropped");
    change(notes.duplicates, "duplicates added up");
    if (format != GraphFileFormat::matrix_market) {  // there it is what "general" means
        change(notes.both_ways, "pairs listed both ways joined");
        change(notes.unequal, "of them with two weights, averaged");
    }
    change(symmetrised, "pairs not symmetric, symmetrised");
    if (!changes.empty()) text += "\n" + list_of(changes);
    for (const std::string& remark : remarks) text += "\n" + remark;
    return text;
}

}  // namespace fiedler
