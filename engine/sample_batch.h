// engine/sample_batch.h: a batch of samples as the kernels read it: what a SampleBatch lacks is made here, on the host,
// and its arrays are laid side by side in one block, so that a step needs one copy to the device. None of it needs the
// device: a thread of its own makes the coming steps ready (sample_steps.h).
//
//   adjacency   coefficients s_ij = w_ij / sqrt(d_i d_j), d the weighted degree; symmetric, so one CSR serves both passes.
//               With one type of edges each node has a loop of weight 1, which counts in d (Kipf, Welling 2017): a node
//               without edges keeps its values. With several types there are none: own weights are learned beside them.
//   features    the transposed CSR for the gradient; dense rows padded to 8 columns, in T
//   training    input dropout on the features (what is dropped is left out; the rest is scaled up), and one random sign
//               for each sample and column of the spectral embedding. Both depend on `draw` and on positions in the batch.
//
// Frames. On CUDA batches have one shape, that of the largest, or one with a half, a quarter, ... of its nodes: a matrix
// product of a size not seen before costs more in the choice of its algorithm than in itself, and only what has one shape
// can be recorded. The frame's other nodes are nodes without features, edges and targets, in samples of their own, and its
// other samples are empty. What is lost is little, since a batch is filled until the next sample does not fit; the last
// one of an epoch may be small. The samples themselves do not notice.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "engine/model.h"
#include "engine/samples.h"

namespace fiedler {

// The most that a batch may hold.
struct SampleCapacity {
    std::int64_t nodes = 0, samples = 0, edges = 0, feature_entries = 0;
};

struct SampleDraw {
    bool training = false;   // with targets' gradients, dropout and random signs
    std::uint64_t seed = 0;  // of this step
};

// A block of memory of the host's that the device can read by itself, and what gives it back.
using HostBlock = std::unique_ptr<std::byte[], std::function<void(std::byte*)>>;

// A batch in its block. Its memory is used again for the next one.
struct PreparedBatch {
    HostBlock block;
    // Of the batch itself, without what fills its frame: edges with loops, rows of targets and predictions, known targets.
    std::int64_t nodes = 0, samples = 0, edges = 0, feature_entries = 0, rows = 0, known = 0;
    std::uint32_t arrays = 0;      // bit k: array k of the layout is there
    std::int64_t frame_nodes = 0;  // of the frame that it is in; 0: in none
    std::vector<double> roots;     // room for what is needed on the way
};

// Where the arrays of a batch lie in its block: the same for all batches of a model and a capacity.
template <class T>
class BatchLayout {
  public:
    BatchLayout(const ModelSpec&, const SampleCapacity& most, bool training, bool framed);
    // What the device must have room for: the largest batch, or the frame.
    const SampleCapacity& frame() const { return frame_; }
    bool framed() const { return framed_; }
    std::size_t bytes() const { return bytes_; }  // of a block, a multiple of 256 as each array's place is
    // Overwrites. std::logic_error for a batch that does not fit the model, or is larger than the most. By any thread.
    void prepare(const SampleBatch&, const SampleDraw&, PreparedBatch&) const;
    // The batch in a block that was copied to `base`; `samples` must outlive it.
    DeviceBatch at(const PreparedBatch&, std::byte* base, DeviceSamples& samples) const;

  private:
    using A = acc_t<T>;
    enum Array {
        offsets,
        begin,
        end,
        feature_offsets,
        feature_columns,
        feature_values,
        by_feature_offsets,
        by_feature_rows,
        by_feature_values,
        dense,
        spectral,
        edge_offsets,
        edge_columns,
        edge_types,
        edge_coefficients,
        classes,
        targets,
        row_shift,
        row_scale,
        seed,
        scale,  // 1 / known: the weight of a target in the loss
        count,  // what objective_sum adds to
        arrays
    };
    void place(Array, std::int64_t elements, std::size_t size);
    std::int64_t loops() const;  // edges of the frame that are no edges of the batch, at most
    template <class U>
    U* room(PreparedBatch& p, Array a) const {
        p.arrays |= 1u << a;
        return reinterpret_cast<U*>(p.block.get() + at_[a]);
    }
    std::int64_t frame_nodes(std::int64_t nodes) const;
    SampleCapacity sizes_of(const PreparedBatch&) const;
    void prepare_packing(const SampleBatch&, PreparedBatch&) const;
    void prepare_features(const SampleBatch&, const SampleDraw&, PreparedBatch&) const;
    void prepare_dense(const SampleBatch&, const SampleDraw&, PreparedBatch&) const;
    void transpose_features(PreparedBatch&) const;
    void prepare_edges(const SampleBatch&, PreparedBatch&) const;
    void prepare_spectral(const SampleBatch&, const SampleDraw&, PreparedBatch&) const;
    void prepare_targets(const SampleBatch&, PreparedBatch&) const;

    ModelSpec spec_;
    SampleCapacity most_, frame_;
    bool training_, framed_;
    std::array<std::size_t, arrays> at_{};
    std::size_t bytes_ = 0;
};

}  // namespace fiedler
