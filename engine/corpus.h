// engine/corpus.h: files, folders and JSONL as a stream of documents, one at a time, always in the same order.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace fiedler {

struct CorpusOptions {
    std::vector<std::string> paths;       // files and folders; a file is one document, a line of a .jsonl file is one
    std::vector<std::string> extensions;  // inside folders, only these ("h", "hpp", "" for none); empty: all
    std::string json_field = "text";      // the field of a JSONL record that holds the text
    std::int64_t max_bytes = 0;           // documents are taken in order up to so many bytes of text; 0: all
    std::int64_t max_file_bytes = std::int64_t{1} << 30;  // a single document may not be larger
};

struct CorpusFile {
    std::string path;
    std::int64_t bytes = 0, modified_ns = 0;
    bool jsonl = false, named = false;  // named: given by the user, not found in a folder, so a fault is an error
};

// The files a corpus is made of, in reading order: paths in the order given, folders in byte-wise order of the path,
// each file once however many links lead to it. Hidden entries and symbolic links to folders are not followed.
struct Corpus {
    CorpusOptions options;
    std::vector<CorpusFile> files;
    std::int64_t bytes = 0;         // of all files, at most max_bytes: what a progress bar counts to
    std::uint64_t fingerprint = 0;  // of paths, sizes, modification times and options
};
Corpus scan_corpus(const CorpusOptions& options);

struct Document {
    std::string name;  // path, or path:line in a JSONL file
    std::string_view text;
    std::shared_ptr<const void> owner;  // keeps text alive
};

struct CorpusCounts {
    std::int64_t documents = 0, bytes = 0;                             // bytes of text
    std::int64_t binary = 0, not_utf8 = 0, empty = 0, unreadable = 0;  // skipped files
    std::string skipped() const;  // "skipped 12 binary files, 3 not UTF-8", or empty
};

// Reads the documents one after the other; holds one file at a time (large ones mapped, not read).
class CorpusReader {
  public:
    explicit CorpusReader(const Corpus& corpus);
    ~CorpusReader();
    bool next(Document& document);  // false at the end; InputError when the corpus has no text at all
    const CorpusCounts& counts() const { return counts_; }
    std::int64_t bytes_read() const { return bytes_read_; }  // of files, for the progress bar

  private:
    bool next_whole(Document& document);
    bool open_file(const CorpusFile& file);
    bool next_line(Document& document);
    const Corpus& corpus_;
    CorpusCounts counts_;
    std::size_t file_ = 0;
    std::int64_t bytes_read_ = 0;
    std::shared_ptr<const void> owner_;
    std::string_view text_;  // of the file at hand
    std::size_t at_ = 0;     // JSONL: start of the next line
    std::int64_t line_ = 0;  // JSONL: number of the last line
    bool in_lines_ = false, ended_ = false;
};

}  // namespace fiedler
