#include "engine/safetensors.h"
#include "engine/json_fields.h"

#include <algorithm>

#include "engine/byte_reader.h"
#include "engine/error.h"
#include "engine/json_depth.h"

namespace fiedler {

namespace {

constexpr std::uint64_t kLongestHeader = 100'000'000;  // the limit of the official reader

// Sorted keys: a header of very many takes time in proportion, which the ordered type would not.
using Header = nlohmann::json;

struct Name {
    const char *theirs, *ours;
};
constexpr Name kNames[] = {{"F32", "f32"}, {"BF16", "bf16"}, {"F16", "f16"}, {"F64", "f64"},
                           {"I32", "i32"}, {"I64", "i64"},   {"U8", "u8"}};

struct Entry {
    WeightTensor tensor;
    std::uint64_t begin = 0, end = 0;
};

Entry read_entry(const std::string& path, const std::string& name, const Header& about) {
    Entry e;
    e.tensor.name = name;
    std::string type;
    std::vector<std::uint64_t> offsets;
    try {
        type = about.at("dtype").get<std::string>();
        e.tensor.shape = whole_numbers<std::int64_t>(about.at("shape"));
        offsets = whole_numbers<std::uint64_t>(about.at("data_offsets"));
    } catch (const Header::exception&) {
        input_error("{}: is corrupt: tensor '{}' lacks dtype, shape or data_offsets; write it again", path, name);
    }
    for (const Name& n : kNames)
        if (type == n.theirs) e.tensor.dtype = n.ours;
    if (e.tensor.dtype.empty())
        input_error("{}: tensor '{}' is of type {}, and fiedler takes F32, BF16 and F16; convert it first", path, name,
                    type);
    if (offsets.size() != 2 || offsets[0] > offsets[1])
        input_error("{}: is corrupt: tensor '{}' has no two data_offsets in order; write it again", path, name);
    e.begin = offsets[0];
    e.end = offsets[1];
    if (e.tensor.elements() < 0 || e.tensor.bytes() != e.end - e.begin)
        input_error(
            "{}: tensor '{}' has a shape without elements, or one that does not give its {} bytes; write it again",
            path, name, e.end - e.begin);
    return e;
}

}  // namespace

void write_safetensors(const std::string& path, std::span<const WeightTensor> tensors,
                       const std::map<std::string, std::string>& notes) {
    Json header = Json::object();
    if (!notes.empty()) header["__metadata__"] = notes;
    std::size_t bytes = 0;
    for (const WeightTensor& t : tensors) {
        const auto found =
            std::find_if(std::begin(kNames), std::end(kNames), [&](const Name& n) { return t.dtype == n.ours; });
        if (found == std::end(kNames))
            throw std::logic_error("safetensors: tensor " + t.name + " is of type " + t.dtype);
        header[t.name] = {{"dtype", found->theirs}, {"shape", t.shape}, {"data_offsets", {bytes, bytes + t.bytes()}}};
        bytes += t.bytes();
    }
    std::string text = header.dump(-1, ' ', false, Json::error_handler_t::replace);
    text.resize((text.size() + 7) / 8 * 8, ' ');  // the tensors begin at a multiple of 8
    std::string file(8, '\0');
    const std::uint64_t length = text.size();
    std::memcpy(file.data(), &length, 8);
    file.reserve(8 + text.size() + bytes);
    file += text;
    for (const WeightTensor& t : tensors) file.append(static_cast<const char*>(t.data), t.bytes());
    write_file_atomic(path, file);
}

SafetensorsFile::SafetensorsFile(const std::string& path) : path_(path), file_(path) {
    ByteReader in(file_.text(), path);
    const auto length = in.number<std::uint64_t>("the header's length");
    if (length > kLongestHeader)
        input_error("{}: is no safetensors file: its header would have {} bytes; give one that safetensors wrote", path,
                    length);
    const std::string_view text = in.take(length, "the header");
    const Header header = json_depth(text) > kDeepestJson ? Header() : Header::parse(text, nullptr, false);
    if (!header.is_object()) input_error("{}: is no safetensors file: its header is not JSON; write it again", path);
    std::vector<Entry> entries;
    for (const auto& [name, about] : header.items())
        if (name != "__metadata__") entries.push_back(read_entry(path, name, about));
    std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.begin < b.begin; });
    std::uint64_t end = 0;
    const std::size_t payload = in.at();
    for (Entry& e : entries) {
        if (e.begin != end)
            input_error("{}: is corrupt: tensor '{}' overlaps another or leaves a gap; write it again", path,
                        e.tensor.name);
        end = e.end;
    }
    if (end != in.left())
        input_error("{}: is truncated or corrupt: its tensors have {} bytes, and {} are there; copy it again", path,
                    end, in.left());
    for (Entry& e : entries) {
        e.tensor.data = file_.data() + payload + e.begin;
        tensors_.push_back(std::move(e.tensor));
    }
}

}  // namespace fiedler
