// engine/safetensors.h: files of the safetensors format: 8 bytes with the length of a JSON header, the header, the
// tensors without gaps. Written so that the official packages read them; read with every claim of the header checked.
#pragma once
#include <map>
#include <span>
#include <string>

#include "engine/weights.h"

namespace fiedler {

// tensors: f32, bf16 or f16. notes: the header's __metadata__. Written whole or not at all.
void write_safetensors(const std::string& path, std::span<const WeightTensor> tensors,
                       const std::map<std::string, std::string>& notes);

class SafetensorsFile {
  public:
    explicit SafetensorsFile(const std::string& path);
    const std::string& path() const { return path_; }
    const std::vector<WeightTensor>& tensors() const { return tensors_; }  // data: mapped, of any alignment

  private:
    std::string path_;
    MappedFile file_;
    std::vector<WeightTensor> tensors_;  // f32, bf16, f16, f64, i32, i64, u8
};

}  // namespace fiedler
