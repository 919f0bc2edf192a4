#include "engine/evaluate.h"

#include <algorithm>
#include <chrono>
#include <numbers>

namespace fiedler {

Evaluation evaluate(Engine& engine, const Dataset& data, std::int64_t max_tokens, bool document_mask) {
    const std::int64_t length = engine.spec().context;
    return evaluate({length, engine.plan().tokens / length, [&](const Batch& batch) { return engine.loss_sum(batch); }},
                    data, max_tokens, document_mask);
}

Evaluation evaluate(const LossSource& model, const Dataset& data, std::int64_t max_tokens, bool document_mask) {
    const auto start = std::chrono::steady_clock::now();
    const std::int64_t length = model.context, rows = model.rows;
    const std::int64_t windows =
        data.val_windows(length, max_tokens > 0 ? std::max<std::int64_t>(1, max_tokens / length) : 0);
    Evaluation e;
    double sum = 0;
    std::int64_t bytes = 0;
    bool bytes_known = true;
    Batch batch;
    for (std::int64_t first = 0; first < windows; first += rows) {
        data.val_batch(first, windows, rows, length, document_mask, batch);
        sum += model.loss_sum(batch);
        e.tokens += std::count_if(batch.targets.begin(), batch.targets.end(), [](std::int32_t t) { return t >= 0; });
        const auto of_batch = data.target_bytes(batch);
        bytes_known = bytes_known && of_batch.has_value();
        if (of_batch) bytes += *of_batch;
    }
    e.loss = sum / double(e.tokens);
    e.unigram_entropy = data.val_entropy(windows, length);
    if (bytes_known && bytes > 0) e.bits_per_byte = sum / std::numbers::ln2 / double(bytes);
    e.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return e;
}

}  // namespace fiedler
