#include "engine/dataset.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <set>

#include "engine/files.h"
#include "engine/prepare.h"
#include "tests/engine/temp_folder.h"

namespace fiedler::test {
namespace {

using Tokens = std::vector<std::int32_t>;

void put_shard(const std::string& path, const Tokens& tokens, std::int32_t vocab) {
    ShardWriter writer(path, vocab);
    writer.append(tokens);
    writer.finish();
}
Tokens counting(std::int32_t n) {
    Tokens tokens(static_cast<std::size_t>(n));
    std::iota(tokens.begin(), tokens.end(), 0);
    return tokens;
}
// A dataset whose training tokens are 0, 1, 2, ... over several shards, so that a token is its own position.
Dataset counting_dataset(const TempFolder& t, std::int32_t train, std::int32_t val = 100) {
    const Tokens all = counting(train);
    const auto third = all.begin() + train / 3;
    std::filesystem::create_directories(t / "d");
    put_shard(t / "d/train_0.bin", Tokens(all.begin(), third), 60000);
    put_shard(t / "d/train_1.bin", Tokens(third, third + 1), 60000);
    put_shard(t / "d/train_2.bin", Tokens(third + 1, all.end()), 60000);
    put_shard(t / "d/val_0.bin", counting(val), 60000);
    return Dataset::open(t / "d");
}
TrainWindows windows(std::int64_t rows, std::int64_t length, std::uint64_t seed = 1) {
    TrainWindows w;
    w.rows = rows;
    w.length = length;
    w.seed = seed;
    return w;
}

TEST(Dataset, EpochsShuffleAWindowGridWithAPhase) {
    const TempFolder t;
    const Dataset data = counting_dataset(t, 1000);
    constexpr std::int64_t kLength = 16;
    const std::int64_t per_epoch = data.windows_per_epoch(kLength);
    EXPECT_EQ(per_epoch, 61);
    Batch batch;
    std::set<std::int64_t> phases;
    std::set<std::vector<std::int64_t>> orders;
    for (std::int64_t epoch = 0; epoch < 8; ++epoch) {
        std::vector<std::int64_t> starts;
        for (std::int64_t w = 0; w < per_epoch; ++w) {
            data.train_batch(epoch * per_epoch + w, windows(1, kLength), batch);
            for (std::size_t i = 0; i < kLength; ++i) {
                ASSERT_EQ(batch.inputs[i], batch.inputs[0] + static_cast<std::int32_t>(i)) << "tokens in a row";
                ASSERT_EQ(batch.targets[i], batch.inputs[i] + 1) << "the next token";
            }
            starts.push_back(batch.inputs[0]);
        }
        const std::int64_t phase = *std::min_element(starts.begin(), starts.end());
        phases.insert(phase);
        for (std::int64_t& s : starts) s -= phase;
        orders.insert(starts);
        std::sort(starts.begin(), starts.end());
        for (std::int64_t w = 0; w < per_epoch; ++w)
            ASSERT_EQ(starts[static_cast<std::size_t>(w)], w * kLength) << "every window once";
    }
    EXPECT_GT(phases.size(), 3u);
    EXPECT_EQ(orders.size(), 8u);
}

TEST(Dataset, EveryTokenIsSometimesATarget) {
    const TempFolder t;
    const Dataset data = counting_dataset(t, 55);
    std::set<std::int32_t> seen;
    Batch batch;
    for (std::int64_t g = 0; g < 600; ++g) {
        data.train_batch(g, windows(1, 10), batch);
        seen.insert(batch.targets.begin(), batch.targets.end());
    }
    EXPECT_EQ(seen.size(), 54u);
    EXPECT_EQ(*seen.rbegin(), 54);
}

TEST(Dataset, CursorIsTheWholeState) {
    const TempFolder t;
    const Dataset data = counting_dataset(t, 700), again = Dataset::open(t / "d");
    Batch a, b;
    for (std::int64_t cursor = 0; cursor < 300; cursor += 7) {
        data.train_batch(cursor, windows(7, 16), a);
        again.train_batch(cursor, windows(7, 16), b);
        EXPECT_EQ(a.inputs, b.inputs);
        EXPECT_EQ(a.targets, b.targets);
        again.train_batch(cursor, windows(7, 16, 2), b);
        EXPECT_NE(a.inputs, b.inputs) << "another seed, another order";
    }
}

TEST(Dataset, RanksShareTheWindows) {
    const TempFolder t;
    const Dataset data = counting_dataset(t, 2000);
    Batch one, part;
    data.train_batch(12, windows(6, 8), one);
    for (int rank = 0; rank < 3; ++rank) {
        TrainWindows w = windows(2, 8);
        w.rank = rank;
        w.world = 3;
        data.train_batch(12, w, part);
        for (int row = 0; row < 2; ++row)
            for (int i = 0; i < 8; ++i)
                EXPECT_EQ(part.inputs[static_cast<std::size_t>(row * 8 + i)],
                          one.inputs[static_cast<std::size_t>((row * 3 + rank) * 8 + i)]);
    }
}

TEST(Dataset, SmallestCorpusAndOneTokenLess) {
    const TempFolder t;
    const Dataset data = counting_dataset(t, 33);
    Batch batch;
    data.train_batch(0, windows(2, 16), batch);
    data.train_batch(5, windows(1, 32), batch);
    EXPECT_EQ(batch.inputs, counting(32));
    const std::string message = input_error_of([&] { data.train_batch(0, windows(3, 11), batch); });
    EXPECT_HAS(message, "smaller than one batch");
    EXPECT_HAS(message, "33 training tokens");
    EXPECT_HAS(message, "3 x 11 + 1 = 34");
}

TEST(Dataset, ValidationWindowsDoNotOverlap) {
    const TempFolder t;
    const Dataset data = counting_dataset(t, 100, 101);
    ASSERT_EQ(data.val_windows(10), 10);
    Batch batch;
    Tokens seen;
    for (std::int64_t first = 0; first < 10; first += 4) {
        data.val_batch(first, 10, 4, 10, false, batch);
        EXPECT_EQ(batch.real_rows, first == 8 ? 2 : 4);
        for (std::size_t i = 0; i < batch.inputs.size(); ++i) {
            if (static_cast<std::int64_t>(i) >= batch.real_rows * 10) {
                EXPECT_EQ(batch.targets[i], -1) << "padding is ignored by the loss";
                continue;
            }
            EXPECT_EQ(batch.targets[i], batch.inputs[i] + 1);
            seen.push_back(batch.inputs[i]);
        }
    }
    EXPECT_EQ(seen, counting(100));
    EXPECT_NEAR(data.val_entropy(10, 10), std::log(100.0), 1e-12);
    // Capped: evenly spaced.
    ASSERT_EQ(data.val_windows(10, 3), 3);
    data.val_batch(0, 3, 3, 10, false, batch);
    EXPECT_EQ(batch.inputs[0], 0);
    EXPECT_EQ(batch.inputs[10], 30);
    EXPECT_EQ(batch.inputs[20], 60);
    EXPECT_EQ(data.val_windows(10, 99), 10);
    EXPECT_HAS(input_error_of([&] { data.val_windows(101); }), "one window needs 101 + 1");
}

std::string llmc(const std::vector<std::uint16_t>& tokens) {
    std::int32_t header[256] = {20240520, 1, static_cast<std::int32_t>(tokens.size())};
    return std::string(reinterpret_cast<const char*>(header), sizeof header) +
           std::string(reinterpret_cast<const char*>(tokens.data()), tokens.size() * 2);
}

TEST(Dataset, LlmCShards) {
    const TempFolder t;
    std::vector<std::uint16_t> tokens;
    for (int i = 0; i < 1000; ++i) tokens.push_back(i % 100 == 0 ? 50256 : static_cast<std::uint16_t>(i));
    t.put("d/fineweb_train_000001.bin", llmc(tokens));
    t.put("d/fineweb_val_000000.bin", llmc({50256, 1, 2, 3}));
    t.put("d/readme.txt", "not a shard");
    EXPECT_TRUE(is_dataset(t / "d"));
    const Dataset data = Dataset::open(t / "d");
    EXPECT_EQ(data.info().vocab_size, 50257);
    EXPECT_EQ(data.info().separator, 50256);
    EXPECT_EQ(data.train().size(), 1000);
    EXPECT_EQ(data.val().size(), 4);
    EXPECT_NEAR(data.info().unigram_entropy, std::log(4.0), 1e-12);
    EXPECT_EQ(data.tokenizer(), nullptr);
    Batch batch;
    data.val_batch(0, 1, 1, 3, false, batch);
    EXPECT_EQ(batch.inputs, (Tokens{50256, 1, 2}));
    EXPECT_FALSE(data.target_bytes(batch).has_value());
    // One file: its last twentieth is held out.
    const Dataset single = Dataset::open(t / "d/fineweb_train_000001.bin");
    EXPECT_EQ(single.train().size(), 950);
    EXPECT_EQ(single.val().size(), 50);
    Tokens first(1);
    single.val().copy(0, 1, first.data());
    EXPECT_EQ(first[0], 950);
    EXPECT_HAS(input_error_of([&] { Dataset::open(t / "missing.bin"); }), "missing.bin");
    std::filesystem::create_directory(t / "empty");
    EXPECT_FALSE(is_dataset(t / "empty"));
    EXPECT_HAS(input_error_of([&] { Dataset::open(t / "empty"); }), "not a dataset");
}

void expect_sequences(const Batch& batch, const Tokens& offsets) {
    EXPECT_EQ(batch.offsets, offsets);
    const Packed p = batch.packed();
    ASSERT_EQ(p.count + 1, static_cast<std::int32_t>(offsets.size()));
    ASSERT_EQ(p.tokens, offsets.back());
    for (std::int32_t s = 0; s < p.count; ++s)
        for (std::int32_t i = p.sequence_begin(s); i < p.sequence_end(s); ++i) {
            EXPECT_EQ(p.first(i), p.sequence_begin(s));
            EXPECT_EQ(p.last(i), p.sequence_end(s));
        }
}

TEST(Dataset, DocumentMaskCutsAtSeparatorsThatLead) {
    const TempFolder t;
    t.put("d/x_train.bin", llmc(std::vector<std::uint16_t>(50, 7)));
    t.put("d/x_val.bin", llmc({50256, 1, 2, 50256, 4, 5, 50256, 50256, 8}));
    const Dataset data = Dataset::open(t / "d");
    Batch batch;
    data.val_batch(0, 2, 3, 4, true, batch);
    expect_sequences(batch, {0, 3, 4, 6, 7, 8, 12});  // the padded row is one sequence
    data.val_batch(0, 2, 2, 4, false, batch);
    EXPECT_EQ(batch.packed().length, 4);
}

class PreparedDataset : public testing::Test {
  protected:
    void SetUp() override {
        for (int i = 0; i < 40; ++i) t_.put(fmt::format("c/{}", i), code_like(200 + 37 * i, i));
        PrepareOptions o;
        o.corpus.paths = {t_ / "c"};
        o.vocab_size = 400;
        o.val_fraction = 0.25;
        prepare(o, t_ / "d", nullptr);
    }
    TempFolder t_;
};

TEST_F(PreparedDataset, DocumentMaskCutsAfterSeparators) {
    const Dataset data = Dataset::open(t_ / "d");
    Batch batch;
    TrainWindows w = windows(4, 512);
    w.document_mask = true;
    data.train_batch(0, w, batch);
    Tokens offsets;
    for (std::int32_t i = 0; i < 4 * 512; ++i)
        if (i % 512 == 0 || batch.inputs[static_cast<std::size_t>(i - 1)] == 1) offsets.push_back(i);
    offsets.push_back(4 * 512);
    EXPECT_GT(offsets.size(), 6u);
    expect_sequences(batch, offsets);
}

TEST_F(PreparedDataset, BytesOfTargetsAreBytesOfText) {
    const Dataset data = Dataset::open(t_ / "d");
    const std::int64_t length = data.val().size() - 1;
    Batch batch;
    data.val_batch(0, data.val_windows(length), 2, length, false, batch);
    Tokens first(1);
    data.val().copy(0, 1, first.data());
    EXPECT_EQ(*data.target_bytes(batch), data.info().val.bytes - data.tokenizer()->byte_length(first[0]));
    EXPECT_NEAR(data.val_entropy(1, length), data.info().unigram_entropy, 1e-2);
}

TEST_F(PreparedDataset, RefusesDamage) {
    const std::string good = slurp(t_ / "d/dataset.json");
    const auto error = [&](const std::string& from, const std::string& to) {
        std::string json = good;
        EXPECT_NE(json.find(from), json.npos) << from;
        json.replace(json.find(from), from.size(), to);
        t_.put("d/dataset.json", json);
        const std::string message = input_error_of([&] { Dataset::open(t_ / "d"); });
        EXPECT_HAS(message, t_ / "d");
        t_.put("d/dataset.json", good);
        return message;
    };
    EXPECT_HAS(error("\"version\": 1", "\"version\": 2"), "newer");
    EXPECT_HAS(error("fiedler dataset", "something else"), "not the manifest");
    EXPECT_HAS(error("\"vocab_size\": 400", "\"vocab_size\": 401"), "has 400 pieces");
    EXPECT_HAS(error("\"separator\"", "\"seperator\""), "corrupt");
    EXPECT_HAS(error("train_000000.bin", "../train_000000.bin"), "not a plain file name");
    EXPECT_HAS(error("train_000000.bin", "val_000000.bin"), "does not belong");
    EXPECT_HAS(error("{", ""), "corrupt");
    std::string model = slurp(t_ / "d/tokenizer.model");
    model[model.size() / 2] ^= 1;
    t_.put("d/tokenizer.model", model);
    EXPECT_HAS(input_error_of([&] { Dataset::open(t_ / "d"); }), "tokenizer.model");
    std::filesystem::remove(t_ / "d/val_000000.bin");
    EXPECT_HAS(input_error_of([&] { Dataset::open(t_ / "d"); }), "tokenizer.model");
}

}  // namespace
}  // namespace fiedler::test
