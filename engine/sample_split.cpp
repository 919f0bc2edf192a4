#include "engine/sample_split.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <numeric>

#include "engine/error.h"
#include "engine/files.h"
#include "engine/graph_table.h"
#include "engine/rng.h"

namespace fiedler {

namespace {

using Size = std::size_t;
enum Stream : std::uint64_t { kSamples = 0x73706c, kScaffolds = 0x736366 };
constexpr const char* kPartNames[] = {"train", "val", "test", "none"};

// Items in a random order: by a random key, of equals the earlier first.
std::vector<std::int64_t> shuffled(std::int64_t count, std::int64_t seed, std::uint64_t stream) {
    std::vector<std::pair<std::uint64_t, std::int64_t>> keys;
    for (std::int64_t i = 0; i < count; ++i)
        keys.emplace_back(rng::bits(static_cast<std::uint64_t>(seed), stream, static_cast<std::uint64_t>(i)), i);
    std::sort(keys.begin(), keys.end());
    std::vector<std::int64_t> order;
    for (const auto& [key, i] : keys) order.push_back(i);
    return order;
}

struct Cuts {
    std::int64_t train, val;  // counts
};
Cuts cuts_of(std::int64_t count, const SplitOptions& o) {
    const double all = o.train + o.val + o.test;
    if (!(o.train > 0) || !(o.val >= 0) || !(o.test >= 0) || !std::isfinite(all))
        input_error("split-shares: {},{},{} make no split; give three shares that are not negative, the first above 0",
                    o.train, o.val, o.test);
    constexpr double kSlack = 1e-9;  // 0.8 + 0.1 of 10 is 9
    const auto n = static_cast<double>(count);
    const auto train = static_cast<std::int64_t>(n * (o.train / all) + kSlack);
    return {train, static_cast<std::int64_t>(n * ((o.train + o.val) / all) + kSlack) - train};
}

std::vector<Part> random_split(std::int64_t count, const SplitOptions& o) {
    const Cuts cut = cuts_of(count, o);
    const std::vector<std::int64_t> order = shuffled(count, o.seed, kSamples);
    std::vector<Part> parts(static_cast<Size>(count), Part::test);
    for (std::int64_t i = 0; i < cut.train + cut.val; ++i)
        parts[static_cast<Size>(order[static_cast<Size>(i)])] = i < cut.train ? Part::train : Part::val;
    return parts;
}

std::vector<Part> fold_split(std::int64_t count, const SplitOptions& o) {
    if (o.folds < 2 || o.fold > o.folds || o.fold < 0)
        input_error("fold: {} of {}; choose 1 to the number of folds, which is at least 2", o.fold, o.folds);
    (void)cuts_of(count, o);
    const std::vector<std::int64_t> order = shuffled(count, o.seed, kSamples);
    const std::int64_t begin = count * (o.fold - 1) / o.folds, end = count * o.fold / o.folds;
    const auto val = static_cast<std::int64_t>(std::llround(double(count) * o.val / (o.train + o.val + o.test)));
    std::vector<Part> parts(static_cast<Size>(count), Part::train);
    for (std::int64_t i = begin; i < end; ++i) parts[static_cast<Size>(order[static_cast<Size>(i)])] = Part::test;
    for (std::int64_t i = end; i < std::min(end + val, begin + count); ++i)
        parts[static_cast<Size>(order[static_cast<Size>(i % count)])] = Part::val;
    return parts;
}

std::vector<Part> scaffold_split(std::int64_t count, std::span<const std::int32_t> scaffold_of, const SplitOptions& o) {
    if (std::ssize(scaffold_of) != count) throw std::logic_error("sample_split: a scaffold for each sample");
    const Cuts cut = cuts_of(count, o);
    std::vector<std::vector<std::int64_t>> sets;
    for (std::int64_t i = 0; i < count; ++i) {
        const auto s = static_cast<Size>(scaffold_of[static_cast<Size>(i)]);
        if (s >= sets.size()) sets.resize(s + 1);
        sets[s].push_back(i);
    }
    std::erase_if(sets, [](const auto& set) { return set.empty(); });
    const auto larger = [](const auto& a, const auto& b) {
        return std::pair(a.size(), a.front()) > std::pair(b.size(), b.front());
    };
    std::sort(sets.begin(), sets.end(), larger);
    if (o.seed != 0) {
        const auto big =
            static_cast<Size>(std::max<std::int64_t>(1, std::min(cut.val, count - cut.train - cut.val) / 2));
        const auto rest = std::find_if(sets.begin(), sets.end(), [&](const auto& set) { return set.size() <= big; });
        std::vector<std::vector<std::int64_t>> mixed;
        for (const std::int64_t i : shuffled(sets.end() - rest, o.seed, kScaffolds)) mixed.push_back(rest[i]);
        std::move(mixed.begin(), mixed.end(), rest);
    }
    std::vector<Part> parts(static_cast<Size>(count));
    std::int64_t train = 0, val = 0;
    for (const auto& set : sets) {
        const std::int64_t n = std::ssize(set);
        Part p = Part::train;
        if (train + n > cut.train) p = train + val + n > cut.train + cut.val ? Part::test : Part::val;
        train += p == Part::train ? n : 0, val += p == Part::val ? n : 0;
        for (const std::int64_t i : set) parts[static_cast<Size>(i)] = p;
    }
    return parts;
}

}  // namespace

const char* name_of(Part p) { return kPartNames[static_cast<Size>(p)]; }

std::vector<Part> split_samples(std::int64_t count, std::span<const std::int32_t> scaffold_of, const SplitOptions& o) {
    if (o.how != "random" && o.how != "scaffold")
        throw std::logic_error("sample_split: a split that is neither random nor by scaffold");
    if (o.fold != 0 && o.how != "random") input_error("fold: folds are of a random split; leave --split {} out", o.how);
    std::vector<Part> parts = o.fold != 0         ? fold_split(count, o)
                              : o.how == "random" ? random_split(count, o)
                                                  : scaffold_split(count, scaffold_of, o);
    std::array<std::int64_t, 4> counts{};
    for (const Part p : parts) ++counts[static_cast<Size>(p)];
    const bool wanted[] = {true, o.val > 0, o.test > 0 || o.fold != 0};
    for (Size p = 0; p < 3; ++p)
        if (wanted[p] && counts[p] == 0)
            input_error("split: of {} samples none is in the part {}; give more samples, or other --split-shares",
                        count, kPartNames[p]);
    return parts;
}

void write_split(const std::string& path, std::span<const Part> parts, std::span<const std::string> names) {
    std::string text = "row,part,name\n";
    for (Size i = 0; i < parts.size(); ++i) {
        std::string name = names[i];
        if (name.find_first_of(",\"") != name.npos) {
            for (Size at = 0; (at = name.find('"', at)) != name.npos; at += 2) name.insert(at, "\"");
            name = '"' + name + '"';
        }
        text += fmt::format("{},{},{}\n", i + 1, name_of(parts[i]), name);
    }
    write_file_atomic(path, text);
}

std::vector<Part> read_split(const std::string& path, std::span<const std::string> names) {
    const TextFile file(path);
    std::vector<Part> parts;
    std::int64_t number = 0;
    LineFields fields(',');
    for (std::string_view rest = file.text(); !rest.empty();) {
        const std::string_view line = take_line(rest);
        ++number;
        if (trimmed(line).empty() || (parts.empty() && line.starts_with("row,part"))) continue;
        try {
            fields.split(line);
            const auto row = std::to_string(parts.size() + 1);
            if (fields.count() != 3) line_fault("{} fields; a row is row,part,name", fields.count());
            if (fields[0] != row)
                line_fault("row {} where {} comes next; list all rows in order", shown(fields[0]), row);
            const auto part = std::find(std::begin(kPartNames), std::end(kPartNames), fields[1]);
            if (part == std::end(kPartNames)) line_fault("part {}; write train, val, test or none", shown(fields[1]));
            if (parts.size() >= names.size()) line_fault("a row too many: the data have {}", names.size());
            if (fields[2] != names[parts.size()])
                line_fault("the name {}, but row {} of the data is {}; a split belongs to the data it was made for",
                           shown(fields[2]), row, shown(names[parts.size()]));
            parts.push_back(static_cast<Part>(part - std::begin(kPartNames)));
        } catch (const LineFault& fault) {
            input_error("{}:{}: {}", path, number, fault.what);
        }
    }
    if (parts.size() != names.size())
        input_error("{}: {} rows, but the data have {}; a split belongs to the data it was made for", path,
                    parts.size(), names.size());
    return parts;
}

}  // namespace fiedler
