// engine/tokenizer.h: SentencePiece byte-pair encoding that gives back exactly the bytes it was given.
//
// Around SentencePiece stand three things of our own. Text is cut into units that no piece of the vocabulary can span,
// so that each unit is encoded once and remembered (the result is that of encoding the whole text). What SentencePiece
// cannot carry (bytes that are not UTF-8, zero bytes, U+2581, its sign for a space) goes through the byte pieces.
// And decoding is a table: every token stands for a fixed string of bytes, whatever its neighbours.
#pragma once
#include <array>
#include <bitset>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace sentencepiece {
class SentencePieceProcessor;
}

namespace fiedler {

constexpr int kMinVocabSize = 320;  // 2 reserved, 7 for line ends and tabs, 256 bytes, and some letters

// A hash map key that can be looked up by string_view.
struct StringHash {
    using is_transparent = void;
    std::size_t operator()(std::string_view s) const;
};
template <class Value>
using StringMap = std::unordered_map<std::string, Value, StringHash, std::equal_to<>>;

// Words of a sample with their counts: what the vocabulary is learned from. Its size grows with the distinct words.
class WordCounter {
  public:
    void add(std::string_view text);  // valid UTF-8
    std::int64_t bytes() const { return bytes_; }
    const StringMap<std::int64_t>& words() const { return words_; }

  private:
    StringMap<std::int64_t> words_;
    std::int64_t bytes_ = 0;
};

class Tokenizer {
  public:
    // InputError when the words cannot fill the vocabulary: says how large it may be.
    static Tokenizer train(const WordCounter& words, int vocab_size);
    static Tokenizer load(const std::string& path);
    static Tokenizer from_model(std::string model, const std::string& name);  // name: for messages
    Tokenizer(Tokenizer&&) noexcept;
    Tokenizer& operator=(Tokenizer&&) noexcept;
    ~Tokenizer();

    const std::string& model() const { return model_; }  // the serialised SentencePiece model: the file's bytes
    int vocab_size() const { return static_cast<int>(pieces_.size()); }
    int separator() const { return separator_; }  // stands at the end of each document; never comes out of encode()

    std::vector<std::int32_t> encode(std::string_view text) const;  // any bytes; for much text use an Encoder
    std::string decode(std::span<const std::int32_t> tokens) const;
    const std::string& piece(std::int32_t token) const;  // the bytes it stands for; empty for separator and unknown
    int byte_length(std::int32_t token) const { return static_cast<int>(piece(token).size()); }

    // May any piece hold byte a followed by byte b? If not, text can be cut there without changing its tokens.
    bool joined(unsigned char a, unsigned char b) const { return joined_[a * 256u + b]; }

  private:
    friend class Encoder;
    Tokenizer();
    std::unique_ptr<sentencepiece::SentencePieceProcessor> processor_;
    std::string model_;
    std::vector<std::string> pieces_;
    std::array<std::int32_t, 256> byte_token_{};
    std::bitset<65536> joined_;
    int separator_ = 0;
};

// Encodes with a memory of units seen before. One per thread; the tokens do not depend on what it has seen.
class Encoder {
  public:
    explicit Encoder(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
    void encode(std::string_view text, std::vector<std::int32_t>& out);  // appends

  private:
    void encode_unit(std::string_view unit, std::vector<std::int32_t>& out);
    void encode_plain(std::string_view text, std::vector<std::int32_t>& out);
    struct Slice {
        std::uint32_t first, count;
    };
    const Tokenizer& tokenizer_;
    StringMap<Slice> seen_;
    std::vector<std::int32_t> remembered_;
    std::vector<int> scratch_;
};

// Turns tokens into text as they come: a character split over tokens is held back until it is whole, and what can never
// become one is replaced by U+FFFD.
class StreamDecoder {
  public:
    explicit StreamDecoder(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
    std::string push(std::int32_t token);
    std::string finish();  // what is still held back

  private:
    std::string take(bool last);
    const Tokenizer& tokenizer_;
    std::string held_;
};

}  // namespace fiedler
