// engine/piece_tokenizer.h: the tokenizer without the SentencePiece library: reads the models that `fiedler prepare`
// trains (byte-pair, byte fallback, no normalisation) and gives the same tokens as engine/tokenizer.h. For the runtime,
// which depends on nothing, and for the files that keep the vocabulary as a list (gguf).
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace fiedler {

struct Piece {
    enum Type { normal = 1, unknown = 2, control = 3, user = 4, unused = 5, byte = 6 };
    std::string text;  // as in the model: U+2581 for a space
    float score = 0;
    int type = normal;
};

class PieceTokenizer {
  public:
    // model: the bytes of tokenizer.model; name: for messages. InputError for anything but such a model.
    PieceTokenizer(std::string_view model, const std::string& name);
    int vocab_size() const { return static_cast<int>(pieces_.size()); }
    int separator() const { return separator_; }
    const std::vector<Piece>& pieces() const { return pieces_; }
    const std::string& bytes(std::int32_t token) const { return bytes_[static_cast<std::size_t>(token)]; }
    std::vector<std::int32_t> encode(std::string_view text) const;  // any bytes
    std::string decode(std::span<const std::int32_t> tokens) const;

  private:
    void read_model(std::string_view model, const std::string& name);
    void index(const std::string& name);
    void encode_plain(std::string_view text, std::vector<std::int32_t>& out) const;
    std::size_t user_symbol_at(std::string_view text, std::size_t at) const;

    std::vector<Piece> pieces_;
    std::vector<std::string> bytes_;  // what each stands for; empty for control and unknown
    // Pieces that merging can make, by their bytes, and those that stand whole (line ends and tabs).
    std::unordered_map<std::string_view, std::int32_t> learned_, user_;
    std::size_t longest_user_ = 0;
    std::array<std::int32_t, 256> byte_token_{};
    int separator_ = -1;
};

}  // namespace fiedler
