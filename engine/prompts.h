// engine/prompts.h: the texts that `fiedler generate` goes on from.
#pragma once
#include <string>
#include <vector>

#include "engine/config.h"

namespace fiedler {

struct Prompt {
    std::string text;
    std::string id;     // JSONL: the object's "id" as JSON, to be given back; else empty
    std::string where;  // for messages: "prompt", "FILE" or "FILE, line N"
};

// Of --prompt and --prompt-file (formats: config.h's PromptFormat). InputError names file and line. At least one.
//   lines   one prompt a line, an empty line being the empty prompt; the end of the last line begins no other
//   jsonl   an object a line, with "prompt": text and, if wanted, "id": anything; empty lines are skipped
std::vector<Prompt> read_prompts(const Config&);
bool has_many(const Config&);  // whether the format is one of many prompts

}  // namespace fiedler
