// engine/gguf.h: GGUF, version 3, as a container: metadata, then a table of tensors, then their data at multiples of 32.
// The names of metadata and tensors are those of data/README.md; stock llama.cpp does not know the architecture.
#pragma once
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine/weights.h"

namespace fiedler {

// A value of the metadata, of the types that Fiedler writes.
struct GgufValue {
    enum class Type : std::uint32_t { u8 = 0, i32 = 5, u32 = 4, f32 = 6, boolean = 7, text = 8, array = 9 };
    Type type = Type::u32, of = Type::u32;  // of: of the array's elements
    std::uint32_t number = 0;
    float real = 0;
    std::string text;                // also an array of u8
    std::vector<std::string> texts;  // arrays
    std::vector<float> reals;
    std::vector<std::int32_t> numbers;

    static GgufValue of_number(std::uint32_t n);
    static GgufValue of_real(float f);
    static GgufValue of_text(std::string t);
    static GgufValue of_bytes(std::string t);
    static GgufValue of_texts(std::vector<std::string> t);
    static GgufValue of_reals(std::vector<float> f);
    static GgufValue of_numbers(std::vector<std::int32_t> n);
};
using GgufMetadata = std::vector<std::pair<std::string, GgufValue>>;

// tensors: f32, bf16 or f16, of at most four dimensions. Written whole or not at all.
void write_gguf(const std::string& path, const GgufMetadata&, std::span<const WeightTensor> tensors);

class GgufFile {
  public:
    explicit GgufFile(const std::string& path);
    const std::string& path() const { return path_; }
    const std::vector<WeightTensor>& tensors() const { return tensors_; }  // data: mapped
    // Texts and arrays of bytes of the metadata; others are read past.
    const std::map<std::string, std::string>& texts() const { return texts_; }

  private:
    std::string path_;
    MappedFile file_;
    std::vector<WeightTensor> tensors_;
    std::map<std::string, std::string> texts_;
};

}  // namespace fiedler
