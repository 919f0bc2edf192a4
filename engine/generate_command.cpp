// engine/generate_command.cpp: `fiedler generate`. One text is shown as it is made; many are made at once.
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "engine/commands.h"
#include "engine/error.h"
#include "engine/files.h"
#include "engine/generate_batch.h"
#include "engine/log.h"
#include "engine/prompts.h"
#include "engine/signals.h"
#include "engine/use_model.h"

namespace fiedler {

namespace {

SamplingSettings sampling_of(const Config& c, std::int64_t number) {
    return {c.sampling_temperature, c.top_k, c.top_p, static_cast<std::uint64_t>(c.seed + number)};
}

int generate_one(ModelInUse& use, const std::string& prompt, const Config& c) {
    const MakeDecoder decoder = [&](std::int64_t capacity) { return use.decoder(capacity); };
    GenerateSettings g;
    g.max_tokens = c.max_tokens;
    g.sampling = sampling_of(c, 0);
    fmt::print("{}", prompt);
    const Generated text = generate(decoder, *use.bundle().tokenizer, prompt, g, [](const std::string& piece) {
        fmt::print("{}", piece);
        std::fflush(stdout);
        return !stop_requested();
    });
    fmt::print("\n");
    std::fflush(stdout);
    fmt::print(stderr, "[{} tokens, {:.0f} a second; prompt of {} in {:.0f} ms; cache {} bytes a token; {}]\n",
               text.tokens, double(text.tokens) / std::max(text.decode_seconds, 1e-9), text.prompt_tokens,
               text.prefill_seconds * 1e3, text.cache_bytes_per_token, use.name());
    return 0;
}

// count texts of each prompt, in the order of the prompts; text i of all has the seed of --seed and i.
struct Requests {
    std::vector<TextRequest> all;
    std::int64_t longest = 0;          // tokens
    const Prompt* too_long = nullptr;  // the first whose tokens are more than the context
    std::int64_t tokens_of_too_long = 0;
};
Requests requests_of(const std::vector<Prompt>& prompts, const Bundle& bundle, const Config& c) {
    Requests r;
    for (const Prompt& p : prompts) {
        const std::vector<std::int32_t> tokens = prompt_tokens(*bundle.tokenizer, p.text);
        const auto n = static_cast<std::int64_t>(tokens.size());
        r.longest = std::max(r.longest, n);
        if (n > bundle.spec.context && !r.too_long) r.too_long = &p, r.tokens_of_too_long = n;
        for (std::int64_t i = 0; i < c.count; ++i)
            r.all.push_back({tokens, static_cast<std::uint64_t>(c.seed) + r.all.size()});
    }
    return r;
}

std::string json_line(std::size_t i, const Prompt& prompt, const BatchText& t, const Config& c) {
    Json line = {{"index", i / static_cast<std::size_t>(c.count)}};
    if (c.count > 1) line["sample"] = i % static_cast<std::size_t>(c.count);
    if (!prompt.id.empty()) line["id"] = Json::parse(prompt.id);
    line["prompt"] = prompt.text;
    line["text"] = t.text;
    line["tokens"] = t.tokens;
    line["prompt_tokens"] = t.prompt_tokens;
    line["end"] = name_of(t.end);
    line["first_token_seconds"] = t.first_token_seconds;
    return line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

void print_totals(const std::vector<BatchText>& texts, const BatchTotals& totals, const std::string& name) {
    std::vector<double> first;
    for (const BatchText& t : texts)
        if (t.first_token_seconds > 0) first.push_back(t.first_token_seconds * 1e3);
    std::sort(first.begin(), first.end());
    const std::string wait = first.empty() ? ""
                                           : fmt::format("first token after {:.1f} ms, at most {:.1f} ms; ",
                                                         first[first.size() / 2], first.back());
    fmt::print(
        stderr,
        "[{} texts, {} tokens, {:.0f} a second; {}prompts of {} tokens; {} at once; cache {} bytes a token; {}]\n",
        texts.size(), totals.tokens, double(totals.tokens) / std::max(totals.seconds, 1e-9), wait, totals.prompt_tokens,
        totals.slots, totals.cache_bytes_per_token, name);
}

int generate_many(ModelInUse& use, const std::vector<Prompt>& prompts, const Requests& requests, const Config& c) {
    const Tokenizer& tokenizer = *use.bundle().tokenizer;
    const auto prompt_of = [&](std::size_t i) -> const Prompt& {
        return prompts[i / static_cast<std::size_t>(c.count)];
    };
    const bool as_json = has_many(c);
    const TextReady ready = [&](std::size_t i, const BatchText& t) {
        if (c.out.empty()) {
            fmt::print("{}", as_json ? json_line(i, prompt_of(i), t, c) : prompt_of(i).text + t.text + "\n");
            std::fflush(stdout);
        }
        return !stop_requested();
    };
    BatchTotals totals;
    std::vector<BatchText> texts;
    std::unique_ptr<BatchDecoder> decoder;
    if (!requests.too_long) {
        BatchDecoderOptions o;
        o.slots = c.batch;
        o.sequences = static_cast<std::int64_t>(requests.all.size());
        o.capacity = requests.longest + c.max_tokens;
        o.stop = tokenizer.separator();
        o.sampling = sampling_of(c, 0);
        o.cuda_graph = c.cuda_graph != GraphChoice::off;
        decoder = use.batch_decoder(o);
    }
    if (decoder) {
        texts = generate_batch(*decoder, tokenizer, requests.all, c.max_tokens, ready, stop_requested, totals);
    } else {
        const MakeDecoder make = [&](std::int64_t capacity) { return use.decoder(capacity); };
        texts = generate_each(make, tokenizer, requests.all, {sampling_of(c, 0), c.max_tokens}, ready, stop_requested,
                              totals);
    }
    if (!c.out.empty()) {
        std::string lines;  // with those that were interrupted
        for (std::size_t i = 0; i < texts.size(); ++i) lines += json_line(i, prompt_of(i), texts[i], c);
        write_file_atomic(c.out, lines);
        fmt::print(stderr, "texts       {}\n", c.out);
    }
    print_totals(texts, totals, use.name());
    return 0;
}

}  // namespace

int run_generate(const Invocation& call) {
    const SignalGuard guard;
    const Config& c = call.config;
    const auto use = use_model(c.model, c);
    const Bundle& bundle = use->bundle();
    if (!bundle.tokenizer)
        throw InputError(
            fmt::format("model: {} has no {} beside it, so it cannot read a prompt", bundle.path, kTokenizerName));
    const std::vector<Prompt> prompts = read_prompts(c);
    if (!bundle.spec.causal) throw InputError("model: a bidirectional model (causal = false) does not generate text");
    if (prompts.size() == 1 && c.count == 1 && c.out.empty() && !has_many(c) && c.batch == 0)
        return generate_one(*use, prompts[0].text, c);
    const Requests requests = requests_of(prompts, bundle, c);
    // One long prompt goes through a decoder of its own, as ever.
    if (requests.too_long && has_many(c))
        input_error("{}: the prompt has {} tokens, more than the model's context of {}; shorten it",
                    requests.too_long->where, requests.tokens_of_too_long, bundle.spec.context);
    return generate_many(*use, prompts, requests, c);
}

}  // namespace fiedler
