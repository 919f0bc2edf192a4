#include "engine/evaluate.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <numbers>

namespace fiedler {

Evaluation evaluate(Engine& engine, const Dataset& data, std::int64_t max_tokens, bool document_mask) {
    const std::int64_t length = engine.spec().context;
    return evaluate({length, engine.plan().tokens / length, [&](const Batch& batch) { return engine.loss_sum(batch); }},
                    data, max_tokens, document_mask);
}

namespace {

constexpr std::int64_t kFirstBucket = 16;

class PositionSums {
  public:
    // Returns the sum of all.
    double add(const Batch& batch, const std::vector<float>& losses) {
        double all = 0;
        for (std::size_t i = 0; i < losses.size(); ++i) {
            all += double(losses[i]);
            if (batch.targets[i] < 0) continue;
            const auto token = static_cast<std::int64_t>(i);
            const std::int64_t before = batch.begin.empty() ? token % batch.length : token - batch.begin[i];
            const auto bucket = static_cast<std::size_t>(std::bit_width(std::uint64_t(before / kFirstBucket)));
            if (bucket >= buckets_.size()) buckets_.resize(bucket + 1);
            buckets_[bucket].loss += double(losses[i]);
            ++buckets_[bucket].tokens;
        }
        return all;
    }
    std::vector<LossAtPosition> means(std::int64_t length) {
        for (std::size_t k = 0; k < buckets_.size(); ++k) {
            LossAtPosition& b = buckets_[k];
            b.begin = k == 0 ? 0 : kFirstBucket << (k - 1);
            b.end = std::min(kFirstBucket << k, length);
            if (b.tokens > 0) b.loss /= double(b.tokens);
        }
        return std::move(buckets_);
    }

  private:
    std::vector<LossAtPosition> buckets_;
};

}  // namespace

Evaluation evaluate(const LossSource& model, const Dataset& data, std::int64_t max_tokens, bool document_mask,
                    bool by_position) {
    const auto start = std::chrono::steady_clock::now();
    const std::int64_t length = model.context, rows = model.rows;
    const std::int64_t windows =
        data.val_windows(length, max_tokens > 0 ? std::max<std::int64_t>(1, max_tokens / length) : 0);
    Evaluation e;
    double sum = 0;
    std::int64_t bytes = 0;
    bool bytes_known = true;
    Batch batch;
    PositionSums positions;
    for (std::int64_t first = 0; first < windows; first += rows) {
        data.val_batch(first, windows, rows, length, document_mask, batch);
        sum += by_position ? positions.add(batch, model.token_losses(batch)) : model.loss_sum(batch);
        e.tokens += std::count_if(batch.targets.begin(), batch.targets.end(), [](std::int32_t t) { return t >= 0; });
        const auto of_batch = data.target_bytes(batch);
        bytes_known = bytes_known && of_batch.has_value();
        if (of_batch) bytes += *of_batch;
    }
    e.loss = sum / double(e.tokens);
    if (by_position) e.by_position = positions.means(length);
    e.unigram_entropy = data.val_entropy(windows, length);
    if (bytes_known && bytes > 0) e.bits_per_byte = sum / std::numbers::ln2 / double(bytes);
    e.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return e;
}

}  // namespace fiedler
