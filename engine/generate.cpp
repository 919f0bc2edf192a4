#include "engine/generate.h"

#include <chrono>

#include "engine/error.h"

namespace fiedler {

Generated generate(Engine& engine, const Tokenizer& tokenizer, const std::string& prompt,
                   const GenerateSettings& settings, const std::function<bool(const std::string&)>& emit) {
    if (!engine.spec().causal) throw InputError("model: a bidirectional model (causal = false) does not generate text");
    return generate([&](std::int64_t capacity) { return engine.decoder(capacity); }, tokenizer, prompt, settings, emit);
}

Generated generate(const MakeDecoder& make, const Tokenizer& tokenizer, const std::string& prompt,
                   const GenerateSettings& settings, const std::function<bool(const std::string&)>& emit) {
    using Clock = std::chrono::steady_clock;
    const auto seconds_since = [](Clock::time_point t) {
        return std::chrono::duration<double>(Clock::now() - t).count();
    };
    std::vector<std::int32_t> tokens{tokenizer.separator()};  // a document begins where the one before it ended
    const std::vector<std::int32_t> encoded = tokenizer.encode(prompt);
    tokens.insert(tokens.end(), encoded.begin(), encoded.end());
    Generated g;
    g.prompt_tokens = static_cast<std::int64_t>(tokens.size());
    const auto decoder = make(g.prompt_tokens + settings.max_tokens);
    g.cache_bytes_per_token = decoder->cache_bytes_per_token();
    auto start = Clock::now();
    decoder->prefill(tokens);
    g.prefill_seconds = seconds_since(start);
    start = Clock::now();
    StreamDecoder text(tokenizer);
    bool wanted = true;
    const auto give = [&](const std::string& piece) {
        g.text += piece;
        if (emit && !piece.empty()) wanted = emit(piece);
    };
    while (wanted && g.tokens < settings.max_tokens) {
        const std::int32_t next =
            sample(decoder->logits(), settings.sampling, static_cast<std::uint64_t>(decoder->length()));
        if (next == tokenizer.separator()) break;
        ++g.tokens;
        give(text.push(next));
        if (wanted && g.tokens < settings.max_tokens) decoder->append(next);
    }
    if (wanted) give(text.finish());
    g.decode_seconds = seconds_since(start);
    return g;
}

}  // namespace fiedler
