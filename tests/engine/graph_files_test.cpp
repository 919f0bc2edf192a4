#include "engine/graph_files.h"

#include <omp.h>

#include <cmath>
#include <cstdlib>

#include "engine/files.h"
#include "tests/engine/temp_folder.h"

namespace fiedler::test {
namespace {

using Size = std::size_t;
using Strings = std::vector<std::string>;

struct Read {
    Graph graph;
    GraphFileReport report;
};
Read read(const std::string& path, const GraphFileOptions& options = {}) {
    Read r;
    r.graph = read_graph(path, options, r.report);
    return r;
}
// "0-1:1 1-2:0.5": node names and weights
std::string edges_of(const Graph& g) {
    std::string text;
    const auto name = [&](std::int64_t i) {
        return g.names.empty() ? std::to_string(i) : g.names[static_cast<Size>(i)];
    };
    for (std::int64_t i = 0; i < g.nodes; ++i)
        for (auto k = static_cast<Size>(g.offsets[static_cast<Size>(i)]);
             k < static_cast<Size>(g.offsets[static_cast<Size>(i) + 1]); ++k)
            if (i < g.columns[k])
                text += fmt::format("{}{}-{}:{}", text.empty() ? "" : " ", name(i), name(g.columns[k]), g.weights[k]);
    return text;
}
// Written under this name, read with these options: the message without the folder.
std::string error_of(const std::string& name, const std::string& bytes, const GraphFileOptions& options = {}) {
    const TempFolder t;
    std::string message = input_error_of([&] { read(t.put(name, bytes), options); });
    if (const Size at = message.find(t.path()); at != message.npos) message.erase(at, t.path().size() + 1);
    return message;
}
GraphFileOptions options(void (*set)(GraphFileOptions&)) {
    GraphFileOptions o;
    set(o);
    return o;
}

// ---- edge lists ----------------------------------------------------------------------------------------------------

TEST(GraphFiles, SnapEdgeList) {
    const TempFolder t;
    const Read r =
        read(t.put("g.txt",
                   "# Undirected graph\n% another comment\n# Nodes: 4 Edges: 5\n0\t1\n  1   2 \r\n\n2 0\n1 0\n"
                   "# in between\n2 2"));
    EXPECT_EQ(edges_of(r.graph), "0-1:1 0-2:1 1-2:1");
    EXPECT_EQ(r.report.format, GraphFileFormat::edges);
    EXPECT_EQ(r.report.first_id, 0);
    EXPECT_TRUE(r.report.first_id_seen);
    EXPECT_FALSE(r.report.weighted());
    EXPECT_EQ(r.report.notes.lines, 5);
    EXPECT_EQ(r.report.notes.self_loops, 1);
    EXPECT_EQ(r.report.notes.both_ways, 1);
    EXPECT_TRUE(r.report.remarks.empty());
    EXPECT_HAS(r.report.text(), "g.txt: edge list, 5 lines, from column 1 to column 2, no weights\n");
    EXPECT_HAS(r.report.text(), "ids are numbers from 0 (seen)\n1 self loops dropped, 1 pairs listed both ways joined");
}

TEST(GraphFiles, WeightsOfAnEdgeList) {
    const TempFolder t;
    const std::string path = t.put("g.txt", "0 1 0.5 17\n1 2 +3e-1 18\n2 1 0 19\n0 1 1 20\n");
    const Read r = read(path);
    EXPECT_EQ(edges_of(r.graph), "0-1:1.5 1-2:0.3");
    EXPECT_EQ(r.report.weight, "column 3");
    EXPECT_EQ(r.report.notes.zeros, 1);
    EXPECT_EQ(r.report.notes.duplicates, 1);
    EXPECT_EQ(r.report.remarks, Strings{"not read: column 4"});
    EXPECT_EQ(edges_of(read(path, options([](auto& o) { o.weight = "none"; })).graph), "0-1:2 1-2:1");
    EXPECT_EQ(edges_of(read(path, options([](auto& o) { o.weight = "4"; })).graph), "0-1:37 1-2:18.5");
    const Read typed = read(t.put("typed.txt", "0 1 Depends\n1 2 Depends\n"));
    EXPECT_FALSE(typed.report.weighted());
    EXPECT_EQ(typed.report.remarks, Strings{"not read: column 3"});
}

TEST(GraphFiles, FirstIdAndGaps) {
    const TempFolder t;
    const std::string path = t.put("g.txt", "1 2\n2 5\n");
    const Read one = read(path);
    EXPECT_EQ(one.report.first_id, 1);
    EXPECT_EQ(one.report.gaps, 2);
    EXPECT_EQ(one.graph.nodes, 5);
    EXPECT_EQ(one.graph.names, (Strings{"1", "2", "3", "4", "5"}));
    EXPECT_EQ(edges_of(one.graph), "1-2:1 2-5:1");
    EXPECT_HAS(one.report.text(), "ids are numbers from 1 (seen), 2 without a line are isolated nodes");
    const Read zero = read(path, options([](auto& o) { o.first_id = 0; }));
    EXPECT_EQ(zero.graph.nodes, 6);
    EXPECT_TRUE(zero.graph.names.empty());
    EXPECT_EQ(zero.report.gaps, 3);
    EXPECT_FALSE(zero.report.first_id_seen);
    const Read dropped = read(path, options([](auto& o) { o.gaps = GraphGaps::dropped; }));
    EXPECT_EQ(dropped.graph.names, (Strings{"1", "2", "5"}));
    EXPECT_EQ(edges_of(dropped.graph), "1-2:1 2-5:1");
    EXPECT_HAS(dropped.report.text(), "2 without a line are dropped");
    const Read more = read(path, options([](auto& o) { o.nodes = 7; }));
    EXPECT_EQ(more.graph.nodes, 7);
    EXPECT_EQ(more.report.gaps, 4);
}

TEST(GraphFiles, GapsThatCannotBeMeantAskBack) {
    const TempFolder t;
    const std::string path = t.put("g.txt", "5 2000000000\n7 5\n");
    EXPECT_HAS(input_error_of([&] { read(path); }), "2,000,000,000 nodes for 2 lines, since ids go up to 2000000000");
    const Read r = read(path, options([](auto& o) { o.gaps = GraphGaps::dropped; }));
    EXPECT_EQ(edges_of(r.graph), "5-7:1 5-2000000000:1");
    EXPECT_EQ(r.report.gaps, 2000000000 - 3);
    const Read names = read(path, options([](auto& o) { o.ids = GraphIds::names; }));
    EXPECT_EQ(names.graph.names, (Strings{"5", "2000000000", "7"}));  // in order of first appearance
}

TEST(GraphFiles, NamesAsIds) {
    const TempFolder t;
    const Read r = read(t.put("g.edges", "carol alice\nalice bob\nb\xc3\xb6rn carol\n"));
    EXPECT_EQ(r.graph.names, (Strings{"carol", "alice", "bob", "b\xc3\xb6rn"}));
    EXPECT_EQ(edges_of(r.graph), "carol-alice:1 carol-b\xc3\xb6rn:1 alice-bob:1");
    EXPECT_EQ(r.report.ids, GraphIds::names);
    EXPECT_HAS(r.report.text(), "ids are names");
}

TEST(GraphFiles, BlanksInsideNamesBetweenTabs) {
    const TempFolder t;
    const Read r = read(t.put("g.txt", "New York\tBoston\nBoston\tSan Jose\n"));
    EXPECT_EQ(r.report.format, GraphFileFormat::tsv);
    EXPECT_EQ(r.graph.names, (Strings{"New York", "Boston", "San Jose"}));
}

// ---- CSV and TSV ---------------------------------------------------------------------------------------------------

TEST(GraphFiles, CsvWithHeader) {
    const TempFolder t;
    const std::string path =
        t.put("g.csv", "\xef\xbb\xbfWeight,note,Target,Source\n2,\"a, \"\"b\"\"\",1,0\n0.5, plain ,2,1\n");
    const Read r = read(path);
    EXPECT_EQ(edges_of(r.graph), "0-1:2 1-2:0.5");
    EXPECT_TRUE(r.report.header);
    EXPECT_EQ(r.report.from, "Source");
    EXPECT_EQ(r.report.to, "Target");
    EXPECT_EQ(r.report.weight, "Weight");
    EXPECT_EQ(r.report.remarks, Strings{"not read: note"});
    EXPECT_HAS(r.report.text(), "g.csv: CSV, 2 lines, from Source to Target, weights from Weight");
    const Read by_name = read(path, options([](auto& o) { o.from = "note"; }));
    EXPECT_EQ(by_name.graph.names, (Strings{"a, \"b\"", "1", "plain", "2"}));
    const Read by_number = read(path, options([](auto& o) {
                                    o.from = "3";
                                    o.to = "4";
                                    o.weight = "none";
                                }));
    EXPECT_EQ(edges_of(by_number.graph), "0-1:1 1-2:1");
}

TEST(GraphFiles, CsvWithoutHeader) {
    const TempFolder t;
    EXPECT_EQ(edges_of(read(t.put("a.csv", "0,1\n1,2\n")).graph), "0-1:1 1-2:1");
    EXPECT_EQ(edges_of(read(t.put("b.csv", "a,b,2\nb,c,3\n")).graph), "a-b:2 b-c:3");
    EXPECT_EQ(edges_of(read(t.put("c.txt", "0, 1\n1, 2\n")).graph), "0-1:1 1-2:1");  // found by its comma
    EXPECT_EQ(edges_of(read(t.put("d.csv", "0;1;0.5\n1;2;4\n")).graph), "0-1:0.5 1-2:4");
    EXPECT_EQ(edges_of(read(t.put("e.tsv", "# comment\n\"x\ty\"\tz\nz\tw\n")).graph), "x\ty-z:1 z-w:1");
}

TEST(GraphFiles, HeaderFoundOrTold) {
    const TempFolder t;
    const std::string odd = t.put("odd.csv", "left,right\n0,1\n1,2\n");  // text above numbers
    EXPECT_TRUE(read(odd).report.header);
    EXPECT_EQ(read(odd).graph.nodes, 3);
    const Read absent = read(odd, options([](auto& o) { o.header = TableHeader::absent; }));
    EXPECT_EQ(absent.graph.names, (Strings{"left", "right", "0", "1", "2"}));
    const std::string text = t.put("text.csv", "person,friend\nann,bob\n");  // cannot be told from an edge
    EXPECT_EQ(read(text).graph.nodes, 4);
    EXPECT_EQ(read(text, options([](auto& o) { o.header = TableHeader::present; })).graph.nodes, 2);
    EXPECT_EQ(read(text, options([](auto& o) { o.from = "friend"; })).report.to, "person");
    const std::string only = t.put("only.csv", "source,target\n");
    EXPECT_HAS(input_error_of([&] { read(only); }), "only.csv: no edges and no nodes");
}

TEST(GraphFiles, FormatTold) {
    const TempFolder t;
    const std::string path = t.put("g.csv", "a,1 b,2\nb,2 c\n");
    EXPECT_EQ(read(path, options([](auto& o) { o.format = GraphFileFormat::edges; })).graph.names,
              (Strings{"a,1", "b,2", "c"}));
}

// ---- files of nodes ------------------------------------------------------------------------------------------------

TEST(GraphFiles, FileOfNodes) {
    const TempFolder t;
    GraphFileOptions o;
    o.nodes_file = t.put("nodes.txt", "# all\n9\n0\n4\n");
    const Read r = read(t.put("g.txt", "0 4\n4 6\n"), o);
    EXPECT_EQ(r.graph.names, (Strings{"0", "4", "6", "9"}));  // gaps are dropped: the file says who there is
    EXPECT_EQ(edges_of(r.graph), "0-4:1 4-6:1");
    EXPECT_EQ(r.report.listed_nodes, 3);
    EXPECT_EQ(r.report.remarks, Strings{"1 nodes have edges but are not in " + o.nodes_file});
    o.gaps = GraphGaps::isolated;
    EXPECT_EQ(read(t / "g.txt", o).graph.nodes, 10);

    o = {};
    o.nodes_file = t.put("names.tsv", "id\tage\nann lee\t3\nbob\t4\nzoe\t5\n");
    const Read names = read(t.put("g.tsv", "bob\tann lee\n"), o);
    EXPECT_EQ(names.graph.names, (Strings{"ann lee", "bob", "zoe"}));
    EXPECT_EQ(edges_of(names.graph), "ann lee-bob:1");
    EXPECT_TRUE(names.report.remarks.empty());

    o.nodes_file = t.put("plain.txt", "ann lee\nbob\n");
    EXPECT_EQ(read(t / "g.tsv", o).graph.names, (Strings{"ann lee", "bob"}));

    o.nodes_file = t.put("n.txt", "0\n1\n");
    const Read none = read(t.put("none.txt", "# no edges\n"), o);
    EXPECT_EQ(none.graph.nodes, 2);
    EXPECT_EQ(none.graph.edges(), 0);
    o.nodes_file = t.put("bad.txt", "0\n1\nx\n");
    EXPECT_EQ(read(t / "none.txt", o).graph.names, (Strings{"0", "1", "x"}));
    EXPECT_HAS(input_error_of([&] { read(t.put("h.txt", "0 1\n"), o); }), "bad.txt:3: id \"x\" is not an integer");
}

// ---- Matrix Market -------------------------------------------------------------------------------------------------

TEST(GraphFiles, MatrixMarketSymmetric) {
    const TempFolder t;
    const Read r = read(t.put("g.mtx",
                              "%%MatrixMarket matrix coordinate real symmetric\n% comment\n%\n\n4 4 4\n2 1 0.5\n"
                              "3 3 7\n3 2 2e0\n3 1 1\n"));
    EXPECT_EQ(edges_of(r.graph), "1-2:0.5 1-3:1 2-3:2");
    EXPECT_EQ(r.graph.nodes, 4);
    EXPECT_EQ(r.report.format, GraphFileFormat::matrix_market);
    EXPECT_EQ(r.report.gaps, 1);
    EXPECT_EQ(r.report.first_id, 1);
    EXPECT_TRUE(r.report.symmetric && r.report.weighted());
    EXPECT_HAS(r.report.text(), "Matrix Market, 4 entries (symmetric), weights from values");
    // Found by its banner, whatever the name.
    const Read pattern = read(t.put("g.txt", "%%matrixmarket MATRIX Coordinate Pattern Symmetric\n2 2 1\n2 1\n"));
    EXPECT_EQ(edges_of(pattern.graph), "1-2:1");
    EXPECT_FALSE(pattern.report.weighted());
}

TEST(GraphFiles, MatrixMarketGeneral) {
    const TempFolder t;
    const std::string head = "%%MatrixMarket matrix coordinate integer general\n3 3 ";
    const Read r = read(t.put("g.mtx", head + "5\n1 2 3\n2 1 3\n3 2 4\n2 3 4\n1 3 0\n"));
    EXPECT_EQ(edges_of(r.graph), "1-2:3 2-3:4");
    EXPECT_EQ(r.report.symmetrised, 0);
    const std::string skewed = t.put("h.mtx", head + "4\n1 2 3\n2 1 3\n3 2 4\n2 3 6\n");
    EXPECT_HAS(input_error_of([&] { read(skewed); }),
               "h.mtx: general and not symmetric: entry (2, 3) is 6, entry (3, 2) is 4 (1 such pairs)");
    const std::string one_way = t.put("i.mtx", head + "3\n1 2 3\n2 1 3\n3 2 4\n");
    EXPECT_HAS(input_error_of([&] { read(one_way); }), "entry (2, 3) is 0, entry (3, 2) is 4 (1 such pairs)");
    const GraphFileOptions o = options([](auto& p) { p.symmetrise = true; });
    const Read averaged = read(skewed, o);
    EXPECT_EQ(edges_of(averaged.graph), "1-2:3 2-3:5");
    EXPECT_EQ(averaged.report.symmetrised, 1);
    EXPECT_HAS(averaged.report.text(), "1 pairs not symmetric, symmetrised");
    EXPECT_EQ(edges_of(read(one_way, o).graph), "1-2:3 2-3:4");  // listed one way: its weight, as in an edge list
}

TEST(GraphFiles, MatrixMarketRefused) {
    const auto banner = [](const std::string& words, const std::string& rest = "\n2 2 1\n2 1 1\n") {
        return error_of("g.mtx", "%%MatrixMarket " + words + rest);
    };
    EXPECT_HAS(banner("matrix array real general"), "g.mtx:1: \"array\" is not read; write the matrix as coordinate");
    EXPECT_HAS(banner("matrix coordinate complex symmetric"), "g.mtx:1: \"complex\" is not read; weights must be real");
    EXPECT_HAS(banner("matrix coordinate real hermitian"), "\"hermitian\" is not read; the matrix of an undirected");
    EXPECT_HAS(banner("matrix coordinate real skew-symmetric"), "\"skew-symmetric\" is not read");
    EXPECT_HAS(banner("matrix coordinate real"), "g.mtx:1: ");
    EXPECT_HAS(error_of("g.mtx", "1 2\n"),
               "g.mtx:1: \"1 2\" where \"%%MatrixMarket matrix coordinate real symmetric\"");
    EXPECT_HAS(error_of("g.mtx", ""), "g.mtx:1: \"\" where");
    const std::string good = "matrix coordinate real symmetric";
    EXPECT_HAS(banner(good, "\n% only comments\n"), "g.mtx: ends before the line \"rows columns entries\"");
    EXPECT_HAS(banner(good, "\n2 3 1\n2 1 1\n"), "g.mtx:2: 2 rows and 3 columns; the matrix of a graph is square");
    EXPECT_HAS(banner(good, "\n%\n2 2\n2 1 1\n"), "g.mtx:3: \"2 2\" where \"rows columns entries\" is expected");
    EXPECT_HAS(banner(good, "\n2 2 x\n2 1 1\n"), "g.mtx:2: \"2 2 x\" where");
    EXPECT_HAS(banner(good, "\n0 0 0\n"), "g.mtx:2: a matrix without rows");
    EXPECT_HAS(banner(good, "\n3000000000 3000000000 0\n"), "g.mtx:2: 3000000000 rows; a graph has at most 2147483647");
    EXPECT_HAS(banner(good, "\n2000000000 2000000000 3\n2 1 1\n"), "g.mtx:2: 2000000000 rows for 3 entries");
    EXPECT_HAS(banner(good, "\n2 2 1\n3 1 1\n"), "g.mtx:3: index 3 is outside the declared 2 x 2");
    EXPECT_HAS(banner(good, "\n2 2 1\n0 1 1\n"), "g.mtx:3: index 0 is outside");
    EXPECT_HAS(banner(good, "\n2 2 1\n1 99999999999999999999 1\n"), "g.mtx:3: index 99999999999999999999 is outside");
    EXPECT_HAS(banner(good, "\n2 2 1\na 1 1\n"), "g.mtx:3: index \"a\" is not an integer");
    EXPECT_HAS(banner(good, "\n2 2 1\n1 2 1\n"), "g.mtx:3: entry (1, 2) is above the diagonal");
    EXPECT_HAS(banner(good, "\n2 2 1\n\n2 1\n"), "g.mtx:4: \"2 1\" where \"row column value\" is expected");
    EXPECT_HAS(banner("matrix coordinate pattern symmetric", "\n2 2 1\n2 1 5\n"), "where \"row column\" is expected");
    EXPECT_HAS(banner(good, "\n2 2 1\n2 1 -3\n"), "g.mtx:3: weight -3 is negative");
    EXPECT_HAS(banner(good, "\n2 2 1\n2 1 nan\n"), "g.mtx:3: weight is \"nan\"");
    EXPECT_HAS(banner(good, "\n2 2 3\n2 1 1\n"),
               "g.mtx:2: declares 3 entries, but there are 1; the file may be cut off");
    EXPECT_HAS(banner(good, "\n2 2 1\n2 1 1\n1 1 1\n"), "g.mtx:2: declares 1 entries, but there are 2; correct the");
    const std::string text = "%%MatrixMarket matrix coordinate pattern symmetric\n2 2 1\n2 1\n";
    EXPECT_HAS(error_of("g.mtx", text, options([](auto& o) { o.symmetrise = true; })), "symmetric as it is");
    EXPECT_HAS(error_of("g.mtx", text, options([](auto& o) { o.nodes = 2; })), "leave the number of nodes out");
    EXPECT_HAS(error_of("g.mtx", text, options([](auto& o) { o.first_id = 0; })), "numbers from 1");
}

// ---- bad input -----------------------------------------------------------------------------------------------------

TEST(GraphFiles, MalformedLines) {
    EXPECT_HAS(error_of("g.txt", "# c\n0 1\n\n2\n"), "g.txt:4: 1 field where the first row has 2: \"2\"; correct the");
    EXPECT_HAS(error_of("g.txt", "0 1\n1 2 3\n"), "g.txt:2: 3 fields where the first row has 2: \"1 2 3\"");
    EXPECT_HAS(error_of("g.txt", "7\n8\n"), "g.txt:1: only one column");
    EXPECT_HAS(error_of("g.csv", "a,b\n\"c,d\n"), "g.csv:2: a quote is not closed on this line");
    EXPECT_HAS(error_of("g.csv", "a,b\n\"c\"d,e\n"), "g.csv:2: text after a closing quote");
    EXPECT_HAS(error_of("g.csv", "a,b\n,c\n"), "g.csv:2: an empty id");
    EXPECT_HAS(error_of("g.csv", "a,b\nc,\xff\xfe\n"), "g.csv:2: id \"??\" is not UTF-8");
    std::string many;
    for (int i = 0; i < 120; ++i) many += fmt::format("{} {}\n", i, i + 1);
    EXPECT_HAS(error_of("g.txt", many + "5 x\n"), "g.txt:121: id \"x\" is not an integer, as ids before it are");
    EXPECT_HAS(error_of("g.txt", many + "5 6.0\n"), "g.txt:121: id \"6.0\"");
    const std::string longest(100, 'y');
    EXPECT_HAS(error_of("g.txt", many + "5 " + longest), "g.txt:121: id \"" + longest.substr(0, 40) + "...\" is not");
}

TEST(GraphFiles, BadWeights) {
    EXPECT_HAS(error_of("g.txt", "0 1 1\n1 2 -0.5\n"), "g.txt:2: weight -0.5 is negative");
    EXPECT_HAS(error_of("g.txt", "0 1 1\n1 2 nan\n"), "g.txt:2: weight is \"nan\"; replace");
    EXPECT_HAS(error_of("g.txt", "0 1 1\n1 2 inf\n"), "g.txt:2: weight is \"inf\", infinite or beyond float");
    EXPECT_HAS(error_of("g.txt", "0 1 1\n1 2 1e39\n"), "g.txt:2: weight is \"1e39\", infinite or beyond float");
    EXPECT_HAS(error_of("g.txt", "0 1 1\n1 2 1e-60\n"), "g.txt:2: weight is \"1e-60\", too small for float");
    EXPECT_HAS(error_of("g.txt", "0 1 1\n1 2 1" + std::string(60, '0')), "infinite or beyond float");
    EXPECT_HAS(error_of("g.txt", "0 1 1\n1 2 0." + std::string(60, '0') + "1"), "too small for float");
    const GraphFileOptions third = options([](auto& o) { o.weight = "3"; });
    EXPECT_HAS(error_of("g.txt", "0 1 1\n1 2 2x\n", third), "g.txt:2: weight is \"2x\", not a number; correct it");
    EXPECT_HAS(error_of("g.csv", "0,1,1\n1,2,\n", third), "g.csv:2: weight is \"\", not a number");
}

TEST(GraphFiles, IdsOutOfRange) {
    EXPECT_HAS(error_of("g.txt", "0 1\n-1 2\n"), "g.txt:2: id -1 is negative");
    EXPECT_HAS(error_of("g.txt", "0 1\n1 2147483648\n"),
               "g.txt:2: id \"2147483648\" is out of range: ids go from 0 to 2147483647; let ids be names");
    EXPECT_HAS(error_of("g.txt", "0 1\n1 2147483647\n"),
               "g.txt:2: id \"2147483647\" is out of range: ids go from 0 to "
               "2147483646");
    EXPECT_HAS(error_of("g.txt", "0 1\n1 99999999999999999999\n"), "g.txt:2: id \"99999999999999999999\" is out of");
    EXPECT_HAS(error_of("g.txt", "1 2\n1 0\n", options([](auto& o) { o.first_id = 1; })),
               "g.txt:2: id \"0\" is out of range: ids go from 1 to 2147483647, counted from 1");
    const GraphFileOptions four = options([](auto& o) { o.nodes = 4; });
    EXPECT_HAS(error_of("g.txt", "0 1\n2 4\n", four), "g.txt:2: id \"4\" is out of range: ids go from 0 to 3, 4 nodes");
    EXPECT_HAS(error_of("g.txt", "1 2\n2 5\n", four), "g.txt:2: id \"5\" is out of range: ids go from 1 to 4, 4 nodes");
}

TEST(GraphFiles, FilesThatAreNoText) {
    EXPECT_HAS(error_of("g.txt", std::string("0 1\n1 2\n\0\1\2", 11)), "g.txt:3: a zero byte: a binary file");
    EXPECT_HAS(error_of("g.txt", "\x1f\x8b\x08..."), "g.txt: compressed with gzip; unpack it first");
    EXPECT_HAS(error_of("g.txt", "\xfd\x37zXZ..."), "compressed with xz");
    EXPECT_HAS(error_of("g.txt", std::string("\xff\xfe\x30\0", 4)), "UTF-16");
    EXPECT_HAS(error_of("g.txt", ""), "g.txt: no edges and no nodes; give a file with a line for each edge");
    EXPECT_HAS(error_of("g.txt", "# nothing\n\n"), "no edges and no nodes");
    EXPECT_HAS(input_error_of([] { read("/nowhere/g.txt"); }), "/nowhere/g.txt: cannot read");
}

TEST(GraphFiles, OptionsThatDoNotFit) {
    const std::string csv = "a,b,c\n0,1,2\n";
    EXPECT_HAS(error_of("g.csv", csv, options([](auto& o) { o.weight = "mass"; })),
               "g.csv: no column of weights \"mass\"; there are a, b, c");
    EXPECT_HAS(error_of("g.txt", "0 1\n", options([](auto& o) {
                            o.header = TableHeader::absent;
                            o.to = "5";
                        })),
               "g.txt: column of ids \"5\": there are columns 1 to 2 and no header");
    EXPECT_HAS(error_of("g.csv", csv, options([](auto& o) { o.from = o.to = "a"; })), "both ids would be taken from a");
    EXPECT_HAS(error_of("g.csv", csv, options([](auto& o) { o.weight = "a"; })), "ids and weights would both be taken");
    EXPECT_HAS(error_of("g.txt", "0 1\n", options([](auto& o) { o.symmetrise = true; })), "this is read as edge list");
    EXPECT_HAS(error_of("g.txt", "0 1\n", options([](auto& o) { o.first_id = 2; })), "first id 2: must be 0 or 1");
    EXPECT_HAS(error_of("g.txt", "0 1\n", options([](auto& o) { o.nodes = -4; })), "-4 nodes: must be from 1");
    EXPECT_HAS(error_of("g.txt", "a b\n", options([](auto& o) { o.nodes = 4; })), "its ids are names");
    EXPECT_HAS(error_of("g.txt", "0 1\n", options([](auto& o) {
                            o.nodes = 4;
                            o.gaps = GraphGaps::dropped;
                        })),
               "contradict each other");
}

TEST(GraphFiles, CountInTheCommentIsCompared) {
    const TempFolder t;
    EXPECT_EQ(read(t.put("g.txt", "# Nodes: 3 Edges: 5000\n0 1\n1 2\n")).report.remarks,
              Strings{"its comment says 5,000 edges, but it has 2 lines: cut off?"});
}

// ---- large files and real ones -------------------------------------------------------------------------------------

// Several pieces (2 MiB each): joined in order, whatever the number of threads; faults have the line of the whole file.
TEST(GraphFiles, PiecesReadInParallelMakeOneGraph) {
    const TempFolder t;
    constexpr int kLines = 400000;
    std::string numbers, names;
    std::vector<Edge> edges;
    for (std::uint64_t i = 0; i < kLines; ++i) {
        const auto a = static_cast<std::int32_t>(rng::below(50000, 1, 0, i));
        const auto b = static_cast<std::int32_t>(rng::below(50000, 1, 1, i));
        const auto w = static_cast<float>(1 + rng::below(7, 1, 2, i));
        edges.push_back({a, b, w});
        numbers += fmt::format("{} {} {}\n", a, b, w);
        names += fmt::format("n{} n{} {}\n", a, b, w);
    }
    const Graph expected = build_graph(50000, edges);
    const int threads = omp_get_max_threads();
    std::vector<Graph> named;
    for (const int n : {1, 3}) {
        omp_set_num_threads(n);
        const Read r = read(t.put("g.txt", numbers), options([](auto& o) { o.nodes = 50000; }));
        EXPECT_EQ(r.report.notes.lines, kLines);
        EXPECT_EQ(r.graph.offsets, expected.offsets);
        EXPECT_EQ(r.graph.columns, expected.columns);
        EXPECT_EQ(r.graph.weights, expected.weights);
        named.push_back(read(t.put("h.txt", names)).graph);
    }
    omp_set_num_threads(threads);
    EXPECT_EQ(named[0].names, named[1].names);
    EXPECT_EQ(named[0].columns, named[1].columns);
    EXPECT_EQ(named[0].weights, named[1].weights);
    EXPECT_EQ(named[0].edges(), expected.edges());
    Strings in_order;  // by first appearance
    std::vector<bool> seen(50000, false);
    for (const Edge& e : edges)
        for (const std::int32_t i : {e.from, e.to})
            if (!seen[static_cast<Size>(i)]) {
                seen[static_cast<Size>(i)] = true;
                in_order.push_back("n" + std::to_string(i));
            }
    EXPECT_EQ(named[0].names, in_order);
    const std::string path = t.put("bad.txt", numbers + "1 2 oops\n" + numbers + "x y z\n");
    EXPECT_HAS(input_error_of([&] { read(path); }), fmt::format("bad.txt:{}: weight is \"oops\"", kLines + 1));
}

TEST(GraphFiles, LaplacianOfAFileMatchesHandComputation) {
    const TempFolder t;
    const Graph g = read(t.put("g.csv", "source,target,weight\na,b,1\nb,c,3\nb,a,1\n")).graph;  // a-b 1, b-c 3
    const auto l = laplacian_of<double>(g, LaplacianKind::combinatorial);
    EXPECT_EQ(l.offsets, (std::vector<std::int64_t>{0, 2, 5, 7}));
    EXPECT_EQ(l.columns, (std::vector<std::int32_t>{0, 1, 0, 1, 2, 1, 2}));
    EXPECT_EQ(l.values, (std::vector<double>{1, -1, -1, 4, -3, -3, 3}));
    const auto n = laplacian_of<double>(g, LaplacianKind::normalised);
    EXPECT_EQ(n.values, (std::vector<double>{1, -0.5, -0.5, 1, -3 / std::sqrt(12), -3 / std::sqrt(12), 1}));
}

TEST(GraphFiles, RealGraphs) {
    const std::string archive = std::string(FIEDLER_SOURCE_DIR) + "/../shared/data/graphs.tar.xz";
    if (!file_exists(archive)) GTEST_SKIP() << "no " << archive;
    const TempFolder t;
    if (std::system(fmt::format("tar xJf '{}' -C '{}'", archive, t.path()).c_str()) != 0)
        GTEST_SKIP() << "cannot unpack " << archive;
    const std::string folder = t.path() + "/";
    const auto statistics = [&](const std::string& edges, const std::string& nodes) {
        GraphFileOptions o;
        if (!nodes.empty()) o.nodes_file = folder + nodes;
        const Graph g = read(folder + edges, o).graph;
        const GraphStatistics s = statistics_of(g, find_components(g));
        return std::vector<std::int64_t>{s.nodes, s.edges, s.components, s.largest_component, s.degree_max};
    };
    using Numbers = std::vector<std::int64_t>;
    EXPECT_EQ(statistics("planetoid/cora.edges", ""), (Numbers{2708, 5278, 78, 2485, 168}));
    EXPECT_EQ(statistics("planetoid/citeseer.edges", ""), (Numbers{3327, 4552, 438, 2120, 99}));
    EXPECT_EQ(statistics("debian_deps/edges.tsv", "debian_deps/nodes.tsv"),
              (Numbers{63436, 317086, 1934, 61333, 21814}));
    EXPECT_EQ(statistics("wordnet_graph/edges.tsv", ""), (Numbers{117659, 183789, 1377, 115426, 674}));
}

// ---- labels --------------------------------------------------------------------------------------------------------

TEST(GraphLabels, ByIdOrByRow) {
    const TempFolder t;
    const Graph numbers = build_graph(3, {{0, 1}});
    EXPECT_EQ(read_labels(t.put("a.txt", "red\n-1\nblue\n"), numbers), (Strings{"red", "-1", "blue"}));
    EXPECT_EQ(read_labels(t.put("b.txt", "2 x\n0 y\n"), numbers), (Strings{"y", "", "x"}));
    EXPECT_EQ(read_labels(t.put("c.csv", "id,label\n1,\"a, b\"\n"), numbers), (Strings{"", "a, b", ""}));
    EXPECT_EQ(read_labels(t.put("label.csv", "label\n3\n4\n3\n"), numbers), (Strings{"3", "4", "3"}));
    Graph names = build_graph(2, {{0, 1}});
    names.names = {"ann lee", "7"};
    LabelFileOptions o;
    o.label = "3";
    EXPECT_EQ(read_labels(t.put("d.tsv", "7\t0.5\tnet\nann lee\t1\tlibs\n"), names, o), (Strings{"libs", "net"}));
    o.id = "who";
    o.label = "group";
    EXPECT_EQ(read_labels(t.put("e.csv", "group,who\ng1,7\n"), names, o), (Strings{"", "g1"}));
}

TEST(GraphLabels, Refused) {
    const TempFolder t;
    Graph g = build_graph(3, {{0, 1}});
    const auto error = [&](const std::string& bytes, const LabelFileOptions& o = {}) {
        return input_error_of([&] { read_labels(t.put("l.txt", bytes), g, o); });
    };
    EXPECT_HAS(error("a\nb\n"), "l.txt: 2 labels for 3 nodes");
    EXPECT_HAS(error("a\nb\nc\nd\n"), "l.txt:4: a label too many: the graph has 3 nodes");
    EXPECT_HAS(error("0 a\n3 b\n"), "l.txt:2: id \"3\" is out of range: ids go from 0 to 2, as the graph's 3 nodes");
    EXPECT_HAS(error("0 a\n0 b\n"), "l.txt:2: a second label for \"0\": \"b\" after \"a\"");
    EXPECT_HAS(error("0 a\n1 b c\n"), "l.txt:2: 3 fields where the first row has 2");
    EXPECT_HAS(error(""), "l.txt: no labels");
    EXPECT_HAS(error("0 a\n", {TableHeader::absent, "", "4"}), "column of labels \"4\": there are columns 1 to 2");
    EXPECT_HAS(error("0 a\n", {TableHeader::absent, "2", "2"}), "both be taken from column 2");
    g.names = {"x", "y", "z"};
    EXPECT_HAS(error("x a\nw b\n"), "l.txt:2: id \"w\" is not in the graph");
}

}  // namespace
}  // namespace fiedler::test
