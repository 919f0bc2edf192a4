// engine/sample_batch.h: a batch of samples as the kernels read it: what a SampleBatch lacks is made here, on the host,
// and its arrays are laid side by side, so that a step needs one copy to the device.
//
//   adjacency   coefficients s_ij = w_ij / sqrt(d_i d_j), d the weighted degree; symmetric, so one CSR serves both passes.
//               With one type of edges each node has a loop of weight 1, which counts in d (Kipf, Welling 2017): a node
//               without edges keeps its values. With several types there are none: own weights are learned beside them.
//   features    the transposed CSR for the gradient; dense rows padded to 8 columns, in T
//   training    input dropout on the features (what is dropped is left out; the rest is scaled up), and one random sign
//               for each sample and column of the spectral embedding. Both depend on `draw` and on positions in the batch.
#pragma once
#include <cstdint>
#include <vector>

#include "engine/model.h"
#include "engine/samples.h"
#include "kernels/bag.h"

namespace fiedler {

// The most that a batch may hold.
struct SampleCapacity {
    std::int64_t nodes = 0, samples = 0, edges = 0, feature_entries = 0;
};

struct SampleDraw {
    bool training = false;   // with targets' gradients, dropout and random signs
    std::uint64_t seed = 0;  // of this step
};

template <class T>
class PreparedSamples {
  public:
    // Overwrites; memory is used again. std::logic_error for a batch that does not fit the model.
    void prepare(const SampleBatch&, const ModelSpec&, const SampleDraw&);
    std::int64_t nodes() const { return static_cast<std::int64_t>(begin_.size()); }
    std::int64_t samples() const { return static_cast<std::int64_t>(offsets_.size()) - 1; }
    std::int64_t edges() const { return edges_; }  // loops not counted
    std::int64_t feature_entries() const { return static_cast<std::int64_t>(feature_columns_.size()); }
    std::int64_t known() const { return known_; }  // targets
    std::int64_t rows() const { return rows_; }    // of targets and predictions

    std::size_t bytes() const;  // of all arrays, each at a multiple of 256
    // Copies the arrays to a block of bytes().
    void copy_to(std::byte* block) const;
    // The batch as it lies in such a block at `base`; `samples` must outlive it.
    DeviceBatch at(std::byte* base, const ModelSpec&, DeviceSamples& samples) const;
    // bytes() of the largest batch.
    static std::size_t most_bytes(const ModelSpec&, const SampleCapacity&, bool training);

  private:
    void prepare_packing(const SampleBatch&);
    void prepare_features(const SampleBatch&, const ModelSpec&, const SampleDraw&);
    void prepare_edges(const SampleBatch&, const ModelSpec&);
    void prepare_targets(const SampleBatch&, const ModelSpec&);
    template <class Visit>
    void each_array(const Visit&) const;

    std::vector<std::int32_t> offsets_, begin_, end_;
    std::vector<std::int32_t> feature_offsets_, feature_columns_;
    std::vector<float> feature_values_;
    BagTransposed by_feature_;
    std::vector<T> dense_, spectral_;
    std::vector<std::int32_t> edge_offsets_, edge_columns_;
    std::vector<std::uint8_t> edge_types_;
    std::vector<float> coefficients_;
    std::vector<std::int32_t> classes_;
    std::vector<float> targets_, row_shift_, row_scale_;
    std::vector<std::uint64_t> seed_;
    std::vector<std::int64_t> count_;  // what objective_sum adds to
    std::int64_t known_ = 0, rows_ = 0, edges_ = 0;
};

}  // namespace fiedler
