#include "engine/gguf.h"

#include <algorithm>
#include <set>

#include "engine/byte_reader.h"
#include "engine/error.h"

namespace fiedler {

namespace {

constexpr std::uint32_t kVersion = 3, kAlign = 32, kMostDimensions = 4;
using Type = GgufValue::Type;

struct TensorType {
    std::uint32_t number;
    const char* name;
};
constexpr TensorType kTypes[] = {{0, "f32"}, {1, "f16"}, {30, "bf16"}};

std::uint64_t round_up(std::uint64_t n, std::uint64_t align) { return (n + align - 1) / align * align; }

struct Writer {
    std::string bytes;
    template <class T>
    void number(T value) {
        bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
    }
    void text(std::string_view t) {
        number(static_cast<std::uint64_t>(t.size()));
        bytes += t;
    }
    void value(const GgufValue& v) {
        number(static_cast<std::uint32_t>(v.type));
        if (v.type == Type::u32) number(v.number);
        if (v.type == Type::f32) number(v.real);
        if (v.type == Type::text) text(v.text);
        if (v.type != Type::array) return;
        number(static_cast<std::uint32_t>(v.of));
        const std::size_t n = v.of == Type::text  ? v.texts.size()
                              : v.of == Type::u8  ? v.text.size()
                              : v.of == Type::f32 ? v.reals.size()
                                                  : v.numbers.size();
        number(static_cast<std::uint64_t>(n));
        for (const std::string& t : v.texts) text(t);
        for (const float f : v.reals) number(f);
        for (const std::int32_t i : v.numbers) number(i);
        if (v.of == Type::u8) bytes += v.text;
    }
};

// Bytes of a value of a fixed size; 0: text, array or no type.
std::uint64_t size_of(std::uint32_t type) {
    constexpr std::uint64_t sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return type < std::size(sizes) ? sizes[type] : 0;
}
std::string_view read_text(ByteReader& in) { return in.take(in.number<std::uint64_t>("a length"), "a text"); }

// Reads past a value; gives its bytes where it is a text or an array of bytes.
std::string_view read_value(ByteReader& in, std::uint32_t type, int depth) {
    if (const std::uint64_t size = size_of(type)) return in.take(size, "a value"), std::string_view();
    if (type == static_cast<std::uint32_t>(Type::text)) return read_text(in);
    if (type != static_cast<std::uint32_t>(Type::array)) in.fail("a value of no known type");
    if (depth > 3) in.fail("arrays within arrays");
    const auto of = in.number<std::uint32_t>("a type");
    const auto count = in.number<std::uint64_t>("a length");
    if (const std::uint64_t size = size_of(of)) {
        if (count > in.left() / size) in.fail("a length");
        const std::string_view bytes = in.take(count * size, "an array");
        return of == static_cast<std::uint32_t>(Type::u8) ? bytes : std::string_view();
    }
    if (count > in.left() / 8) in.fail("a length");  // each element has a length of 8 bytes at least
    for (std::uint64_t i = 0; i < count; ++i) read_value(in, of, depth + 1);
    return {};
}

}  // namespace

GgufValue GgufValue::of_number(std::uint32_t n) {
    GgufValue v;
    v.number = n;
    return v;
}
GgufValue GgufValue::of_real(float f) {
    GgufValue v;
    v.type = Type::f32;
    v.real = f;
    return v;
}
GgufValue GgufValue::of_text(std::string t) {
    GgufValue v;
    v.type = Type::text;
    v.text = std::move(t);
    return v;
}
GgufValue GgufValue::of_bytes(std::string t) {
    GgufValue v = of_text(std::move(t));
    v.type = Type::array;
    v.of = Type::u8;
    return v;
}
GgufValue GgufValue::of_texts(std::vector<std::string> t) {
    GgufValue v;
    v.type = Type::array;
    v.of = Type::text;
    v.texts = std::move(t);
    return v;
}
GgufValue GgufValue::of_reals(std::vector<float> f) {
    GgufValue v;
    v.type = Type::array;
    v.of = Type::f32;
    v.reals = std::move(f);
    return v;
}
GgufValue GgufValue::of_numbers(std::vector<std::int32_t> n) {
    GgufValue v;
    v.type = Type::array;
    v.of = Type::i32;
    v.numbers = std::move(n);
    return v;
}

void write_gguf(const std::string& path, const GgufMetadata& metadata, std::span<const WeightTensor> tensors) {
    Writer out;
    out.bytes = "GGUF";
    out.number(kVersion);
    out.number(static_cast<std::uint64_t>(tensors.size()));
    out.number(static_cast<std::uint64_t>(metadata.size()));
    for (const auto& [key, value] : metadata) {
        out.text(key);
        out.value(value);
    }
    std::uint64_t offset = 0;
    for (const WeightTensor& t : tensors) {
        const auto type =
            std::find_if(std::begin(kTypes), std::end(kTypes), [&](const TensorType& k) { return t.dtype == k.name; });
        if (type == std::end(kTypes) || t.shape.size() > kMostDimensions)
            throw std::logic_error("gguf: tensor " + t.name + " has a type or a shape that gguf has not");
        out.text(t.name);
        out.number(static_cast<std::uint32_t>(t.shape.size()));
        for (std::size_t d = t.shape.size(); d-- > 0;)
            out.number(static_cast<std::uint64_t>(t.shape[d]));  // innermost first
        out.number(type->number);
        out.number(offset);
        offset += round_up(t.bytes(), kAlign);
    }
    out.bytes.resize(round_up(out.bytes.size(), kAlign));
    for (const WeightTensor& t : tensors) {
        out.bytes.append(static_cast<const char*>(t.data), t.bytes());
        out.bytes.resize(round_up(out.bytes.size(), kAlign));
    }
    write_file_atomic(path, out.bytes);
}

namespace {

struct Entry {
    WeightTensor tensor;
    std::uint64_t offset = 0;
};
Entry read_entry(ByteReader& in, const std::string& path) {
    Entry e;
    e.tensor.name = read_text(in);
    const auto dimensions = in.number<std::uint32_t>("a tensor's dimensions");
    if (dimensions < 1 || dimensions > kMostDimensions) in.fail("a tensor of no or too many dimensions");
    for (std::uint32_t d = 0; d < dimensions; ++d) {
        const auto n = in.number<std::uint64_t>("a dimension");
        if (n > std::uint64_t{1} << 40) in.fail("a dimension");
        e.tensor.shape.insert(e.tensor.shape.begin(), static_cast<std::int64_t>(n));
    }
    const auto type = in.number<std::uint32_t>("a tensor's type");
    e.offset = in.number<std::uint64_t>("a tensor's offset");
    for (const TensorType& k : kTypes)
        if (k.number == type) e.tensor.dtype = k.name;
    if (e.tensor.dtype.empty())
        input_error("{}: tensor '{}' is of type {}, and fiedler takes F32 (0), F16 (1) and BF16 (30); convert it first",
                    path, e.tensor.name, type);
    if (e.tensor.elements() < 0) in.fail("a tensor's shape");
    return e;
}

}  // namespace

GgufFile::GgufFile(const std::string& path) : path_(path), file_(path) {
    ByteReader in(file_.text(), path);
    if (!file_.text().starts_with("GGUF"))
        input_error("{}: is no GGUF file; give one that `fiedler export` wrote", path);
    in.take(4, "the magic");
    if (const auto version = in.number<std::uint32_t>("the version"); version != 2 && version != kVersion)
        input_error("{}: is of GGUF version {}, and fiedler reads 2 and 3; convert it", path, version);
    const auto count = in.number<std::uint64_t>("the number of tensors");
    const auto values = in.number<std::uint64_t>("the number of values");
    for (std::uint64_t i = 0; i < values; ++i) {
        const std::string key(read_text(in));
        const auto type = in.number<std::uint32_t>("a type");
        if (key == "general.alignment" && type == static_cast<std::uint32_t>(Type::u32)) {
            if (in.number<std::uint32_t>("the alignment") != kAlign) in.fail("an alignment other than 32");
            continue;
        }
        const std::string_view bytes = read_value(in, type, 0);
        if (!bytes.empty()) texts_[key] = bytes;
    }
    std::vector<Entry> entries;
    std::set<std::string> names;
    for (std::uint64_t i = 0; i < count; ++i) {
        entries.push_back(read_entry(in, path));
        if (!names.insert(entries.back().tensor.name).second) in.fail("a second tensor of one name");
    }
    const std::uint64_t payload = round_up(in.at(), kAlign);
    for (Entry& e : entries) {
        const std::uint64_t size = e.tensor.bytes();
        if (payload > file_.size() || e.offset % kAlign != 0 || e.offset > file_.size() - payload ||
            size > file_.size() - payload - e.offset)
            input_error("{}: is truncated or corrupt: tensor '{}' lies outside the file; copy it again", path,
                        e.tensor.name);
        e.tensor.data = file_.data() + payload + e.offset;
        tensors_.push_back(std::move(e.tensor));
    }
}

}  // namespace fiedler
