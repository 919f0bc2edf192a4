#include "engine/prompts.h"

#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/files.h"

namespace fiedler {

namespace {

PromptFormat format_of(const Config& c) {
    if (c.prompt_format != PromptFormat::automatic) return c.prompt_format;
    return c.prompt_file.ends_with(".jsonl") ? PromptFormat::jsonl : PromptFormat::whole;
}

// Lines without their ends; what follows the last end is a line if it is not empty.
std::vector<std::string> lines_of(const std::string& text) {
    std::vector<std::string> lines;
    for (std::size_t at = 0; at < text.size();) {
        const std::size_t end = std::min(text.find('\n', at), text.size());
        std::string line = text.substr(at, end - at);
        if (line.ends_with('\r')) line.pop_back();
        lines.push_back(std::move(line));
        at = end + 1;
    }
    return lines;
}

Prompt prompt_of_object(const std::string& line, const std::string& where) {
    const Json object = Json::parse(line, nullptr, false);
    if (!object.is_object() || !object.contains("prompt") || !object["prompt"].is_string())
        input_error("{}: no object with a text as \"prompt\"; write {{\"prompt\": \"...\"}}", where);
    Prompt p{object["prompt"].get<std::string>(), "", where};
    if (object.contains("id")) p.id = object["id"].dump();
    return p;
}

}  // namespace

bool has_many(const Config& c) { return !c.prompt_file.empty() && format_of(c) != PromptFormat::whole; }

std::vector<Prompt> read_prompts(const Config& c) {
    if (!c.prompt.empty() && !c.prompt_file.empty())
        throw InputError("prompt: give --prompt or --prompt-file, not both");
    if (c.prompt_file.empty()) {
        if (c.prompt_format != PromptFormat::automatic)
            throw InputError("prompt-format: is of a file of prompts; name it with --prompt-file");
        return {{c.prompt, "", "prompt"}};
    }
    const std::string text = read_file(c.prompt_file);
    if (!has_many(c)) return {{text, "", c.prompt_file}};
    std::vector<Prompt> all;
    std::int64_t number = 0;
    for (const std::string& line : lines_of(text)) {
        const std::string where = fmt::format("{}, line {}", c.prompt_file, ++number);
        if (format_of(c) == PromptFormat::lines)
            all.push_back({line, "", where});
        else if (line.find_first_not_of(" \t") != line.npos)
            all.push_back(prompt_of_object(line, where));
    }
    if (all.empty()) input_error("{}: has no prompts; write one on each line", c.prompt_file);
    return all;
}

}  // namespace fiedler
