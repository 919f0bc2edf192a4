#include <unordered_map>

#include "engine/error.h"
#include "engine/graph_files.h"
#include "engine/graph_table.h"

namespace fiedler {
namespace {

Table open_labels(const TextFile& file, const LabelFileOptions& o) {
    const std::string extension = extension_of(file.path());
    const std::string_view first = first_row_of(file.text());
    TableOptions options;
    options.header = o.header;
    options.chosen = {o.id, o.label};
    options.single = true;
    options.separator = first.find('\t') != first.npos                         ? '\t'
                        : extension == ".csv" || first.find(',') != first.npos ? csv_separator(file.text())
                                                                               : kBlanks;
    options.comments = options.separator == kBlanks;
    return open_table(file, options);
}

// The node of an id as the graph spells it.
class NodeFinder {
  public:
    explicit NodeFinder(const Graph& g) : nodes_(g.nodes) {
        numbers_.reserve(g.names.size());
        for (std::size_t i = 0; i < g.names.size(); ++i) numbers_.emplace(g.names[i], static_cast<std::int32_t>(i));
    }
    std::size_t operator()(std::string_view id) const {
        if (numbers_.empty())
            return static_cast<std::size_t>(
                parse_id(id, {0, nodes_ - 1, fmt::format("as the graph's {} nodes", nodes_)}));
        const auto found = numbers_.find(id);
        if (found == numbers_.end())
            line_fault("id {} is not in the graph; correct it, or list the node in the graph's file of nodes",
                       shown(id));
        return static_cast<std::size_t>(found->second);
    }

  private:
    std::int64_t nodes_;
    std::unordered_map<std::string_view, std::int32_t> numbers_;
};

}  // namespace

std::vector<std::string> read_labels(const std::string& path, const Graph& g, const LabelFileOptions& o) {
    const TextFile file(path);
    const Table t = open_labels(file, o);
    if (t.columns == 0) input_error("{}: no labels; give a file with a line for each node", path);
    const bool by_row = t.columns == 1;
    const auto usual = usual_columns(t.names);
    const std::size_t id = o.id.empty() ? usual.first : find_column(path, o.id, t.names, t.columns, "column of ids");
    const std::size_t label = !o.label.empty() ? find_column(path, o.label, t.names, t.columns, "column of labels")
                              : by_row         ? 0
                                               : usual.second;
    if (!by_row && id == label)
        input_error("{}: ids and labels would both be taken from {}; choose two columns", path, t.column_name(id));

    const NodeFinder node_of(g);
    std::vector<std::string> labels(static_cast<std::size_t>(g.nodes));
    std::vector<bool> given(labels.size(), false);
    LineFields fields(t.separator);
    std::size_t row = 0;
    std::int64_t line_number = t.body_line - 1;
    for (std::string_view rest = t.body; !rest.empty();) {
        const std::string_view line = take_line(rest);
        ++line_number;
        if (trimmed(line).empty() || t.is_comment(line)) continue;
        try {
            fields.split(line);
            if (fields.count() != t.columns)
                line_fault("{} fields where the first row has {}: {}; correct the line", fields.count(), t.columns,
                           shown(line));
            if (by_row && row >= labels.size())
                line_fault("a label too many: the graph has {} nodes; give one a node", labels.size());
            const std::size_t node = by_row ? row++ : node_of(fields[id]);
            if (given[node] && labels[node] != fields[label])
                line_fault("a second label for {}: {} after {}; give each node one", shown(fields[id]),
                           shown(fields[label]), shown(labels[node]));
            labels[node] = fields[label];
            given[node] = true;
        } catch (const LineFault& fault) {
            input_error("{}:{}: {}", path, line_number, fault.what);
        }
    }
    if (by_row && row != labels.size())
        input_error("{}: {} labels for {} nodes; give one a node, or a column of ids beside them", path, row,
                    labels.size());
    return labels;
}

}  // namespace fiedler
