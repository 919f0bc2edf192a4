// engine/config.cpp: knobs as text and JSON, both ways, and what must hold between them.
#include "engine/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "engine/error.h"

namespace fiedler {

namespace {

std::string joined(const std::vector<std::string>& items, const char* separator) {
    return fmt::format("{}", fmt::join(items, separator));
}

// Shortest text that reads back as the same number.
std::string number_text(double x) {
    char text[40];
    const auto end = std::to_chars(text, text + sizeof text, x).ptr;
    return {text, end};
}

std::string range_text(const Knob& k) {
    const double low = k.rules.low, high = k.rules.high;
    if (high >= 1e12) return number_text(low) + " or more";
    return number_text(low) + " to " + number_text(high);
}

[[noreturn]] void bad_value(const Knob& k, const std::string& value, const std::string& where,
                            const std::string& mend) {
    throw InputError(fmt::format("{}: {} = '{}' is not allowed: {}", where, k.name, value, mend));
}

// Whole text as a number. '_' may group digits, as in TOML.
template <class N>
bool parse_number(std::string text, N& out) {
    std::erase(text, '_');
    const char *first = text.data() + (text.starts_with('+') ? 1 : 0), *end = text.data() + text.size();
    const auto [last, status] = std::from_chars(first, end, out);
    return status == std::errc{} && last == end && first != end;
}

void check_range(const Knob& k, double x, const std::string& value, const std::string& where) {
    if (!std::isfinite(x) || x < k.rules.low || x > k.rules.high) bad_value(k, value, where, "give " + range_text(k));
}

struct Setter {
    Config& c;
    const Knob& k;
    const std::vector<std::string>& values;
    const std::string& where;

    const std::string& one() const {
        if (values.size() != 1)
            throw InputError(fmt::format("{}: {} takes one value, not {}; put a text with spaces or commas in quotes",
                                         where, k.name, values.size()));
        return values[0];
    }
    void operator()(bool Config::*field) const {
        const std::string& v = one();
        if (v != "true" && v != "false") bad_value(k, v, where, "give true or false");
        c.*field = v == "true";
    }
    void operator()(std::int64_t Config::*field) const {
        const std::string& v = one();
        std::int64_t n = 0;
        if (k.rules.unit == Unit::bytes)
            n = parse_bytes(v, fmt::format("{}: {}", where, k.name));
        else if (!parse_number(v, n))
            bad_value(k, v, where, "give a whole number, " + range_text(k));
        check_range(k, static_cast<double>(n), v, where);
        c.*field = n;
    }
    void operator()(double Config::*field) const {
        const std::string& v = one();
        double x = 0;
        if (!parse_number(v, x)) bad_value(k, v, where, "give a number, " + range_text(k));
        check_range(k, x, v, where);
        c.*field = x;
    }
    void operator()(std::string Config::*field) const { c.*field = one(); }
    void operator()(std::vector<std::string> Config::*field) const {
        std::vector<std::string> all;
        for (const std::string& v : values) {
            std::size_t first = 0;
            while (k.rules.split_commas && v.find(',', first) != std::string::npos) {
                const std::size_t comma = v.find(',', first);
                all.push_back(v.substr(first, comma - first));
                first = comma + 1;
            }
            all.push_back(v.substr(first));
        }
        std::erase(all, "");
        c.*field = all;
    }
    void operator()(const ChoiceField& field) const {
        const std::string& v = one();
        const auto& choices = k.rules.choices;
        const auto found = std::find(choices.begin(), choices.end(), v);
        if (found == choices.end()) bad_value(k, v, where, fmt::format("choose {}", fmt::join(choices, ", ")));
        field.set(c, static_cast<int>(found - choices.begin()));
    }
};

struct TextGetter {
    const Config& c;
    const Knob& k;
    std::string operator()(bool Config::*f) const { return c.*f ? "true" : "false"; }
    std::string operator()(std::int64_t Config::*f) const { return std::to_string(c.*f); }
    std::string operator()(double Config::*f) const { return number_text(c.*f); }
    std::string operator()(std::string Config::*f) const { return c.*f; }
    std::string operator()(std::vector<std::string> Config::*f) const { return joined(c.*f, ","); }
    std::string operator()(const ChoiceField& f) const { return k.rules.choices[static_cast<std::size_t>(f.get(c))]; }
};

struct JsonGetter {
    const Config& c;
    const Knob& k;
    template <class F>
    Json operator()(F f) const {
        if constexpr (std::is_same_v<F, ChoiceField>)
            return k.rules.choices[static_cast<std::size_t>(f.get(c))];
        else
            return c.*f;
    }
};

// The texts of a JSON value, as a flag would give them.
std::vector<std::string> json_values(const Json& j, const std::string& where, const std::string& name) {
    const auto text = [&](const Json& v) -> std::string {
        if (v.is_string()) return v.get<std::string>();
        if (v.is_boolean()) return v.get<bool>() ? "true" : "false";
        if (v.is_number_float()) return number_text(v.get<double>());
        if (v.is_number()) return v.dump();
        throw InputError(fmt::format("{}: the value of {} is neither text, number nor list", where, name));
    };
    if (!j.is_array()) return {text(j)};
    std::vector<std::string> all;
    for (const Json& v : j) all.push_back(text(v));
    return all;
}

// Knobs that must hold one of a few texts, or a path that exists nowhere yet, are checked where they are used; the
// others here.
void check_special(const Config& c, const Knob& k, const std::string& where) {
    try {
        if (std::string_view(k.name) == "tau") parse_tau(c.tau);
        if (std::string_view(k.name) == "contexts") parse_contexts(c.contexts);
    } catch (const InputError& e) {
        throw InputError(where + ": " + e.what());
    }
}

}  // namespace

std::string nearest_name(const std::string& name, const std::vector<std::string>& candidates) {
    const auto distance = [](const std::string& a, const std::string& b) {
        std::vector<std::size_t> row(b.size() + 1);
        std::iota(row.begin(), row.end(), std::size_t{0});
        for (std::size_t i = 1; i <= a.size(); ++i) {
            std::size_t diagonal = row[0];
            row[0] = i;
            for (std::size_t j = 1; j <= b.size(); ++j) {
                const std::size_t next = std::min({row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1])});
                diagonal = row[j];
                row[j] = next;
            }
        }
        return row.back();
    };
    std::string best;
    std::size_t least = std::max<std::size_t>(2, name.size() / 3) + 1;
    for (const std::string& candidate : candidates)
        if (const std::size_t d = distance(name, candidate); d < least) least = d, best = candidate;
    return best;
}

TauChoice parse_tau(const std::string& text) {
    if (text == "median-learned") return {true, true, 1};
    if (text == "median-fixed") return {true, false, 1};
    double value = 0;
    if (!parse_number(text, value) || !std::isfinite(value) || value < 1e-30 || value > 1e30)
        throw InputError(
            fmt::format("tau = '{}' is not allowed: give median-learned, median-fixed or a number above 0", text));
    return {false, false, value};
}

std::vector<std::int64_t> parse_contexts(const std::vector<std::string>& values) {
    constexpr std::int64_t kMost = 1 << 24;
    std::vector<std::int64_t> all;
    for (const std::string& v : values) {
        std::int64_t n = 0;
        if (!parse_number(v, n) || n < 2 || n > kMost || n % 2 != 0)
            throw InputError(fmt::format(
                "contexts = '{}' is not allowed: give even numbers of tokens, 2 to {}, with commas between", v, kMost));
        if (!all.empty() && n <= all.back())
            throw InputError(fmt::format("contexts: {} stands after {}: give them in ascending order", n, all.back()));
        all.push_back(n);
    }
    return all;
}

std::int64_t parse_bytes(const std::string& text, const std::string& where) {
    struct Suffix {
        const char* name;
        double factor;
    };
    constexpr Suffix suffixes[] = {
        {"", 1},      {"B", 1},        {"KB", 1e3},        {"MB", 1e6},           {"GB", 1e9},
        {"TB", 1e12}, {"KiB", 1024.0}, {"MiB", 1048576.0}, {"GiB", 1073741824.0}, {"TiB", 1099511627776.0}};
    const std::size_t digits = std::min(text.find_first_not_of("0123456789._"), text.size());
    const std::size_t unit = std::min(text.find_first_not_of(' ', digits), text.size());
    double number = 0;
    if (parse_number(text.substr(0, digits), number))
        for (const Suffix& s : suffixes)
            if (text.substr(unit) == s.name && number * s.factor <= 9e15)
                return static_cast<std::int64_t>(std::llround(number * s.factor));
    throw InputError(fmt::format(
        "{} = '{}' is not a size: give a number with B, KB, MB, GB, KiB, MiB or GiB, as in 24GiB", where, text));
}

std::string bytes_text(std::int64_t bytes) {
    const double b = static_cast<double>(bytes);
    if (bytes < 1024) return fmt::format("{} B", bytes);
    if (b < 1048576.0) return fmt::format("{:.1f} KiB", b / 1024);
    if (b < 1073741824.0) return fmt::format("{:.1f} MiB", b / 1048576.0);
    return fmt::format("{:.2f} GiB", b / 1073741824.0);
}

std::string value_text(const Config& c, const Knob& k) { return std::visit(TextGetter{c, k}, k.field); }

void copy_knob(Config& to, const Config& from, const Knob& k) {
    std::visit(
        [&](auto field) {
            if constexpr (std::is_same_v<decltype(field), ChoiceField>)
                field.set(to, field.get(from));
            else
                to.*field = from.*field;
        },
        k.field);
}

void set_value(Config& c, const Knob& k, const std::vector<std::string>& values, const std::string& where) {
    std::visit(Setter{c, k, values, where}, k.field);
    check_special(c, k, where);
}

Json to_json(const Config& c) {
    Json j = Json::object();
    for (const Knob& k : knobs()) j[k.name] = std::visit(JsonGetter{c, k}, k.field);
    return j;
}

Json to_json(const Config& c, KnobGroup group) {
    Json j = Json::object();
    for (const Knob& k : knobs())
        if (k.group == group) j[k.name] = std::visit(JsonGetter{c, k}, k.field);
    return j;
}

Config config_from_json(const Json& j, const std::string& where) {
    if (!j.is_object()) throw InputError(where + ": the config is not a JSON object");
    Config c;
    for (const auto& [name, value] : j.items()) {
        const Knob* k = find_knob(name);
        if (!k) throw InputError(unknown_knob(name, where));
        set_value(c, *k, json_values(value, where, name), where);
    }
    return c;
}

std::string unknown_knob(const std::string& name, const std::string& where) {
    std::vector<std::string> names;
    for (const Knob& k : knobs()) names.push_back(k.name);
    const std::string near = nearest_name(name, names);
    return fmt::format(
        "{}: there is no knob '{}'{}", where, name,
        near.empty() ? std::string("; `fiedler train --help` lists them") : "; did you mean " + near + "?");
}

bool Invocation::given(const std::string& knob) const {
    const auto found = source.find(knob);
    return found != source.end() && (found->second == Source::file || found->second == Source::flag);
}

Config resume_config(const Config& saved, const Invocation& now) {
    Config c = saved;
    for (const Knob& k : knobs()) {
        if (k.group == KnobGroup::use || !now.given(k.name)) continue;
        const std::string was = value_text(saved, k), is = value_text(now.config, k);
        if (k.rules.on_resume == OnResume::must_match && was != is)
            throw InputError(
                fmt::format("{} = {} cannot be changed on --resume: the checkpoint was made with {}; leave it out, or "
                            "start a new run "
                            "with another --out",
                            k.name, is, was.empty() ? "nothing" : was));
        copy_knob(c, now.config, k);
    }
    c.resume = now.config.resume;
    // The run goes on in its folder, unless another is named or it was looked for under the name of a preset.
    c.out = now.config.resume == "latest" || now.given("out") ? run_folder(now.config) : run_folder(saved);
    return c;
}

void check_training(const Config& c) {
    if (c.batch_tokens % c.context != 0)
        throw InputError(fmt::format("batch-tokens = {} is not a multiple of context = {}: give {} or {}",
                                     c.batch_tokens, c.context,
                                     std::max(c.batch_tokens / c.context, std::int64_t{1}) * c.context,
                                     (c.batch_tokens / c.context + 1) * c.context));
    const std::int64_t sequences = c.batch_tokens / c.context;
    if (c.micro_batch > 0 && sequences % c.micro_batch != 0)
        throw InputError(
            fmt::format("micro-batch = {} does not divide the {} sequences of a step (batch-tokens / context): give a "
                        "divisor, or 0",
                        c.micro_batch, sequences));
}

std::string run_folder(const Config& c) { return c.out.empty() ? "runs/" + c.preset : c.out; }

}  // namespace fiedler
