#include "engine/piece_tokenizer.h"

#include <algorithm>
#include <queue>

#include "engine/byte_reader.h"
#include "engine/utf8.h"

namespace fiedler {

namespace {

constexpr std::string_view kSpaceSign = "\xe2\x96\x81";
constexpr std::size_t kMostPieces = 1 << 24;
constexpr const char* kTrainOne = "give the tokenizer.model of a dataset that `fiedler prepare` made";

// A field of a Protocol Buffers message: body for bytes and messages, value for numbers.
struct Field {
    std::uint64_t number = 0, value = 0;
    std::string_view body;
    float real() const {
        float f = 0;
        if (body.size() == 4) std::memcpy(&f, body.data(), 4);
        return f;
    }
};
template <class Take>
void read_message(std::string_view message, const std::string& name, Take&& take) {
    ByteReader in(message, name);
    while (!in.done()) {
        const std::uint64_t key = in.varint("a field");
        Field f;
        f.number = key >> 3;
        switch (key & 7) {
            case 0:
                f.value = in.varint("a number");
                break;
            case 1:
                f.body = in.take(8, "a number");
                break;
            case 2:
                f.body = in.take(in.varint("a length"), "a text");
                break;
            case 5:
                f.body = in.take(4, "a number");
                break;
            default:
                in.fail("a field of no known type");
        }
        take(f);
    }
}

Piece read_piece(std::string_view message, const std::string& name) {
    Piece p;
    read_message(message, name, [&](const Field& f) {
        if (f.number == 1) p.text = f.body;
        if (f.number == 2) p.score = f.real();
        if (f.number == 3) p.type = static_cast<int>(f.value & 0xff);
    });
    return p;
}

int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}
// The byte of a piece "<0x0A>", or -1.
int byte_of(const std::string& text) {
    if (text.size() != 6 || !text.starts_with("<0x") || text[5] != '>') return -1;
    const int high = hex_digit(text[3]), low = hex_digit(text[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

std::string with_spaces(const std::string& text) {
    std::string bytes;
    for (std::size_t at = 0; at < text.size();) {
        const bool space = std::string_view(text).substr(at).starts_with(kSpaceSign);
        bytes += space ? ' ' : text[at];
        at += space ? kSpaceSign.size() : 1;
    }
    return bytes;
}

}  // namespace

PieceTokenizer::PieceTokenizer(std::string_view model, const std::string& name) {
    read_model(model, name);
    index(name);
}

void PieceTokenizer::read_model(std::string_view model, const std::string& name) {
    bool byte_pairs = false, adds_space = true, normalises = false;
    std::int64_t end = 2;
    read_message(model, name, [&](const Field& f) {
        if (f.number == 1) {
            if (pieces_.size() >= kMostPieces)
                input_error("{}: has more than {} pieces; {}", name, kMostPieces, kTrainOne);
            pieces_.push_back(read_piece(f.body, name));
        }
        if (f.number == 2)  // TrainerSpec
            read_message(f.body, name, [&](const Field& t) {
                if (t.number == 3) byte_pairs = t.value == 2;
                if (t.number == 42) end = static_cast<std::int64_t>(t.value);
            });
        if (f.number == 3)  // NormalizerSpec
            read_message(f.body, name, [&](const Field& n) {
                if (n.number == 2) normalises = !n.body.empty();
                if (n.number == 3) adds_space = n.value != 0;
            });
    });
    if (pieces_.empty() || !byte_pairs) input_error("{}: is no byte-pair model of SentencePiece; {}", name, kTrainOne);
    if (normalises || adds_space)
        input_error("{}: the tokenizer changes the text it encodes (normalisation or added spaces); {}", name,
                    kTrainOne);
    if (end < 0 || end >= vocab_size()) input_error("{}: has no end-of-text piece; {}", name, kTrainOne);
    separator_ = static_cast<int>(end);
}

void PieceTokenizer::index(const std::string& name) {
    byte_token_.fill(-1);
    bytes_.reserve(pieces_.size());
    for (std::int32_t id = 0; id < vocab_size(); ++id) {
        const Piece& p = pieces_[static_cast<std::size_t>(id)];
        const int byte = p.type == Piece::byte ? byte_of(p.text) : -1;
        if (byte >= 0) {
            byte_token_[static_cast<std::size_t>(byte)] = id;
            bytes_.emplace_back(1, static_cast<char>(byte));
        } else {
            const bool text = p.type == Piece::normal || p.type == Piece::user;
            bytes_.push_back(text ? with_spaces(p.text) : std::string());
        }
    }
    for (std::int32_t id = 0; id < vocab_size(); ++id) {
        const std::string& bytes = bytes_[static_cast<std::size_t>(id)];
        const int type = pieces_[static_cast<std::size_t>(id)].type;
        if (bytes.empty() || type == Piece::byte) continue;
        (type == Piece::user ? user_ : learned_).emplace(bytes, id);
        if (type == Piece::user) longest_user_ = std::max(longest_user_, bytes.size());
    }
    if (std::count(byte_token_.begin(), byte_token_.end(), -1) > 0)
        input_error("{}: the tokenizer has no byte fallback; {}", name, kTrainOne);
}

std::string PieceTokenizer::decode(std::span<const std::int32_t> tokens) const {
    std::string text;
    for (const std::int32_t t : tokens) text += bytes(t);
    return text;
}

// What SentencePiece cannot carry is spelt in bytes, and nothing merges across it.
std::vector<std::int32_t> PieceTokenizer::encode(std::string_view text) const {
    std::vector<std::int32_t> out;
    std::size_t start = 0, at = 0;
    while (at < text.size()) {
        const int length = utf8_sequence(text, at);
        const auto bytes = static_cast<std::size_t>(std::max(1, length));
        if (length <= 0 || text[at] == '\0' || text.substr(at, bytes) == kSpaceSign) {
            encode_plain(text.substr(start, at - start), out);
            for (std::size_t i = at; i < at + bytes; ++i)
                out.push_back(byte_token_[static_cast<unsigned char>(text[i])]);
            start = at + bytes;
        }
        at += bytes;
    }
    encode_plain(text.substr(start), out);
    return out;
}

// Length of the longest symbol that stands whole here; 0: none.
std::size_t PieceTokenizer::user_symbol_at(std::string_view text, std::size_t at) const {
    for (std::size_t n = std::min(longest_user_, text.size() - at); n > 0; --n)
        if (user_.contains(text.substr(at, n))) return n;
    return 0;
}

// Byte-pair merging as SentencePiece does it: the neighbours whose joint piece has the highest score first, the leftmost
// of equals.
void PieceTokenizer::encode_plain(std::string_view text, std::vector<std::int32_t>& out) const {
    struct Symbol {
        std::string_view text;  // empty: merged into its left neighbour
        int before = -1, after = -1;
        bool whole = false;
    };
    struct Pair {
        float score;
        int left, right;
        std::size_t size;
        bool operator<(const Pair& o) const { return score < o.score || (score == o.score && left > o.left); }
    };
    std::vector<Symbol> symbols;
    for (std::size_t at = 0; at < text.size();) {
        const std::size_t user = user_symbol_at(text, at);
        const std::size_t n = user ? user : static_cast<std::size_t>(std::max(1, utf8_sequence(text, at)));
        const int i = static_cast<int>(symbols.size());
        symbols.push_back({text.substr(at, n), i - 1, i + 1, user > 0});
        at += n;
    }
    if (symbols.empty()) return;
    symbols.back().after = -1;
    std::priority_queue<Pair> agenda;
    const auto consider = [&](int left, int right) {
        if (left < 0 || right < 0) return;
        const Symbol &a = symbols[static_cast<std::size_t>(left)], &b = symbols[static_cast<std::size_t>(right)];
        if (a.whole || b.whole) return;
        const std::string_view joint(a.text.data(), a.text.size() + b.text.size());
        const auto found = learned_.find(joint);
        if (found != learned_.end())
            agenda.push({pieces_[static_cast<std::size_t>(found->second)].score, left, right, joint.size()});
    };
    for (int i = 1; i < static_cast<int>(symbols.size()); ++i) consider(i - 1, i);
    while (!agenda.empty()) {
        const Pair best = agenda.top();
        agenda.pop();
        Symbol &a = symbols[static_cast<std::size_t>(best.left)], &b = symbols[static_cast<std::size_t>(best.right)];
        if (a.text.empty() || b.text.empty() || a.text.size() + b.text.size() != best.size) continue;  // out of date
        a.text = {a.text.data(), best.size};
        b.text = {};
        a.after = b.after;
        if (b.after >= 0) symbols[static_cast<std::size_t>(b.after)].before = best.left;
        consider(a.before, best.left);
        consider(best.left, a.after);
    }
    for (int i = 0; i >= 0; i = symbols[static_cast<std::size_t>(i)].after) {
        const Symbol& s = symbols[static_cast<std::size_t>(i)];
        const auto& known = s.whole ? user_ : learned_;
        if (const auto found = known.find(s.text); found != known.end()) {
            out.push_back(found->second);
            continue;
        }
        for (const char c : s.text) out.push_back(byte_token_[static_cast<unsigned char>(c)]);
    }
}

}  // namespace fiedler
