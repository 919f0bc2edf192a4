#include "engine/prepare.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <filesystem>
#include <limits>
#include <optional>

#include "engine/error.h"
#include "engine/files.h"
#include "engine/progress.h"
#include "engine/rng.h"
#include "engine/utf8.h"

namespace fiedler {
namespace fs = std::filesystem;

namespace {

constexpr int kFormat = 1;  // of the folder's contents: raise it when the same corpus gives other bytes
constexpr std::uint64_t kSplitSeed = 0x73706c6974, kSampleSeed = 0x73616d706c65;
constexpr std::size_t kSampleBlock = 16 << 10;  // the tokenizer's sample is drawn in blocks of lines
constexpr std::size_t kSegment = 256 << 10;     // text one thread encodes at a time
constexpr std::size_t kWaveBytes = 16 << 20, kWaveSegments = 4096;  // text in memory at a time
constexpr std::size_t kRankedDocuments = 1 << 20;  // up to here the held-out share is exact, above it is on average
constexpr double kPositionFraction = 0.1;          // of a single document

std::string read_tokenizer_bytes(const PrepareOptions& o) { return o.tokenizer.empty() ? "" : read_file(o.tokenizer); }

std::int64_t sample_bytes(const PrepareOptions& o) {
    if (o.sample_bytes > 0) return o.sample_bytes;
    return std::clamp<std::int64_t>(std::int64_t{o.vocab_size} * 1024, 4'000'000, 32'000'000);
}

void check_options(const PrepareOptions& o) {
    if (!(o.val_fraction >= 0 && o.val_fraction <= 1))
        input_error("held-out share {} is not possible; choose one from 0 to 1", o.val_fraction);
    if (o.tokenizer.empty() && (o.vocab_size < kMinVocabSize || o.vocab_size > 1'000'000))
        input_error("vocabulary size {} is not possible; choose one from {} to 1000000", o.vocab_size, kMinVocabSize);
    if (o.shard_tokens < 1 || o.shard_tokens > std::numeric_limits<std::int32_t>::max())
        input_error("{} tokens a shard is not possible; choose from 1 to {}", o.shard_tokens,
                    std::numeric_limits<std::int32_t>::max());
}

void check_cancelled(const PrepareOptions& o) {
    if (o.cancelled && o.cancelled()) run_error("interrupted while preparing the data; nothing was written");
}

// Which documents are held out. A document's own bytes decide, so equal documents are never on both sides.
struct Split {
    bool by_position = false;
    std::size_t position = 0;        // by position: where the single document is cut
    bool none = false, all = false;  // nothing, everything held out
    std::uint64_t threshold = 0;     // else: hashes up to here
    bool held_out(std::uint64_t hash) const { return all || (!none && hash <= threshold); }
};

std::uint64_t document_hash(std::string_view text) { return rng::bits(kSplitSeed, 0, hash_bytes(text)); }

std::size_t cut_position(std::string_view text) {
    const auto at = static_cast<std::size_t>(static_cast<double>(text.size()) * (1 - kPositionFraction));
    const std::size_t line = at == 0 ? text.npos : text.rfind('\n', at - 1);
    return line != text.npos ? line + 1 : utf8_floor(text, at);
}

struct Survey {
    CorpusCounts counts;
    Split split;
};

// First pass: every fault of the corpus is found before any work is done, and the split is decided.
Survey survey(const Corpus& corpus, const PrepareOptions& o, std::FILE* log) {
    Progress progress(log, "reading", corpus.bytes);
    CorpusReader reader(corpus);
    Document document;
    std::vector<std::uint64_t> hashes;
    std::uint64_t least = ~std::uint64_t{0}, most = 0;
    std::size_t cut = 0;
    while (reader.next(document)) {
        const std::uint64_t hash = document_hash(document.text);
        least = std::min(least, hash);
        most = std::max(most, hash);
        if (hashes.size() <= kRankedDocuments) hashes.push_back(hash);
        if (reader.counts().documents == 1) cut = cut_position(document.text);
        progress.update(reader.bytes_read());
        check_cancelled(o);
    }
    Survey s;
    s.counts = reader.counts();
    const std::string skipped = s.counts.skipped();
    progress.finish(fmt::format("{} in {} document{}{}{}", format_bytes(s.counts.bytes), s.counts.documents,
                                s.counts.documents == 1 ? "" : "s", skipped.empty() ? "" : "; ", skipped));
    Split& split = s.split;
    split.none = o.val_fraction == 0;
    split.all = o.val_fraction == 1;
    if (split.none || split.all) return s;
    if (least == most) {  // one document, or several equal ones
        if (s.counts.documents > 1)
            input_error("{}: all {} documents are equal, none can be held out; give more text, or hold out nothing",
                        list_of(corpus.options.paths), s.counts.documents);
        if (cut == 0)
            input_error("{}: a single document this short cannot be split; give more text, or hold out nothing",
                        list_of(corpus.options.paths));
        split.by_position = true;
        split.position = cut;
        return s;
    }
    if (hashes.size() > kRankedDocuments) {
        split.threshold = static_cast<std::uint64_t>(o.val_fraction * 0x1p64);
        return s;
    }
    const auto count = static_cast<double>(hashes.size());
    auto rank = static_cast<std::size_t>(std::clamp(std::round(o.val_fraction * count), 1.0, count - 1)) - 1;
    std::sort(hashes.begin(), hashes.end());
    while (hashes[rank] == most) --rank;  // equal documents at the end: something must be left to train on
    split.threshold = hashes[rank];
    return s;
}

// The end of the block that begins at `start`: the end of a line where there is one.
std::size_t block_end(std::string_view text, std::size_t start) {
    if (start + kSampleBlock >= text.size()) return text.size();
    const std::size_t line = text.rfind('\n', start + kSampleBlock);
    if (line != text.npos && line > start) return line + 1;
    const std::size_t cut = utf8_floor(text, start + kSampleBlock);
    return cut > start ? cut : text.size();
}

// Second pass: a sample of the training documents, evenly spread, teaches the tokenizer.
Tokenizer train_tokenizer(const Corpus& corpus, const PrepareOptions& o, const Survey& s, std::FILE* log) {
    const double share =
        static_cast<double>(sample_bytes(o)) / static_cast<double>(std::max<std::int64_t>(1, s.counts.bytes));
    const std::uint64_t threshold = share >= 1 ? ~std::uint64_t{0} : static_cast<std::uint64_t>(share * 0x1p64);
    Progress progress(log, "sampling", corpus.bytes);
    CorpusReader reader(corpus);
    Document document;
    WordCounter words;
    std::uint64_t block = 0;
    while (reader.next(document)) {
        check_cancelled(o);
        progress.update(reader.bytes_read());
        std::string_view text = document.text;
        if (s.split.by_position)
            text = text.substr(0, s.split.position);
        else if (!s.split.all && s.split.held_out(document_hash(text)))
            continue;
        for (std::size_t start = 0, end; start < text.size(); start = end) {
            end = block_end(text, start);
            if (rng::bits(kSampleSeed, 0, block++) <= threshold) words.add(text.substr(start, end - start));
        }
    }
    progress.finish(
        fmt::format("{} for the tokenizer, {} distinct words", format_bytes(words.bytes()), words.words().size()));
    if (log) fmt::print(log, "learning a vocabulary of {} ...\n", o.vocab_size);
    if (log) std::fflush(log);
    return Tokenizer::train(words, o.vocab_size);
}

// One split's shards, a new one when the last is full.
class SplitWriter {
  public:
    SplitWriter(std::string folder, std::string name, const Tokenizer& tokenizer, std::int64_t shard_tokens)
        : folder_(std::move(folder)),
          name_(std::move(name)),
          tokenizer_(tokenizer),
          shard_tokens_(shard_tokens),
          counts_(static_cast<std::size_t>(tokenizer.vocab_size())) {}

    void append(std::span<const std::int32_t> tokens) {
        for (const std::int32_t token : tokens) ++counts_[static_cast<std::size_t>(token)];
        info_.tokens += static_cast<std::int64_t>(tokens.size());
        while (!tokens.empty()) {
            if (!shard_) {
                info_.files.push_back(fmt::format("{}_{:06}.bin", name_, info_.files.size()));
                shard_.emplace(join_path(folder_, info_.files.back()), tokenizer_.vocab_size());
            }
            const auto room = static_cast<std::size_t>(shard_tokens_ - shard_->tokens());
            const std::size_t part = std::min(room, tokens.size());
            shard_->append(tokens.first(part));
            tokens = tokens.subspan(part);
            if (part == room) close();
        }
    }
    void end_document() {
        const std::int32_t separator = tokenizer_.separator();
        append({&separator, 1});
        ++info_.documents;
    }
    void add_bytes(std::size_t bytes) { info_.bytes += static_cast<std::int64_t>(bytes); }
    SplitInfo finish() {
        if (shard_) close();
        return info_;
    }
    const std::vector<std::int64_t>& counts() const { return counts_; }
    std::int64_t tokens() const { return info_.tokens; }

  private:
    void close() {
        info_.checksums.push_back(shard_->finish().checksum);
        shard_.reset();
    }
    std::string folder_, name_;
    const Tokenizer& tokenizer_;
    std::int64_t shard_tokens_;
    std::vector<std::int64_t> counts_;
    std::optional<ShardWriter> shard_;
    SplitInfo info_;
};

struct Segment {
    std::string_view text;
    std::shared_ptr<const void> owner;
    bool held_out = false, ends_document = false;
};

// Documents as segments of about kSegment bytes, cut only where no token can span the cut.
class Segmenter {
  public:
    Segmenter(const Corpus& corpus, const Split& split, const Tokenizer& tokenizer)
        : reader_(corpus), split_(split), tokenizer_(tokenizer) {}

    bool next(Segment& segment) {
        while (parts_.empty()) {
            Document document;
            if (!reader_.next(document)) return false;
            if (split_.by_position) {
                const std::size_t cut = std::min(split_.position, document.text.size());
                parts_ = {{document.text.substr(0, cut), document.owner, false, true},
                          {document.text.substr(cut), document.owner, true, true}};
            } else {
                parts_ = {{document.text, document.owner, split_.held_out(document_hash(document.text)), true}};
            }
        }
        Segment& part = parts_.front();
        segment = part;
        const std::size_t cut = cut_of(part.text);
        if (cut < part.text.size()) {
            segment.text = part.text.substr(0, cut);
            segment.ends_document = false;
            part.text.remove_prefix(cut);
        } else {
            parts_.erase(parts_.begin());
        }
        return true;
    }
    const CorpusReader& reader() const { return reader_; }

  private:
    std::size_t cut_of(std::string_view text) const {
        std::size_t at = kSegment;
        while (at < text.size() &&
               tokenizer_.joined(static_cast<unsigned char>(text[at - 1]), static_cast<unsigned char>(text[at])))
            ++at;
        return std::min(at, text.size());
    }
    CorpusReader reader_;
    const Split& split_;
    const Tokenizer& tokenizer_;
    std::vector<Segment> parts_;  // of the document at hand, what is left of it
};

// Third pass: encodes waves of segments on all threads and hands them on in order.
class WaveEncoder {
  public:
    WaveEncoder(const Tokenizer& tokenizer, int threads)
        : encoders_(static_cast<std::size_t>(threads > 0 ? threads : omp_get_max_threads()), Encoder(tokenizer)) {}

    const std::vector<std::vector<std::int32_t>>& encode(const std::vector<Segment>& wave) {
        tokens_.resize(std::max(tokens_.size(), wave.size()));
        std::exception_ptr failure;
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast <int>(encoders_.size()))
        for (std::size_t i = 0; i < wave.size(); ++i) {
            try {
                tokens_[i].clear();
                encoders_[static_cast<std::size_t>(omp_get_thread_num())].encode(wave[i].text, tokens_[i]);
            } catch (...) {
#pragma omp critical(fiedler_prepare_failure)
                failure = std::current_exception();
            }
        }
        if (failure) std::rethrow_exception(failure);
        return tokens_;
    }

  private:
    std::vector<Encoder> encoders_;
    std::vector<std::vector<std::int32_t>> tokens_;
};

void encode_corpus(const Corpus& corpus, const PrepareOptions& o, const Survey& survey, const Tokenizer& tokenizer,
                   SplitWriter& train, SplitWriter& val, std::FILE* log) {
    Progress progress(log, "encoding", survey.counts.bytes);
    Segmenter segments(corpus, survey.split, tokenizer);
    WaveEncoder encoder(tokenizer, o.threads);
    std::vector<Segment> wave;
    std::int64_t done = 0;
    for (bool more = true; more;) {
        wave.clear();
        Segment segment;
        for (std::size_t bytes = 0; bytes < kWaveBytes && wave.size() < kWaveSegments; bytes += segment.text.size()) {
            if (!(more = segments.next(segment))) break;
            wave.push_back(segment);
        }
        const auto& tokens = encoder.encode(wave);
        for (std::size_t i = 0; i < wave.size(); ++i) {
            SplitWriter& out = wave[i].held_out ? val : train;
            out.append(tokens[i]);
            out.add_bytes(wave[i].text.size());
            if (wave[i].ends_document) out.end_document();
            done += static_cast<std::int64_t>(wave[i].text.size());
        }
        progress.update(done, fmt::format("{} documents, {} tokens", segments.reader().counts().documents,
                                          format_count(train.tokens() + val.tokens())));
        check_cancelled(o);
    }
    progress.finish(
        fmt::format("{} training and {} validation tokens", format_count(train.tokens()), format_count(val.tokens())));
}

DatasetInfo prepare_scanned(const Corpus& corpus, const PrepareOptions& o, const std::string& output, std::FILE* log) {
    if (!is_free(output) && !(o.replace && file_exists(join_path(output, "dataset.json"))))
        input_error("{}: exists already; remove it or choose another output folder", output);
    StagedFolder staged(output);  // an unwritable output is found here, before the work
    const Survey s = survey(corpus, o, log);
    const Tokenizer tokenizer = o.tokenizer.empty() ? train_tokenizer(corpus, o, s, log) : Tokenizer::load(o.tokenizer);
    check_cancelled(o);

    DatasetInfo info;
    info.tokenizer = "tokenizer.model";
    info.tokenizer_checksum = hash_bytes(tokenizer.model());
    write_file_atomic(join_path(staged.path(), info.tokenizer), tokenizer.model());
    SplitWriter train(staged.path(), "train", tokenizer, o.shard_tokens);
    SplitWriter val(staged.path(), "val", tokenizer, o.shard_tokens);
    encode_corpus(corpus, o, s, tokenizer, train, val, log);
    info.train = train.finish();
    info.val = val.finish();
    info.folder = output;
    info.split = s.split.by_position ? "by position" : s.split.none || s.split.all ? "none" : "by document";
    info.fingerprint = dataset_fingerprint(corpus, o);
    info.skipped = s.counts.skipped();
    info.vocab_size = tokenizer.vocab_size();
    info.separator = tokenizer.separator();
    info.unigram_entropy = entropy_of_counts(val.counts());
    write_file_atomic(join_path(staged.path(), "dataset.json"), manifest_text(info));
    staged.commit(o.replace);
    return info;
}

}  // namespace

std::string dataset_fingerprint(const Corpus& corpus, const PrepareOptions& o) {
    std::string all =
        fmt::format("{} {} {} {} {}\n", kFormat, hex64(corpus.fingerprint), o.val_fraction, o.shard_tokens,
                    o.tokenizer.empty() ? fmt::format("{} {}", o.vocab_size, sample_bytes(o)) : "");
    all += read_tokenizer_bytes(o);
    return hex64(hash_bytes(all));
}

DatasetInfo prepare(const PrepareOptions& options, const std::string& output, std::FILE* log) {
    check_options(options);
    return prepare_scanned(scan_corpus(options.corpus), options, output, log);
}

Prepared prepare_if_needed(const PrepareOptions& options, const std::string& cache, std::FILE* log) {
    check_options(options);
    const std::vector<std::string>& paths = options.corpus.paths;
    if (paths.size() == 1 && is_dataset(paths[0])) return {paths[0], true};
    const Corpus corpus = scan_corpus(options.corpus);
    const std::string fingerprint = dataset_fingerprint(corpus, options);
    std::string name = fs::path(paths[0]).lexically_normal().filename().string();
    if (name.empty() || name == "." || name == "..") name = "data";
    const std::string folder = join_path(cache, name + "-" + fingerprint);
    if (file_exists(join_path(folder, "dataset.json"))) {
        try {
            if (Dataset::open(folder).info().fingerprint == fingerprint) {
                if (log) fmt::print(log, "using the dataset prepared before: {}\n", folder);
                return {folder, true};
            }
        } catch (const InputError& damage) {
            if (log) fmt::print(log, "preparing again, the dataset made before is damaged: {}\n", damage.what());
        }
    }
    PrepareOptions fresh = options;
    fresh.replace = true;
    prepare_scanned(corpus, fresh, folder, log);
    if (log) fmt::print(log, "dataset: {}\n", folder);
    return {folder, false};
}

}  // namespace fiedler
