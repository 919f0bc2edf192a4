#include "engine/corpus.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "engine/error.h"
#include "engine/files.h"
#include "engine/progress.h"
#include "engine/utf8.h"

namespace fiedler {
namespace fs = std::filesystem;

namespace {

constexpr std::int64_t kMapBytes = std::int64_t{64} << 20;  // smaller files are read: faster, and safe if one shrinks

bool is_jsonl(const std::string& path) { return fs::path(path).extension() == ".jsonl"; }

bool extension_wanted(const CorpusOptions& options, const fs::path& path) {
    if (options.extensions.empty()) return true;
    std::string extension = path.extension().string();
    if (!extension.empty()) extension.erase(0, 1);
    return std::any_of(options.extensions.begin(), options.extensions.end(), [&](std::string wanted) {
        if (wanted.starts_with('.')) wanted.erase(0, 1);
        return wanted == extension;
    });
}

using Identity = std::pair<std::uint64_t, std::uint64_t>;  // device and inode

void add_file(Corpus& corpus, std::set<Identity>& seen, const std::string& path, const struct stat& status,
              bool named) {
    if (!seen.insert({status.st_dev, status.st_ino}).second) return;
    CorpusFile file;
    file.path = path;
    file.bytes = status.st_size;
    file.modified_ns = std::int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec;
    file.jsonl = is_jsonl(path);
    file.named = named;
    if (!file.jsonl && file.bytes > corpus.options.max_file_bytes)
        input_error("{}: {} is more than one document may have ({}); split the file, or give its documents as JSONL",
                    path, format_bytes(file.bytes), format_bytes(corpus.options.max_file_bytes));
    corpus.files.push_back(std::move(file));
}

void add_folder(Corpus& corpus, std::set<Identity>& seen, const std::string& folder) {
    std::vector<std::string> paths;
    std::error_code error;
    fs::recursive_directory_iterator it(folder, fs::directory_options::skip_permission_denied, error), end;
    if (error) input_error("{}: cannot read this folder ({}); check its permissions", folder, error.message());
    for (; it != end; it.increment(error)) {
        if (it->path().filename().string().starts_with('.')) {
            it.disable_recursion_pending();
            continue;
        }
        if (extension_wanted(corpus.options, it->path())) paths.push_back(it->path().string());
    }
    if (error) input_error("{}: cannot read this folder ({}); check its permissions", folder, error.message());
    std::sort(paths.begin(), paths.end());
    for (const std::string& path : paths) {
        struct stat status {};
        if (::stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode))
            add_file(corpus, seen, path, status, /*named=*/false);
    }
}

std::uint64_t fingerprint_of(const Corpus& corpus) {
    const CorpusOptions& o = corpus.options;
    std::string all = fmt::format("{}\n{}\n{}\n", o.json_field, o.max_bytes, list_of(o.extensions));
    for (const CorpusFile& f : corpus.files) {
        std::error_code error;
        const fs::path absolute = fs::absolute(f.path, error);
        all += fmt::format("{}\n{} {} {}\n", error ? f.path : absolute.lexically_normal().string(), f.bytes,
                           f.modified_ns, f.named);
    }
    return hash_bytes(all);
}

// nlohmann's messages begin with "[json.exception...] " and span one line; keep what follows the bracket.
std::string json_message(const std::exception& e) {
    const std::string_view what = e.what();
    const std::size_t at = what.find("] ");
    return std::string(at == what.npos ? what : what.substr(at + 2));
}

// The text of one JSONL record.
std::string record_text(std::string_view line, const std::string& place, const std::string& field) {
    nlohmann::json record;
    try {
        record = nlohmann::json::parse(line);
    } catch (const nlohmann::json::exception& e) {
        input_error("{}: not valid JSON ({}); every line must be one JSON object", place, json_message(e));
    }
    if (!record.is_object()) input_error("{}: not a JSON object; every line must be one", place);
    const auto found = record.find(field);
    if (found == record.end()) input_error("{}: no field \"{}\"; name the field that holds the text", place, field);
    if (!found->is_string())
        input_error("{}: field \"{}\" is not a string; name the field that holds the text", place, field);
    return std::move(found->get_ref<std::string&>());
}

}  // namespace

Corpus scan_corpus(const CorpusOptions& options) {
    if (options.paths.empty()) input_error("no corpus given; name at least one file or folder");
    Corpus corpus;
    corpus.options = options;
    std::set<Identity> seen;
    for (const std::string& path : options.paths) {
        struct stat status {};
        if (::stat(path.c_str(), &status) != 0)
            input_error("{}: cannot read the corpus ({}); check the path", path, std::strerror(errno));
        if (S_ISDIR(status.st_mode))
            add_folder(corpus, seen, path);
        else if (S_ISREG(status.st_mode))
            add_file(corpus, seen, path, status, /*named=*/true);
        else
            input_error("{}: neither a file nor a folder; give one of these as the corpus", path);
    }
    if (corpus.files.empty())
        input_error("{}: the corpus is empty, no file{} in it; name a folder that holds text", list_of(options.paths),
                    options.extensions.empty() ? "" : fmt::format(" ending in {}", list_of(options.extensions)));
    for (const CorpusFile& f : corpus.files) corpus.bytes += f.bytes;
    if (options.max_bytes > 0) corpus.bytes = std::min(corpus.bytes, options.max_bytes);
    corpus.fingerprint = fingerprint_of(corpus);
    return corpus;
}

std::string CorpusCounts::skipped() const {
    std::string list;
    const auto add = [&](std::int64_t count, const char* one, const char* many) {
        if (count > 0) list += fmt::format("{}{} {}", list.empty() ? "skipped " : ", ", count, count == 1 ? one : many);
    };
    add(binary, "binary file", "binary files");
    add(not_utf8, "not UTF-8", "not UTF-8");
    add(empty, "empty", "empty");
    add(unreadable, "unreadable", "unreadable");
    return list;
}

CorpusReader::CorpusReader(const Corpus& corpus) : corpus_(corpus) {}
CorpusReader::~CorpusReader() = default;

// Makes text_ the content of a file; false when the file is to be skipped.
bool CorpusReader::open_file(const CorpusFile& file) {
    if (!file.named && ::access(file.path.c_str(), R_OK) != 0) {
        ++counts_.unreadable;
        return false;
    }
    if (file.bytes > kMapBytes) {
        auto mapped = std::make_shared<MappedFile>(file.path);
        text_ = mapped->text();
        owner_ = std::move(mapped);
    } else {
        auto bytes = std::make_shared<std::string>(read_file(file.path));
        text_ = *bytes;
        owner_ = std::move(bytes);
    }
    if (text_.empty()) {
        if (file.named) input_error("{}: the file is empty; give a file that holds text", file.path);
        ++counts_.empty;
        return false;
    }
    if (const std::size_t nul = text_.find('\0'); nul != text_.npos) {
        if (file.named)
            input_error("{}: a binary file (zero byte at offset {}); give text, or convert it to UTF-8", file.path,
                        nul);
        ++counts_.binary;
        return false;
    }
    if (const std::size_t bad = find_invalid_utf8(text_); bad != text_.npos) {
        if (file.named)
            input_error("{}: not valid UTF-8 at byte offset {}; convert it, e.g. iconv -f LATIN1 -t UTF-8", file.path,
                        bad);
        ++counts_.not_utf8;
        return false;
    }
    return true;
}

// The next record of the JSONL file at hand; false at its end. Blank lines and empty texts are passed over.
bool CorpusReader::next_line(Document& document) {
    const CorpusFile& file = corpus_.files[file_ - 1];
    while (at_ < text_.size()) {
        const std::size_t end = std::min(text_.find('\n', at_), text_.size());
        const std::string_view line = text_.substr(at_, end - at_);
        at_ = end + 1;
        ++line_;
        bytes_read_ += static_cast<std::int64_t>(line.size()) + 1;
        if (line.find_first_not_of(" \t\r") == line.npos) continue;
        document.name = fmt::format("{}:{}", file.path, line_);
        auto text = std::make_shared<std::string>(record_text(line, document.name, corpus_.options.json_field));
        if (text->empty()) continue;
        if (static_cast<std::int64_t>(text->size()) > corpus_.options.max_file_bytes)
            input_error("{}: {} is more than one document may have ({}); split it", document.name,
                        format_bytes(static_cast<std::int64_t>(text->size())),
                        format_bytes(corpus_.options.max_file_bytes));
        document.text = *text;
        document.owner = std::move(text);
        return true;
    }
    in_lines_ = false;
    return false;
}

bool CorpusReader::next_whole(Document& document) {
    for (;;) {
        if (in_lines_ && next_line(document)) return true;
        if (file_ == corpus_.files.size()) return false;
        const CorpusFile& file = corpus_.files[file_++];
        if (!open_file(file)) {
            bytes_read_ += file.bytes;
            continue;
        }
        if (file.jsonl) {
            in_lines_ = true;
            at_ = 0;
            line_ = 0;
            continue;
        }
        bytes_read_ += static_cast<std::int64_t>(text_.size());
        document.name = file.path;
        document.text = text_;
        document.owner = owner_;
        return true;
    }
}

bool CorpusReader::next(Document& document) {
    if (ended_ || !next_whole(document)) {
        if (counts_.documents == 0) {
            const std::string skipped = counts_.skipped();
            input_error("{}: the corpus is empty, no text in it{}; name files that hold UTF-8 text",
                        list_of(corpus_.options.paths), skipped.empty() ? "" : " (" + skipped + ")");
        }
        owner_.reset();
        return false;
    }
    const std::int64_t cap = corpus_.options.max_bytes;
    if (cap > 0 && counts_.bytes + static_cast<std::int64_t>(document.text.size()) >= cap) {
        // The last document: cut at the end of a line where there is one.
        ended_ = true;
        const auto room = static_cast<std::size_t>(cap - counts_.bytes);
        if (room < document.text.size()) {
            const std::size_t line = document.text.substr(0, room).rfind('\n');
            const std::size_t cut = line != std::string_view::npos ? line + 1 : utf8_floor(document.text, room);
            document.text = document.text.substr(0, cut);
        }
        if (document.text.empty()) return next(document);
    }
    ++counts_.documents;
    counts_.bytes += static_cast<std::int64_t>(document.text.size());
    return true;
}

}  // namespace fiedler
