#include "engine/weights.h"
#include "engine/json_fields.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <fstream>
#include <set>

#include "engine/error.h"
#include "engine/json_depth.h"
#include "kernels/dtype.h"
#include "kernels/half.h"

namespace fiedler {

namespace {

static_assert(std::endian::native == std::endian::little, "files are little-endian");

constexpr std::int32_t kMagic = 'F' | 'D' << 8 | 'L' << 16 | 'W' << 24, kVersion = 1;
constexpr std::size_t kHeaderBytes = 1024, kAlign = 256;
constexpr std::int64_t kMostTensors = 1 << 20;

using Header = std::array<std::int32_t, 256>;

constexpr std::size_t round_up(std::size_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

void put64(Header& h, std::size_t at, std::uint64_t value) { std::memcpy(&h[at], &value, 8); }
std::uint64_t get64(const Header& h, std::size_t at) {
    std::uint64_t value = 0;
    std::memcpy(&value, &h[at], 8);
    return value;
}

struct Type {
    const char* name;
    std::size_t bytes;
};
constexpr Type kTypes[] = {{"bf16", 2}, {"f16", 2}, {"f32", 4}, {"f64", 8}, {"i32", 4}, {"i64", 8}, {"u8", 1}};

// 0: there is no such type, or it is a type of blocks.
std::size_t dtype_bytes(const std::string& dtype) {
    for (const Type& t : kTypes)
        if (dtype == t.name) return t.bytes;
    return 0;
}
bool is_known(const std::string& dtype) { return dtype_bytes(dtype) > 0 || quant_of(dtype); }

// Elements of a shape, or -1 when it is no shape of a tensor that a file could hold.
std::int64_t count_elements(const std::vector<std::int64_t>& shape) {
    std::int64_t n = 1;
    for (const std::int64_t d : shape)
        if (d < 1 || __builtin_mul_overflow(n, d, &n) || n > (std::int64_t{1} << 56)) return -1;
    return shape.empty() ? -1 : n;
}

// Bytes of a tensor of a known type, or -1 when it has no such shape.
std::int64_t count_bytes(const std::string& dtype, const std::vector<std::int64_t>& shape) {
    const std::int64_t elements = count_elements(shape);
    const auto quant = quant_of(dtype);
    if (elements < 0 || !quant) return elements < 0 ? -1 : elements * static_cast<std::int64_t>(dtype_bytes(dtype));
    // The last block of rows and the last group of columns are filled up: at most 16 x 32 times the elements.
    if (shape.size() != 2 || elements > std::int64_t{1} << 40) return -1;
    return QuantShape{*quant, shape[0], shape[1]}.bytes();
}

Json table_of(const Json& config, std::span<const WeightTensor> tensors, std::size_t& payload_bytes) {
    Json table = {{"config", config}, {"tensors", Json::array()}};
    payload_bytes = 0;
    for (const WeightTensor& t : tensors) {
        table["tensors"].push_back({{"name", t.name},
                                    {"dtype", t.dtype},
                                    {"shape", t.shape},
                                    {"offset", payload_bytes},
                                    {"bytes", t.bytes()}});
        payload_bytes += round_up(t.bytes());
    }
    return table;
}

void check_header(const std::string& path, const Header& h, std::size_t file_bytes) {
    if (h[0] != kMagic)
        input_error("{}: is not a Fiedler weights file (.fdl); give one that `fiedler train` wrote", path);
    if (h[1] > kVersion || h[1] < 1)
        input_error("{}: is of version {}, and this fiedler reads version {}: {}", path, h[1], kVersion,
                    h[1] > kVersion ? "use a newer fiedler" : "write it again");
    if (get64(h, 254) != hash_bytes(h.data(), kHeaderBytes - 8))
        input_error("{}: is corrupt: its header does not match its checksum; copy it again", path);
    const std::uint64_t table_bytes = get64(h, 4), table = get64(h, 6), bytes = get64(h, 10), payload = get64(h, 12);
    if (table != kHeaderBytes || table_bytes > (std::uint64_t{1} << 40) || payload % kAlign != 0 ||
        payload < table + table_bytes || payload > (std::uint64_t{1} << 41) || bytes > (std::uint64_t{1} << 60))
        input_error("{}: is corrupt: its header gives impossible sizes; copy it again", path);
    if (file_bytes < payload + bytes)
        input_error("{}: is truncated: it has {} bytes of {}; copy it again", path, file_bytes, payload + bytes);
    if (file_bytes > payload + bytes)
        input_error("{}: is corrupt: {} bytes follow its end; copy it again", path, file_bytes - payload - bytes);
}

WeightTensor read_entry(const std::string& path, const Json& entry, const std::byte* payload,
                        std::uint64_t payload_bytes, std::uint64_t& end) {
    WeightTensor t;
    std::int64_t offset = 0, bytes = 0;
    try {
        t.name = entry.at("name").get<std::string>();
        t.dtype = entry.at("dtype").get<std::string>();
        t.shape = whole_numbers<std::int64_t>(entry.at("shape"));
        offset = whole_number<std::int64_t>(entry.at("offset"));
        bytes = whole_number<std::int64_t>(entry.at("bytes"));
    } catch (const Json::exception&) {
        input_error("{}: is corrupt: tensor '{}' lacks a field of the table; copy it again", path, t.name);
    }
    if (!is_known(t.dtype))
        input_error("{}: tensor '{}' is of type '{}', which this fiedler does not know: use a newer fiedler", path,
                    t.name, t.dtype);
    if (bytes < 0 || bytes != count_bytes(t.dtype, t.shape))
        input_error("{}: is corrupt: the shape of tensor '{}' does not give its {} bytes; copy it again", path, t.name,
                    bytes);
    if (offset < 0 || offset % static_cast<std::int64_t>(kAlign) != 0 || static_cast<std::uint64_t>(offset) < end ||
        static_cast<std::uint64_t>(offset) > payload_bytes ||
        static_cast<std::uint64_t>(bytes) > payload_bytes - static_cast<std::uint64_t>(offset))
        input_error("{}: is corrupt: tensor '{}' lies outside the payload or over another; copy it again", path,
                    t.name);
    end = static_cast<std::uint64_t>(offset + bytes);
    t.data = payload + offset;
    return t;
}

}  // namespace

std::int64_t WeightTensor::elements() const { return count_elements(shape); }
std::size_t WeightTensor::bytes() const { return static_cast<std::size_t>(count_bytes(dtype, shape)); }

std::optional<Quant> quant_of(const std::string& dtype) {
    if (dtype == "q8") return Quant::int8;
    if (dtype == "q4") return Quant::int4;
    return std::nullopt;
}

void write_weights(const std::string& path, const Json& config, std::span<const WeightTensor> tensors) {
    for (const WeightTensor& t : tensors)
        if (!t.data || !is_known(t.dtype) || count_bytes(t.dtype, t.shape) < 0)
            throw std::logic_error("weights: tensor " + t.name + " has no data, type or shape");
    std::size_t payload_bytes = 0;
    // A path in the config need not be UTF-8.
    const std::string table =
        table_of(config, tensors, payload_bytes).dump(-1, ' ', false, Json::error_handler_t::replace);
    const std::size_t payload = round_up(kHeaderBytes + table.size());
    std::string file(payload + payload_bytes, '\0');
    std::memcpy(file.data() + kHeaderBytes, table.data(), table.size());
    std::size_t offset = payload;
    for (const WeightTensor& t : tensors) {
        std::memcpy(file.data() + offset, t.data, t.bytes());
        offset += round_up(t.bytes());
    }
    Header h{};
    h[0] = kMagic;
    h[1] = kVersion;
    h[2] = static_cast<std::int32_t>(tensors.size());
    put64(h, 4, table.size());
    put64(h, 6, kHeaderBytes);
    put64(h, 8, hash_bytes(table));
    put64(h, 10, payload_bytes);
    put64(h, 12, payload);
    put64(h, 14, hash_bytes(file.data() + payload, payload_bytes));
    put64(h, 254, hash_bytes(h.data(), kHeaderBytes - 8));
    std::memcpy(file.data(), h.data(), kHeaderBytes);
    write_file_atomic(path, file);
}

WeightsFile::WeightsFile(const std::string& path, bool verify_payload) : path_(path), file_(path) {
    if (file_.size() < kHeaderBytes) {
        std::int32_t magic = 0;
        if (file_.size() >= 4) std::memcpy(&magic, file_.data(), 4);
        if (magic != kMagic) input_error("{}: is not a Fiedler weights file (.fdl)", path);
        input_error("{}: is truncated: it has {} bytes, and its header alone has {}; copy it again", path, file_.size(),
                    kHeaderBytes);
    }
    Header h{};
    std::memcpy(h.data(), file_.data(), kHeaderBytes);
    check_header(path, h, file_.size());
    const std::string_view table_text = file_.text().substr(kHeaderBytes, get64(h, 4));
    const std::byte* payload = file_.data() + get64(h, 12);
    if (hash_bytes(table_text) != get64(h, 8))
        input_error("{}: is corrupt: its table does not match its checksum; copy it again", path);
    if (verify_payload && hash_bytes(payload, get64(h, 10)) != get64(h, 14))
        input_error("{}: is corrupt: its tensors do not match their checksum; copy it again", path);

    const Json table = json_depth(table_text) > kDeepestJson ? Json() : Json::parse(table_text, nullptr, false);
    if (!table.is_object() || !table.contains("config") || !table.contains("tensors") || !table["tensors"].is_array())
        input_error("{}: is corrupt: its table is not the JSON it should be; copy it again", path);
    config_ = table["config"];
    if (h[2] < 0 || h[2] > kMostTensors || table["tensors"].size() != static_cast<std::size_t>(h[2]))
        input_error("{}: is corrupt: its header counts {} tensors and its table {}; copy it again", path, h[2],
                    table["tensors"].size());
    std::uint64_t end = 0;
    std::set<std::string> names;
    for (const Json& entry : table["tensors"]) {
        tensors_.push_back(read_entry(path, entry, payload, get64(h, 10), end));
        if (!names.insert(tensors_.back().name).second)
            input_error("{}: is corrupt: it has two tensors '{}'; copy it again", path, tensors_.back().name);
    }
}

const WeightTensor* WeightsFile::find(const std::string& name) const {
    const auto found =
        std::find_if(tensors_.begin(), tensors_.end(), [&](const WeightTensor& t) { return t.name == name; });
    return found == tensors_.end() ? nullptr : &*found;
}

std::string WeightsFile::kind() const {
    const auto found = config_.is_object() ? config_.find("kind") : config_.end();
    return found != config_.end() && found->is_string() ? found->get<std::string>() : "";
}

void WeightsFile::read_f32(const std::string& name, const std::vector<std::int64_t>& shape, float* out) const {
    const WeightTensor* t = find(name);
    if (!t) input_error("{}: has no tensor '{}': it was written for another model", path_, name);
    tensor_to_f32(path_, *t, shape, out);
}

void check_shape(const std::string& path, const WeightTensor& t, const std::vector<std::int64_t>& shape) {
    if (t.shape != shape)
        input_error("{}: tensor '{}' has shape [{}], and the model needs [{}]: it was written for another model", path,
                    t.name, fmt::join(t.shape, ", "), fmt::join(shape, ", "));
}

void tensor_to_f32(const std::string& path, const WeightTensor& t, const std::vector<std::int64_t>& shape, float* out) {
    check_shape(path, t, shape);
    if (t.dtype == "f32") {
        std::memcpy(out, t.data, t.bytes());
    } else if (t.dtype == "bf16" || t.dtype == "f16") {
        const auto* from = static_cast<const std::byte*>(t.data);  // of any alignment
        for (std::int64_t i = 0; i < t.elements(); ++i) {
            std::uint16_t bits = 0;
            std::memcpy(&bits, from + 2 * i, 2);
            out[i] = t.dtype == "f16" ? half_to_float(bits) : std::bit_cast<float>(std::uint32_t{bits} << 16);
        }
    } else if (const auto quant = quant_of(t.dtype)) {
        const QuantShape s{*quant, shape[0], shape[1]};
        dequantise(Cpu{}, {s, static_cast<const std::byte*>(t.data)}, {out, s.rows, s.cols});
    } else {
        input_error(
            "{}: tensor '{}' holds {}, and the model needs f32, bf16, f16, q8 or q4: it was written for another model",
            path, t.name, t.dtype);
    }
}

bool is_weights_file(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    std::int32_t magic = 0;
    return in.read(reinterpret_cast<char*>(&magic), 4) && magic == kMagic;
}

}  // namespace fiedler
