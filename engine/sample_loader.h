// engine/sample_loader.h: which samples make up which batch.
#pragma once
#include <span>
#include <vector>

#include "engine/config.h"
#include "engine/sample_batch.h"
#include "engine/samples.h"

namespace fiedler {

// Batches of at most --batch-nodes nodes (one sample always fits), and of at most 1.5 times as many samples, edges and
// features as that many nodes have on average.
class SampleLoader {
  public:
    SampleLoader(const SampleSource&, std::int64_t batch_nodes);
    const SampleCapacity& capacity() const { return capacity_; }
    std::int64_t longest() const { return longest_; }  // nodes of the largest sample
    // The part's samples in order, cut into batches.
    std::vector<std::vector<std::int64_t>> in_order(std::span<const std::int64_t> samples) const;
    // The training part, shuffled anew for each epoch.
    std::vector<std::vector<std::int64_t>> of_epoch(std::uint64_t seed, std::int64_t epoch) const;

  private:
    const SampleSource& source_;
    SampleCapacity capacity_;
    std::int64_t longest_ = 0;
};

// Every sample of the source, or those of one part.
std::vector<std::int64_t> samples_of(const SampleSource&, PartChoice);

}  // namespace fiedler
