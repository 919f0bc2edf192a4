// engine/files.h: files and folders that are either whole or not there.
//
// Whatever cannot be read or written (missing, not permitted, disk full) is an InputError that names the path.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace fiedler {

std::string read_file(const std::string& path);
bool file_exists(const std::string& path);
bool folder_exists(const std::string& path);
bool is_free(const std::string& path);  // nothing there, or an empty folder: an output may be put there
// With parents; fine when it is there already and can be written to. Returns those that were missing, outermost first.
std::vector<std::string> make_folders(const std::string& path);
void remove_empty_folders(const std::vector<std::string>& outermost_first);
std::string join_path(const std::string& folder, std::string_view name);

// Read-only view of a whole file. Empty files give an empty view.
class MappedFile {
  public:
    MappedFile() = default;
    explicit MappedFile(const std::string& path);
    ~MappedFile();
    MappedFile(MappedFile&& other) noexcept;
    MappedFile& operator=(MappedFile&& other) noexcept;
    const std::byte* data() const { return data_; }
    std::size_t size() const { return size_; }
    std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }

  private:
    const std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

// Buffered writer of one file. close() makes the bytes durable; destruction without close() drops what is not written.
class FileWriter {
  public:
    explicit FileWriter(const std::string& path);
    ~FileWriter();
    FileWriter(const FileWriter&) = delete;
    FileWriter& operator=(const FileWriter&) = delete;
    void write(const void* bytes, std::size_t count);
    void overwrite(std::uint64_t offset, const void* bytes, std::size_t count);  // bytes written before
    void close();                                                                // flush, fsync, close
    const std::string& path() const { return path_; }

  private:
    void flush();
    void write_all(const char* bytes, std::size_t count);
    std::string path_;
    std::string buffer_;
    int file_ = -1;
};

// Writes to a temporary name beside `path`, makes it durable, then renames: readers see the old file or the new one.
void write_file_atomic(const std::string& path, std::string_view bytes);
// Finds out before the work that a file can be written where it shall be.
void probe_writable(const std::string& path);

// A folder built under a temporary name beside its destination. commit() renames it into place; destruction without
// commit() removes it. Left-overs of processes killed on this machine are removed when the next one begins.
class StagedFolder {
  public:
    explicit StagedFolder(const std::string& destination);
    ~StagedFolder();
    StagedFolder(const StagedFolder&) = delete;
    StagedFolder& operator=(const StagedFolder&) = delete;
    const std::string& path() const { return path_; }
    void commit(bool replace);  // replace: an existing destination gives way, else it is an InputError

  private:
    std::string destination_, path_;
    std::vector<std::string> parents_;  // made for it
    bool committed_ = false;
};

// "a, b, c"
std::string list_of(const std::vector<std::string>& items);

// A hash as 16 hexadecimal digits, and XXH3-64 of bytes.
std::string hex64(std::uint64_t value);
std::uint64_t hash_bytes(const void* bytes, std::size_t count);
inline std::uint64_t hash_bytes(std::string_view bytes) { return hash_bytes(bytes.data(), bytes.size()); }

}  // namespace fiedler
