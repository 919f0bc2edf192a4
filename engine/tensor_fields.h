// engine/tensor_fields.h: what the readers and writers of .fdl files with a kind share (weights.h): graphs, spectra and
// prepared molecules. Every fault of a file is an InputError that begins with its path.
#pragma once
#include <fmt/ranges.h>

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/error.h"
#include "engine/weights.h"

namespace fiedler {

[[noreturn]] inline void corrupt(const std::string& path, const std::string& why) {
    input_error("{}: is corrupt: {}; make it again", path, why);
}

template <class T>
constexpr const char* type_name();
template <>
constexpr const char* type_name<float>() {
    return "f32";
}
template <>
constexpr const char* type_name<double>() {
    return "f64";
}
template <>
constexpr const char* type_name<std::int32_t>() {
    return "i32";
}
template <>
constexpr const char* type_name<std::int64_t>() {
    return "i64";
}
template <>
constexpr const char* type_name<char>() {
    return "u8";
}
template <>
constexpr const char* type_name<std::uint8_t>() {
    return "u8";
}

// `values` must live until the file is written. Without values there is no tensor.
template <class Values>
void add_tensor(std::vector<WeightTensor>& tensors, const std::string& name, std::vector<std::int64_t> shape,
                const Values& values) {
    using T = typename Values::value_type;
    if (!values.empty()) tensors.push_back({name, type_name<T>(), std::move(shape), values.data()});
}

// The named tensor; empty where the shape has no elements and the file no tensor.
template <class T, class Values = std::vector<T>>
Values read_tensor(const WeightsFile& file, const std::string& name, const std::vector<std::int64_t>& shape) {
    std::int64_t elements = 1;
    for (const std::int64_t d : shape)
        if (d < 0 || __builtin_mul_overflow(elements, d, &elements)) corrupt(file.path(), "its sizes are impossible");
    const WeightTensor* t = file.find(name);
    if (!t && elements == 0) return {};
    if (!t) corrupt(file.path(), fmt::format("it has no tensor '{}'", name));
    if (t->dtype != type_name<T>() || t->shape != shape)
        corrupt(file.path(), fmt::format("tensor '{}' is {} [{}], not {} [{}]", name, t->dtype,
                                         fmt::join(t->shape, ", "), type_name<T>(), fmt::join(shape, ", ")));
    const auto* first = static_cast<const T*>(t->data);
    return {first, first + elements};
}

template <class T>
T field(const WeightsFile& file, const char* name) {
    try {
        return file.config().at(name).get<T>();
    } catch (const nlohmann::json::exception&) {
        corrupt(file.path(), fmt::format("its config lacks the field '{}'", name));
    }
}

inline std::int64_t count_field(const WeightsFile& file, const char* name, std::int64_t most) {
    const auto n = field<std::int64_t>(file, name);
    if (n < 0 || n > most) corrupt(file.path(), fmt::format("its config says {} = {}", name, n));
    return n;
}

// Opens the file, which must be of the kind, and checks its version. mend: "give a graph".
inline WeightsFile open_kind(const std::string& path, const char* kind, int known, const char* mend) {
    WeightsFile file(path);
    if (file.kind() != kind)
        input_error("{}: is a Fiedler file, but {} and no {}; {}", path,
                    file.kind().empty() ? "one of weights" : "a " + file.kind(), kind, mend);
    const auto version = file.config().find("version");
    if (version == file.config().end() || !version->is_number_integer() || version->get<std::int64_t>() < 1)
        corrupt(path, "its config lacks a version");
    if (version->get<std::int64_t>() > known)
        input_error("{}: is a {} of version {}, and this fiedler reads version {}: use a newer fiedler", path, kind,
                    version->get<std::int64_t>(), known);
    return file;
}

// Texts as two tensors: NAME_offsets, i64 [count + 1], into NAME_bytes, u8. Lives until the file is written.
struct JoinedTexts {
    std::vector<std::int64_t> offsets{0};
    std::vector<char> bytes;
    explicit JoinedTexts(const std::vector<std::string>& texts) {
        for (const std::string& t : texts) {
            bytes.insert(bytes.end(), t.begin(), t.end());
            offsets.push_back(static_cast<std::int64_t>(bytes.size()));
        }
    }
    void add(std::vector<WeightTensor>& tensors, const std::string& name) const {
        add_tensor(tensors, name + "_offsets", {static_cast<std::int64_t>(offsets.size())}, offsets);
        add_tensor(tensors, name + "_bytes", {offsets.back()}, bytes);
    }
};

inline std::vector<std::string> read_texts(const WeightsFile& file, const std::string& name, std::int64_t count) {
    const auto offsets = read_tensor<std::int64_t>(file, name + "_offsets", {count + 1});
    const auto bytes = read_tensor<char>(file, name + "_bytes", {offsets.back()});
    std::vector<std::string> texts;
    texts.reserve(static_cast<std::size_t>(count));
    for (std::size_t i = 0; i + 1 < offsets.size(); ++i) {
        if (offsets[i] < 0 || offsets[i] > offsets[i + 1] || offsets[i + 1] > offsets.back())
            corrupt(file.path(), fmt::format("{} {} lies outside its bytes", name, i));
        texts.emplace_back(bytes.data() + offsets[i], static_cast<std::size_t>(offsets[i + 1] - offsets[i]));
    }
    return texts;
}

}  // namespace fiedler
