// engine/eval_command.cpp: `fiedler eval` of a model of text: the loss of a corpus, by position, or by context.
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numbers>

#include "engine/commands.h"
#include "engine/error.h"
#include "engine/evaluate.h"
#include "engine/evaluate_contexts.h"
#include "engine/files.h"
#include "engine/log.h"
#include "engine/position_plot.h"
#include "engine/sample_bundle.h"
#include "engine/signals.h"
#include "engine/use_model.h"

namespace fiedler {

namespace {

std::int64_t most_tokens(const Invocation& call) { return call.given("val-tokens") ? call.config.val_tokens : 0; }

Dataset data_of(const ModelInUse& use, const Config& c) {
    if (c.data.empty()) throw InputError("data: nothing to evaluate on; add --data with a corpus or a dataset");
    return data_for(use.bundle(), c);
}

// Words (to standard error where --json has standard output), the plot, and the line of JSON.
void report(const Config& c, const std::string& words, const std::string& svg, Json j) {
    fmt::print(c.json ? stderr : stdout, "{}", words);
    if (!c.plot.empty()) {
        write_file_atomic(c.plot, svg);
        fmt::print(c.json ? stderr : stdout, "plot               {}\n", c.plot);
        j["plot"] = c.plot;
    }
    if (c.json) fmt::print("{}\n", j.dump(-1, ' ', false, Json::error_handler_t::replace));
}

Json number_or_null(const std::optional<double>& x) { return x ? Json(*x) : Json(); }

// ---- one context ------------------------------------------------------------------------------------------------------

std::string words_of(const Evaluation& e, const std::string& device) {
    std::string text = fmt::format("validation loss    {:.4f} nats a token\n", e.loss);
    if (e.bits_per_byte) text += fmt::format("bits per byte      {:.4f}\n", *e.bits_per_byte);
    text += fmt::format("unigram entropy    {:.4f} nats a token\n", e.unigram_entropy);
    text += fmt::format("tokens             {} ({} a second on {})\n", e.tokens,
                        count_text(double(e.tokens) / e.seconds), device);
    for (const LossAtPosition& b : e.by_position)
        text += fmt::format("after {} to {} tokens: {:.4f} nats ({} tokens)\n", b.begin, b.end - 1, b.loss, b.tokens);
    return text;
}

Json json_of(const Evaluation& e, const std::string& device) {
    Json j = {{"loss", e.loss},
              {"bits_per_byte", number_or_null(e.bits_per_byte)},
              {"unigram_entropy", e.unigram_entropy},
              {"tokens", e.tokens},
              {"seconds", e.seconds},
              {"device", device}};
    for (const LossAtPosition& b : e.by_position)
        j["by_position"].push_back({{"begin", b.begin}, {"end", b.end}, {"loss", b.loss}, {"tokens", b.tokens}});
    return j;
}

void eval_text(const Invocation& call) {
    const Config& c = call.config;
    const auto use = use_model(c.model, c);  // before the data: a missing device or memory is said at once
    const Dataset data = data_of(*use, c);
    const LossSource source = use->losses();
    const bool by_position = c.by_position || !c.plot.empty();
    if (by_position && !source.token_losses)
        throw InputError(
            "by-position: the CPU runtime gives sums of losses only; leave --runtime out, or evaluate the "
            "weights before they were quantised");
    const Evaluation e = evaluate(source, data, most_tokens(call), c.document_mask, by_position);
    const std::string svg = c.plot.empty() ? "" : svg_of(e.by_position, "Loss by position: " + c.model);
    report(c, words_of(e, use->name()), svg, json_of(e, use->name()));
}

// ---- several contexts -------------------------------------------------------------------------------------------------

struct ContextEvaluation {
    std::int64_t trained_context = 0;
    std::string device;
    ScoredBlocks blocks;
    TargetStatistics targets;
    std::vector<ContextLoss> contexts;  // ascending

    std::optional<double> bits_per_byte(const ContextLoss& c) const {
        if (!targets.bytes || *targets.bytes == 0) return std::nullopt;
        return c.loss * double(blocks.scored()) / std::numbers::ln2 / double(*targets.bytes);
    }
};

// Short sequences many at once, but never more tokens than the longest context has: what it fits in, they fit in.
SequenceShape shape_of(std::int64_t context, std::int64_t longest) {
    constexpr std::int64_t kBatchTokens = 8192;
    return {context, std::max<std::int64_t>(1, std::min(longest, kBatchTokens) / context)};
}

// The longest context first, so that what does not fit the memory or the data is said at once. One engine at a time.
ContextEvaluation evaluate_contexts(const Invocation& call, const std::vector<std::int64_t>& lengths) {
    const Config& c = call.config;
    ContextEvaluation all;
    std::optional<Dataset> data;
    for (auto length = lengths.rbegin(); length != lengths.rend(); ++length) {
        const auto use = use_model(c.model, c, shape_of(*length, lengths.back()));
        if (!data) {
            if (!use->bundle().spec.causal)
                input_error(
                    "contexts: {} sees the tokens that it is to predict (causal = false); a context needs a "
                    "causal model",
                    c.model);
            data = data_of(*use, c);
            all.blocks = scored_blocks(*data, *length, most_tokens(call));
            all.targets = statistics_of(all.blocks, *data);
            all.trained_context = use->bundle().config.context;
            all.device = use->name();
        }
        all.contexts.insert(all.contexts.begin(), loss_at_context(use->losses(), *data, all.blocks, c.document_mask));
    }
    return all;
}

std::string difference_text(const ContextLoss& of, const ContextLoss& shortest) {
    const PairedDifference d = paired_difference(of, shortest);
    const std::string error = d.standard_error ? fmt::format(" +- {:.4f}", *d.standard_error) : "";
    return fmt::format(", {:+.4f}{} against {}", d.mean, error, shortest.context);
}

std::string words_of(const ContextEvaluation& e) {
    const std::size_t n = e.blocks.first.size();
    std::string text = fmt::format("tokens scored      {}, the same for every context ({} block{} of {}, on {})\n",
                                   e.blocks.scored(), n, n == 1 ? "" : "s", e.blocks.tokens, e.device);
    text += fmt::format("unigram entropy    {:.4f} nats a token\n", e.targets.unigram_entropy);
    for (const ContextLoss& c : e.contexts) {
        text += fmt::format("context {:<10} {:.4f} nats a token", c.context, c.loss);
        if (&c != &e.contexts.front()) text += difference_text(c, e.contexts.front());
        if (c.context > e.trained_context) text += fmt::format(" (trained with {})", e.trained_context);
        text += '\n';
    }
    if (e.contexts.size() > 1)
        text += n == 1 ? "no standard errors: all tokens lie in one block; give more data\n"
                       : fmt::format("+- standard error of the paired difference, over the {} blocks\n", n);
    return text;
}

Json json_of(const ContextEvaluation& e) {
    Json j = {{"tokens", e.blocks.scored()},
              {"blocks", e.blocks.first.size()},
              {"block_tokens", e.blocks.tokens},
              {"trained_context", e.trained_context},
              {"unigram_entropy", e.targets.unigram_entropy},
              {"device", e.device},
              {"contexts", Json::array()}};
    for (const ContextLoss& c : e.contexts) {
        const PairedDifference d = paired_difference(c, e.contexts.front());
        j["contexts"].push_back({{"context", c.context},
                                 {"loss", c.loss},
                                 {"bits_per_byte", number_or_null(e.bits_per_byte(c))},
                                 {"difference", d.mean},
                                 {"standard_error", number_or_null(d.standard_error)},
                                 {"windows", c.windows},
                                 {"seconds", c.seconds}});
    }
    return j;
}

void eval_contexts(const Invocation& call) {
    const Config& c = call.config;
    if (c.by_position) throw InputError("contexts: does not go with --by-position: give one of them");
    const ContextEvaluation e = evaluate_contexts(call, parse_contexts(c.contexts));
    const std::string svg = c.plot.empty() ? "" : svg_of(e.contexts, "Loss of the same tokens by context: " + c.model);
    report(c, words_of(e), svg, json_of(e));
}

}  // namespace

int run_eval(const Invocation& call) {
    const Config& c = call.config;
    if (call.given("contexts") && c.contexts.empty())
        throw InputError("contexts: names no length; give some, as in --contexts 256,1024,4096");
    if (is_sample_model(c.model)) {
        if (!c.contexts.empty()) input_error("contexts: {} is no model of text", c.model);
        return run_sample_eval(call);
    }
    const SignalGuard guard;
    if (!c.plot.empty()) probe_writable(c.plot);
    if (c.contexts.empty())
        eval_text(call);
    else
        eval_contexts(call);
    return 0;
}

}  // namespace fiedler
