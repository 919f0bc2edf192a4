// `fiedler export` and `fiedler import`: every format and back, and files that are not what they should be.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstring>

#include "engine/error.h"
#include "engine/gguf.h"
#include "engine/piece_tokenizer.h"
#include "engine/safetensors.h"
#include "engine/tokenizer.h"
#include "tests/engine/command_run.h"

namespace fiedler::test {
namespace {

using CommandExport = CommandTest;

std::string said(const std::function<void()>& f) {
    try {
        f();
    } catch (const InputError& e) {
        return e.what();
    }
    return "no error";
}

TEST_F(CommandExport, EveryFormatComesBackBitForBit) {
    trained("run", {{"data", "corpus"}, {"steps", "3"}, {"spectral-dims", "6"}, {"spectral-source", "random"}});
    for (const char* dtype : {"f32", "bf16"}) {
        SCOPED_TRACE(dtype);
        const std::string name = dtype;
        for (const Words& more : {Words{"--out", name + ".fdl"}, Words{"--format", "gguf", "--out", name + ".gguf"},
                                  Words{"--format", "safetensors", "--out", name + "-folder"}}) {
            Words words = {"export", "run", "--dtype", dtype};
            words.insert(words.end(), more.begin(), more.end());
            const Outcome o = run(words);
            ASSERT_EQ(o.code, 0) << o.err;
            EXPECT_HAS(o.out, more.back());
        }
        for (const auto& from : {name + ".gguf", name + "-folder"}) {
            const Outcome o = run({"import", from, "--dtype", dtype, "--out", "back.fdl"});
            ASSERT_EQ(o.code, 0) << o.err;
            EXPECT_TRUE(equal_files("back.fdl", name + ".fdl")) << from;
        }
    }
    // The tokenizer is inside: the file alone generates, and is evaluated on text.
    const Words how = {"--prompt", "static int", "--max-tokens", "12", "--sampling-temperature",
                       "0",        "--device",   "cpu"};
    Words one = {"generate", "f32.fdl"}, other = {"generate", "run"};
    one.insert(one.end(), how.begin(), how.end());
    other.insert(other.end(), how.begin(), how.end());
    EXPECT_EQ(run(one).out, run(other).out);
    const Outcome e = run({"eval", "f32.fdl", "--data", "corpus/f100.c", "--data-cache", "cache", "--device", "cpu"});
    const Outcome same = run({"eval", "run", "--data", "corpus/f100.c", "--data-cache", "cache", "--device", "cpu"});
    EXPECT_EQ(e.code, 0) << e.err;
    EXPECT_EQ(e.out.substr(0, e.out.find("tokens")), same.out.substr(0, same.out.find("tokens")));
    EXPECT_EQ(run({"inspect", "f32.fdl"}).code, 0);
}

TEST_F(CommandExport, SaysWhatIsWrong) {
    trained("run", {{"data", "corpus"}, {"steps", "1"}});
    const auto refused = [&](const Words& words, const std::string& what) {
        const Outcome o = run(words);
        EXPECT_EQ(o.code, 2) << o.err;
        EXPECT_HAS(o.err, what);
        EXPECT_EQ(std::count(o.err.begin(), o.err.end(), '\n'), 1) << o.err;
    };
    refused({"export", "run"}, "out: name the file");
    refused({"export", "run", "--out", "none/model.fdl"}, "none is no folder");
    refused({"export", "nothing", "--out", "m.fdl"}, "there is no such model");
    refused({"import", "nothing", "--out", "m.fdl"}, "there is no such file");
    ASSERT_EQ(run({"export", "run", "--format", "safetensors", "--out", "folder"}).code, 0);
    refused({"export", "run", "--format", "safetensors", "--out", "folder"}, "exists already");
    EXPECT_FALSE(std::filesystem::exists(path("m.fdl")));

    Json config = Json::parse(slurp(path("folder/config.json")));
    config["fiedler"]["channels"] = 64;
    world_.put("folder/config.json", config.dump());
    refused({"import", "folder", "--out", "m.fdl"},
            "'embedding.weight' has shape [512, 32], and the model needs [512, 64]");
    config["fiedler"]["channels"] = 32;
    config["fiedler"]["layers"] = 1;
    config["fiedler"]["pattern"] = "s";
    world_.put("folder/config.json", config.dump());
    refused({"import", "folder", "--out", "m.fdl"}, "'layers.1.attn.v.weight' is not one of the model");
    config["fiedler"]["layers"] = 4;
    config["fiedler"]["pattern"] = "sb";
    world_.put("folder/config.json", config.dump());
    refused({"import", "folder", "--out", "m.fdl"}, "has no tensor 'layers.2.attn.v.weight'");
    world_.put("folder/config.json", "{}");
    refused({"import", "folder", "--out", "m.fdl"}, "has no object \"fiedler\"");
    std::filesystem::remove(path("folder/config.json"));
    refused({"import", "folder", "--out", "m.fdl"}, "folder/config.json: is not there");
}

// A file of one tensor [2, 2], with its header changed.
std::string safetensors_of(const std::string& header, std::size_t bytes = 16) {
    std::string file(8, '\0');
    const std::uint64_t length = header.size();
    std::memcpy(file.data(), &length, 8);
    return file + header + std::string(bytes, '\1');
}

TEST(Safetensors, RefusesWhatIsNotWhole) {
    TempFolder folder;
    const auto error = [&](const std::string& bytes) {
        folder.put("x.safetensors", bytes);
        return said([&] { SafetensorsFile file(folder / "x.safetensors"); });
    };
    const std::string good = R"({"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}})";
    EXPECT_EQ(error(safetensors_of(good)), "no error");
    EXPECT_HAS(error(""), "the header's length");
    EXPECT_HAS(error(std::string(8, '\xff')), "its header would have");
    EXPECT_HAS(error(safetensors_of(good).substr(0, 20)), "the header");
    EXPECT_HAS(error(safetensors_of(good, 15)), "its tensors have 16 bytes, and 15 are there");
    EXPECT_HAS(error(safetensors_of(good, 17)), "its tensors have 16 bytes, and 17 are there");
    EXPECT_HAS(error(safetensors_of("[]")), "not JSON");
    EXPECT_HAS(error(safetensors_of(R"({"a":{"dtype":"F32","shape":[2,2],"data_offsets":[4,20]}})", 20)),
               "leaves a gap");
    EXPECT_HAS(error(safetensors_of(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,16]}})")),
               "does not give its 16 bytes");
    EXPECT_HAS(error(safetensors_of(R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}})")),
               "does not give its 16 bytes");
    EXPECT_HAS(error(safetensors_of(R"({"a":{"dtype":"F32","shape":[-2,-2],"data_offsets":[0,16]}})")),
               "does not give");
    EXPECT_HAS(error(safetensors_of(R"({"a":{"dtype":"I8","shape":[16],"data_offsets":[0,16]}})")), "is of type I8");
    EXPECT_HAS(error(safetensors_of(R"({"a":{"dtype":"F32","shape":[2,2]}})")), "lacks dtype, shape or data_offsets");
    EXPECT_HAS(error(safetensors_of(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}})")),
               "no two data_offsets");
}

TEST(Gguf, RefusesWhatIsNotWhole) {
    TempFolder folder;
    const float values[4] = {1, 2, 3, 4};
    const std::vector<WeightTensor> tensors = {{"a", "f32", {2, 2}, values}};
    write_gguf(folder / "good.gguf", {{"text", GgufValue::of_text("hello")}, {"list", GgufValue::of_texts({"x", "y"})}},
               tensors);
    const std::string good = slurp(folder / "good.gguf");
    const auto error = [&](const std::string& bytes) {
        folder.put("x.gguf", bytes);
        return said([&] { GgufFile file(folder / "x.gguf"); });
    };
    {
        const GgufFile file(folder / "good.gguf");
        EXPECT_EQ(file.texts().at("text"), "hello");
        ASSERT_EQ(file.tensors().size(), 1u);
        EXPECT_EQ(file.tensors()[0].shape, (std::vector<std::int64_t>{2, 2}));
        EXPECT_EQ(std::memcmp(file.tensors()[0].data, values, 16), 0);
    }
    // Padding up to 32 follows the last tensor: without it the file is still whole.
    for (std::size_t n = 0; n < good.size() - 16; ++n)
        EXPECT_NE(error(good.substr(0, n)), "no error") << n << " of " << good.size() << " bytes";
    const auto changed = [&](std::size_t at, std::uint64_t value) {
        std::string bytes = good;
        std::memcpy(bytes.data() + at, &value, 8);
        return error(bytes);
    };
    EXPECT_HAS(changed(8, 1ull << 60), "truncated or corrupt");   // tensors
    EXPECT_HAS(changed(16, 1ull << 60), "truncated or corrupt");  // values
    EXPECT_HAS(changed(24, ~0ull), "a text");                     // length of the first key
    EXPECT_HAS(error("GGUF" + std::string(4, '\7') + std::string(40, '\0')), "version");
}

TEST_F(CommandExport, PieceTokenizerGivesTheTokensOfSentencePiece) {
    const std::string model = slurp(path(dataset() + "/tokenizer.model"));
    const Tokenizer theirs = Tokenizer::from_model(model, "test");
    const PieceTokenizer ours(model, "test");
    ASSERT_EQ(ours.vocab_size(), theirs.vocab_size());
    EXPECT_EQ(ours.separator(), theirs.separator());
    for (std::int32_t t = 0; t < ours.vocab_size(); ++t) EXPECT_EQ(ours.bytes(t), theirs.piece(t)) << t;
    std::vector<std::string> texts = {"",
                                      " ",
                                      "  a  b ",
                                      "\n\n\n\t\t\t\t\t\r\n\r",
                                      std::string("nul\0here", 8),
                                      "\xe2\x96\x81_\xe2\x96",
                                      "\xff\xfe caf\xc3\xa9 \xe6\xbc\xa2",
                                      c_text(40, 3),
                                      "aaaaaaaaaaaaaaaaaaaaaaaa",
                                      "<0x41><|endoftext|><unk>"};
    std::string noise;
    for (std::uint64_t i = 0; i < 4000; ++i) noise += static_cast<char>(rng::below(i % 3 ? 128 : 256, 5, 6, i));
    texts.push_back(noise);
    for (const std::string& text : texts) {
        EXPECT_EQ(ours.encode(text), theirs.encode(text)) << text.substr(0, 60);
        EXPECT_EQ(ours.decode(ours.encode(text)), text);
    }
}

TEST_F(CommandExport, PieceTokenizerRefusesWhatIsNoModel) {
    const std::string model = slurp(path(dataset() + "/tokenizer.model"));
    const auto error = [](const std::string& bytes) { return said([&] { PieceTokenizer t(bytes, "t"); }); };
    EXPECT_EQ(error(model), "no error");
    EXPECT_HAS(error(""), "is no byte-pair model");
    EXPECT_HAS(error("hello, world"), "t: ");
    for (std::size_t n = 1; n < model.size(); n += 97) EXPECT_HAS(error(model.substr(0, n)), "t: ");
    EXPECT_HAS(error(std::string("\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 11)), "a text");
    EXPECT_HAS(error(std::string(30, '\xff')), "a field");
}

}  // namespace
}  // namespace fiedler::test
