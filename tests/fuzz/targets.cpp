#include "tests/fuzz/targets.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "engine/checkpoint.h"
#include "engine/dataset.h"
#include "engine/error.h"
#include "engine/gguf.h"
#include "engine/json_depth.h"
#include "engine/piece_tokenizer.h"
#include "engine/safetensors.h"
#include "engine/shard.h"
#include "engine/weights.h"
#include "infer/session.h"

namespace fiedler::fuzz {

namespace {

// A file in memory, by a path that can be opened.
class MemoryFile {
  public:
    explicit MemoryFile(const std::string& bytes) : file_(::memfd_create("fuzz", 0)) {
        for (std::size_t done = 0; done < bytes.size();) {
            const ssize_t put = ::write(file_, bytes.data() + done, bytes.size() - done);
            if (put <= 0) std::abort();
            done += static_cast<std::size_t>(put);
        }
    }
    ~MemoryFile() { ::close(file_); }
    MemoryFile(const MemoryFile&) = delete;
    std::string path() const { return "/proc/self/fd/" + std::to_string(file_); }

  private:
    int file_;
};

template <class F>
void reading(F&& f) {
    try {
        f();
    } catch (const InputError&) {
    }
}

// Reads every byte that a tensor claims, and its values where it has some.
void touch(const std::string& path, const std::vector<WeightTensor>& tensors) {
    static volatile std::size_t sum;
    for (const WeightTensor& t : tensors) {
        const auto* bytes = static_cast<const unsigned char*>(t.data);
        for (std::size_t i = 0; i < t.bytes(); ++i) sum = sum + bytes[i];
        if (t.elements() > 1 << 20) continue;
        std::vector<float> values(static_cast<std::size_t>(t.elements()));
        reading([&] { tensor_to_f32(path, t, t.shape, values.data()); });
    }
}

// Makes the three checksums of a .fdl file right, as far as its sizes let it.
void mend_fdl(std::string& file) {
    if (file.size() < 1024) return;
    const auto get = [&](std::size_t at) {
        std::uint64_t v;
        std::memcpy(&v, file.data() + 4 * at, 8);
        return v;
    };
    const auto put = [&](std::size_t at, std::uint64_t v) { std::memcpy(file.data() + 4 * at, &v, 8); };
    const std::uint64_t payload = get(12), table = get(4);
    if (table <= file.size() - 1024) put(8, hash_bytes(file.data() + 1024, table));
    if (payload <= file.size() && get(10) <= file.size() - payload) put(14, hash_bytes(file.data() + payload, get(10)));
    put(254, hash_bytes(file.data(), 1016));
}

void fdl(const std::uint8_t* data, std::size_t size) {
    if (size < 1) return;
    std::string bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
    if (data[0] % 2 == 0) mend_fdl(bytes);
    const MemoryFile file(bytes);
    reading([&] {
        const WeightsFile weights(file.path());
        touch(file.path(), weights.tensors());
    });
    reading([&] {
        const InferModel model(file.path());
        Session session(model, {.threads = 1, .cache = static_cast<CacheKind>(data[0] / 2 % 3), .batch = 4});
        const std::int32_t last = model.spec().vocab - 1, tokens[] = {0, last, last / 2, 0, last};
        session.feed(
            std::span(tokens).first(std::min<std::size_t>(5, static_cast<std::size_t>(session.options().capacity))));
    });
}

void safetensors(const std::uint8_t* data, std::size_t size) {
    const MemoryFile file(std::string(reinterpret_cast<const char*>(data), size));
    reading([&] { touch(file.path(), SafetensorsFile(file.path()).tensors()); });
}

void gguf(const std::uint8_t* data, std::size_t size) {
    const MemoryFile file(std::string(reinterpret_cast<const char*>(data), size));
    reading([&] { touch(file.path(), GgufFile(file.path()).tensors()); });
}

void shard(const std::uint8_t* data, std::size_t size) {
    const MemoryFile file(std::string(reinterpret_cast<const char*>(data), size));
    (void)looks_like_shard(file.path());
    reading([&] {
        const Shard s(file.path());
        std::vector<std::int32_t> tokens(static_cast<std::size_t>(s.tokens()));
        s.copy(0, s.tokens(), tokens.data());
        if (s.tokens() > 0 && s[s.tokens() - 1] > s.info().max_token) std::abort();
    });
}

// A folder of this process that a manifest is put into.
const std::string& scratch_folder() {
    // Never destroyed: exit handlers run after destructors of what was made later than they were registered.
    static const std::string& folder = *new const std::string([] {
        const bool memory = std::filesystem::exists("/dev/shm");
        const std::string path =
            (memory ? "/dev/shm/fiedler-fuzz-" : "/tmp/fiedler-fuzz-") + std::to_string(::getpid());
        std::filesystem::create_directories(path);
        std::atexit([] { std::filesystem::remove_all(scratch_folder()); });
        return path;
    }());
    return folder;
}
void put(const std::string& name, const std::string& bytes) {
    const std::string path = scratch_folder() + "/" + name;
    std::FILE* file = std::fopen(path.c_str(), "wb");
    if (!file || std::fwrite(bytes.data(), 1, bytes.size(), file) != bytes.size()) std::abort();
    std::fclose(file);
}

void manifest(const std::uint8_t* data, std::size_t size) {
    if (size < 1) return;
    std::string bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
    put("dataset.json", bytes);
    reading([&] { (void)read_manifest(scratch_folder()); });
    if (data[0] % 2 == 0) {  // with its own checksum made right
        Json json = json_depth(bytes) > kDeepestJson ? Json() : Json::parse(bytes, nullptr, false);
        if (json.is_object()) {
            json.erase("xxh3");
            json["xxh3"] = hex64(hash_bytes(json.dump(-1, ' ', false, Json::error_handler_t::replace)));
            bytes = json.dump(-1, ' ', false, Json::error_handler_t::replace);
        }
    }
    put("manifest.json", bytes);
    reading([&] {
        const Checkpoint checkpoint(scratch_folder());
        (void)config_from_json(checkpoint.meta().config, "fuzz");
    });
}

void tokenizer(const std::uint8_t* data, std::size_t size) {
    if (size < 2) return;
    // The last bytes are a text to encode: as many as the first byte says.
    const std::size_t text = std::min<std::size_t>(data[0], size - 1);
    reading([&] {
        const PieceTokenizer t({reinterpret_cast<const char*>(data) + 1, size - 1 - text}, "fuzz");
        const auto tokens = t.encode({reinterpret_cast<const char*>(data) + size - text, text});
        for (const std::int32_t token : tokens)
            if (token < 0 || token >= t.vocab_size()) std::abort();
        (void)t.decode(tokens);
    });
}

}  // namespace

const Target kTargets[6] = {{"fdl", fdl},     {"safetensors", safetensors}, {"gguf", gguf},
                            {"shard", shard}, {"manifest", manifest},       {"tokenizer", tokenizer}};

const Target* target_named(const char* name) {
    for (const Target& t : kTargets)
        if (std::strcmp(t.name, name) == 0) return &t;
    return nullptr;
}

}  // namespace fiedler::fuzz
