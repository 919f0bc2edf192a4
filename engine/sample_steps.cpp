#include "engine/sample_steps.h"

#include "engine/error.h"
#include "engine/rng.h"

namespace fiedler {

namespace {
constexpr std::uint64_t kStepStream = 0x73746570;  // "step"
}

SampleSteps::SampleSteps(const SampleSource& source, const SampleLoader& loader, SampleEngine& engine,
                         std::uint64_t seed, const SampleCursor& first)
    : source_(source), loader_(loader), engine_(engine), seed_(seed) {
    load_epoch(first.epoch);
    if (first.position > std::ssize(batches_))
        throw InputError("checkpoint: its place in the data does not exist; start a new run");
    using Steps = Prefetcher<PreparedBatch, SampleCursor>;
    std::vector<PreparedBatch> rooms;
    for (std::size_t i = 0; i < Steps::kAhead + SampleEngine::kStepsInFlight; ++i) rooms.push_back(engine.room());
    steps_ = std::make_unique<Steps>([this](SampleCursor& at, PreparedBatch& room) { read(at, room); },
                                     std::move(rooms), first);
}

void SampleSteps::load_epoch(std::int64_t epoch) {
    batches_ = loader_.of_epoch(seed_, epoch);
    epoch_ = epoch;
    if (batches_.empty()) throw InputError("data: no sample is in the training part; split otherwise");
}

void SampleSteps::read(SampleCursor& at, PreparedBatch& room) {
    if (epoch_ != at.epoch) load_epoch(at.epoch);
    if (at.position == std::ssize(batches_)) {
        load_epoch(++at.epoch);
        at.position = 0;
    }
    source_.gather_epoch(batches_[static_cast<std::size_t>(at.position)], at.epoch, gathered_);
    const SampleDraw draw{true, rng::bits(seed_, kStepStream, static_cast<std::uint64_t>(at.step))};
    engine_.prepare(gathered_, draw, room);
    ++at.step;
    if (++at.position == std::ssize(batches_)) ++at.epoch, at.position = 0;
}

}  // namespace fiedler
