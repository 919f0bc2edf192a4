#include "engine/tokenizer.h"

#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <algorithm>
#include <set>

#include "engine/error.h"
#include "engine/files.h"
#include "engine/utf8.h"

namespace fiedler {

namespace {

constexpr std::string_view kSpaceSign = "\xe2\x96\x81";    // U+2581: SentencePiece's sign for a space
constexpr std::string_view kUnknownSign = "\xe2\x96\x85";  // U+2585: reserved by SentencePiece in training
// Line ends and tabs never take part in merges; these runs get tokens of their own.
constexpr const char* kUserSymbols = "\n,\n\n,\r\n,\t,\t\t,\t\t\t,\t\t\t\t";
constexpr int kUserSymbolCount = 7, kReserved = 2, kBytePieces = 256;
constexpr std::size_t kMaxWordBytes = 128;       // no piece has more than 16 characters
constexpr std::size_t kMaxUnitBytes = 64 << 10;  // bounds the work on text without any place to cut
constexpr std::size_t kRememberedUnitBytes = 64, kRememberedUnits = 1 << 18;
constexpr double kCharacterCoverage = 0.9995;  // rarer characters are spelt in bytes

bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool is_ascii(char c) { return static_cast<unsigned char>(c) < 0x80; }
bool is_line_end_or_tab(char c) { return c == '\n' || c == '\r' || c == '\t'; }

// SentencePiece learns no piece across these places, so cutting here only makes words repeat more often.
bool word_ends_between(char a, char b) {
    if (b == ' ') return a != ' ';
    return a != ' ' && is_ascii(a) && is_ascii(b) && is_letter(a) != is_letter(b);
}

// Frequent characters that get pieces of their own: the coverage asked for, but at most half of the free vocabulary.
std::set<std::string, std::less<>> frequent_characters(const WordCounter& words, int vocab_size) {
    StringMap<std::int64_t> counts;
    std::int64_t total = 0;
    for (const auto& [word, count] : words.words())
        for (std::size_t at = 0; at < word.size();) {
            const auto length = static_cast<std::size_t>(std::max(1, utf8_sequence(word, at)));
            counts[word.substr(at, length)] += count;
            total += count;
            at += length;
        }
    for (const std::string_view reserved : {kSpaceSign, kUnknownSign, std::string_view("\0", 1)})
        if (const auto it = counts.find(reserved); it != counts.end()) counts.erase(it);
    std::vector<std::pair<std::string, std::int64_t>> sorted(counts.begin(), counts.end());
    std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) {
        return a.second != b.second ? a.second > b.second : a.first < b.first;
    });
    const int room = (vocab_size - kReserved - kUserSymbolCount - kBytePieces) / 2;
    std::set<std::string, std::less<>> kept;
    std::int64_t covered = 0;
    for (const auto& [character, count] : sorted) {
        if (static_cast<int>(kept.size()) >= room ||
            static_cast<double>(covered) >= kCharacterCoverage * static_cast<double>(total))
            break;
        kept.insert(character);
        covered += count;
    }
    return kept;
}

// The words as SentencePiece reads them, "word<tab>count", in byte-wise order; rare characters cut a word in two.
class WordList : public sentencepiece::SentenceIterator {
  public:
    WordList(const WordCounter& words, int vocab_size) {
        const auto kept = frequent_characters(words, vocab_size);
        StringMap<std::int64_t> counts;
        for (const auto& [word, count] : words.words()) {
            std::size_t start = 0, at = 0;
            const auto cut = [&, &word = word, &count = count] {  // clang 14 captures no bindings
                if (at > start) counts[word.substr(start, at - start)] += count;
            };
            while (at < word.size()) {
                const auto length = static_cast<std::size_t>(std::max(1, utf8_sequence(word, at)));
                if (!kept.contains(std::string_view(word).substr(at, length))) {
                    cut();
                    start = at + length;
                }
                at += length;
            }
            cut();
        }
        lines_.reserve(counts.size());
        for (const auto& [word, count] : counts) lines_.push_back(fmt::format("{}\t{}", word, count));
        std::sort(lines_.begin(), lines_.end());
    }
    bool empty() const { return lines_.empty(); }
    bool done() const override { return at_ >= lines_.size(); }
    void Next() override { ++at_; }
    const std::string& value() const override { return lines_[at_]; }
    sentencepiece::util::Status status() const override { return {}; }

  private:
    std::vector<std::string> lines_;
    std::size_t at_ = 0;
};

std::string one_line(std::string text) {
    std::replace(text.begin(), text.end(), '\n', ' ');
    return text;
}

// The bytes a piece stands for.
std::string piece_bytes(const sentencepiece::SentencePieceProcessor& processor, int id) {
    if (processor.IsControl(id) || processor.IsUnknown(id) || processor.IsUnused(id)) return {};
    const std::string& piece = processor.IdToPiece(id);
    if (processor.IsByte(id)) return std::string(1, static_cast<char>(std::stoi(piece.substr(3, 2), nullptr, 16)));
    std::string bytes;
    for (std::size_t at = 0; at < piece.size();) {
        const bool space = std::string_view(piece).substr(at).starts_with(kSpaceSign);
        bytes += space ? ' ' : piece[at];
        at += space ? kSpaceSign.size() : 1;
    }
    return bytes;
}

}  // namespace

std::size_t StringHash::operator()(std::string_view s) const { return hash_bytes(s); }

void WordCounter::add(std::string_view text) {
    bytes_ += static_cast<std::int64_t>(text.size());
    std::size_t start = 0;
    const auto count = [&](std::size_t end) {
        const std::string_view word = text.substr(start, end - start);
        if (word.empty()) return;
        if (const auto it = words_.find(word); it != words_.end())
            ++it->second;
        else
            words_.emplace(word, 1);
    };
    for (std::size_t at = 0; at < text.size(); ++at) {
        if (is_line_end_or_tab(text[at])) {
            count(at);
            start = at + 1;
        } else if (at > start && (word_ends_between(text[at - 1], text[at]) ||
                                  (at - start >= kMaxWordBytes && !is_utf8_continuation(text[at])))) {
            count(at);
            start = at;
        }
    }
    count(text.size());
}

Tokenizer::Tokenizer() : processor_(std::make_unique<sentencepiece::SentencePieceProcessor>()) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer Tokenizer::train(const WordCounter& words, int vocab_size) {
    if (vocab_size < kMinVocabSize || vocab_size > 1'000'000)
        input_error("vocabulary size {} is not possible; choose one from {} to 1000000", vocab_size, kMinVocabSize);
    WordList list(words, vocab_size);
    if (list.empty()) input_error("the corpus holds no words to learn a vocabulary from; give more text");
    const std::unordered_map<std::string, std::string> options{
        {"model_type", "bpe"},
        {"vocab_size", std::to_string(vocab_size)},
        {"hard_vocab_limit", "false"},  // fewer pieces than asked are found out below, with a better message
        {"input_format", "tsv"},
        {"byte_fallback", "true"},
        {"normalization_rule_name", "identity"},
        {"add_dummy_prefix", "false"},
        {"remove_extra_whitespaces", "false"},
        {"allow_whitespace_only_pieces", "true"},
        {"user_defined_symbols", kUserSymbols},
        {"character_coverage", "1.0"},  // rare characters are gone from the list already
        {"unk_id", "0"},
        {"eos_id", "1"},
        {"bos_id", "-1"},
        {"pad_id", "-1"},
        {"eos_piece", "<|endoftext|>"},
        {"num_threads", "1"},
        {"minloglevel", "2"},
    };
    std::string model;
    const auto status = sentencepiece::SentencePieceTrainer::Train(options, &list, &model);
    if (!status.ok()) run_error("training the tokenizer failed: {}", one_line(status.ToString()));
    Tokenizer tokenizer = from_model(std::move(model), "the new tokenizer");
    if (tokenizer.vocab_size() != vocab_size)
        input_error(
            "the corpus is too small for a vocabulary of {}: the largest possible is {}; ask for at most that, "
            "or give more text",
            vocab_size, tokenizer.vocab_size());
    return tokenizer;
}

Tokenizer Tokenizer::load(const std::string& path) { return from_model(read_file(path), path); }

Tokenizer Tokenizer::from_model(std::string model, const std::string& name) {
    Tokenizer t;
    if (model.empty() || !t.processor_->LoadFromSerializedProto(model).ok())
        input_error("{}: not a SentencePiece model, or corrupt; give the tokenizer.model of a prepared dataset", name);
    const auto& processor = *t.processor_;
    t.model_ = std::move(model);
    t.separator_ = processor.eos_id() >= 0 ? processor.eos_id() : processor.bos_id();
    if (t.separator_ < 0) input_error("{}: the tokenizer has no end-of-text piece; train one with `prepare`", name);
    t.byte_token_.fill(-1);
    for (int id = 0; id < processor.GetPieceSize(); ++id) {
        std::string bytes = piece_bytes(processor, id);
        if (processor.IsByte(id)) t.byte_token_[static_cast<unsigned char>(bytes[0])] = id;
        for (std::size_t i = 1; i < bytes.size(); ++i)
            t.joined_.set(static_cast<unsigned char>(bytes[i - 1]) * 256u + static_cast<unsigned char>(bytes[i]));
        t.pieces_.push_back(std::move(bytes));
    }
    if (std::count(t.byte_token_.begin(), t.byte_token_.end(), -1) > 0)
        input_error("{}: the tokenizer has no byte fallback; train one with `prepare`", name);
    for (unsigned a = 0; a < 256; ++a)
        for (unsigned b = 0x80; b < 0xc0; ++b) t.joined_.set(a * 256 + b);  // never cut inside a character
    const std::string probe = "  Hello, w\xc3\xb6rld!\t\n\r\n x  = 3; // \xe6\xbc\xa2 \xf0\x9f\x98\x80\n\n ";
    if (t.decode(t.encode(probe)) != probe)
        input_error(
            "{}: the tokenizer changes the text it encodes (normalisation or added spaces); train one with "
            "`prepare`",
            name);
    return t;
}

const std::string& Tokenizer::piece(std::int32_t token) const {
    if (token < 0 || token >= vocab_size())
        input_error("token {} lies outside the tokenizer's vocabulary of {}; use the tokenizer the data was made with",
                    token, vocab_size());
    return pieces_[static_cast<std::size_t>(token)];
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text) const {
    std::vector<std::int32_t> tokens;
    Encoder(*this).encode(text, tokens);
    return tokens;
}

std::string Tokenizer::decode(std::span<const std::int32_t> tokens) const {
    std::string text;
    for (const std::int32_t token : tokens) text += piece(token);
    return text;
}

void Encoder::encode(std::string_view text, std::vector<std::int32_t>& out) {
    for (std::size_t start = 0, end; start < text.size(); start = end) {
        const std::size_t limit = std::min(text.size(), start + kMaxUnitBytes);
        end = start + 1;
        while (end < limit &&
               tokenizer_.joined(static_cast<unsigned char>(text[end - 1]), static_cast<unsigned char>(text[end])))
            ++end;
        // Stopped by the limit: not inside a character (valid ones have at most three continuation bytes).
        for (int i = 0; i < 3 && end == limit - static_cast<std::size_t>(i) && end < text.size() && end > start + 1 &&
                        is_utf8_continuation(text[end]);
             ++i)
            --end;
        const std::string_view unit = text.substr(start, end - start);
        if (unit.size() > kRememberedUnitBytes) {
            encode_unit(unit, out);
            continue;
        }
        auto known = seen_.find(unit);
        if (known == seen_.end()) {
            if (seen_.size() >= kRememberedUnits) {
                seen_.clear();
                remembered_.clear();
            }
            const auto first = static_cast<std::uint32_t>(remembered_.size());
            encode_unit(unit, remembered_);
            known = seen_.emplace(unit, Slice{first, static_cast<std::uint32_t>(remembered_.size()) - first}).first;
        }
        const auto from = remembered_.begin() + known->second.first;
        out.insert(out.end(), from, from + known->second.count);
    }
}

// Splits off what must be spelt in bytes.
void Encoder::encode_unit(std::string_view unit, std::vector<std::int32_t>& out) {
    std::size_t start = 0, at = 0;
    while (at < unit.size()) {
        const int length = utf8_sequence(unit, at);
        const auto bytes = static_cast<std::size_t>(std::max(1, length));
        if (length <= 0 || unit[at] == '\0' || unit.substr(at, bytes) == kSpaceSign) {
            encode_plain(unit.substr(start, at - start), out);
            for (std::size_t i = at; i < at + bytes; ++i)
                out.push_back(tokenizer_.byte_token_[static_cast<unsigned char>(unit[i])]);
            start = at + bytes;
        }
        at += bytes;
    }
    encode_plain(unit.substr(start), out);
}

void Encoder::encode_plain(std::string_view text, std::vector<std::int32_t>& out) {
    if (text.empty()) return;
    const auto status = tokenizer_.processor_->Encode(text, &scratch_);
    if (!status.ok()) run_error("encoding text failed: {}", one_line(status.ToString()));
    out.insert(out.end(), scratch_.begin(), scratch_.end());
}

std::string StreamDecoder::push(std::int32_t token) {
    held_ += tokenizer_.piece(token);
    return take(/*last=*/false);
}
std::string StreamDecoder::finish() { return take(/*last=*/true); }

std::string StreamDecoder::take(bool last) {
    std::string text;
    std::size_t at = 0;
    while (at < held_.size()) {
        const int length = utf8_sequence(held_, at);
        if (length < 0 && !last) break;
        if (length > 0)
            text.append(held_, at, static_cast<std::size_t>(length));
        else
            text += "\xef\xbf\xbd";
        at += static_cast<std::size_t>(std::max(1, length));
    }
    held_.erase(0, at);
    return text;
}

}  // namespace fiedler
