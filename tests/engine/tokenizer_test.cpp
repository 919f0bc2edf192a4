#include "engine/tokenizer.h"

#include <sentencepiece_processor.h>

#include <vector>

#include "engine/files.h"
#include "engine/utf8.h"
#include "tests/engine/temp_folder.h"

namespace fiedler::test {
namespace {

constexpr int kVocab = 600;

const Tokenizer& tokenizer() {
    static const Tokenizer t = [] {
        WordCounter words;
        words.add(code_like(100'000, 1) + "na\xc3\xafve caf\xc3\xa9 na\xc3\xafve caf\xc3\xa9\n");
        return Tokenizer::train(words, kVocab);
    }();
    return t;
}

std::vector<std::string> hostile_texts() {
    std::string all_bytes;
    for (int b = 0; b < 256; ++b) all_bytes += static_cast<char>(b);
    return {
        "",
        " ",
        "  leading and trailing  ",
        "\n",
        "\n\n\n\n",
        "\t\tint x;\t// tab\n\t\t\t\t\t\tdeep\n",
        "line\r\nline\r\n\r\n\rlone\r",
        "for (int i = 0; i < n; ++i) { a[i] += b->c.d * 0x1F; }\n",
        "\xf0\x9f\x98\x80\xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x92\xbb and \xe6\xbc\xa2\xe5\xad\x97",
        "\xe2\x96\x81",
        "a\xe2\x96\x81 b \xe2\x96\x81\xe2\x96\x81"
        "c\xe2\x96\x85 \xe2\x81\x87",
        "e\xcc\x81 \xc3\xa9 \xef\xac\x81 \xe3\x80\x80 \xc2\xa0 \xef\xbb\xbf",  // nothing is normalised
        "<unk> <s> </s> <|endoftext|> <0x41> <0x0A>",
        std::string("zero \0 byte", 11),
        "broken \xff\xfe \xe2\x96 \xc3( \xed\xa0\x80 \xf0\x9f\x98",
        all_bytes,
        std::string(200'000, 'a'),
        std::string(100'000, ' ') + "x",
        code_like(20'000, 99),
    };
}

TEST(Tokenizer, ReservedIdsAndSize) {
    EXPECT_EQ(tokenizer().vocab_size(), kVocab);
    EXPECT_EQ(tokenizer().separator(), 1);
    EXPECT_EQ(tokenizer().piece(0), "");
    EXPECT_EQ(tokenizer().piece(1), "");
    for (const char* symbol : {"\n", "\n\n", "\r\n", "\t", "\t\t"})
        EXPECT_EQ(tokenizer().encode(symbol).size(), 1u) << "a token of its own";
}

TEST(Tokenizer, GivesBackEveryByte) {
    for (const std::string& text : hostile_texts()) {
        const auto tokens = tokenizer().encode(text);
        EXPECT_EQ(tokenizer().decode(tokens), text);
        std::size_t bytes = 0;
        for (const std::int32_t token : tokens) {
            bytes += static_cast<std::size_t>(tokenizer().byte_length(token));
            ASSERT_TRUE(token > 1 && token < kVocab) << "the separator and the unknown token never come out";
        }
        EXPECT_EQ(bytes, text.size());
    }
}

TEST(Tokenizer, LargerVocabulariesCompressMore) {
    WordCounter words;
    words.add(code_like(100'000, 1));
    const std::string text = code_like(50'000, 5);
    std::size_t last = text.size();  // a token a byte
    for (const int vocab : {400, 600, 1000}) {
        const std::size_t count = Tokenizer::train(words, vocab).encode(text).size();
        EXPECT_LT(count, last * 9 / 10) << vocab;
        last = count;
    }
}

// Cutting into units must not change what SentencePiece makes of the whole.
TEST(Tokenizer, EqualsSentencePieceOnWholeTexts) {
    sentencepiece::SentencePieceProcessor whole;
    ASSERT_TRUE(whole.LoadFromSerializedProto(tokenizer().model()).ok());
    for (const std::string& text : {code_like(30'000, 3), std::string("\t\t\t\t\tint  x   =  3;\r\n\r\n\n\n\n  y\n"),
                                    std::string("caf\xc3\xa9 <s>")}) {
        std::vector<int> expected;
        ASSERT_TRUE(whole.Encode(text, &expected).ok());
        EXPECT_EQ(tokenizer().encode(text), expected);
    }
}

TEST(Tokenizer, MemoryDoesNotChangeTheResult) {
    Encoder reused(tokenizer());
    for (int round = 0; round < 2; ++round)
        for (const std::string& text : hostile_texts()) {
            std::vector<std::int32_t> tokens{42};
            reused.encode(text, tokens);
            ASSERT_EQ(tokens[0], 42) << "appends";
            tokens.erase(tokens.begin());
            EXPECT_EQ(tokens, tokenizer().encode(text));
        }
}

TEST(Tokenizer, UnjoinedPlacesCanBeCut) {
    const std::string text = code_like(5'000, 8);
    const auto whole = tokenizer().encode(text);
    int cuts = 0;
    for (std::size_t at = 1; at < text.size(); ++at) {
        if (tokenizer().joined(static_cast<unsigned char>(text[at - 1]), static_cast<unsigned char>(text[at])))
            continue;
        if (++cuts % 50 != 0) continue;
        auto parts = tokenizer().encode(text.substr(0, at));
        const auto rest = tokenizer().encode(text.substr(at));
        parts.insert(parts.end(), rest.begin(), rest.end());
        ASSERT_EQ(parts, whole) << at;
    }
    EXPECT_GT(cuts, 500);
}

TEST(Tokenizer, TrainingIsReproducibleWhateverTheOrder) {
    const std::string a = code_like(30'000, 1), b = code_like(30'000, 2);
    WordCounter one, two;
    one.add(a), one.add(b);
    two.add(b), two.add(a);
    EXPECT_EQ(Tokenizer::train(one, 500).model(), Tokenizer::train(two, 500).model());
}

TEST(Tokenizer, ManyRareCharactersDoNotFillTheVocabulary) {
    std::string text;
    for (int c = 0x4e00; c < 0x4e00 + 3000; ++c)
        text += {static_cast<char>(0xe0 | c >> 12), static_cast<char>(0x80 | (c >> 6 & 63)),
                 static_cast<char>(0x80 | (c & 63))};
    WordCounter words;
    words.add(text + "\n" + code_like(50'000, 1));
    const Tokenizer t = Tokenizer::train(words, 500);
    EXPECT_EQ(t.vocab_size(), 500);
    EXPECT_EQ(t.decode(t.encode(text)), text);
}

TEST(Tokenizer, TooSmallACorpusSaysHowLargeTheVocabularyMayBe) {
    WordCounter words;
    words.add("the cat sat on the mat with another cat\n");
    const std::string message = input_error_of([&] { Tokenizer::train(words, 2000); });
    EXPECT_HAS(message, "too small for a vocabulary of 2000");
    WordCounter more;
    more.add(code_like(3000, 4));
    const std::string advice = input_error_of([&] { Tokenizer::train(more, 5000); });
    const std::string before = "the largest possible is ";
    const int largest = std::stoi(advice.substr(advice.find(before) + before.size()));
    EXPECT_EQ(Tokenizer::train(more, largest).vocab_size(), largest) << "the advice must work";
    EXPECT_HAS(input_error_of([&] { Tokenizer::train(words, 100); }), "choose one from");
    EXPECT_HAS(input_error_of([&] { Tokenizer::train(WordCounter(), 500); }), "no words");
}

TEST(Tokenizer, LoadRefusesWhatIsNotAModel) {
    const TempFolder t;
    write_file_atomic(t / "m.model", tokenizer().model());
    EXPECT_EQ(Tokenizer::load(t / "m.model").encode("int x;\n"), tokenizer().encode("int x;\n"));
    t.put("bad.model", "hello");
    EXPECT_HAS(input_error_of([&] { Tokenizer::load(t / "bad.model"); }), "bad.model");
    t.put("empty.model", "");
    EXPECT_HAS(input_error_of([&] { Tokenizer::load(t / "empty.model"); }), "not a SentencePiece model");
    EXPECT_HAS(input_error_of([&] { Tokenizer::load(t / "none.model"); }), "none.model");
    EXPECT_HAS(input_error_of([] { tokenizer().piece(kVocab); }), "outside the tokenizer's vocabulary");
    EXPECT_HAS(input_error_of([] { tokenizer().piece(-1); }), "outside the tokenizer's vocabulary");
}

TEST(StreamDecoder, HoldsBackHalfCharacters) {
    const std::string text = "ok \xf0\x9f\x98\x80 caf\xc3\xa9 \xe6\xbc\xa2!";
    StreamDecoder stream(tokenizer());
    std::string all;
    for (const std::int32_t token : tokenizer().encode(text)) {
        const std::string part = stream.push(token);
        EXPECT_EQ(find_invalid_utf8(part), std::string::npos);
        all += part;
    }
    EXPECT_EQ(stream.finish(), "");
    EXPECT_EQ(all, text);
}

TEST(StreamDecoder, ReplacesWhatCannotBecomeACharacter) {
    StreamDecoder stream(tokenizer());
    std::string all;
    for (const std::int32_t token : tokenizer().encode("a\xff"
                                                       "b\xe2\x82"
                                                       "c\xf0\x9f"))
        all += stream.push(token);
    all += stream.finish();
    const std::string bad = "\xef\xbf\xbd";
    EXPECT_EQ(all, "a" + bad + "b" + bad + bad + "c" + bad + bad);
}

}  // namespace
}  // namespace fiedler::test
