// engine/graph_files.h: graphs and node labels from text files.
//
//   edges          SNAP text: "from to [weight ...]" between blanks or tabs; lines that begin with # or % are comments
//   csv, tsv       columns with or without a header; quoted fields; # comments above the first row
//   matrix_market  coordinate real | integer | pattern, symmetric | general; ids from 1
//
// Graphs are undirected: (u, v) listed one way is an edge of its weight; listed both ways, of the mean of the two
// (graph.h says what is summed and dropped). Every fault of the input is an InputError in one line with file and line.
// 10M lines take a few seconds; the result does not depend on the number of threads.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "engine/graph.h"

namespace fiedler {

// automatic: the first line "%%MatrixMarket"; else the extension .mtx .csv .tsv .tab; else the separators of the first
// row (a comma: csv; fields with blanks between tabs: tsv; else edges).
enum class GraphFileFormat { automatic, edges, csv, tsv, matrix_market };
const char* name_of(GraphFileFormat);

// numbers: integers >= 0, a node each; names: any text, numbered in the order of first appearance.
// automatic: numbers when all ids of the first 100 rows are integers.
enum class GraphIds { automatic, numbers, names };

// What becomes of a number that no line (and no line of the file of nodes) mentions, between the first id and the last:
// an isolated node, so that node i stays row i of files beside the graph, or nothing: the others move up, keeping their
// order, and Graph::names says what they were. automatic: dropped with a file of nodes, else isolated, unless that
// made more than 16 nodes a line and 1,000,000: then an InputError asks.
enum class GraphGaps { automatic, isolated, dropped };

enum class TableHeader { automatic, present, absent };

struct GraphFileOptions {
    GraphFileFormat format = GraphFileFormat::automatic;
    TableHeader header = TableHeader::automatic;
    // Columns by name (needs a header) or number from 1. Empty: from and to are found by their usual names (source and
    // target, from and to, src and dst, u and v, ...), else they are the first two. Weights: the column called weight,
    // weights or w; without a header the next column if its first 100 rows are numbers. "none": no weights.
    std::string from, to, weight;
    GraphIds ids = GraphIds::automatic;
    int first_id = -1;  // numbers: 0 or 1; -1: 0 when an id is 0, else 1
    GraphGaps gaps = GraphGaps::automatic;
    std::int64_t nodes = 0;  // numbers: how many there are; 0: up to the largest id
    std::string nodes_file;  // one id a line (further columns after a tab, a comma in .csv, are not read); may be empty
    bool symmetrise = false;  // Matrix Market, general: allow a matrix that is not symmetric
};

struct GraphFileReport {
    std::string path;
    GraphFileFormat format = GraphFileFormat::automatic;
    std::string from, to, weight;  // columns, as named in the file or "column 1"; weight empty: every line weighs 1
    bool header = false;
    GraphIds ids = GraphIds::automatic;  // numbers or names
    int first_id = 0;                    // of numbers
    bool first_id_seen = false;          // derived from the smallest id, not given
    std::int64_t gaps = 0;               // numbers nobody mentions
    bool gaps_dropped = false;
    std::int64_t listed_nodes = 0;     // in the file of nodes
    GraphNotes notes;                  // Matrix Market: an entry is a line
    bool symmetric = false;            // Matrix Market: only one triangle is in the file
    std::int64_t symmetrised = 0;      // Matrix Market, general: node pairs whose two entries differ
    std::vector<std::string> remarks;  // what a user may want to know: columns not read, a count that does not match
    bool weighted() const { return !weight.empty(); }
    std::string text() const;  // a few lines for people
};

Graph read_graph(const std::string& path, const GraphFileOptions& options, GraphFileReport& report);

struct LabelFileOptions {
    TableHeader header = TableHeader::automatic;
    std::string id, label;  // columns by name or number from 1; empty: the first and the second
};

// A label for each node, as text; "" for nodes that are not in the file. The file (csv, else tab- or blank-separated)
// has columns of ids, as the graph spells them, and of labels; or one column only (or `label` given and `id` not): then
// row i is the label of node i and there are as many rows as nodes. InputError: an id that the graph has not, two
// labels for one id, a wrong number of rows.
std::vector<std::string> read_labels(const std::string& path, const Graph& graph, const LabelFileOptions& options = {});

}  // namespace fiedler
