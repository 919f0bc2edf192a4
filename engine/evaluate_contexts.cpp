#include "engine/evaluate_contexts.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <span>

#include "engine/error.h"
#include "engine/signals.h"

namespace fiedler {

namespace {

struct Window {
    std::size_t block = 0;
    std::int64_t first = 0;   // its first input's place in the split
    std::int64_t scored = 0;  // the first of its places that is scored; all later ones are
};

// Where half a context does not divide a block, the block's last window goes back to end with it: it scores fewer targets,
// and still after c / 2 tokens or more.
std::vector<Window> windows_of(const ScoredBlocks& blocks, std::int64_t context) {
    const std::int64_t half = context / 2;
    std::vector<Window> all;
    for (std::size_t b = 0; b < blocks.first.size(); ++b)
        for (std::int64_t at = 0; at < blocks.tokens; at += half) {
            const std::int64_t from = std::min(at, blocks.tokens - half);
            all.push_back({b, blocks.first[b] + from - half, half + at - from});
        }
    return all;
}

void read_windows(const Dataset& data, std::span<const Window> windows, const LossSource& model, bool document_mask,
                  Batch& batch) {
    std::vector<std::int64_t> starts;
    for (const Window& w : windows) starts.push_back(w.first);
    data.val_batch_at(starts, model.rows, model.context, document_mask, batch);
    for (std::size_t r = 0; r < windows.size(); ++r) {
        const auto row = batch.targets.begin() + static_cast<std::ptrdiff_t>(r) * model.context;
        std::fill(row, row + windows[r].scored, -1);
    }
}

// Of each row, of which there is one where only sums are known.
std::vector<double> row_sums(const LossSource& model, const Batch& batch) {
    if (!model.token_losses) return {model.loss_sum(batch)};
    const std::vector<float> losses = model.token_losses(batch);
    std::vector<double> sums;
    for (auto row = losses.begin(); row != losses.end(); row += batch.length)
        sums.push_back(std::accumulate(row, row + batch.length, 0.0));
    return sums;
}

double mean_of(const std::vector<double>& x) {
    return std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
}

}  // namespace

ScoredBlocks scored_blocks(const Dataset& data, std::int64_t longest, std::int64_t max_tokens) {
    const std::int64_t half = longest / 2, tokens = data.val().size();
    const std::int64_t all = (tokens - 1) / half - 1;  // the last target is one beyond its block
    if (tokens < 1 || all < 1)
        input_error("contexts: {} is too long for {}: its held-out split has {} tokens, and one window needs {} + 1",
                    longest, data.info().folder, tokens, longest);
    const std::int64_t count = max_tokens > 0 ? std::clamp<std::int64_t>(max_tokens / half, 1, all) : all;
    ScoredBlocks blocks{half, {}};
    for (std::int64_t b = 0; b < count; ++b) blocks.first.push_back((b * all / count + 1) * half);
    return blocks;
}

TargetStatistics statistics_of(const ScoredBlocks& blocks, const Dataset& data) {
    std::vector<std::int64_t> counts(static_cast<std::size_t>(data.info().vocab_size));
    TargetStatistics s;
    Batch block;
    block.targets.resize(static_cast<std::size_t>(blocks.tokens));
    std::int64_t bytes = 0;
    for (const std::int64_t first : blocks.first) {
        data.val().copy(first + 1, blocks.tokens, block.targets.data());
        for (const std::int32_t token : block.targets) ++counts[static_cast<std::size_t>(token)];
        bytes += data.target_bytes(block).value_or(0);
    }
    if (data.tokenizer()) s.bytes = bytes;
    s.unigram_entropy = entropy_of_counts(counts);
    return s;
}

ContextLoss loss_at_context(const LossSource& model, const Dataset& data, const ScoredBlocks& blocks,
                            bool document_mask) {
    if (model.context % 2 != 0 || model.context > 2 * blocks.tokens || (!model.token_losses && model.rows != 1))
        throw std::logic_error("loss_at_context: a context that does not fit the blocks, or rows without their losses");
    const auto start = std::chrono::steady_clock::now();
    const std::vector<Window> windows = windows_of(blocks, model.context);
    ContextLoss result{model.context, static_cast<std::int64_t>(windows.size()), 0, {}, 0};
    result.block_means.resize(blocks.first.size());
    Batch batch;
    const auto rows = static_cast<std::size_t>(model.rows);
    for (std::size_t first = 0; first < windows.size(); first += rows) {
        if (stop_requested()) run_error("stopped; there is no figure before the last token is scored");
        const auto now = std::span(windows).subspan(first, std::min(rows, windows.size() - first));
        read_windows(data, now, model, document_mask, batch);
        const std::vector<double> sums = row_sums(model, batch);
        for (std::size_t r = 0; r < now.size(); ++r)
            result.block_means[now[r].block] += sums[r] / static_cast<double>(blocks.tokens);
    }
    result.loss = mean_of(result.block_means);
    result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return result;
}

PairedDifference paired_difference(const ContextLoss& of, const ContextLoss& against) {
    const std::size_t n = of.block_means.size();
    if (n == 0 || n != against.block_means.size()) throw std::logic_error("paired_difference: not of the same blocks");
    std::vector<double> differences(n);
    for (std::size_t b = 0; b < n; ++b) differences[b] = of.block_means[b] - against.block_means[b];
    PairedDifference d{mean_of(differences), {}};
    if (n == 1) return d;
    double squares = 0;
    for (const double x : differences) squares += (x - d.mean) * (x - d.mean);
    d.standard_error = std::sqrt(squares / static_cast<double>(n - 1) / static_cast<double>(n));
    return d;
}

}  // namespace fiedler
