// engine/spectral_embedding.h: what a model holds beside its parameters and never trains: the table U of the spectral
// embedding, x0 = E[token] + U[token] Ws, and the feature Laplacian Lf of its energy layers.
//
// Column j of U is an eigenvector of the token graph's Laplacian, ascending, the null space left out, times
// sqrt(vocab): its mean square is 1, so the rows of U have a mean square of k whatever the vocabulary. Raw rows differ
// much in length (on text the median is half and the longest ten times the mean: clusters of rare tokens); unit rows
// are all scaled to length sqrt(k), as normalised spectral clustering does (Ng, Jordan, Weiss 2001). A token that is
// never seen has a row of zeros in both. The random table is scaled in the same way.
//
// Both are part of the trained model: checkpoints and weights files hold them as tensors, and what reads those never
// computes them again:
//
//   spectral.U                     [vocab, k]   f32 in checkpoints; as the matrices in weights files
//   feature_laplacian.matrix       [D, D] f32   Lf, dense
//   feature_laplacian.eigenvectors [D, D] f32   row m is u_m
//   feature_laplacian.eigenvalues  [D] f32      ascending
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "engine/feature_laplacian.h"
#include "engine/model_spec.h"

namespace fiedler {

struct ModelConstants {
    HostLaplacian laplacian;      // dim 0: that of the path (path_laplacian)
    std::vector<float> spectral;  // U: [vocab, spectral_columns()], columns beyond spectral_dims 0; empty: no embedding
};

inline constexpr const char* kSpectralTable = "spectral.U";

struct ConstantTensor {
    std::string name;
    std::vector<std::int64_t> shape;
    std::vector<float> values;
};
// The tensors a file of this model holds: U where the model has one, Lf where a layer has energies.
std::vector<ConstantTensor> tensors_of(const ModelSpec&, const ModelConstants&);
// read: fills the named tensor from the file, or says that it is absent. Lf may be absent where it is the path's
// (older files). InputError with `where` for anything else that is absent.
using TensorReader =
    std::function<bool(const std::string& name, const std::vector<std::int64_t>& shape, std::vector<float>& out)>;
ModelConstants constants_from(const ModelSpec&, bool path_laplacian, const TensorReader& read,
                              const std::string& where);

enum class SpectralRows { raw, unit };
// U from columns [first, first + k) of vectors [vocab, columns] with columns of unit norm: k = spec.spectral_dims.
std::vector<float> spectral_table(const ModelSpec&, std::span<const float> vectors, std::int64_t columns,
                                  std::int64_t first, SpectralRows = SpectralRows::raw);
// U from a random orthonormal matrix instead (Householder's QR of normal numbers): the control of the embedding.
std::vector<float> random_spectral_table(const ModelSpec&, std::uint64_t seed);

}  // namespace fiedler
