#include "engine/sample_loader.h"

#include <algorithm>

#include "engine/rng.h"

namespace fiedler {

namespace {
constexpr std::uint64_t kEpochStream = std::uint64_t{1} << 32;  // + the epoch
}

std::vector<std::int64_t> samples_of(const SampleSource& source, PartChoice choice) {
    std::vector<std::int64_t> all;
    for (const Part p : {Part::train, Part::val, Part::test, Part::none}) {
        if (choice != PartChoice::all && static_cast<int>(choice) != static_cast<int>(p)) continue;
        const std::span<const std::int64_t> some = source.samples(p);
        all.insert(all.end(), some.begin(), some.end());
    }
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    return all;
}

SampleLoader::SampleLoader(const SampleSource& source, std::int64_t batch_nodes) : source_(source) {
    const std::vector<std::int64_t> all = samples_of(source, PartChoice::all);
    SampleCapacity sum, largest;
    for (const std::int64_t s : all) {
        const std::int64_t nodes = source.nodes_of(s), edges = source.edges_of(s),
                           entries = source.feature_entries_of(s);
        sum.nodes += nodes, sum.edges += edges, sum.feature_entries += entries;
        longest_ = std::max(longest_, nodes);
        largest.edges = std::max(largest.edges, edges);
        largest.feature_entries = std::max(largest.feature_entries, entries);
    }
    capacity_.nodes = std::max(longest_, std::min(batch_nodes, sum.nodes));
    const auto share = [&](std::int64_t total, std::int64_t most) {
        const double average = sum.nodes > 0 ? double(total) / double(sum.nodes) : 0;
        return std::max(most, std::min(total, static_cast<std::int64_t>(1.5 * average * double(capacity_.nodes)) + 64));
    };
    capacity_.samples = std::min(share(std::ssize(all), 1), capacity_.nodes);
    capacity_.edges = share(sum.edges, largest.edges);
    capacity_.feature_entries = share(sum.feature_entries, largest.feature_entries);
}

std::vector<std::vector<std::int64_t>> SampleLoader::in_order(std::span<const std::int64_t> samples) const {
    std::vector<std::vector<std::int64_t>> batches;
    SampleCapacity filled;
    for (const std::int64_t s : samples) {
        const std::int64_t nodes = source_.nodes_of(s), edges = source_.edges_of(s),
                           entries = source_.feature_entries_of(s);
        if (batches.empty() || filled.nodes + nodes > capacity_.nodes || filled.edges + edges > capacity_.edges ||
            filled.feature_entries + entries > capacity_.feature_entries || filled.samples == capacity_.samples) {
            batches.emplace_back();
            filled = {};
        }
        batches.back().push_back(s);
        filled.nodes += nodes, filled.edges += edges, filled.feature_entries += entries, ++filled.samples;
    }
    return batches;
}

std::vector<std::vector<std::int64_t>> SampleLoader::of_epoch(std::uint64_t seed, std::int64_t epoch) const {
    const std::span<const std::int64_t> part = source_.samples(Part::train);
    const rng::Permutation order(part.size(), seed, kEpochStream + static_cast<std::uint64_t>(epoch));
    std::vector<std::int64_t> shuffled(part.size());
    for (std::size_t i = 0; i < part.size(); ++i) shuffled[order(i)] = part[i];
    return in_order(shuffled);
}

}  // namespace fiedler
