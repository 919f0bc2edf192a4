#include "engine/matrix_files.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "engine/error.h"
#include "engine/table_text.h"
#include "kernels/parallel.h"

static_assert(std::endian::native == std::endian::little);

namespace fiedler {
namespace {

using Size = std::size_t;
constexpr std::string_view kMagic = "\x93NUMPY";

// ---- .npy ----------------------------------------------------------------------------------------------------------

struct NpyHeader {
    std::string type;  // "<f4"
    bool fortran = false;
    std::int64_t rows = 0, columns = 1;
    Size item = 0, data = 0;  // bytes of a number; where the numbers begin
};

// The header is a Python dictionary with three keys: {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }
class HeaderText {
  public:
    HeaderText(const std::string& path, std::string_view text) : path_(path), text_(text) {}
    [[noreturn]] void refuse(const char* what) const {
        input_error("{}: {} in the header of this .npy file; save it again with numpy.save", path_, what);
    }
    std::string_view value_of(std::string_view key) const {
        for (const char quote : {'\'', '"'}) {
            const std::string quoted = quote + std::string(key) + quote;
            const Size at = text_.find(quoted);
            if (at == text_.npos) continue;
            std::string_view rest = trimmed(text_.substr(at + quoted.size()));
            if (!rest.starts_with(':')) break;
            return trimmed(rest.substr(1));
        }
        refuse(fmt::format("no {}", key).c_str());
    }
    std::string type() const {
        const std::string_view v = value_of("descr");
        if (v.starts_with('['))
            input_error("{}: an array of records; save its numbers as a plain array of two dimensions", path_);
        if (v.empty() || (v[0] != '\'' && v[0] != '"')) refuse("no type");
        const Size end = v.find(v[0], 1);
        if (end == v.npos) refuse("no type");
        return std::string(v.substr(1, end - 1));
    }
    bool fortran() const {
        const std::string_view v = value_of("fortran_order");
        if (v.starts_with("True")) return true;
        if (v.starts_with("False")) return false;
        refuse("no order");
    }
    std::vector<std::int64_t> shape() const {
        std::string_view v = value_of("shape");
        if (!v.starts_with('(')) refuse("no shape");
        const Size end = v.find(')');
        if (end == v.npos) refuse("no shape");
        v = v.substr(1, end - 1);
        std::vector<std::int64_t> shape;
        while (!trimmed(v).empty()) {
            const Size comma = std::min(v.find(','), v.size());
            const std::string_view number = trimmed(v.substr(0, comma));
            const auto [stop, error] =
                std::from_chars(number.data(), number.data() + number.size(), shape.emplace_back());
            if (error != std::errc{} || stop != number.data() + number.size() || shape.back() < 0) refuse("no shape");
            v.remove_prefix(std::min(comma + 1, v.size()));
        }
        return shape;
    }

  private:
    const std::string& path_;
    std::string_view text_;
};

NpyHeader read_npy_header(const std::string& path, std::string_view bytes) {
    const auto cut_off = [&] { input_error("{}: cut off inside its header; copy or save it again", path); };
    if (bytes.size() < 10) cut_off();
    const int version = static_cast<unsigned char>(bytes[6]);
    if (version < 1 || version > 3)
        input_error("{}: version {} of the .npy format; versions 1 to 3 are read, save it again with numpy.save", path,
                    version);
    const Size width = version == 1 ? 2 : 4;
    Size length = 0;
    if (bytes.size() < 8 + width) cut_off();
    std::memcpy(&length, bytes.data() + 8, width);
    NpyHeader h;
    h.data = 8 + width + length;
    if (h.data > bytes.size()) cut_off();
    const HeaderText text(path, bytes.substr(8 + width, length));
    h.type = text.type();
    h.fortran = text.fortran();
    const std::vector<std::int64_t> shape = text.shape();
    if (shape.empty() || shape.size() > 2)
        input_error("{}: an array of {} dimensions; a matrix has two, a row for each node (reshape it)", path,
                    shape.size());
    h.rows = shape[0];
    if (shape.size() == 2) h.columns = shape[1];
    if (h.rows == 0 || h.columns == 0) input_error("{}: an array of {} x {} is empty", path, h.rows, h.columns);
    return h;
}

float half_to_float(std::uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float value = exponent == 31  ? (fraction ? std::numeric_limits<float>::quiet_NaN() : HUGE_VALF)
                        : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                        : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    return half & 0x8000 ? -value : value;
}

struct Half {
    std::uint16_t bits;
};
template <class T>
float to_float(T value) {
    if constexpr (std::is_same_v<T, Half>)
        return half_to_float(value.bits);
    else
        return static_cast<float>(value);
}

// Copies rows in blocks, so that Fortran order reads whole cache lines too.
template <class T>
void copy_npy(const std::string& path, const NpyHeader& h, const std::byte* data, Matrix& m) {
    constexpr std::int64_t kBlock = 64;
    const std::int64_t row_step = h.fortran ? 1 : h.columns, column_step = h.fortran ? h.rows : 1;
    std::atomic<bool> finite{true};
    parallel_for(Cpu{}, (h.rows + kBlock - 1) / kBlock, [&](std::int64_t block) {
        const std::int64_t first = block * kBlock, last = std::min(first + kBlock, h.rows);
        bool good = true;
        const auto copy = [&](std::int64_t r, std::int64_t c) {
            T value;
            std::memcpy(&value, data + static_cast<Size>(r * row_step + c * column_step) * sizeof(T), sizeof(T));
            const float x = to_float(value);
            good &= std::isfinite(x);
            m.values[static_cast<Size>(r * h.columns + c)] = x;
        };
        if (h.fortran)
            for (std::int64_t c = 0; c < h.columns; ++c)
                for (std::int64_t r = first; r < last; ++r) copy(r, c);
        else
            for (std::int64_t r = first; r < last; ++r)
                for (std::int64_t c = 0; c < h.columns; ++c) copy(r, c);
        if (!good) finite = false;
    });
    if (finite) return;
    const auto bad = std::find_if(m.values.begin(), m.values.end(), [](float x) { return !std::isfinite(x); });
    const std::int64_t at = bad - m.values.begin();
    input_error("{}: row {}, column {} (from 0): {}; replace what is missing, scale down what is beyond float", path,
                at / h.columns, at % h.columns, std::isnan(*bad) ? "NaN" : "infinite or beyond float");
}

struct NpyType {
    std::string_view name;  // without its byte order
    Size bytes;
    void (*copy)(const std::string&, const NpyHeader&, const std::byte*, Matrix&);
};
constexpr NpyType kTypes[] = {
    {"f2", 2, copy_npy<Half>},          {"f4", 4, copy_npy<float>},         {"f8", 8, copy_npy<double>},
    {"b1", 1, copy_npy<std::uint8_t>},  {"i1", 1, copy_npy<std::int8_t>},   {"i2", 2, copy_npy<std::int16_t>},
    {"i4", 4, copy_npy<std::int32_t>},  {"i8", 8, copy_npy<std::int64_t>},  {"u1", 1, copy_npy<std::uint8_t>},
    {"u2", 2, copy_npy<std::uint16_t>}, {"u4", 4, copy_npy<std::uint32_t>}, {"u8", 8, copy_npy<std::uint64_t>}};

const NpyType& type_of(const std::string& path, const std::string& type) {
    const std::string_view name = std::string_view(type).substr(std::min<Size>(1, type.size()));
    const NpyType* found = std::find_if(std::begin(kTypes), std::end(kTypes), [&](auto& t) { return t.name == name; });
    const bool known = found != std::end(kTypes);
    if (known && type[0] == '>' && found->bytes > 1)
        input_error("{}: numbers are big-endian ({}); save array.astype(\"<{}\")", path, type, name);
    if (!known || (type[0] != '<' && type[0] != '|' && type[0] != '='))
        input_error("{}: numbers of type {} are not read; save array.astype(\"float32\")", path, shown(type));
    return *found;
}

Matrix read_npy(const std::string& path, const MappedFile& file) {
    const NpyHeader h = read_npy_header(path, file.text());
    const NpyType& type = type_of(path, h.type);
    const Size held = file.size() - h.data;
    // Divisions, so that no product of a lying header can overflow.
    const Size row_bytes_most = std::numeric_limits<std::int64_t>::max() / type.bytes;
    const bool huge = static_cast<Size>(h.columns) > row_bytes_most / static_cast<Size>(h.rows);
    const Size needed = huge ? row_bytes_most : static_cast<Size>(h.rows) * static_cast<Size>(h.columns) * type.bytes;
    if (huge || held != needed)
        input_error("{}: {} x {} numbers of {} bytes, but the file holds {} bytes of them; {}", path, h.rows, h.columns,
                    type.bytes, held, held < needed ? "it is cut off" : "it has bytes too many");
    Matrix m;
    m.rows = h.rows;
    m.columns = h.columns;
    m.values.resize(needed / type.bytes);
    type.copy(path, h, file.data() + h.data, m);
    return m;
}

// ---- CSV and TSV ---------------------------------------------------------------------------------------------------

struct NumberRows {
    Size columns;
    LineFields fields;
    std::vector<float> values{};

    void line(std::string_view line) {
        fields.split(line);
        if (fields.count() != columns)
            line_fault("{} fields where the first row has {}; correct the line (or the file is cut off)",
                       fields.count(), columns);
        for (Size c = 0; c < columns; ++c) {
            const std::string_view text = fields[c];
            float value = 0;
            const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), value);
            if (error != std::errc{} || stop != text.data() + text.size() || !std::isfinite(value))
                value = parse_float(text, fmt::format("column {}", c + 1), true);
            values.push_back(value);
        }
    }
};

Matrix read_numbers(const std::string& path) {
    const TextFile file(path);
    std::string_view rest = file.text(), first, body;
    std::int64_t line_number = 0;
    while (!rest.empty() && first.empty()) {
        body = rest;
        first = take_line(rest);
        ++line_number;
        if (trimmed(first).empty() || first[0] == '#') first = {};
    }
    if (first.empty()) input_error("{}: no rows; give a file with a row of numbers for each node", path);
    char separator = kBlanks;
    for (const char c : {'\t', ';', ','})
        if (first.find(c) != first.npos) separator = c;
    LineFields fields(separator);
    try {
        fields.split(first);
    } catch (const LineFault& fault) {
        input_error("{}:{}: {}", path, line_number, fault.what);
    }
    Matrix m;
    m.columns = static_cast<std::int64_t>(fields.count());
    bool header = false;
    for (Size c = 0; c < fields.count(); ++c) header |= !fields[c].empty() && !is_number(fields[c]);
    if (header) {
        for (Size c = 0; c < fields.count(); ++c) m.names.emplace_back(fields[c]);
        body = rest;
        ++line_number;
    }
    auto pieces = parse_lines(path, body, line_number, [&] {
        return NumberRows{static_cast<Size>(m.columns), LineFields(separator)};
    });
    Size count = 0;
    for (const NumberRows& piece : pieces) count += piece.values.size();
    if (count == 0) input_error("{}: a header and no rows; give a row of numbers for each node", path);
    m.values.reserve(count);
    for (NumberRows& piece : pieces) {
        m.values.insert(m.values.end(), piece.values.begin(), piece.values.end());
        piece.values = {};
    }
    m.rows = static_cast<std::int64_t>(count) / m.columns;
    return m;
}

}  // namespace

Matrix read_matrix(const std::string& path) {
    {
        const MappedFile file(path);
        if (file.text().starts_with(kMagic)) return read_npy(path, file);
        if (path.ends_with(".npy")) input_error("{}: not a .npy file (no NUMPY at its beginning)", path);
    }
    return read_numbers(path);
}

template <class T>
std::string npy_header(const std::vector<std::int64_t>& shape) {
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);
    std::string text = fmt::format("{{'descr': '<f{}', 'fortran_order': False, 'shape': ({},", sizeof(T), shape.at(0));
    text += shape.size() > 1 ? fmt::format(" {}), }}", shape[1]) : std::string("), }");
    constexpr Size kBefore = 10, kAlign = 64;  // magic, version, length
    while ((kBefore + text.size() + 1) % kAlign != 0) text += ' ';
    text += '\n';
    std::string header(kMagic);
    header += {'\x01', '\x00', static_cast<char>(text.size() & 255), static_cast<char>(text.size() >> 8)};
    return header + text;
}

namespace {
template <class T>
std::string checked_header(std::span<const T> values, const std::vector<std::int64_t>& shape) {
    if (shape.empty() || shape.size() > 2 ||
        static_cast<std::int64_t>(values.size()) != shape[0] * (shape.size() > 1 ? shape[1] : 1))
        run_error("write_npy: {} values do not fill the shape given", values.size());
    return npy_header<T>(shape);
}
}  // namespace

template <class T>
void write_npy(FileWriter& out, std::span<const T> values, const std::vector<std::int64_t>& shape) {
    const std::string header = checked_header(values, shape);
    out.write(header.data(), header.size());
    out.write(values.data(), values.size_bytes());
}

template <class T>
void write_npy(const std::string& path, std::span<const T> values, const std::vector<std::int64_t>& shape) {
    std::string bytes = checked_header(values, shape);
    bytes.append(reinterpret_cast<const char*>(values.data()), values.size_bytes());
    write_file_atomic(path, bytes);
}

template std::string npy_header<float>(const std::vector<std::int64_t>&);
template std::string npy_header<double>(const std::vector<std::int64_t>&);
template void write_npy<float>(FileWriter&, std::span<const float>, const std::vector<std::int64_t>&);
template void write_npy<double>(FileWriter&, std::span<const double>, const std::vector<std::int64_t>&);
template void write_npy<float>(const std::string&, std::span<const float>, const std::vector<std::int64_t>&);
template void write_npy<double>(const std::string&, std::span<const double>, const std::vector<std::int64_t>&);

}  // namespace fiedler
