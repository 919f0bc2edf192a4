// The runtime as other programs get it, without the engine: also built for aarch64 and run under qemu-user. The model's
// numbers come from a generator, so that they are the same on every machine, and so are its logits, up to rounding.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>

#include "engine/params.h"
#include "engine/rng.h"
#include "infer/session.h"
#include "tests/engine/temp_folder.h"

extern "C" int fiedler_header_test(const char* path);

namespace fiedler::test {
namespace {

// A SentencePiece model of bytes, letters and a few merges, written as Protocol Buffers by hand.
std::string tokenizer_model() {
    std::string model;
    const auto piece = [&](const std::string& text, float score, int type) {
        std::string body = "\x0a" + std::string(1, static_cast<char>(text.size())) + text + "\x15";
        body.append(reinterpret_cast<const char*>(&score), 4);
        body += "\x18" + std::string(1, static_cast<char>(type));
        model += "\x0a" + std::string(1, static_cast<char>(body.size())) + body;
    };
    piece("<unk>", 0, 2);
    piece("<|endoftext|>", 0, 3);
    piece("\n", 0, 4);
    for (int b = 0; b < 256; ++b) {
        char text[8];
        std::snprintf(text, sizeof text, "<0x%02X>", b);
        piece(text, 0, 6);
    }
    piece("in", -1, 1);
    piece("int", -2, 1);
    piece("\xe2\x96\x81m", -3, 1);
    for (char c = 'a'; c <= 'z'; ++c) piece(std::string(1, c), -10 - float(c - 'a'), 1);
    piece("\xe2\x96\x81", -50, 1);
    model += std::string("\x12\x05\x18\x02\xd0\x02\x01", 7);  // trainer: byte pairs, eos 1
    model += std::string("\x1a\x02\x18\x00", 4);              // normalizer: no space before
    return model;
}

enum class Form { f32, int8, int4 };
// A model in `folder`, its matrices in the form asked for.
std::string make_model(const TempFolder& folder, Form form) {
    Config c;
    for (const auto& [name, value] : {std::pair{"pattern", "sbd"},
                                      {"layers", "3"},
                                      {"channels", "96"},
                                      {"heads", "3"},
                                      {"scalars", "2"},
                                      {"vocab", "300"},
                                      {"context", "128"},
                                      {"spectral-dims", "5"},
                                      {"init-std", "0.1"}})
        set_value(c, *find_knob(name), {value}, name);
    const ModelSpec spec = model_spec(c);
    const ParamTable table(spec);
    std::vector<float> values(static_cast<std::size_t>(table.elements)), u(300 * 5);
    initialise(table, spec, 11, values.data());
    for (std::size_t i = 0; i < u.size(); ++i) u[i] = static_cast<float>(rng::normal(2, 3, i));
    for (const ParamTensor& t : table.tensor)  // away from the start, where convolutions are the identity
        for (std::int64_t i = 0; i < t.size(); ++i)
            values[static_cast<std::size_t>(t.offset + i)] +=
                0.05f * static_cast<float>(rng::normal(4, hash_bytes(t.name), static_cast<std::uint64_t>(i)));
    const std::string tokenizer = tokenizer_model();
    std::vector<WeightTensor> tensors;
    std::vector<std::unique_ptr<std::byte[]>> memory;
    const auto add = [&](const std::string& name, const std::vector<std::int64_t>& shape, const float* data,
                         bool matrix) {
        tensors.push_back({name, "f32", shape, data});
        if (form == Form::f32 || !matrix) return;
        const QuantShape s{form == Form::int8 ? Quant::int8 : Quant::int4, shape[0], shape[1]};
        memory.push_back(std::make_unique<std::byte[]>(static_cast<std::size_t>(s.bytes())));
        quantise(Cpu{1}, {data, s.rows, s.cols}, s, QuantSearch::least_error, memory.back().get());
        tensors.back().dtype = form == Form::int8 ? "q8" : "q4";
        tensors.back().data = memory.back().get();
    };
    for (const ParamTensor& t : table.tensor) {
        const bool matrix = t.cols > 8 && t.rows > 24 && t.name.find("scalars") == t.name.npos;
        add(t.name, t.shape(), values.data() + t.offset, matrix);
    }
    add("spectral.U", {300, 5}, u.data(), true);
    tensors.push_back({"tokenizer.model", "u8", {static_cast<std::int64_t>(tokenizer.size())}, tokenizer.data()});
    const std::string path = folder / ("model" + std::to_string(static_cast<int>(form)) + ".fdl");
    write_weights(path, {{"model", to_json(c, KnobGroup::model)}}, tensors);
    return path;
}

std::vector<std::int32_t> some_tokens(int n) {
    std::vector<std::int32_t> t;
    for (int i = 0; i < n; ++i)
        t.push_back(static_cast<std::int32_t>(rng::below(290, 7, 8, static_cast<std::uint64_t>(i))));
    return t;
}
std::vector<float> logits_of(const std::string& path, const SessionOptions& o, int tokens = 100) {
    const InferModel model(path);
    Session s(model, o);
    s.feed(some_tokens(tokens));
    return s.logits();
}
double relative_error(const std::vector<float>& a, const std::vector<float>& b) {
    double difference = 0, size = 0;
    for (std::size_t i = 0; i < b.size(); ++i) {
        difference += std::pow(double(a[i]) - double(b[i]), 2);
        size += std::pow(double(b[i]), 2);
    }
    return std::sqrt(difference / size);
}

TEST(Runtime, LogitsAreThoseOfOtherMachines) {
    const TempFolder folder;
    const std::string golden = std::string(FIEDLER_SOURCE_DIR) + "/tests/golden/infer_logits.txt";
    const bool write = std::getenv("FIEDLER_WRITE_GOLDEN") != nullptr;
    std::ofstream out;
    if (write) out.open(golden);
    std::ifstream in(golden);
    for (const Form form : {Form::f32, Form::int8, Form::int4}) {
        const std::vector<float> logits =
            logits_of(make_model(folder, form), {.threads = 1, .cache = CacheKind::exact});
        std::vector<float> expected(8), first(logits.begin(), logits.begin() + 8);
        for (std::size_t i = 0; i < 8; ++i) {
            if (write) out << logits[i] << (i < 7 ? " " : "\n");
            ASSERT_TRUE(write || in >> expected[i]);
        }
        // f32 sums in another order; a quantised activation may round to its other neighbour here and there.
        EXPECT_TRUE(write || relative_error(first, expected) < (form == Form::f32 ? 1e-4 : 2e-2));
    }
}

TEST(Runtime, IntegersStayNearTheirWeights) {
    const TempFolder folder;
    const std::vector<float> f32 = logits_of(make_model(folder, Form::f32), {.threads = 1, .cache = CacheKind::exact});
    const double int8 = relative_error(logits_of(make_model(folder, Form::int8), {.threads = 1}), f32);
    const double int4 = relative_error(logits_of(make_model(folder, Form::int4), {.threads = 1}), f32);
    EXPECT_GT(int8, 1e-5);
    EXPECT_LT(int8, 0.03);
    EXPECT_LT(int8, int4);
    EXPECT_LT(int4, 0.4);
}

TEST(Runtime, PiecesThreadsAndInstructionSetsChangeRoundingOnly) {
    const TempFolder folder;
    const std::string plain = make_model(folder, Form::f32), path = make_model(folder, Form::int8);
    const std::vector<float> exact = logits_of(plain, {.threads = 1, .cache = CacheKind::exact, .batch = 128});
    for (const std::int64_t batch : {1, 7, 64})
        EXPECT_LT(relative_error(logits_of(plain, {.threads = 1, .cache = CacheKind::exact, .batch = batch}), exact),
                  1e-4)
            << batch;
    const std::vector<float> whole = logits_of(path, {.threads = 1});
    EXPECT_EQ(logits_of(path, {.threads = 3}), whole);
    EXPECT_LT(relative_error(logits_of(path, {.threads = 1, .batch = 1}), whole), 0.02);
    EXPECT_LT(relative_error(logits_of(path, {.threads = 1, .batch = 7}), whole), 0.02);
    for (const char* target : quantised_targets()) {
        ASSERT_TRUE(choose_quantised_target(target));
        EXPECT_LT(relative_error(logits_of(path, {.threads = 1}), whole), 0.02) << target;
        choose_quantised_target("");
    }
}

TEST(Runtime, HeaderIsC99AndWorksFromC) {
    const TempFolder folder;
    for (const Form form : {Form::f32, Form::int8, Form::int4})
        EXPECT_EQ(fiedler_header_test(make_model(folder, form).c_str()), 0);
}

TEST(Runtime, TokenizerMergesByScore) {
    const PieceTokenizer t(tokenizer_model(), "test");
    EXPECT_EQ(t.separator(), 1);
    const auto pieces = [&](const std::string& text) {
        std::string all;
        for (const std::int32_t id : t.encode(text)) all += t.pieces()[static_cast<std::size_t>(id)].text + "|";
        return all;
    };
    EXPECT_EQ(pieces("int main\n"), "int|\xe2\x96\x81m|a|in|\n|");
    EXPECT_EQ(pieces("A\xff"), "<0x41>|<0xFF>|");
    EXPECT_EQ(t.decode(t.encode("int main\n\xff\xe2\x96\x81")), "int main\n\xff\xe2\x96\x81");
}

// The program of infer/example.c. FIEDLER_RUN: what runs programs of this architecture, if not the machine itself.
TEST(Runtime, TheExampleGenerates) {
    const TempFolder folder;
    const char* runner = std::getenv("FIEDLER_RUN");
    const std::string example = (runner ? std::string(runner) + " " : "") + FIEDLER_EXAMPLE;
    EXPECT_EQ(std::system((example + " 2> /dev/null").c_str()) / 256, 2);  // says how it is used
    const std::string command = example + " " + make_model(folder, Form::int8) + " 'int main' 12 > " + (folder / "out");
    ASSERT_EQ(std::system(command.c_str()), 0);
    std::ifstream in(folder / "out");
    const std::string text((std::istreambuf_iterator<char>(in)), {});
    EXPECT_EQ(text.substr(0, 8), "int main");
    EXPECT_GT(text.size(), 10u);
}

}  // namespace
}  // namespace fiedler::test
