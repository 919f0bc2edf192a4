// infer/model.h: a trained model as the CPU runtime holds it: a mapped .fdl file and views into it. Quantised tensors
// (q8, q4) and f32 ones are used where they lie; bf16 and f16 ones are widened once. No CUDA, no SentencePiece.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/config.h"
#include "engine/model_spec.h"
#include "engine/piece_tokenizer.h"
#include "engine/spectral_embedding.h"
#include "engine/weights.h"
#include "kernels/energy.h"

namespace fiedler {

// A matrix [out, in] in either form.
struct InferMatrix {
    std::int64_t rows = 0, cols = 0;
    QuantMatrix quant;       // data absent: plain
    Mat<const float> plain;  // into the file, or into `owned`
    std::vector<float> owned;

    explicit operator bool() const { return rows > 0; }
    bool quantised() const { return quant.data != nullptr; }
    void row(std::int64_t i, float* out) const;
    std::size_t bytes() const;  // that a product reads
};

struct InferLayer {
    LayerSpec spec;
    InferMatrix projected, aux, out, mlp_in, mlp_out;  // aux: scalars, then the gate; f32
    // Convolutions by tap, [4][columns]; tap 0 is the token itself. Empty without one.
    std::vector<float> conv, conv_scalars;
    std::vector<float> inverse_temp;  // of each scalar column of queries or keys, [H R]
    std::vector<float> gate_bias, log_temp, log_tau;
};

class InferModel {
  public:
    // InputError for anything but a .fdl file of a causal model whose tensors fit its config.
    explicit InferModel(const std::string& path);
    InferModel(const InferModel&) = delete;
    InferModel& operator=(const InferModel&) = delete;

    const std::string& path() const { return file_.path(); }
    const ModelSpec& spec() const { return spec_; }
    const Config& config() const { return config_; }
    const PieceTokenizer* tokenizer() const { return tokenizer_.get(); }  // inside the file or beside it; or null
    const std::string& tokenizer_model() const { return tokenizer_model_; }
    bool quantised() const { return quantised_; }
    std::size_t weight_bytes() const;  // read for one token: every matrix once, of the embedding as head
    std::size_t memory_bytes() const;  // of the file as mapped, and what was widened

    const InferMatrix& embedding() const { return embedding_; }
    const InferMatrix& head() const { return spec_.tied ? embedding_ : head_; }
    const InferMatrix& spectral_table() const { return spectral_table_; }
    const InferMatrix& spectral() const { return spectral_; }
    const std::vector<InferLayer>& layers() const { return layers_; }
    FeatureLaplacian<float> laplacian() const;

  private:
    const WeightTensor& tensor(const std::string& name, const std::vector<std::int64_t>& shape) const;
    InferMatrix matrix(const std::string& name, std::int64_t rows, std::int64_t cols);
    std::vector<float> values(const std::string& name, const std::vector<std::int64_t>& shape) const;
    std::vector<float> by_tap(const std::string& name, std::int64_t columns) const;
    InferLayer layer(int l);
    void read_laplacian();
    void read_tokenizer();

    WeightsFile file_;
    Config config_;
    ModelSpec spec_;
    bool quantised_ = false;
    InferMatrix embedding_, head_, spectral_table_, spectral_;
    std::vector<InferLayer> layers_;
    std::vector<std::int32_t> lap_offsets_, lap_columns_;
    std::vector<float> lap_values_, lap_vectors_, lap_eigenvalues_;
    std::unique_ptr<PieceTokenizer> tokenizer_;
    std::string tokenizer_model_;
};

// Has the file a quantised tensor?
bool is_quantised_file(const std::string& path);

}  // namespace fiedler
