#include "engine/checkpoint.h"
#include "engine/json_fields.h"

#include <algorithm>
#include <charconv>
#include <filesystem>

#include "engine/error.h"
#include "engine/json_depth.h"

namespace fiedler {
namespace fs = std::filesystem;

namespace {

constexpr const char* kManifest = "manifest.json";
constexpr const char* kFormat = "fiedler checkpoint";
constexpr int kVersion = 1;

// Incomplete or damaged: the search for the newest checkpoint goes on to the one before.
struct TornCheckpoint : InputError {
    using InputError::InputError;
};
template <class... Args>
[[noreturn]] void torn(fmt::format_string<Args...> format, Args&&... args) {
    throw TornCheckpoint(fmt::format(format, std::forward<Args>(args)...));
}

// Paths and prompts may hold anything; JSON holds UTF-8.
std::string dump(const Json& j, int indent = -1) { return j.dump(indent, ' ', false, Json::error_handler_t::replace); }

std::string join_file(const std::string& folder, const std::string& name) { return join_path(folder, name); }

// Step of "step_00001000"; -1 for any other name.
std::int64_t step_of(const std::string& name) {
    constexpr std::string_view prefix = "step_";
    std::int64_t step = 0;
    const char *first = name.data() + prefix.size(), *end = name.data() + name.size();
    if (!name.starts_with(prefix) || first == end) return -1;
    const auto [last, status] = std::from_chars(first, end, step);
    return status == std::errc{} && last == end && step >= 0 ? step : -1;
}

// (step, folder) of everything in the run that is named like a checkpoint, newest first.
std::vector<std::pair<std::int64_t, std::string>> candidates(const std::string& run_folder) {
    std::vector<std::pair<std::int64_t, std::string>> all;
    std::error_code error;
    for (fs::directory_iterator it(run_folder, error), end; !error && it != end; it.increment(error))
        if (const std::int64_t step = step_of(it->path().filename().string());
            step >= 0 && fs::is_directory(it->path()))
            all.emplace_back(step, it->path().string());
    std::sort(all.rbegin(), all.rend());
    return all;
}

// Deletes a checkpoint so that it is no checkpoint at any moment in between: its manifest first.
void delete_checkpoint(const fs::path& folder) {
    std::error_code ignored;
    if (!fs::remove(folder / kManifest, ignored) && ignored) return;
    fs::remove_all(folder, ignored);
}

// Keeps the newest `keep` up to `newest`, and deletes what a killed process left half-written.
void prune(const std::string& run_folder, std::int64_t newest, std::int64_t keep) {
    std::int64_t complete = 0;
    for (const auto& [step, folder] : candidates(run_folder)) {
        if (step > newest) continue;
        if (!is_checkpoint(folder) || complete >= keep)
            delete_checkpoint(folder);
        else
            ++complete;
    }
    std::error_code ignored;
    std::vector<fs::path> left_over;
    for (fs::directory_iterator it(run_folder, ignored), end; !ignored && it != end; it.increment(ignored))
        if (const std::string name = it->path().filename().string();
            name.starts_with(".step_") && name.find(".partial-") != std::string::npos)
            left_over.push_back(it->path());
    for (const fs::path& folder : left_over) delete_checkpoint(folder);
}

Json read_manifest(const std::string& folder) {
    const std::string path = join_file(folder, kManifest);
    if (!file_exists(path)) torn("{}: is no complete checkpoint: it has no {}", folder, kManifest);
    const std::string text = read_file(path);
    Json manifest = Json::parse(json_depth(text) > kDeepestJson ? "" : text, nullptr, false);
    if (manifest.is_discarded()) torn("{}: is torn: it is no JSON", path);
    if (!manifest.is_object() || manifest.value("format", Json()) != kFormat)
        input_error("{}: is not the manifest of a Fiedler checkpoint", path);
    if (const Json version = manifest.value("version", Json());
        !version.is_number_integer() || version.get<int>() != kVersion)
        input_error("{}: is of version {}, and this fiedler reads version {}: use the fiedler that wrote it", path,
                    dump(version), kVersion);
    const Json checksum = manifest.value("xxh3", Json());
    manifest.erase("xxh3");
    if (checksum != hex64(hash_bytes(dump(manifest)))) torn("{}: is corrupt: it does not match its checksum", path);
    return manifest;
}

}  // namespace

std::string checkpoint_name(std::int64_t step) { return fmt::format("step_{:08}", step); }

bool is_checkpoint(const std::string& folder) { return file_exists(join_file(folder, kManifest)); }

CheckpointWriter::CheckpointWriter(const std::string& run_folder, std::int64_t step)
    : run_folder_(run_folder), folder_(join_path(run_folder, checkpoint_name(step))), step_(step), staged_(folder_) {}

void CheckpointWriter::add(const std::string& name, const void* data, std::size_t bytes) {
    FileWriter file(join_file(staged_.path(), name + ".bin"));
    file.write(data, bytes);
    file.close();
    files_.push_back(
        {{"name", name}, {"file", name + ".bin"}, {"bytes", bytes}, {"xxh3", hex64(hash_bytes(data, bytes))}});
}

void CheckpointWriter::add_copy(const std::string& path, const std::string& file) {
    const std::string bytes = read_file(path);
    FileWriter copy(join_file(staged_.path(), file));
    copy.write(bytes.data(), bytes.size());
    copy.close();
    files_.push_back({{"name", file}, {"file", file}, {"bytes", bytes.size()}, {"xxh3", hex64(hash_bytes(bytes))}});
}

std::string CheckpointWriter::commit(const CheckpointMeta& meta, std::int64_t keep) {
    if (meta.step != step_) throw std::logic_error("checkpoint: the step differs from the writer's");
    Json manifest = {{"format", kFormat},     {"version", kVersion}, {"step", meta.step},
                     {"tokens", meta.tokens}, {"seed", meta.seed},   {"config", meta.config},
                     {"data", meta.data},     {"state", meta.state}, {"fiedler", FIEDLER_VERSION},
                     {"files", files_}};
    manifest["xxh3"] = hex64(hash_bytes(dump(manifest)));
    write_file_atomic(join_file(staged_.path(), kManifest), dump(manifest, 1) + "\n");
    staged_.commit(true);
    prune(run_folder_, step_, std::max<std::int64_t>(keep, 1));
    return folder_;
}

Checkpoint::Checkpoint(const std::string& folder) : folder_(folder) {
    if (!folder_exists(folder)) input_error("{}: there is no such checkpoint", folder);
    const Json manifest = read_manifest(folder);
    try {
        meta_.step = whole_number<std::int64_t>(manifest.at("step"));
        meta_.tokens = whole_number<std::int64_t>(manifest.at("tokens"));
        meta_.seed = whole_number<std::int64_t>(manifest.at("seed"));
        meta_.config = manifest.at("config");
        meta_.data = manifest.at("data");
        meta_.state = manifest.at("state");
        read_files(manifest);
    } catch (const Json::exception&) {
        torn("{}: is corrupt: its manifest lacks a field", folder);
    }
}

void Checkpoint::read_files(const Json& manifest) {
    for (const Json& entry : manifest.at("files")) {
        const std::string name = entry.at("name").get<std::string>(), file = entry.at("file").get<std::string>();
        if (file.empty() || file.find('/') != std::string::npos || file[0] == '.')
            torn("{}: is corrupt: '{}' is no file of a checkpoint", folder_, file);
        const std::string path = join_file(folder_, file);
        if (!file_exists(path)) torn("{}: is torn: {} is missing", folder_, file);
        MappedFile mapped(path);
        if (const auto bytes = whole_number<std::size_t>(entry.at("bytes")); mapped.size() != bytes)
            torn("{}: is torn: it has {} bytes of {}", path, mapped.size(), bytes);
        if (hex64(hash_bytes(mapped.data(), mapped.size())) != entry.at("xxh3").get<std::string>())
            torn("{}: is corrupt: it does not match its checksum", path);
        blocks_.emplace(name, std::move(mapped));
    }
}

std::vector<std::string> Checkpoint::names() const {
    std::vector<std::string> all;
    for (const auto& [name, file] : blocks_) all.push_back(name);
    return all;
}

std::size_t Checkpoint::block_bytes(const std::string& name) const {
    const auto found = blocks_.find(name);
    if (found == blocks_.end()) input_error("{}: holds no {}: it was written by another kind of run", folder_, name);
    return found->second.size();
}

const void* Checkpoint::block(const std::string& name, std::size_t bytes) const {
    const std::size_t has = block_bytes(name);
    if (bytes != any_size && has != bytes)
        input_error("{}: its {} has {} bytes, and this model needs {}: it belongs to another model", folder_, name, has,
                    bytes);
    return blocks_.at(name).data();
}

std::string Checkpoint::file(const std::string& name) const {
    block_bytes(name);
    return join_file(folder_, name);
}

namespace {

// Also says what was wrong with those passed over, newest first.
std::string search(const std::string& run_folder, std::vector<std::string>& damages) {
    for (const auto& [step, folder] : candidates(run_folder)) {
        try {
            return Checkpoint(folder).folder();
        } catch (const TornCheckpoint& e) {
            damages.emplace_back(e.what());
        }
    }
    return "";
}

}  // namespace

std::string latest_checkpoint(const std::string& run_folder, const Notice& notice) {
    std::vector<std::string> damages;
    const std::string found = search(run_folder, damages);
    if (notice && !found.empty())
        for (const std::string& damage : damages) notice(damage + "; the checkpoint before it is used");
    return found;
}

std::string find_checkpoint(const std::string& path, const Notice& notice) {
    if (is_checkpoint(path) || step_of(fs::path(path).filename().string()) >= 0) return Checkpoint(path).folder();
    if (!folder_exists(path)) input_error("{}: there is no such run or checkpoint", path);
    if (const std::string found = latest_checkpoint(path, notice); !found.empty()) return found;
    std::vector<std::string> damages;
    search(path, damages);
    if (damages.empty()) input_error("{}: holds no complete checkpoint; start the run anew", path);
    input_error("{}: holds no complete checkpoint, the newest one is damaged ({}); start the run anew", path,
                damages[0]);
}

}  // namespace fiedler
