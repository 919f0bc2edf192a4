#include "engine/dataset.h"
#include "engine/json_fields.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/files.h"
#include "engine/json_depth.h"
#include "engine/rng.h"

namespace fiedler {
namespace fs = std::filesystem;

namespace {

constexpr int kManifestVersion = 1;
constexpr const char* kManifest = "dataset.json";
constexpr std::uint64_t kPhaseStream = 0x7068617365;  // rng streams: "phase", and the shuffle of each epoch
constexpr std::uint64_t kShuffleStream = 0x73687566666cull << 16;
constexpr std::int32_t kGpt2Vocab = 50257, kLlama3Vocab = 128256, kLlama3Separator = 128000;

using Json = nlohmann::ordered_json;

Json split_json(const SplitInfo& split) {
    Json shards = Json::array();
    for (std::size_t i = 0; i < split.files.size(); ++i)
        shards.push_back({{"file", split.files[i]}, {"xxh3", hex64(split.checksums[i])}});
    return {{"documents", split.documents}, {"bytes", split.bytes}, {"tokens", split.tokens}, {"shards", shards}};
}

std::uint64_t parse_hex(const std::string& text) { return std::stoull(text, nullptr, 16); }

// Names in a manifest stay inside its folder.
std::string plain_name(const std::string& name) {
    if (name.empty() || name.find('/') != name.npos || name[0] == '.')
        throw std::invalid_argument("\"" + name + "\" is not a plain file name");
    return name;
}

SplitInfo parse_split(const Json& json) {
    SplitInfo split;
    split.documents = whole_number<std::int64_t>(json.at("documents"));
    split.bytes = whole_number<std::int64_t>(json.at("bytes"));
    split.tokens = whole_number<std::int64_t>(json.at("tokens"));
    for (const Json& shard : json.at("shards")) {
        split.files.push_back(plain_name(shard.at("file").get<std::string>()));
        split.checksums.push_back(parse_hex(shard.at("xxh3").get<std::string>()));
    }
    return split;
}

DatasetInfo parse_manifest(const Json& json) {
    DatasetInfo info;
    info.split = json.at("split").get<std::string>();
    info.fingerprint = json.at("fingerprint").get<std::string>();
    info.skipped = json.at("skipped").get<std::string>();
    info.vocab_size = whole_number<std::int32_t>(json.at("vocab_size"));
    info.separator = whole_number<std::int32_t>(json.at("separator"));
    info.tokenizer = plain_name(json.at("tokenizer").at("file").get<std::string>());
    info.tokenizer_checksum = parse_hex(json.at("tokenizer").at("xxh3").get<std::string>());
    info.train = parse_split(json.at("train"));
    info.val = parse_split(json.at("val"));
    info.unigram_entropy = json.at("val").at("unigram_entropy").get<double>();
    return info;
}

std::string one_line(std::string text) {
    std::replace(text.begin(), text.end(), '\n', ' ');
    return text;
}

void add_split(TokenStream& stream, const std::string& folder, const SplitInfo& split, std::int32_t vocab_size) {
    for (std::size_t i = 0; i < split.files.size(); ++i) {
        Shard shard(join_path(folder, split.files[i]));
        if (shard.info().checksum != split.checksums[i] || shard.info().vocab_size != vocab_size)
            input_error("{}: does not belong to this dataset (its checksum differs from {}); prepare the data again",
                        shard.info().path, kManifest);
        stream.add(std::move(shard));
    }
    if (stream.size() != split.tokens)
        input_error("{}: corrupt, its shards hold {} tokens and {} says {}; prepare the data again", folder,
                    stream.size(), kManifest, split.tokens);
}

std::vector<std::string> shard_files(const std::string& folder) {
    std::vector<std::string> files;
    std::error_code error;
    for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error))
        if (it->path().extension() == ".bin" && looks_like_shard(it->path().string()))
            files.push_back(it->path().string());
    std::sort(files.begin(), files.end());
    return files;
}

}  // namespace

std::string manifest_text(const DatasetInfo& info) {
    Json val = split_json(info.val);
    val["unigram_entropy"] = info.unigram_entropy;
    const Json json = {
        {"format", "fiedler dataset"},
        {"version", kManifestVersion},
        {"vocab_size", info.vocab_size},
        {"separator", info.separator},
        {"tokenizer", {{"file", info.tokenizer}, {"xxh3", hex64(info.tokenizer_checksum)}}},
        {"split", info.split},
        {"train", split_json(info.train)},
        {"val", val},
        {"skipped", info.skipped},
        {"fingerprint", info.fingerprint},
    };
    return json.dump(2) + "\n";
}

DatasetInfo read_manifest(const std::string& folder) {
    const std::string path = join_path(folder, kManifest);
    try {
        const std::string text = read_file(path);
        const Json json = Json::parse(json_depth(text) > kDeepestJson ? "" : text);
        if (json.at("format") != "fiedler dataset")
            input_error("{}: not the manifest of a dataset; give a folder made by `fiedler prepare`", path);
        const int version = whole_number<int>(json.at("version"));
        if (version > kManifestVersion)
            input_error(
                "{}: dataset version {} is newer than this program reads ({}); update Fiedler or prepare the data "
                "again",
                path, version, kManifestVersion);
        DatasetInfo info = parse_manifest(json);
        info.folder = folder;
        return info;
    } catch (const InputError&) {
        throw;
    } catch (const std::exception& e) {  // of the JSON library, or a number that is none
        input_error("{}: corrupt ({}); prepare the data again", path, one_line(e.what()));
    }
}

bool is_dataset(const std::string& path) {
    if (folder_exists(path)) return file_exists(join_path(path, kManifest)) || !shard_files(path).empty();
    return fs::path(path).extension() == ".bin" && file_exists(path);
}

void TokenStream::add(Shard shard) {
    starts_.push_back(starts_.back() + shard.tokens());
    shards_.push_back(std::make_shared<const Shard>(std::move(shard)));
}

void TokenStream::copy(std::int64_t first, std::int64_t count, std::int32_t* out) const {
    if (first < 0 || count < 0 || first + count > size())
        run_error("tokens {} to {} lie outside the {} of the dataset", first, first + count, size());
    auto shard =
        static_cast<std::size_t>(std::upper_bound(starts_.begin(), starts_.end(), first) - starts_.begin() - 1);
    while (count > 0) {
        const std::int64_t part = std::min(count, starts_[shard + 1] - first);
        shards_[shard]->copy(first - starts_[shard] + (shard == 0 ? offset_ : 0), part, out);
        first += part;
        out += part;
        count -= part;
        ++shard;
    }
}

TokenStream TokenStream::slice(std::int64_t first, std::int64_t count) const {
    TokenStream part;
    for (std::size_t s = 0; s < shards_.size(); ++s) {
        const std::int64_t from = std::max(first, starts_[s]), to = std::min(first + count, starts_[s + 1]);
        if (from >= to) continue;
        if (part.shards_.empty()) part.offset_ = from - starts_[s] + (s == 0 ? offset_ : 0);
        part.shards_.push_back(shards_[s]);
        part.starts_.push_back(part.starts_.back() + to - from);
    }
    return part;
}

Packed Batch::packed() const {
    if (offsets.empty()) return Packed::uniform(static_cast<std::int32_t>(rows), static_cast<std::int32_t>(length));
    Packed p;
    p.tokens = static_cast<std::int32_t>(inputs.size());
    p.count = static_cast<std::int32_t>(offsets.size()) - 1;
    p.offsets = offsets.data();
    p.begin = begin.data();
    p.end = end.data();
    return p;
}

Dataset Dataset::open(const std::string& path) {
    if (folder_exists(path) && file_exists(join_path(path, kManifest))) return open_prepared(path);
    return open_foreign(path);
}

Dataset Dataset::open_prepared(const std::string& folder) {
    Dataset d;
    d.info_ = read_manifest(folder);
    const std::string model_path = join_path(folder, d.info_.tokenizer);
    std::string model = read_file(model_path);
    if (hash_bytes(model) != d.info_.tokenizer_checksum)
        input_error("{}: corrupt, its checksum differs from {}; prepare the data again", model_path, kManifest);
    d.tokenizer_ = std::make_shared<const Tokenizer>(Tokenizer::from_model(std::move(model), model_path));
    if (d.tokenizer_->vocab_size() != d.info_.vocab_size)
        input_error("{}: has {} pieces and {} says {}; prepare the data again", model_path, d.tokenizer_->vocab_size(),
                    kManifest, d.info_.vocab_size);
    add_split(d.train_, folder, d.info_.train, d.info_.vocab_size);
    add_split(d.val_, folder, d.info_.val, d.info_.vocab_size);
    return d;
}

// llm.c: names holding "val" are held out, the others train. Where none is, the last twentieth is held out. Vocabulary
// and separator, which begins a document there, are those of the tokenizer that such shards are made with.
Dataset Dataset::open_foreign(const std::string& path) {
    const std::vector<std::string> files = folder_exists(path) ? shard_files(path) : std::vector<std::string>{path};
    if (files.empty())
        input_error("{}: not a dataset, neither {} nor token shards in it; make one with `fiedler prepare`", path,
                    kManifest);
    Dataset d;
    d.info_.folder = path;
    d.info_.split = "foreign";
    std::int32_t most = -1, stated = 0;
    int token_bytes = 0;
    for (const std::string& file : files) {
        const std::string name = fs::path(file).filename().string();
        const bool held_out = files.size() > 1 && name.find("val") != name.npos;
        Shard shard(file);
        if (token_bytes != 0 && shard.info().token_bytes != token_bytes)
            input_error("{}: its tokens have {} bytes, those of {} have {}; put them into separate folders", file,
                        shard.info().token_bytes, files[0], token_bytes);
        token_bytes = shard.info().token_bytes;
        most = std::max(most, shard.info().max_token);
        stated = std::max(stated, shard.info().vocab_size);
        (held_out ? d.info_.val : d.info_.train).files.push_back(name);
        (held_out ? d.val_ : d.train_).add(std::move(shard));
    }
    if (d.val_.size() == 0) {
        const std::int64_t all = d.train_.size(), held_out = all / 20;
        d.val_ = d.train_.slice(all - held_out, held_out);
        d.train_ = d.train_.slice(0, all - held_out);
    }
    const std::int32_t usual = token_bytes == 2 ? kGpt2Vocab : kLlama3Vocab;
    d.info_.vocab_size = stated > 0 ? stated : most < usual ? usual : most + 1;
    if (stated == 0 && most < usual) {
        d.info_.separator = token_bytes == 2 ? kGpt2Vocab - 1 : kLlama3Separator;
        d.info_.separator_leads = true;
    }
    d.info_.train.tokens = d.train_.size();
    d.info_.val.tokens = d.val_.size();
    std::vector<std::int64_t> counts(static_cast<std::size_t>(d.info_.vocab_size));
    for (std::int64_t i = 0; i < d.val_.size(); ++i) {
        std::int32_t token;
        d.val_.copy(i, 1, &token);
        ++counts[static_cast<std::size_t>(token)];
    }
    d.info_.unigram_entropy = entropy_of_counts(counts);
    return d;
}

void Dataset::require_train(std::int64_t rows, std::int64_t length) const {
    const std::int64_t needed = rows * length + 1;
    if (train_.size() < needed)
        input_error(
            "{}: the corpus is smaller than one batch: {} training tokens, and {} x {} + 1 = {} are needed; give "
            "more text, or lower the batch or the sequence length",
            info_.folder, train_.size(), rows, length, needed);
}

// A constant number, whatever the phase of the epoch.
std::int64_t Dataset::windows_per_epoch(std::int64_t length) const {
    return std::max<std::int64_t>(1, (train_.size() - length) / length);
}

void Dataset::train_batch(std::int64_t cursor, const TrainWindows& w, Batch& batch) const {
    require_train(w.rows, w.length);
    const std::int64_t per_epoch = windows_per_epoch(w.length);
    // Phases leave room for all windows and the last target: phase + per_epoch * length + 1 <= size.
    const std::int64_t phases = train_.size() - per_epoch * w.length;
    batch.rows = batch.real_rows = w.rows;
    batch.length = w.length;
    batch.inputs.resize(static_cast<std::size_t>(w.rows * w.length));
    batch.targets.resize(batch.inputs.size());
    std::vector<std::int32_t> row(static_cast<std::size_t>(w.length + 1));
    for (std::int64_t r = 0; r < w.rows; ++r) {
        const std::int64_t window = cursor + w.rank + r * w.world;
        const auto epoch = static_cast<std::uint64_t>(window / per_epoch);
        const rng::Permutation shuffle(static_cast<std::uint64_t>(per_epoch), w.seed, kShuffleStream + epoch);
        const auto place = static_cast<std::int64_t>(shuffle(static_cast<std::uint64_t>(window % per_epoch)));
        const auto phase =
            static_cast<std::int64_t>(rng::below(static_cast<std::uint64_t>(phases), w.seed, kPhaseStream, epoch));
        train_.copy(phase + place * w.length, w.length + 1, row.data());
        std::copy(row.begin(), row.end() - 1, batch.inputs.begin() + r * w.length);
        std::copy(row.begin() + 1, row.end(), batch.targets.begin() + r * w.length);
    }
    finish(batch, w.document_mask);
}

std::int64_t Dataset::val_windows(std::int64_t length, std::int64_t max_windows) const {
    const std::int64_t all = (val_.size() - 1) / length;
    if (val_.size() < 1 || all < 1)
        input_error(
            "{}: the validation split has {} tokens, and one window needs {} + 1; give more text, hold out a "
            "larger share, or lower the sequence length",
            info_.folder, val_.size(), length);
    return max_windows > 0 ? std::min(all, max_windows) : all;
}

std::int64_t Dataset::val_start(std::int64_t window, std::int64_t count, std::int64_t length) const {
    const std::int64_t all = (val_.size() - 1) / length;
    return window * all / count * length;
}

void Dataset::val_batch(std::int64_t first, std::int64_t count, std::int64_t rows, std::int64_t length,
                        bool document_mask, Batch& batch) const {
    std::vector<std::int64_t> starts;
    for (std::int64_t w = first; w < std::min(first + rows, count); ++w) starts.push_back(val_start(w, count, length));
    val_batch_at(starts, rows, length, document_mask, batch);
}

void Dataset::val_batch_at(std::span<const std::int64_t> starts, std::int64_t rows, std::int64_t length,
                           bool document_mask, Batch& batch) const {
    batch.rows = rows;
    batch.length = length;
    batch.real_rows = static_cast<std::int64_t>(starts.size());
    batch.inputs.assign(static_cast<std::size_t>(rows * length), std::max(0, info_.separator));
    batch.targets.assign(batch.inputs.size(), -1);
    for (std::int64_t r = 0; r < batch.real_rows; ++r) {
        const std::int64_t start = starts[static_cast<std::size_t>(r)];
        val_.copy(start, length, batch.inputs.data() + r * length);
        val_.copy(start + 1, length, batch.targets.data() + r * length);
    }
    finish(batch, document_mask);
}

double Dataset::val_entropy(std::int64_t count, std::int64_t length) const {
    std::vector<std::int64_t> counts(static_cast<std::size_t>(info_.vocab_size));
    std::vector<std::int32_t> targets(static_cast<std::size_t>(length));
    for (std::int64_t w = 0; w < count; ++w) {
        val_.copy(val_start(w, count, length) + 1, length, targets.data());
        for (const std::int32_t token : targets) ++counts[static_cast<std::size_t>(token)];
    }
    return entropy_of_counts(counts);
}

std::optional<std::int64_t> Dataset::target_bytes(const Batch& batch) const {
    if (!tokenizer_) return std::nullopt;
    std::int64_t bytes = 0;
    for (const std::int32_t token : batch.targets)
        if (token >= 0) bytes += tokenizer_->byte_length(token);
    return bytes;
}

// Cuts the rows into sequences.
void Dataset::finish(Batch& batch, bool document_mask) const {
    batch.offsets.clear();
    batch.begin.clear();
    batch.end.clear();
    if (!document_mask) return;
    if (info_.separator < 0)
        input_error("{}: these shards do not say which token separates documents; train without the document mask",
                    info_.folder);
    const auto tokens = static_cast<std::int32_t>(batch.inputs.size());
    const auto real = static_cast<std::int32_t>(batch.real_rows * batch.length);
    const auto length = static_cast<std::int32_t>(batch.length);
    for (std::int32_t i = 0; i < tokens; ++i) {
        const auto at = static_cast<std::size_t>(i);
        bool starts = i % length == 0;
        if (!starts && i < real) starts = batch.inputs[info_.separator_leads ? at : at - 1] == info_.separator;
        if (starts) batch.offsets.push_back(i);
    }
    batch.offsets.push_back(tokens);
    batch.begin.resize(batch.inputs.size());
    batch.end.resize(batch.inputs.size());
    for (std::size_t s = 0; s + 1 < batch.offsets.size(); ++s) {
        std::fill(batch.begin.begin() + batch.offsets[s], batch.begin.begin() + batch.offsets[s + 1], batch.offsets[s]);
        std::fill(batch.end.begin() + batch.offsets[s], batch.end.begin() + batch.offsets[s + 1], batch.offsets[s + 1]);
    }
}

double entropy_of_counts(const std::vector<std::int64_t>& counts) {
    double total = 0, sum = 0;
    for (const std::int64_t c : counts) {
        if (c == 0) continue;
        total += static_cast<double>(c);
        sum += static_cast<double>(c) * std::log(static_cast<double>(c));
    }
    return total > 0 ? std::log(total) - sum / total : 0;
}

}  // namespace fiedler
