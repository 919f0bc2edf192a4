#include "engine/prepare.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <map>
#include <set>

#include "engine/files.h"
#include "tests/engine/temp_folder.h"

namespace fiedler::test {
namespace {

constexpr int kVocab = 400;

PrepareOptions options_for(const std::string& path) {
    PrepareOptions o;
    o.corpus.paths = {path};
    o.vocab_size = kVocab;
    return o;
}
void put_corpus(const TempFolder& t, int documents, std::size_t bytes = 3000) {
    for (int i = 0; i < documents; ++i) t.put(fmt::format("c/{:03}.c", i), code_like(bytes, 100 + i));
}
std::map<std::string, std::string> contents(const std::string& folder) {
    std::map<std::string, std::string> files;
    for (const auto& entry : std::filesystem::directory_iterator(folder))
        files[entry.path().filename().string()] = slurp(entry.path().string());
    return files;
}
// The documents of a split, decoded.
std::vector<std::string> documents(const Dataset& data, const TokenStream& stream) {
    std::vector<std::string> texts(1);
    for (std::int64_t i = 0; i < stream.size(); ++i) {
        std::int32_t token;
        stream.copy(i, 1, &token);
        if (token == data.info().separator)
            texts.emplace_back();
        else
            texts.back() += data.tokenizer()->piece(token);
    }
    EXPECT_EQ(texts.back(), "") << "every document ends with the separator";
    texts.pop_back();
    return texts;
}

TEST(Prepare, KeepsEveryDocumentOnOneSide) {
    const TempFolder t;
    put_corpus(t, 60);
    t.put("c/copy.c", code_like(3000, 100));  // equal to 000.c
    const DatasetInfo info = prepare(options_for(t / "c"), t / "out", nullptr);
    EXPECT_EQ(info.split, "by document");
    const Dataset data = Dataset::open(t / "out");
    const auto train = documents(data, data.train()), val = documents(data, data.val());
    EXPECT_EQ(train.size() + val.size(), 61u);
    EXPECT_GE(val.size(), 3u);
    EXPECT_LE(val.size(), 4u);
    const std::set<std::string> trained(train.begin(), train.end());
    for (const std::string& text : val) EXPECT_FALSE(trained.contains(text)) << "held out and trained on";
    std::multiset<std::string> all(train.begin(), train.end()), expected;
    all.insert(val.begin(), val.end());
    for (int i = 0; i < 60; ++i) expected.insert(code_like(3000, 100 + i));
    expected.insert(code_like(3000, 100));
    EXPECT_EQ(all, expected);
    // The manifest's numbers.
    std::int64_t bytes = 0;
    for (const std::string& text : val) bytes += static_cast<std::int64_t>(text.size());
    EXPECT_EQ(data.info().val.bytes, bytes);
    EXPECT_EQ(data.info().val.documents, static_cast<std::int64_t>(val.size()));
    EXPECT_EQ(data.info().train.documents, static_cast<std::int64_t>(train.size()));
    EXPECT_EQ(data.info().train.tokens, data.train().size());
    EXPECT_GT(data.info().unigram_entropy, 1);
    EXPECT_LT(data.info().unigram_entropy, std::log(kVocab));
}

TEST(Prepare, SameBytesAgainAndWithOtherThreads) {
    const TempFolder t;
    put_corpus(t, 20);
    t.put("c/large.c", code_like(700'000, 7));  // several segments
    t.put("c/z.jsonl", "{\"text\": \"a line\"}\n{\"text\": \"another\"}\n");
    PrepareOptions o = options_for(t / "c");
    o.threads = 1;
    o.shard_tokens = 50'000;  // several shards
    prepare(o, t / "one", nullptr);
    prepare(o, t / "again", nullptr);
    o.threads = 2;
    prepare(o, t / "two", nullptr);
    const auto one = contents(t / "one");
    EXPECT_GT(one.size(), 5u);
    EXPECT_EQ(contents(t / "again"), one);
    EXPECT_EQ(contents(t / "two"), one);
    const Dataset data = Dataset::open(t / "two");
    EXPECT_GT(data.train().shards().size(), 2u);
    EXPECT_EQ(data.train().shards()[0]->tokens(), 50'000);
    const auto train = documents(data, data.train()), val = documents(data, data.val());
    std::set<std::string> all(train.begin(), train.end());
    all.insert(val.begin(), val.end());
    EXPECT_TRUE(all.contains(code_like(700'000, 7))) << "cut into segments and whole again";
}

TEST(Prepare, SingleDocumentIsSplitByPosition) {
    const TempFolder t;
    const std::string text = code_like(50'000, 1);
    const DatasetInfo info = prepare(options_for(t.put("one.c", text)), t / "out", nullptr);
    EXPECT_EQ(info.split, "by position");
    EXPECT_HAS(slurp(t / "out/dataset.json"), "\"split\": \"by position\"");
    const Dataset data = Dataset::open(t / "out");
    const auto train = documents(data, data.train()), val = documents(data, data.val());
    ASSERT_EQ(train.size(), 1u);
    ASSERT_EQ(val.size(), 1u);
    EXPECT_EQ(train[0] + val[0], text);
    EXPECT_EQ(train[0].back(), '\n');
    EXPECT_NEAR(static_cast<double>(val[0].size()), 5000, 500);
}

TEST(Prepare, HoldsOutNothingOrAll) {
    const TempFolder t;
    put_corpus(t, 5);
    PrepareOptions o = options_for(t / "c");
    o.val_fraction = 0;
    prepare(o, t / "none", nullptr);
    const Dataset none = Dataset::open(t / "none");
    EXPECT_EQ(none.val().size(), 0);
    EXPECT_EQ(documents(none, none.train()).size(), 5u);
    EXPECT_HAS(input_error_of([&] { none.val_windows(16); }), "validation split has 0 tokens");
    o.val_fraction = 1;  // what evaluation of another corpus needs, with the tokenizer of the model
    o.tokenizer = t / "none/tokenizer.model";
    prepare(o, t / "all", nullptr);
    const Dataset all = Dataset::open(t / "all");
    EXPECT_EQ(all.train().size(), 0);
    EXPECT_EQ(all.val().size(), none.train().size());
    EXPECT_EQ(slurp(t / "all/tokenizer.model"), slurp(t / "none/tokenizer.model"));
    o.val_fraction = 0.9999;
    prepare(o, t / "most", nullptr);
    EXPECT_EQ(Dataset::open(t / "most").info().train.documents, 1) << "something is left to train on";
}

TEST(Prepare, BadInputLeavesNothing) {
    const TempFolder t;
    put_corpus(t, 3);
    const auto error = [&](const PrepareOptions& o, const std::string& out) {
        const std::string message = input_error_of([&] { prepare(o, out, nullptr); });
        for (const auto& entry : std::filesystem::directory_iterator(t.path()))
            EXPECT_EQ(entry.path().filename().string().find("partial"), std::string::npos);
        EXPECT_FALSE(folder_exists(t / "out"));
        return message;
    };
    const std::string out = t / "out";
    EXPECT_HAS(error(options_for(t / "missing"), out), "missing");
    EXPECT_HAS(error(options_for(t.put("b", std::string("\0", 1))), out), "binary");
    EXPECT_HAS(error(options_for(t.put("l", "\xe9")), out), "not valid UTF-8");
    EXPECT_HAS(error(options_for(t.put("e", "")), out), "empty");
    EXPECT_HAS(error(options_for(t.put("s", "x")), out), "a single document this short");
    PrepareOptions o = options_for(t / "c");
    o.vocab_size = 30'000;
    EXPECT_HAS(error(o, out), "the largest possible is");
    o = options_for(t / "c");
    o.vocab_size = 10;
    EXPECT_HAS(error(o, out), "vocabulary size 10");
    o = options_for(t / "c");
    o.val_fraction = 1.5;
    EXPECT_HAS(error(o, out), "held-out share 1.5");
    o = options_for(t / "c");
    o.tokenizer = t / "c/000.c";
    EXPECT_HAS(error(o, out), "not a SentencePiece model");
    t.put("plain", "x");
    EXPECT_HAS(error(options_for(t / "c"), t / "plain/out"), "plain");
    EXPECT_HAS(error(options_for(t / "c"), t / "plain"), "exists already");
    t.put("full/file", "precious");
    o = options_for(t / "c");
    o.replace = true;
    EXPECT_HAS(error(o, t / "full"), "exists already");
    EXPECT_EQ(slurp(t / "full/file"), "precious") << "only a dataset is ever replaced";
}

TEST(Prepare, CancelledLeavesNothing) {
    const TempFolder t;
    put_corpus(t, 10);
    for (int after = 0; after < 22; after += 3) {
        PrepareOptions o = options_for(t / "c");
        int polls = 0;
        o.cancelled = [&] { return polls++ >= after; };
        EXPECT_THROW(prepare(o, t / "out", nullptr), RunError) << after;
        EXPECT_EQ(std::distance(std::filesystem::directory_iterator(t.path()), {}), 1);
    }
}

TEST(Prepare, KilledLeavesNoDatasetAndTheNextRunCleansUp) {
    const TempFolder t;
    put_corpus(t, 10);
    const pid_t child = ::fork();
    if (child == 0) {
        PrepareOptions o = options_for(t / "c");
        o.threads = 1;
        o.cancelled = [&] {
            // Killed once the tokenizer is written and encoding has begun.
            for (const auto& entry : std::filesystem::recursive_directory_iterator(t.path()))
                if (entry.path().extension() == ".bin") ::raise(SIGKILL);
            return false;
        };
        prepare(o, t / "out", nullptr);
        ::_exit(0);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status)) << "the child should have been killed half-way";
    EXPECT_FALSE(std::filesystem::exists(t / "out"));
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(t.path()), {}), 2) << "its left-over";
    prepare(options_for(t / "c"), t / "out", nullptr);
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(t.path()), {}), 2) << "corpus and dataset only";
    Dataset::open(t / "out");
}

TEST(Prepare, ReusesUntilSomethingChanges) {
    const TempFolder t;
    put_corpus(t, 5);
    PrepareOptions o = options_for(t / "c");
    const Prepared first = prepare_if_needed(o, t / "cache", nullptr);
    EXPECT_FALSE(first.reused);
    o.threads = 1;
    const Prepared second = prepare_if_needed(o, t / "cache", nullptr);
    EXPECT_TRUE(second.reused);
    EXPECT_EQ(second.folder, first.folder);
    o.vocab_size = kVocab + 1;
    EXPECT_FALSE(prepare_if_needed(o, t / "cache", nullptr).reused);
    o.vocab_size = kVocab;
    put_corpus(t, 6);
    EXPECT_FALSE(prepare_if_needed(o, t / "cache", nullptr).reused);
    // A dataset is taken as it is.
    const Prepared same = prepare_if_needed(options_for(first.folder), t / "cache", nullptr);
    EXPECT_TRUE(same.reused);
    EXPECT_EQ(same.folder, first.folder);
}

TEST(Prepare, DamagedDatasetInTheCacheIsMadeAgain) {
    const TempFolder t;
    put_corpus(t, 5);
    const PrepareOptions o = options_for(t / "c");
    const std::string folder = prepare_if_needed(o, t / "cache", nullptr).folder;
    const auto good = contents(folder);
    std::filesystem::resize_file(join_path(folder, "train_000000.bin"), 2000);
    EXPECT_FALSE(prepare_if_needed(o, t / "cache", nullptr).reused);
    EXPECT_EQ(contents(folder), good);
}

TEST(Prepare, SaysWhatItSkipped) {
    const TempFolder t;
    put_corpus(t, 4);
    t.put("c/picture.png", std::string("\x89PNG\0", 5));
    std::FILE* log = std::tmpfile();
    prepare(options_for(t / "c"), t / "out", log);
    std::string text(static_cast<std::size_t>(std::ftell(log)), '\0');
    std::rewind(log);
    ASSERT_EQ(std::fread(text.data(), 1, text.size(), log), text.size());
    std::fclose(log);
    EXPECT_HAS(text, "4 documents; skipped 1 binary file");
    EXPECT_EQ(Dataset::open(t / "out").info().skipped, "skipped 1 binary file");
}

}  // namespace
}  // namespace fiedler::test
