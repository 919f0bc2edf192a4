#include "engine/corpus.h"

#include <vector>

#include "tests/engine/temp_folder.h"

namespace fiedler::test {
namespace {

struct Read {
    std::vector<std::string> names, texts;
    CorpusCounts counts;
};
Read read_all(const CorpusOptions& options) {
    const Corpus corpus = scan_corpus(options);
    CorpusReader reader(corpus);
    Document document;
    Read all;
    while (reader.next(document)) {
        all.names.push_back(document.name);
        all.texts.emplace_back(document.text);
    }
    all.counts = reader.counts();
    return all;
}
CorpusOptions of(std::vector<std::string> paths) {
    CorpusOptions options;
    options.paths = std::move(paths);
    return options;
}
using Strings = std::vector<std::string>;

TEST(Corpus, WalksInByteOrder) {
    const TempFolder t;
    t.put("c/b.h", "1");
    t.put("c/B.h", "2");
    t.put("c/a/z.h", "3");
    t.put("c/a-b/y.h", "4");
    t.put("c/\xc3\xa4.h", "5");
    t.put("c/.hidden/x.h", "no");
    t.put("c/.x.h", "no");
    EXPECT_EQ(read_all(of({t / "c"})).texts, (Strings{"2", "4", "3", "1", "5"}));
}

TEST(Corpus, LinksToFoldersAreNotFollowedAndEachFileIsReadOnce) {
    const TempFolder t;
    t.put("c/a.txt", "a");
    t.put("elsewhere/b.txt", "b");
    std::filesystem::create_directory_symlink(t / "c", t / "c/loop");
    std::filesystem::create_directory_symlink(t / "elsewhere", t / "c/other");
    std::filesystem::create_symlink(t / "c/a.txt", t / "c/z.txt");
    std::filesystem::create_symlink(t / "gone", t / "c/dangling.txt");
    std::filesystem::create_hard_link(t / "c/a.txt", t / "c/hard.txt");
    EXPECT_EQ(read_all(of({t / "c", t / "c/a.txt"})).texts, Strings{"a"});
}

TEST(Corpus, FiltersByExtensionInsideFolders) {
    const TempFolder t;
    t.put("c/a.h", "h");
    t.put("c/b.hpp", "hpp");
    t.put("c/c.txt", "txt");
    t.put("c/vector", "none");
    CorpusOptions options = of({t / "c"});
    options.extensions = {"h", ".hpp"};
    EXPECT_EQ(read_all(options).texts, (Strings{"h", "hpp"}));
    options.extensions = {""};
    EXPECT_EQ(read_all(options).texts, Strings{"none"});
    options.extensions = {"py"};
    EXPECT_HAS(input_error_of([&] { read_all(options); }), "ending in py");
    options.paths = {t / "c/c.txt"};
    EXPECT_EQ(read_all(options).texts, Strings{"txt"}) << "a file that is named is taken whatever its extension";
}

TEST(Corpus, SkipsAndCountsInsideFolders) {
    const TempFolder t;
    t.put("c/1", std::string("a\0b", 3));
    t.put("c/2", "\xff\xfe");
    t.put("c/3", "latin \xe9 text");
    t.put("c/4", "");
    t.put("c/5", "good");
    const Read all = read_all(of({t / "c"}));
    EXPECT_EQ(all.texts, Strings{"good"});
    EXPECT_EQ(all.counts.skipped(), "skipped 1 binary file, 2 not UTF-8, 1 empty");
    EXPECT_EQ(all.counts.documents, 1);
    EXPECT_EQ(all.counts.bytes, 4);
}

TEST(Corpus, NamedFilesAreErrors) {
    const TempFolder t;
    const auto error = [&](const std::string& bytes) {
        const std::string path = t.put("file", bytes);
        const std::string message = input_error_of([&] { read_all(of({path})); });
        EXPECT_HAS(message, path);
        return message;
    };
    EXPECT_HAS(error(std::string("ab\0c", 4)), "zero byte at offset 2");
    EXPECT_HAS(error("caf\xe9"), "not valid UTF-8 at byte offset 3");
    EXPECT_HAS(error(""), "empty");
    EXPECT_HAS(input_error_of([&] { read_all(of({t / "missing"})); }), "No such file");
    EXPECT_HAS(input_error_of([&] { read_all(of({"/dev/null"})); }), "neither a file nor a folder");
    EXPECT_HAS(input_error_of([&] { read_all(of({})); }), "no corpus given");
}

TEST(Corpus, EmptyFoldersAreErrors) {
    const TempFolder t;
    std::filesystem::create_directory(t / "c");
    EXPECT_HAS(input_error_of([&] { read_all(of({t / "c"})); }), "the corpus is empty");
    t.put("c/picture", std::string("\x89PNG\0", 5));
    EXPECT_HAS(input_error_of([&] { read_all(of({t / "c"})); }), "skipped 1 binary file");
}

TEST(Corpus, OversizedDocumentIsAnError) {
    const TempFolder t;
    t.put("c/big", "0123456789");
    CorpusOptions options = of({t / "c"});
    options.max_file_bytes = 9;
    EXPECT_HAS(input_error_of([&] { read_all(options); }), "more than one document may have");
    options.max_file_bytes = 10;
    EXPECT_EQ(read_all(options).texts.size(), 1u);
    std::filesystem::resize_file(t / "c/big", (std::uintmax_t{1} << 30) + 1);  // sparse
    EXPECT_HAS(input_error_of([&] { read_all(of({t / "c"})); }), "split the file");
}

TEST(Corpus, JsonLines) {
    const TempFolder t;
    const std::string path =
        t.put("d.jsonl",
              "{\"text\": \"one\\nline\", \"id\": 3}\n\n{\"text\":\"\"}\r\n{\"text\": \"\\u00e4 \\ud83d\\ude00\"}");
    const Read all = read_all(of({path}));
    EXPECT_EQ(all.texts, (Strings{"one\nline", "\xc3\xa4 \xf0\x9f\x98\x80"}));
    EXPECT_EQ(all.names, (Strings{path + ":1", path + ":4"}));
    CorpusOptions options = of({t.put("e.jsonl", "{\"body\": \"x\"}\n")});
    options.json_field = "body";
    EXPECT_EQ(read_all(options).texts, Strings{"x"});
}

TEST(Corpus, JsonFaultsNameTheLine) {
    const TempFolder t;
    const auto error = [&](const std::string& bytes) {
        t.put("c/f.jsonl", "{\"text\": \"fine\"}\n" + bytes + "\n");
        const std::string message = input_error_of([&] { read_all(of({t / "c"})); });
        EXPECT_HAS(message, "f.jsonl:2");
        return message;
    };
    EXPECT_HAS(error("{\"text\": \"cut"), "not valid JSON");
    EXPECT_HAS(error("{\"body\": \"x\"}"), "no field \"text\"");
    EXPECT_HAS(error("{\"text\": 3}"), "not a string");
    EXPECT_HAS(error("[1]"), "not a JSON object");
    EXPECT_HAS(error("{\"text\": \"\\ud800\"}"), "not valid JSON");
}

TEST(Corpus, CapTakesDocumentsInOrderAndCutsTheLastAtALine) {
    const TempFolder t;
    t.put("c/a", "12345\n");
    t.put("c/b", "one\ntwo\nthree\n");
    t.put("c/c", "never");
    CorpusOptions options = of({t / "c"});
    options.max_bytes = 15;
    EXPECT_EQ(read_all(options).texts, (Strings{"12345\n", "one\ntwo\n"}));
    options.max_bytes = 6;
    EXPECT_EQ(read_all(options).texts, Strings{"12345\n"});
    options.paths = {t.put("long", "aaaa\xe2\x82\xac")};
    EXPECT_EQ(read_all(options).texts, Strings{"aaaa"}) << "no line end: cut between characters";
    EXPECT_EQ(scan_corpus(options).bytes, 6);
}

TEST(Corpus, FingerprintFollowsFilesAndOptions) {
    const TempFolder t;
    t.put("c/a", "1");
    const CorpusOptions options = of({t / "c"});
    const std::uint64_t first = scan_corpus(options).fingerprint;
    EXPECT_EQ(scan_corpus(options).fingerprint, first);
    CorpusOptions capped = options;
    capped.max_bytes = 5;
    EXPECT_NE(scan_corpus(capped).fingerprint, first);
    t.put("c/b", "1");
    const std::uint64_t second = scan_corpus(options).fingerprint;
    EXPECT_NE(second, first);
    std::filesystem::last_write_time(t / "c/b", std::filesystem::file_time_type::clock::now() + std::chrono::hours(1));
    EXPECT_NE(scan_corpus(options).fingerprint, second);
}

}  // namespace
}  // namespace fiedler::test
