#include "engine/run_folder.h"

#include <fmt/format.h>

#include <filesystem>

#include "engine/checkpoint.h"
#include "engine/files.h"

namespace fiedler {

RunFolder::RunFolder(const std::string& path) : path_(path), was_free_(is_free(path)), made_(make_folders(path)) {}

RunFolder::~RunFolder() {
    if (kept_ || !was_free_) return;
    std::error_code ignored;
    for (const auto& entry : std::filesystem::directory_iterator(path_, ignored))
        std::filesystem::remove_all(entry.path(), ignored);
    remove_empty_folders(made_);
}

std::string default_folder(const std::string& base, bool resume) {
    std::string folder = base, newest = base;
    for (int n = 2; !latest_checkpoint(folder).empty(); ++n) {
        newest = folder;
        folder = fmt::format("{}-{}", base, n);
    }
    return resume ? newest : folder;
}

std::string free_folder(const std::string& base, bool resume) {
    std::string folder = base, newest = base;
    for (int n = 2; !is_free(folder); ++n) {
        newest = folder;
        folder = fmt::format("{}-{}", base, n);
    }
    return resume ? newest : folder;
}

std::string folder_around(const std::string& checkpoint) {
    std::filesystem::path path = std::filesystem::path(checkpoint).lexically_normal();
    if (!path.has_filename()) path = path.parent_path();  // it ended in a slash
    return path.has_parent_path() ? path.parent_path().string() : ".";
}

}  // namespace fiedler
