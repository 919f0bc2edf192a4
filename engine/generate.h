// engine/generate.h: text from a model, token by token.
#pragma once
#include <functional>
#include <string>

#include "engine/engine.h"
#include "engine/sampling.h"
#include "engine/tokenizer.h"

namespace fiedler {

struct GenerateSettings {
    SamplingSettings sampling;
    std::int64_t max_tokens = 64;
};
struct Generated {
    std::string text;  // without the prompt
    std::int64_t prompt_tokens = 0, tokens = 0;
    double prefill_seconds = 0, decode_seconds = 0;
    std::size_t cache_bytes_per_token = 0;
};

// An empty prompt starts a document. Ends at max_tokens or at the document's end. emit, if given, receives the text as
// it comes; generation ends when it returns false.
using MakeDecoder = std::function<std::unique_ptr<Decoder>(std::int64_t capacity)>;
Generated generate(const MakeDecoder&, const Tokenizer&, const std::string& prompt, const GenerateSettings&,
                   const std::function<bool(const std::string&)>& emit = {});
// InputError for a bidirectional model.
Generated generate(Engine&, const Tokenizer&, const std::string& prompt, const GenerateSettings&,
                   const std::function<bool(const std::string&)>& emit = {});

}  // namespace fiedler
