// engine/export_command.cpp: `fiedler export` and `fiedler import`: a model in a flat .fdl file, as safetensors with a
// config.json, or in a GGUF container, and back. The tensors' names are the same in all of them (data/README.md).
#include <fmt/format.h>

#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "engine/bundle.h"
#include "engine/commands.h"
#include "engine/error.h"
#include "engine/gguf.h"
#include "engine/json_depth.h"
#include "engine/piece_tokenizer.h"
#include "engine/safetensors.h"

namespace fiedler {

namespace {

constexpr const char *kTensorsName = "model.safetensors", *kConfigName = "config.json";
constexpr const char *kGgufConfig = "fiedler.config", *kGgufTokenizer = "fiedler.tokenizer_model";

// What other programs look for, then our own knobs, from which import takes the model.
Json config_json(const Bundle& b, bool half) {
    Json j = {{"architectures", {"FiedlerForCausalLM"}}, {"model_type", "fiedler"}};
    j["torch_dtype"] = half ? "bfloat16" : "float32";
    j["vocab_size"] = b.spec.vocab;
    j["hidden_size"] = b.spec.channels;
    j["intermediate_size"] = b.spec.hidden;
    j["num_hidden_layers"] = b.spec.layers();
    j["num_attention_heads"] = b.spec.heads;
    j["max_position_embeddings"] = b.spec.context;
    j["tie_word_embeddings"] = b.spec.tied;
    if (b.tokenizer) j["bos_token_id"] = j["eos_token_id"] = b.tokenizer->separator();
    j["fiedler"] = to_json(b.config, KnobGroup::model);
    return j;
}

GgufMetadata gguf_metadata(const Bundle& b, const std::string& name, bool half) {
    const auto number = [](std::int64_t n) { return GgufValue::of_number(static_cast<std::uint32_t>(n)); };
    GgufMetadata m = {{"general.architecture", GgufValue::of_text("fiedler")},
                      {"general.name", GgufValue::of_text(name)},
                      {"general.alignment", number(32)},
                      {"general.file_type", number(half ? 32 : 0)},  // mostly bf16, all f32
                      {"fiedler.vocab_size", number(b.spec.vocab)},
                      {"fiedler.context_length", number(b.spec.context)},
                      {"fiedler.embedding_length", number(b.spec.channels)},
                      {"fiedler.feed_forward_length", number(b.spec.hidden)},
                      {"fiedler.block_count", number(b.spec.layers())},
                      {"fiedler.attention.head_count", number(b.spec.heads)},
                      {kGgufConfig, GgufValue::of_text(to_json(b.config, KnobGroup::model).dump())}};
    if (!b.tokenizer) return m;
    const PieceTokenizer pieces(b.tokenizer->model(), "the tokenizer");
    std::vector<std::string> texts;
    std::vector<float> scores;
    std::vector<std::int32_t> types;
    for (const Piece& p : pieces.pieces()) {
        texts.push_back(p.text);
        scores.push_back(p.score);
        types.push_back(p.type);
    }
    m.emplace_back("tokenizer.ggml.model", GgufValue::of_text("llama"));  // llama.cpp's word for SentencePiece
    m.emplace_back("tokenizer.ggml.tokens", GgufValue::of_texts(std::move(texts)));
    m.emplace_back("tokenizer.ggml.scores", GgufValue::of_reals(std::move(scores)));
    m.emplace_back("tokenizer.ggml.token_type", GgufValue::of_numbers(std::move(types)));
    m.emplace_back("tokenizer.ggml.bos_token_id", number(pieces.separator()));
    m.emplace_back("tokenizer.ggml.eos_token_id", number(pieces.separator()));
    m.emplace_back("tokenizer.ggml.unknown_token_id", number(0));
    m.emplace_back(kGgufTokenizer, GgufValue::of_bytes(b.tokenizer->model()));
    return m;
}

void write_folder(const std::string& out, const Bundle& b, const StoredModel& model, bool half) {
    StagedFolder folder(out);
    write_safetensors(join_path(folder.path(), kTensorsName), model.tensors,
                      {{"format", "pt"}, {"producer", "fiedler"}});
    write_file_atomic(join_path(folder.path(), kConfigName), config_json(b, half).dump(2) + "\n");
    if (b.tokenizer) write_file_atomic(join_path(folder.path(), kTokenizerName), b.tokenizer->model());
    folder.commit(false);
}

void write_model(const std::string& out, const Bundle& b, ExportFormat format, bool half) {
    const ParamTable table(b.spec);
    StoredModel model(b.spec, table, b.master, b.constants, half);
    if (format == ExportFormat::safetensors) return write_folder(out, b, model, half);
    if (format == ExportFormat::gguf)
        return write_gguf(out, gguf_metadata(b, std::filesystem::path(out).stem().string(), half), model.tensors);
    if (b.tokenizer) model.add_tokenizer(*b.tokenizer);
    write_weights(out, weights_config(b.config, table.parameters), model.tensors);
}

std::int64_t bytes_below(const std::string& path) {
    if (!folder_exists(path)) return static_cast<std::int64_t>(std::filesystem::file_size(path));
    std::int64_t all = 0;
    for (const auto& entry : std::filesystem::directory_iterator(path))
        all += static_cast<std::int64_t>(entry.file_size());
    return all;
}

Bundle read_safetensors(const std::string& path) {
    const bool folder = folder_exists(path);
    const SafetensorsFile file(folder ? join_path(path, kTensorsName) : path);
    const std::string beside = folder ? path : std::filesystem::path(path).parent_path().string();
    const std::string config_path = join_path(beside, kConfigName);
    if (!file_exists(config_path)) input_error("{}: is not there; import takes the model's shape from it", config_path);
    const std::string text = read_file(config_path);
    const Json config = json_depth(text) > kDeepestJson ? Json() : Json::parse(text, nullptr, false);
    if (!config.is_object() || !config.contains("fiedler"))
        input_error("{}: has no object \"fiedler\" with the knobs of the model; write one as data/README.md says",
                    config_path);
    Bundle b = bundle_from_tensors(file.path(), config["fiedler"], file.tensors());
    const std::string tokenizer = join_path(beside, kTokenizerName);
    if (!b.tokenizer && file_exists(tokenizer)) b.tokenizer = Tokenizer::load(tokenizer);
    return b;
}

Bundle read_gguf(const std::string& path) {
    const GgufFile file(path);
    const auto found = file.texts().find(kGgufConfig);
    const Json config = found == file.texts().end() || json_depth(found->second) > kDeepestJson
                            ? Json()
                            : Json::parse(found->second, nullptr, false);
    if (!config.is_object())
        input_error("{}: has no {} in its metadata, so it is no model of Fiedler's", path, kGgufConfig);
    Bundle b = bundle_from_tensors(path, config, file.tensors());
    if (const auto model = file.texts().find(kGgufTokenizer); model != file.texts().end())
        b.tokenizer = Tokenizer::from_model(model->second, path);
    return b;
}

}  // namespace

void check_output(const std::string& out) {
    if (out.empty()) throw InputError("out: name the file to write (safetensors: the folder), as in --out model.fdl");
    const std::string folder = std::filesystem::path(out).parent_path().string();
    if (!folder.empty() && !folder_exists(folder)) input_error("out: {} is no folder; make it first", folder);
}

int run_export(const Invocation& call) {
    const Config& c = call.config;
    check_output(c.out);
    const Bundle bundle = load_bundle(c.model);
    const bool half = c.dtype != ExportType::f32;
    write_model(c.out, bundle, c.format, half);
    if (!bundle.tokenizer)
        fmt::print(stderr, "note: {} has no {} beside it, so the export has none\n", bundle.path, kTokenizerName);
    fmt::print("{}: {} parameters in {}, {}\n", c.out, ParamTable(bundle.spec).parameters, half ? "bf16" : "f32",
               bytes_text(bytes_below(c.out)));
    return 0;
}

int run_import(const Invocation& call) {
    const Config& c = call.config;
    check_output(c.out);
    if (c.model.empty())
        throw InputError("model: name the folder or file to import (safetensors with config.json, or gguf)");
    if (!file_exists(c.model) && !folder_exists(c.model)) input_error("{}: there is no such file or folder", c.model);
    const Bundle bundle = c.model.ends_with(".gguf") ? read_gguf(c.model) : read_safetensors(c.model);
    write_model(c.out, bundle, ExportFormat::fdl, c.dtype == ExportType::bf16);
    fmt::print("{}: {} parameters, {}\n", c.out, ParamTable(bundle.spec).parameters, bytes_text(bytes_below(c.out)));
    return 0;
}

}  // namespace fiedler
