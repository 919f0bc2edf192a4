// engine/generate_batch.h: texts from many prompts. As a text ends, the next prompt takes its slot; what a text becomes
// depends on none of that.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "engine/batch_decoder.h"
#include "engine/generate.h"

namespace fiedler {

struct TextRequest {
    std::vector<std::int32_t> prompt;  // tokens, from prompt_tokens()
    std::uint64_t seed = 1;
};
struct BatchText {
    enum class End { stop, length, interrupted } end = End::interrupted;
    std::string text;                  // without the prompt
    std::vector<std::int32_t> tokens;  // of the text, without the one that ended it
    std::int64_t prompt_tokens = 0;
    double first_token_seconds = 0;  // from taking a slot to the first token's arrival; 0: none came
    bool complete() const { return end != End::interrupted; }
};
const char* name_of(BatchText::End);  // stop: the document's end; length: max_tokens; interrupted

struct BatchTotals {
    std::int64_t tokens = 0, prompt_tokens = 0, steps = 0,
                 slots = 0;  // tokens: generated, those that end texts included
    double seconds = 0;
    std::size_t cache_bytes_per_token = 0;
};

// A document begins where the one before it ended: the separator, then the prompt's own tokens.
std::vector<std::int32_t> prompt_tokens(const Tokenizer&, const std::string& prompt);

// ready, if given, is called for each text in the order of the requests, as soon as it and all before it are there; it
// returns false to stop. Texts that are not complete then are interrupted, with what they have.
using TextReady = std::function<bool(std::size_t, const BatchText&)>;
using StopAsked = std::function<bool()>;
std::vector<BatchText> generate_batch(BatchDecoder&, const Tokenizer&, const std::vector<TextRequest>&,
                                      std::int64_t max_tokens, const TextReady& ready, const StopAsked& stop,
                                      BatchTotals& totals);
// The same one after another, for what decodes no batches.
std::vector<BatchText> generate_each(const MakeDecoder&, const Tokenizer&, const std::vector<TextRequest>&,
                                     const GenerateSettings&, const TextReady& ready, const StopAsked& stop,
                                     BatchTotals& totals);

}  // namespace fiedler
