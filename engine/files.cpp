#include "engine/files.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "engine/error.h"

namespace fiedler {
namespace fs = std::filesystem;

namespace {

constexpr std::size_t kBufferBytes = std::size_t{1} << 20;

[[noreturn]] void write_failed(const std::string& path, int error) {
    if (error == ENOSPC || error == EDQUOT || error == EFBIG)
        input_error("{}: cannot write, {} ({}); free some space or choose another output folder", path,
                    error == EFBIG ? "a limit on file sizes is reached" : "the disk is full", std::strerror(error));
    input_error("{}: cannot write ({}); choose another output folder", path, std::strerror(error));
}

// A file descriptor that closes itself.
struct Descriptor {
    explicit Descriptor(int value) : value(value) {}
    ~Descriptor() {
        if (value >= 0) ::close(value);
    }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    const int value;
};

int open_to_read(const std::string& path, std::size_t& size) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) input_error("{}: cannot read ({}); check the path", path, std::strerror(errno));
    struct stat status {};
    if (::fstat(file, &status) != 0 || !S_ISREG(status.st_mode)) {
        ::close(file);
        input_error("{}: not a regular file; give a file here", path);
    }
    size = static_cast<std::size_t>(status.st_size);
    return file;
}

// Renames are durable once the folder that holds the names is.
void sync_folder(const fs::path& folder) {
    const Descriptor file(::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (file.value >= 0)
        ::fsync(file.value);  // some file systems cannot: then the rename is as durable as they make it
}

std::string host_name() {
    char name[256] = "host";
    ::gethostname(name, sizeof name - 1);
    return name;
}

// ".<name>.partial-<host>-<process>"
std::string partial_prefix(const fs::path& destination) {
    return fmt::format(".{}.partial-{}-", destination.filename().string(), host_name());
}

fs::path without_trailing_slash(const std::string& path) {
    fs::path p = fs::path(path).lexically_normal();
    return p.has_filename() ? p : p.parent_path();
}

void remove_left_overs(const fs::path& destination) {
    const std::string prefix = partial_prefix(destination);
    std::error_code error;
    const fs::path parent = destination.has_parent_path() ? destination.parent_path() : fs::path(".");
    for (fs::directory_iterator it(parent, error), end; !error && it != end; it.increment(error)) {
        const std::string name = it->path().filename().string();
        if (!name.starts_with(prefix)) continue;
        const long process = std::strtol(name.c_str() + prefix.size(), nullptr, 10);
        std::error_code ignored;
        if (process > 0 && ::kill(static_cast<pid_t>(process), 0) != 0 && errno == ESRCH)
            fs::remove_all(it->path(), ignored);
    }
}

}  // namespace

std::string join_path(const std::string& folder, std::string_view name) { return (fs::path(folder) / name).string(); }

bool file_exists(const std::string& path) {
    std::error_code error;
    return fs::is_regular_file(path, error);
}

bool folder_exists(const std::string& path) {
    std::error_code error;
    return fs::is_directory(path, error);
}

bool is_free(const std::string& path) {
    std::error_code error;
    if (!fs::exists(fs::symlink_status(path, error))) return true;
    return fs::is_directory(path, error) && fs::is_empty(path, error) && !error;
}

std::vector<std::string> make_folders(const std::string& path) {
    std::vector<std::string> made;
    std::error_code error, unknown;
    for (fs::path p = path; !p.empty() && fs::status(p, unknown).type() == fs::file_type::not_found;
         p = p.parent_path())
        made.insert(made.begin(), p.string());
    fs::create_directories(path, error);
    if (error) {
        remove_empty_folders(made);
        input_error("{}: cannot create this folder ({}); choose another one", path, error.message());
    }
    if (!folder_exists(path)) input_error("{}: not a folder; choose another output folder", path);
    if (::access(path.c_str(), W_OK | X_OK) != 0) write_failed(path, errno);
    return made;
}

void remove_empty_folders(const std::vector<std::string>& outermost_first) {
    for (auto folder = outermost_first.rbegin(); folder != outermost_first.rend(); ++folder) ::rmdir(folder->c_str());
}

std::string read_file(const std::string& path) {
    std::size_t size = 0;
    const Descriptor file(open_to_read(path, size));
    std::string bytes(size, '\0');
    std::size_t done = 0;
    while (done < size) {
        const ssize_t got = ::read(file.value, bytes.data() + done, size - done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) input_error("{}: cannot read ({}); check the disk", path, std::strerror(errno));
        if (got == 0) break;  // became shorter meanwhile
        done += static_cast<std::size_t>(got);
    }
    bytes.resize(done);
    return bytes;
}

MappedFile::MappedFile(const std::string& path) {
    std::size_t size = 0;
    const Descriptor file(open_to_read(path, size));
    if (size == 0) return;
    void* base = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, file.value, 0);
    if (base == MAP_FAILED) input_error("{}: cannot map into memory ({})", path, std::strerror(errno));
    data_ = static_cast<const std::byte*>(base);
    size_ = size;
}
MappedFile::~MappedFile() {
    if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
}
MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

FileWriter::FileWriter(const std::string& path) : path_(path) {
    file_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (file_ < 0) write_failed(path_, errno);
    buffer_.reserve(kBufferBytes);
}
FileWriter::~FileWriter() {
    if (file_ >= 0) ::close(file_);
}

void FileWriter::write(const void* bytes, std::size_t count) {
    if (buffer_.size() + count > kBufferBytes) flush();
    if (count >= kBufferBytes)
        write_all(static_cast<const char*>(bytes), count);
    else
        buffer_.append(static_cast<const char*>(bytes), count);
}

void FileWriter::flush() {
    write_all(buffer_.data(), buffer_.size());
    buffer_.clear();
}

void FileWriter::write_all(const char* bytes, std::size_t count) {
    while (count > 0) {
        const ssize_t put = ::write(file_, bytes, count);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) write_failed(path_, errno);
        bytes += put;
        count -= static_cast<std::size_t>(put);
    }
}

void FileWriter::overwrite(std::uint64_t offset, const void* bytes, std::size_t count) {
    flush();
    const char* from = static_cast<const char*>(bytes);
    while (count > 0) {
        const ssize_t put = ::pwrite(file_, from, count, static_cast<off_t>(offset));
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) write_failed(path_, errno);
        from += put;
        offset += static_cast<std::uint64_t>(put);
        count -= static_cast<std::size_t>(put);
    }
}

void FileWriter::close() {
    flush();
    // EINVAL and EROFS: not a file that can be synchronised (a pipe, a device); its writes have been checked.
    if (::fsync(file_) != 0 && errno != EINVAL && errno != EROFS) write_failed(path_, errno);
    if (::close(std::exchange(file_, -1)) != 0) write_failed(path_, errno);
}

void write_file_atomic(const std::string& path, std::string_view bytes) {
    const fs::path target(path);
    const fs::path temporary = target.parent_path() / fmt::format(".{}.tmp-{}", target.filename().string(), ::getpid());
    try {
        FileWriter writer(temporary.string());
        writer.write(bytes.data(), bytes.size());
        writer.close();
        if (::rename(temporary.c_str(), path.c_str()) != 0) write_failed(path, errno);
    } catch (...) {
        ::unlink(temporary.c_str());
        throw;
    }
    sync_folder(target.parent_path());
}

void probe_writable(const std::string& path) {
    if (folder_exists(path)) input_error("{}: is a folder; name a file", path);
    const std::filesystem::path target(path);
    const std::string probe = (target.parent_path() / ("." + target.filename().string() + ".probe")).string();
    { const FileWriter writer(probe); }
    std::error_code ignored;
    std::filesystem::remove(probe, ignored);
}

StagedFolder::StagedFolder(const std::string& destination)
    : destination_(without_trailing_slash(destination).string()) {
    const fs::path target(destination_);
    if (target.has_parent_path()) parents_ = make_folders(target.parent_path().string());
    remove_left_overs(target);
    path_ = (target.parent_path() / (partial_prefix(target) + std::to_string(::getpid()))).string();
    std::error_code ignored;
    fs::remove_all(path_, ignored);
    if (::mkdir(path_.c_str(), 0755) != 0) {
        const int failure = errno;
        remove_empty_folders(parents_);
        write_failed(destination_, failure);
    }
}

StagedFolder::~StagedFolder() {
    if (committed_) return;
    std::error_code ignored;
    fs::remove_all(path_, ignored);
    remove_empty_folders(parents_);
}

void StagedFolder::commit(bool replace) {
    sync_folder(path_);
    const std::string old = path_ + ".old";
    std::error_code error;
    const bool exists = !is_free(destination_);
    if (exists && !replace) input_error("{}: exists already; remove it or choose another output folder", destination_);
    if (exists && ::rename(destination_.c_str(), old.c_str()) != 0) write_failed(destination_, errno);
    if (::rename(path_.c_str(), destination_.c_str()) != 0) {
        const int failure = errno;
        if (exists) ::rename(old.c_str(), destination_.c_str());
        write_failed(destination_, failure);
    }
    committed_ = true;
    sync_folder(fs::path(destination_).parent_path());
    if (exists) fs::remove_all(old, error);
}

std::string list_of(const std::vector<std::string>& items) {
    std::string list;
    for (const std::string& item : items) list.append(list.empty() ? "" : ", ").append(item);
    return list;
}

std::string hex64(std::uint64_t value) { return fmt::format("{:016x}", value); }
std::uint64_t hash_bytes(const void* bytes, std::size_t count) { return XXH3_64bits(bytes, count); }

}  // namespace fiedler
