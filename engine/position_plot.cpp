#include "engine/position_plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "engine/svg_plot.h"

namespace fiedler {

namespace {

constexpr double kWidth = 960, kHeight = 540, kLeft = 84, kRight = 930, kTop = 70, kBottom = 470;

struct Axes {
    double least_x, most_x, least_y, most_y;
    double x(double tokens) const {
        return kLeft + (std::log2(tokens) - least_x) / std::max(most_x - least_x, 1e-9) * (kRight - kLeft);
    }
    double y(double loss) const { return kBottom - (loss - least_y) / (most_y - least_y) * (kBottom - kTop); }
};

double middle_of(const LossAtPosition& b) {
    return std::sqrt(double(std::max<std::int64_t>(b.begin, 1)) * double(b.end));
}

Axes axes_of(const std::vector<LossAtPosition>& buckets) {
    Axes a{1e30, -1e30, 1e30, -1e30};
    for (const LossAtPosition& b : buckets) {
        if (b.tokens == 0) continue;
        a.least_x = std::min(a.least_x, std::log2(middle_of(b))),
        a.most_x = std::max(a.most_x, std::log2(double(b.end)));
        a.least_y = std::min(a.least_y, b.loss), a.most_y = std::max(a.most_y, b.loss);
    }
    const double room = std::max(0.08 * (a.most_y - a.least_y), 0.02);
    a.least_y -= room, a.most_y += room;
    return a;
}

std::string text(double x, double y, const std::string& words, const char* anchor, const char* colour, int size) {
    return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" font-size=\"{}\" fill=\"{}\" text-anchor=\"{}\">{}</text>\n", x,
                       y, size, colour, anchor, xml_text(words));
}

}  // namespace

std::string svg_of(const std::vector<LossAtPosition>& buckets, const std::string& title) {
    std::string svg = fmt::format(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"sans-serif\">\n"
        "<rect width=\"{}\" height=\"{}\" fill=\"#ffffff\"/>\n",
        kWidth, kHeight, kWidth, kHeight);
    svg += text(kLeft, 36, title, "start", "#1f2933", 20);
    const Axes axes = axes_of(buckets);
    for (const double loss : axis_ticks(axes.least_y, axes.most_y, 6)) {
        svg += fmt::format("<line x1=\"{}\" x2=\"{}\" y1=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"#d5dbe1\"/>\n", kLeft,
                           kRight, axes.y(loss), axes.y(loss));
        svg += text(kLeft - 8, axes.y(loss) + 4, fmt::format("{:.4g}", loss), "end", "#6b7785", 13);
    }
    std::string line;
    for (const LossAtPosition& b : buckets) {
        if (b.tokens == 0) continue;
        const double x = axes.x(middle_of(b)), y = axes.y(b.loss);
        line += fmt::format("{:.1f},{:.1f} ", x, y);
        svg += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"4\" fill=\"#1d4ed8\"/>\n", x, y);
        svg += text(x, kBottom + 22, b.end < 10000 ? fmt::format("{}", b.end) : fmt::format("{}K", b.end >> 10),
                    "middle", "#6b7785", 12);
        svg += text(x, y - 10, fmt::format("{:.3f}", b.loss), "middle", "#1f2933", 12);
    }
    svg += fmt::format("<polyline points=\"{}\" fill=\"none\" stroke=\"#1d4ed8\" stroke-width=\"2\"/>\n", line);
    svg += text((kLeft + kRight) / 2, kHeight - 18, "tokens before, up to", "middle", "#6b7785", 14);
    svg += text(kLeft, 58, "mean loss, nats a token", "start", "#6b7785", 14);
    return svg + "</svg>\n";
}

}  // namespace fiedler
