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

struct Point {
    double x = 0;             // in tokens
    std::int64_t tokens = 0;  // that its label says
    double loss = 0;
};

Axes axes_of(const std::vector<Point>& points) {
    Axes a{1e30, -1e30, 1e30, -1e30};
    for (const Point& p : points) {
        a.least_x = std::min(a.least_x, std::log2(p.x)), a.most_x = std::max(a.most_x, std::log2(double(p.tokens)));
        a.least_y = std::min(a.least_y, p.loss), a.most_y = std::max(a.most_y, p.loss);
    }
    const double room = std::max(0.08 * (a.most_y - a.least_y), 0.02);
    a.least_y -= room, a.most_y += room;
    return a;
}

std::string text(double x, double y, const std::string& words, const char* anchor, const char* colour, int size) {
    return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" font-size=\"{}\" fill=\"{}\" text-anchor=\"{}\">{}</text>\n", x,
                       y, size, colour, anchor, xml_text(words));
}

// 256, 8192, 12000, 16K
std::string tokens_text(std::int64_t n) {
    return n < 10000 || n % 1024 != 0 ? fmt::format("{}", n) : fmt::format("{}K", n >> 10);
}

std::string svg_of_points(const std::vector<Point>& points, const std::string& title, const char* below) {
    std::string svg = fmt::format(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"sans-serif\">\n"
        "<rect width=\"{}\" height=\"{}\" fill=\"#ffffff\"/>\n",
        kWidth, kHeight, kWidth, kHeight);
    svg += text(kLeft, 36, title, "start", "#1f2933", 20);
    const Axes axes = axes_of(points);
    for (const double loss : axis_ticks(axes.least_y, axes.most_y, 6)) {
        svg += fmt::format("<line x1=\"{}\" x2=\"{}\" y1=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"#d5dbe1\"/>\n", kLeft,
                           kRight, axes.y(loss), axes.y(loss));
        svg += text(kLeft - 8, axes.y(loss) + 4, fmt::format("{:.4g}", loss), "end", "#6b7785", 13);
    }
    std::string line;
    for (const Point& p : points) {
        const double x = axes.x(p.x), y = axes.y(p.loss);
        line += fmt::format("{:.1f},{:.1f} ", x, y);
        svg += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"4\" fill=\"#1d4ed8\"/>\n", x, y);
        svg += text(x, kBottom + 22, tokens_text(p.tokens), "middle", "#6b7785", 12);
        svg += text(x, y - 10, fmt::format("{:.3f}", p.loss), "middle", "#1f2933", 12);
    }
    svg += fmt::format("<polyline points=\"{}\" fill=\"none\" stroke=\"#1d4ed8\" stroke-width=\"2\"/>\n", line);
    svg += text((kLeft + kRight) / 2, kHeight - 18, below, "middle", "#6b7785", 14);
    svg += text(kLeft, 58, "mean loss, nats a token", "start", "#6b7785", 14);
    return svg + "</svg>\n";
}

}  // namespace

std::string svg_of(const std::vector<LossAtPosition>& buckets, const std::string& title) {
    std::vector<Point> points;
    for (const LossAtPosition& b : buckets)
        if (b.tokens > 0)
            points.push_back({std::sqrt(double(std::max<std::int64_t>(b.begin, 1)) * double(b.end)), b.end, b.loss});
    return svg_of_points(points, title, "tokens before, up to");
}

std::string svg_of(const std::vector<ContextLoss>& contexts, const std::string& title) {
    std::vector<Point> points;
    for (const ContextLoss& c : contexts) points.push_back({double(c.context), c.context, c.loss});
    return svg_of_points(points, title, "context, tokens");
}

}  // namespace fiedler
