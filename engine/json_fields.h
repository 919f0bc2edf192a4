// engine/json_fields.h: whole numbers out of JSON that came from a file. The library converts 1e30 to an integer without a
// look, which is undefined.
#pragma once
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <vector>

namespace fiedler {

// json::type_error, like other wrong types, unless it is a whole number that fits.
template <class Int, class J>
Int whole_number(const J& j) {
    using Limits = std::numeric_limits<Int>;
    const bool natural = j.is_number_unsigned();
    const bool fits = natural ? j.template get<std::uint64_t>() <= std::uint64_t(Limits::max())
                              : j.is_number_integer() && Limits::is_signed &&
                                    j.template get<std::int64_t>() >= std::int64_t(Limits::min()) &&
                                    j.template get<std::int64_t>() <= std::int64_t(Limits::max());
    if (!fits) throw J::type_error::create(302, "not a whole number of this field's range", &j);
    return static_cast<Int>(j.template get<std::int64_t>());
}
template <class Int, class J>
std::vector<Int> whole_numbers(const J& j) {
    if (!j.is_array()) throw J::type_error::create(302, "not an array of whole numbers", &j);
    std::vector<Int> all;
    for (const J& each : j) all.push_back(whole_number<Int>(each));
    return all;
}

}  // namespace fiedler
