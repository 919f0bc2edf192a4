// engine/weights.h: the flat weights file, .fdl. Little-endian; tools/read_fdl.py reads it in 30 lines of NumPy.
//
//   bytes 0..1023      256 int32. 64-bit numbers take two, low half first:
//                        [0] magic "FDLW"   [1] version 1   [2] number of tensors   [3] 0
//                        [4,5] bytes of the table     [6,7] its offset, 1024      [8,9] its XXH3-64
//                        [10,11] bytes of the payload [12,13] its offset, a multiple of 256   [14,15] its XXH3-64
//                        [254,255] XXH3-64 of the 1016 bytes before       all others 0
//   the table          JSON: {"config": {...}, "tensors": [{"name", "dtype": "bf16" | "f16" | "f32" | "f64" | "i32" |
//                      "i64" | "u8" | "q8" | "q4", "shape", "offset", "bytes"}, ...]}; zeros follow up to the payload
//   the payload        the tensors' values, row-major, in the table's order without overlap; each begins at a multiple
//                      of 256. offset counts from the payload's first byte; gaps are 0. The file ends with the payload.
//
// A file that is truncated, of another kind or version, or does not match its checksums or its own table is refused
// with an InputError. Trained weights hold bf16 and f32; q8 and q4 are blocks of integers (kernels/quantised.h), in
// quantised weights; other types came with graphs and spectra (spectrum_file.h), which are in the same container with a
// "kind" in their config. A program older than a type names it and refuses.
#pragma once
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/files.h"
#include "engine/json.h"
#include "kernels/quantised.h"

namespace fiedler {

struct WeightTensor {
    std::string name, dtype;  // dtype: "bf16", "f16", "f32", "f64", "i32", "i64", "u8", "q8" or "q4"
    std::vector<std::int64_t> shape;
    const void* data = nullptr;
    std::int64_t elements() const;
    std::size_t bytes() const;
};

// config: the knobs of the model, and whatever else a reader needs (the tokenizer's name). Written whole or not at all.
void write_weights(const std::string& path, const Json& config, std::span<const WeightTensor> tensors);

class WeightsFile {
  public:
    // Checks everything but the payload's checksum, which reads the whole file: verify_payload.
    explicit WeightsFile(const std::string& path, bool verify_payload = true);
    const std::string& path() const { return path_; }
    std::size_t file_bytes() const { return file_.size(); }
    const Json& config() const { return config_; }
    const std::vector<WeightTensor>& tensors() const { return tensors_; }  // data points into the mapped file
    const WeightTensor* find(const std::string& name) const;
    // "graph" or "spectrum" as the config says; "" for weights, which have no kind.
    std::string kind() const;
    // The named tensor as f32, from f32, bf16, f16, q8 or q4; InputError when it is absent, of another shape or type.
    void read_f32(const std::string& name, const std::vector<std::int64_t>& shape, float* out) const;

  private:
    std::string path_;
    MappedFile file_;
    Json config_;
    std::vector<WeightTensor> tensors_;
};

// Its values; `path` opens the message when it has another shape or a type that is no number of a model.
void tensor_to_f32(const std::string& path, const WeightTensor&, const std::vector<std::int64_t>& shape, float* out);
void check_shape(const std::string& path, const WeightTensor&, const std::vector<std::int64_t>& shape);  // the same
std::optional<Quant> quant_of(const std::string& dtype);  // of "q8" and "q4"

// Does the file begin as a weights file does? False for anything unreadable.
bool is_weights_file(const std::string& path);

}  // namespace fiedler
