#include "engine/sample_metrics.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace fiedler {

double roc_auc(std::vector<std::pair<float, bool>> scored) {
    std::sort(scored.begin(), scored.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    double below = 0, area = 0, positives = 0;  // negatives with a lower score; pairs in the right order, ties half
    for (std::size_t first = 0; first < scored.size();) {
        std::size_t last = first;
        double zeros = 0, ones = 0;
        for (; last < scored.size() && scored[last].first == scored[first].first; ++last)
            (scored[last].second ? ones : zeros) += 1;
        area += ones * (below + zeros / 2);
        below += zeros, positives += ones;
        first = last;
    }
    return positives > 0 && below > 0 ? area / (positives * below) : -1;
}

void MetricsBuilder::add(const SampleBatch& b, const SampleLoss& l) {
    loss_ += l.sum;
    known_ += l.known;
    const auto k = static_cast<std::size_t>(shape_.outputs);
    if (shape_.kind == TargetKind::classes) {
        confusion_.resize(k * k);
        for (std::size_t i = 0; i < b.classes.size(); ++i) {
            if (b.classes[i] < 0) continue;
            const auto row = l.predictions.begin() + static_cast<std::ptrdiff_t>(i * k);
            const auto best =
                static_cast<std::size_t>(std::max_element(row, row + static_cast<std::ptrdiff_t>(k)) - row);
            ++confusion_[static_cast<std::size_t>(b.classes[i]) * k + best];
        }
        return;
    }
    pairs_.resize(k);
    for (std::size_t i = 0; i < b.targets.size(); ++i) {
        if (std::isnan(b.targets[i])) continue;
        pairs_[i % k].push_back({l.predictions[i], b.targets[i]});
        if (b.unit_deviation.empty()) continue;
        const double e = (double(l.predictions[i]) - double(b.targets[i])) * b.unit_deviation[i / k];
        unit_squares_ += e * e, unit_magnitudes_ += std::abs(e), ++with_units_;
    }
}

SampleMetrics MetricsBuilder::metrics() const {
    SampleMetrics m = shape_.kind == TargetKind::classes  ? of_classes()
                      : shape_.kind == TargetKind::binary ? of_binary()
                                                          : of_numbers();
    m.kind = shape_.kind;
    m.known = known_;
    m.loss = known_ > 0 ? loss_ / double(known_) : 0;
    return m;
}

SampleMetrics MetricsBuilder::of_classes() const {
    SampleMetrics m;
    const auto k = static_cast<std::size_t>(shape_.outputs);
    m.confusion = confusion_;
    m.confusion.resize(k * k);
    double right = 0, all = 0, f1 = 0, occurring = 0;
    for (std::size_t c = 0; c < k; ++c) {
        double of_class = 0, called = 0;
        for (std::size_t j = 0; j < k; ++j)
            of_class += double(m.confusion[c * k + j]), called += double(m.confusion[j * k + c]);
        const auto hit = double(m.confusion[c * k + c]);
        right += hit, all += of_class;
        if (of_class == 0) continue;
        occurring += 1;
        f1 += 2 * hit / (of_class + called);
    }
    m.accuracy = all > 0 ? right / all : 0;
    m.macro_f1 = occurring > 0 ? f1 / occurring : 0;
    return m;
}

SampleMetrics MetricsBuilder::of_binary() const {
    SampleMetrics m;
    double right = 0, all = 0;
    for (const auto& of_target : pairs_) {
        std::vector<std::pair<float, bool>> scored;
        for (const Pair& p : of_target) {
            scored.emplace_back(p.prediction, p.target > 0.5f);
            right += (p.prediction > 0.5f) == (p.target > 0.5f), all += 1;
        }
        if (const double auc = roc_auc(std::move(scored)); auc >= 0) m.roc_auc += auc, ++m.auc_targets;
    }
    if (m.auc_targets > 0) m.roc_auc /= double(m.auc_targets);
    m.accuracy = all > 0 ? right / all : 0;
    return m;
}

SampleMetrics MetricsBuilder::of_numbers() const {
    SampleMetrics m;
    m.original = !shape_.deviation.empty();
    double squares = 0, magnitudes = 0, all = 0, targets = 0;
    for (std::size_t j = 0; j < pairs_.size(); ++j) {
        if (pairs_[j].empty()) continue;
        double of_target = 0, magnitude = 0;
        for (const Pair& p : pairs_[j]) {
            const double e = double(p.prediction) - double(p.target);
            of_target += e * e, magnitude += std::abs(e);
        }
        const auto n = double(pairs_[j].size());
        squares += of_target, magnitudes += magnitude, all += n, targets += 1;
        if (!m.original) continue;
        m.rmse += std::sqrt(of_target / n) * shape_.deviation[j];
        m.mae_original += magnitude / n * shape_.deviation[j];
    }
    if (all > 0) m.mse = squares / all, m.mae = magnitudes / all;
    if (targets > 0) m.rmse /= targets, m.mae_original /= targets;
    if (with_units_ > 0) {
        m.original = true;
        m.rmse = std::sqrt(unit_squares_ / double(with_units_));
        m.mae_original = unit_magnitudes_ / double(with_units_);
    }
    return m;
}

double SampleMetrics::score() const {
    switch (kind) {
        case TargetKind::classes:
            return accuracy;
        case TargetKind::binary:
            return auc_targets > 0 ? roc_auc : accuracy;
        case TargetKind::regression:
            return -mse;
    }
    return 0;
}

bool SampleMetrics::better_than(const SampleMetrics& other) const {
    if (score() != other.score()) return score() > other.score();
    return loss < other.loss;
}

std::vector<std::pair<std::string, double>> SampleMetrics::numbers() const {
    std::vector<std::pair<std::string, double>> all;
    if (kind == TargetKind::classes) all = {{"accuracy", accuracy}, {"macro_f1", macro_f1}};
    if (kind == TargetKind::binary) {
        if (auc_targets > 0) all.emplace_back("roc_auc", roc_auc);
        all.emplace_back("accuracy", accuracy);
    }
    if (kind == TargetKind::regression) {
        if (original) all = {{"rmse", rmse}, {"mae_original", mae_original}};
        all.emplace_back("mse", mse), all.emplace_back("mae", mae);
    }
    all.emplace_back("loss", loss);
    return all;
}

std::string SampleMetrics::text() const {
    std::string out;
    for (const auto& [name, value] : numbers()) out += fmt::format("{}{} {:.4f}", out.empty() ? "" : ", ", name, value);
    return out;
}

Json SampleMetrics::to_json(const SampleShape& shape) const {
    Json j = Json::object();
    for (const auto& [name, value] : numbers()) j[name] = value;
    j["known"] = known;
    if (kind == TargetKind::binary) j["auc_targets"] = auc_targets;
    if (kind != TargetKind::classes) return j;
    j["classes"] = shape.names;
    Json rows = Json::array();
    const auto k = static_cast<std::ptrdiff_t>(shape.outputs);
    for (std::ptrdiff_t c = 0; c < k; ++c)
        rows.push_back(std::vector<std::int64_t>(confusion.begin() + c * k, confusion.begin() + (c + 1) * k));
    j["confusion"] = rows;
    return j;
}

std::string confusion_text(const SampleMetrics& m, const SampleShape& shape) {
    const auto k = static_cast<std::size_t>(shape.outputs);
    std::size_t width = 9;
    for (const std::string& n : shape.names) width = std::max(width, std::min<std::size_t>(n.size(), 20));
    const auto name = [&](std::size_t c) {
        return c < shape.names.size() ? shape.names[c].substr(0, 20) : std::to_string(c);
    };
    std::string out = fmt::format("{:>{}}", "target", width);
    for (std::size_t c = 0; c < k; ++c)
        out += fmt::format("  {:>{}}", name(c), std::max<std::size_t>(5, name(c).size()));
    for (std::size_t c = 0; c < k; ++c) {
        out += fmt::format("\n{:>{}}", name(c), width);
        for (std::size_t j = 0; j < k; ++j)
            out += fmt::format("  {:>{}}", m.confusion[c * k + j], std::max<std::size_t>(5, name(j).size()));
    }
    return out;
}

}  // namespace fiedler
