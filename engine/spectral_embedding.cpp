#include "engine/spectral_embedding.h"

#include <Eigen/Dense>
#include <cmath>
#include <stdexcept>

#include "engine/error.h"
#include "engine/files.h"
#include "engine/rng.h"

namespace fiedler {

namespace {

constexpr const char *kMatrix = "feature_laplacian.matrix", *kVectors = "feature_laplacian.eigenvectors",
                     *kValues = "feature_laplacian.eigenvalues";

std::vector<float> to_floats(const std::vector<double>& x) { return {x.begin(), x.end()}; }

// [vocab, k] to [vocab, padded] or back.
std::vector<float> with_columns(const std::vector<float>& table, std::int64_t rows, std::int64_t from,
                                std::int64_t to) {
    std::vector<float> out(static_cast<std::size_t>(rows * to));
    for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < std::min(from, to); ++j)
            out[static_cast<std::size_t>(i * to + j)] = table[static_cast<std::size_t>(i * from + j)];
    return out;
}

}  // namespace

std::vector<ConstantTensor> tensors_of(const ModelSpec& spec, const ModelConstants& c) {
    std::vector<ConstantTensor> all;
    if (spec.spectral_dims > 0 && !spec.samples)
        all.push_back({kSpectralTable,
                       {spec.vocab, spec.spectral_dims},
                       with_columns(c.spectral, spec.vocab, spec.spectral_columns(), spec.spectral_dims)});
    if (spec.has_energies()) {
        const std::int64_t d = spec.head_dim();
        const HostLaplacian lap = c.laplacian.dim > 0 ? c.laplacian : path_laplacian(spec.head_dim());
        all.push_back({kMatrix, {d, d}, dense_matrix(lap)});
        all.push_back({kVectors, {d, d}, to_floats(lap.eigenvectors)});
        all.push_back({kValues, {d}, to_floats(lap.eigenvalues)});
    }
    return all;
}

ModelConstants constants_from(const ModelSpec& spec, bool path_laplacian, const TensorReader& read,
                              const std::string& where) {
    ModelConstants c;
    const auto tensor = [&](const char* name, std::vector<std::int64_t> shape, std::vector<float>& out) {
        std::size_t n = 1;
        for (const std::int64_t d : shape) n *= static_cast<std::size_t>(d);
        out.resize(n);
        return read(name, shape, out);
    };
    const auto absent = [&](const char* name) {
        input_error("{}: has no tensor '{}', which its own config asks for; use another checkpoint or weights file",
                    where, name);
    };
    if (spec.spectral_dims > 0 && !spec.samples) {
        std::vector<float> table;
        if (!tensor(kSpectralTable, {spec.vocab, spec.spectral_dims}, table)) absent(kSpectralTable);
        c.spectral = with_columns(table, spec.vocab, spec.spectral_dims, spec.spectral_columns());
    }
    if (!spec.has_energies()) return c;
    const std::int64_t d = spec.head_dim();
    std::vector<float> matrix, vectors, values;
    if (!tensor(kMatrix, {d, d}, matrix)) {
        if (!path_laplacian) absent(kMatrix);
        return c;
    }
    if (!tensor(kVectors, {d, d}, vectors)) absent(kVectors);
    if (!tensor(kValues, {d}, values)) absent(kValues);
    c.laplacian = dense_laplacian(spec.head_dim(), matrix, vectors, values);
    return c;
}

std::vector<float> spectral_table(const ModelSpec& spec, std::span<const float> vectors, std::int64_t columns,
                                  std::int64_t first, SpectralRows lengths) {
    const std::int64_t rows = spec.vocab, k = spec.spectral_dims, padded = spec.spectral_columns();
    if (static_cast<std::int64_t>(vectors.size()) != rows * columns || first + k > columns)
        throw std::logic_error("spectral_table: the vectors do not have the shape of the vocabulary");
    const auto scale = static_cast<float>(std::sqrt(static_cast<double>(rows)));
    std::vector<float> table(static_cast<std::size_t>(rows * padded));
    for (std::int64_t i = 0; i < rows; ++i) {
        const float* from = vectors.data() + i * columns + first;
        float of_row = scale;
        if (lengths == SpectralRows::unit) {
            double square = 0;
            for (std::int64_t j = 0; j < k; ++j) square += double(from[j]) * double(from[j]);
            of_row = square > 0 ? static_cast<float>(std::sqrt(double(k) / square)) : 0.f;
        }
        for (std::int64_t j = 0; j < k; ++j) table[static_cast<std::size_t>(i * padded + j)] = of_row * from[j];
    }
    return table;
}

std::vector<float> random_spectral_table(const ModelSpec& spec, std::uint64_t seed) {
    const Eigen::Index rows = spec.vocab, k = spec.spectral_dims;
    const std::uint64_t stream = hash_bytes(kSpectralTable);
    Eigen::MatrixXd normal(rows, k);
    for (Eigen::Index i = 0; i < rows; ++i)
        for (Eigen::Index j = 0; j < k; ++j)
            normal(i, j) = rng::normal(seed, stream, static_cast<std::uint64_t>(i * k + j));
    const Eigen::HouseholderQR<Eigen::MatrixXd> qr(normal);
    const Eigen::MatrixXd q = qr.householderQ() * Eigen::MatrixXd::Identity(rows, k);
    std::vector<float> vectors(static_cast<std::size_t>(rows * k));
    for (Eigen::Index i = 0; i < rows; ++i)
        for (Eigen::Index j = 0; j < k; ++j) vectors[static_cast<std::size_t>(i * k + j)] = static_cast<float>(q(i, j));
    return spectral_table(spec, vectors, k, 0);
}

}  // namespace fiedler
