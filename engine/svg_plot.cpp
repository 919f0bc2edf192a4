#include "engine/svg_plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "engine/utf8.h"

namespace fiedler {

namespace {

// ---- the sheet: all lengths in px of the view box -----------------------------------------------------------------------
constexpr double kWidth = 1280, kHeight = 720, kHead = 78, kFoot = 46;
struct Box {
    double left, top, right, bottom;
    double width() const { return right - left; }
    double height() const { return bottom - top; }
};
constexpr Box kCurve{78, kHead + 34, 560, kHeight - kFoot - 48};
constexpr Box kLayout{622, kHead + 34, 1258, kHeight - kFoot - 48};

constexpr const char *kInk = "#1f2933", *kSoft = "#6b7785", *kLine = "#d5dbe1", *kAccent = "#c2410c",
                     *kCurveInk = "#1d4ed8";
constexpr std::array<const char*, kClassColours> kClasses = {"#2563eb", "#ea580c", "#16a34a", "#db2777",
                                                             "#7c3aed", "#ca8a04", "#0891b2", "#dc2626",
                                                             "#84a612", "#78533a", "#a9b1ba"};
// Dark to light, even steps of lightness: seen without colour, too.
struct Rgb {
    double r, g, b;
};
constexpr std::array<Rgb, 6> kRamp = {
    {{59, 15, 112}, {101, 36, 135}, {178, 54, 122}, {229, 80, 100}, {251, 136, 97}, {250, 206, 130}}};
constexpr int kRampSteps = 24;

std::string ramp_colour(double t) {
    const double at = std::clamp(t, 0.0, 1.0) * (kRamp.size() - 1);
    const auto i = std::min(static_cast<std::size_t>(at), kRamp.size() - 2);
    const double f = at - static_cast<double>(i);
    const auto mix = [&](double a, double b) { return static_cast<int>(std::lround(a + f * (b - a))); };
    return fmt::format("#{:02x}{:02x}{:02x}", mix(kRamp[i].r, kRamp[i + 1].r), mix(kRamp[i].g, kRamp[i + 1].g),
                       mix(kRamp[i].b, kRamp[i + 1].b));
}

// The first `most` characters.
std::string shortened(std::string_view text, std::size_t most) {
    std::size_t at = 0, characters = 0;
    while (at < text.size() && characters < most) {
        ++at;
        while (at < text.size() && is_utf8_continuation(text[at])) ++at;
        ++characters;
    }
    return at < text.size() ? std::string(text.substr(0, at)) + "\u2026" : std::string(text);
}

std::string tick_text(double x) {
    if (std::abs(x) < 1e-12) return "0";
    return fmt::format("{:.4g}", x);
}

class Sheet {
  public:
    void text(double x, double y, std::string_view words, double size, const char* colour, const char* anchor = "start",
              const char* more = "") {
        out_ +=
            fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" font-size=\"{}\" fill=\"{}\" text-anchor=\"{}\"{}>{}</text>\n",
                        x, y, size, colour, anchor, more, xml_text(words));
    }
    void line(double x0, double y0, double x1, double y1, const char* colour, double width, const char* more = "") {
        out_ += fmt::format(
            "<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"{}\" stroke-width=\"{}\"{}/>\n", x0,
            y0, x1, y1, colour, width, more);
    }
    void circle(double x, double y, double r, const char* more) {
        out_ += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"{}\"{}/>\n", x, y, r, more);
    }
    void rect(const Box& b, const char* more) {
        out_ += fmt::format("<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\"{}/>\n", b.left, b.top,
                            b.width(), b.height(), more);
    }
    void raw(std::string_view text) { out_ += text; }
    std::string take() { return std::move(out_); }

  private:
    std::string out_;
};

// ---- left: the curve ----------------------------------------------------------------------------------------------------

struct Scale {
    double low, high, from, to;
    double operator()(double x) const { return from + (x - low) / (high - low) * (to - from); }
};

void curve_axes(Sheet& s, const CurvePanel& c, const Scale& sx, const Scale& sy) {
    for (const double t : axis_ticks(sy.low, sy.high, 6)) {
        s.line(kCurve.left, sy(t), kCurve.right, sy(t), kLine, 1);
        s.text(kCurve.left - 8, sy(t) + 4, tick_text(t), 12, kSoft, "end");
    }
    for (const double t : axis_ticks(sx.low, sx.high, 7)) {
        if (t != std::floor(t)) continue;
        s.line(sx(t), kCurve.bottom, sx(t), kCurve.bottom + 5, kSoft, 1);
        s.text(sx(t), kCurve.bottom + 19, tick_text(t), 12, kSoft, "middle");
    }
    s.line(kCurve.left, kCurve.bottom, kCurve.right, kCurve.bottom, kSoft, 1);
    s.text((kCurve.left + kCurve.right) / 2, kCurve.bottom + 39, "index", 13, kInk, "middle");
    const double middle = (kCurve.top + kCurve.bottom) / 2;
    s.text(24, middle, "eigenvalue", 13, kInk, "middle",
           fmt::format(" transform=\"rotate(-90 24 {:.1f})\"", middle).c_str());
    s.text(kCurve.left, kCurve.top - 16, c.title, 15, kInk, "start", " font-weight=\"600\"");
}

// The step from the zeros to the next eigenvalue: a bar of its height, and words with a line to it.
void mark_gap(Sheet& s, const CurvePanel& c, const Scale& sx, const Scale& sy) {
    if (c.gap.empty() || c.zeros >= static_cast<std::int64_t>(c.eigenvalues.size())) return;
    const double value = c.eigenvalues[static_cast<std::size_t>(c.zeros)];
    const double x = sx(static_cast<double>(c.first_index + c.zeros)), y = sy(value), base = sy(0);
    s.line(x, base, x, y, kAccent, 2);
    s.line(x - 5, base, x + 5, base, kAccent, 2);
    s.line(x - 5, y, x + 5, y, kAccent, 2);
    const bool right = x > (kCurve.left + kCurve.right) / 2;  // words to the side with more room, clear of the curve
    const double lift = right ? kCurve.top + 0.45 * kCurve.height() : kCurve.top + 0.16 * kCurve.height();
    const double tx = right ? x - 18 : x + 14, ty = std::min(lift, y - 30);
    s.line(x, y - 3, x, ty + 6, kAccent, 1, " stroke-dasharray=\"2 3\"");
    s.text(right ? x + 4 : tx - 10, ty, c.gap, 13, kAccent, right ? "end" : "start", " font-weight=\"600\"");
}

// Without all zeros but the last, where they would take most of the room.
CurvePanel with_few_zeros(CurvePanel c) {
    const std::int64_t others = std::ssize(c.eigenvalues) - c.zeros, shown = std::max<std::int64_t>(others / 2, 3);
    if (c.zeros <= 2 * shown) return c;
    c.eigenvalues.erase(c.eigenvalues.begin(), c.eigenvalues.end() - (others + shown));
    c.first_index += c.zeros - shown;
    c.zeros = shown;
    return c;
}

void curve_panel(Sheet& s, const CurvePanel& all) {
    const CurvePanel c = with_few_zeros(all);
    const auto n = static_cast<std::int64_t>(c.eigenvalues.size());
    if (n == 0) return s.text(kCurve.left, kCurve.top + 20, "no eigenvalues", 13, kSoft);
    const double high = std::max(c.eigenvalues.back(), 1e-12), first = static_cast<double>(c.first_index);
    const Scale sx{first - 0.02 * static_cast<double>(std::max<std::int64_t>(n, 2)),
                   first + 1.02 * static_cast<double>(std::max<std::int64_t>(n, 2)) - 1, kCurve.left, kCurve.right};
    const Scale sy{0, 1.06 * high, kCurve.bottom, kCurve.top};
    curve_axes(s, c, sx, sy);
    std::string points;
    for (std::int64_t j = 0; j < n; ++j)
        points += fmt::format("{:.1f},{:.1f} ", sx(first + static_cast<double>(j)),
                              sy(std::max(0.0, c.eigenvalues[static_cast<std::size_t>(j)])));
    s.raw(fmt::format(
        "<polyline fill=\"none\" stroke=\"{}\" stroke-width=\"1.2\" stroke-opacity=\"0.55\" points=\"{}\"/>\n",
        kCurveInk, points));
    const double r = n <= 80 ? 3.4 : n <= 200 ? 2.4 : 1.7;
    const std::string zero = fmt::format(" fill=\"#fff\" stroke=\"{}\" stroke-width=\"1.6\"", kAccent);
    const std::string other = fmt::format(" fill=\"{}\"", kCurveInk);
    for (std::int64_t j = 0; j < n; ++j)
        s.circle(sx(first + static_cast<double>(j)), sy(std::max(0.0, c.eigenvalues[static_cast<std::size_t>(j)])), r,
                 (j < c.zeros ? zero : other).c_str());
    mark_gap(s, c, sx, sy);
    if (c.zeros > 0) {
        s.circle(kCurve.left + 14, kCurve.top + 8, 3.4, zero.c_str());
        s.text(kCurve.left + 26, kCurve.top + 12,
               fmt::format("{} zero{}{}", all.zeros, all.zeros == 1 ? "" : "s",
                           c.zeros < all.zeros ? fmt::format(", the last {} of them drawn", c.zeros) : ""),
               13, kInk);
    }
}

// ---- right: the layout --------------------------------------------------------------------------------------------------

// Positions in px, in the box less a margin.
struct Positions {
    std::vector<double> x, y;
};

Positions place(const LayoutPanel& p, const Box& box) {
    constexpr double kMargin = 14;
    const auto [x0, x1] = std::minmax_element(p.x.begin(), p.x.end());
    const auto [y0, y1] = std::minmax_element(p.y.begin(), p.y.end());
    const double dx = std::max(double(*x1) - *x0, 1e-30), dy = std::max(double(*y1) - *y0, 1e-30);
    double px = (box.width() - 2 * kMargin) / dx, py = (box.height() - 2 * kMargin) / dy;
    if (p.same_scale) px = py = std::min(px, py);
    const double cx = (box.left + box.right) / 2, cy = (box.top + box.bottom) / 2;
    Positions at;
    for (std::size_t i = 0; i < p.x.size(); ++i) {
        at.x.push_back(cx + (p.x[i] - (double(*x0) + *x1) / 2) * px);
        at.y.push_back(cy - (p.y[i] - (double(*y0) + *y1) / 2) * py);
    }
    return at;
}

void draw_edges(Sheet& s, const LayoutPanel& p, const Positions& at) {
    if (p.edges.empty()) return;
    const auto many = static_cast<double>(p.edges.size());
    std::string d;
    for (const auto& [a, b] : p.edges)
        d += fmt::format("M{:.1f} {:.1f}L{:.1f} {:.1f}", at.x[static_cast<std::size_t>(a)],
                         at.y[static_cast<std::size_t>(a)], at.x[static_cast<std::size_t>(b)],
                         at.y[static_cast<std::size_t>(b)]);
    // The more edges, the fainter: the ink of the sheet stays about the same.
    s.raw(fmt::format(
        "<path fill=\"none\" stroke=\"#52606d\" stroke-width=\"{:.2f}\" stroke-opacity=\"{:.2f}\" d=\"{}\"/>\n",
        many < 2000 ? 0.9 : 0.6, std::clamp(1600 / many, 0.1, 0.5), d));
}

std::string node_circle(const LayoutPanel& p, const Positions& at, std::size_t i, double r) {
    std::string circle = fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"{:.1f}\"", at.x[i], at.y[i], r);
    return circle + (p.names.empty() ? "/>" : "><title>" + xml_text(p.names[i]) + "</title></circle>");
}

// Nodes in groups of one colour. Classes are drawn from the most frequent to the rarest, which would drown else.
void draw_nodes(Sheet& s, const LayoutPanel& p, const Positions& at) {
    const bool classes = !p.class_names.empty();
    const std::size_t groups = classes ? p.class_names.size() : kRampSteps;
    std::vector<std::vector<std::size_t>> members(groups);
    for (std::size_t i = 0; i < p.x.size(); ++i) {
        const double t = classes ? 0 : std::clamp(double(p.value[i]), 0.0, 1.0);
        members[classes ? static_cast<std::size_t>(p.class_of[i])
                        : std::min(static_cast<std::size_t>(t * kRampSteps), groups - 1)]
            .push_back(i);
    }
    std::vector<std::size_t> order(groups);
    for (std::size_t g = 0; g < groups; ++g) order[g] = g;
    if (classes)
        std::stable_sort(order.begin(), order.end(),
                         [&](std::size_t a, std::size_t b) { return members[a].size() > members[b].size(); });
    const auto many = static_cast<double>(p.x.size());
    const double r = std::clamp(150 / std::sqrt(std::max(many, 1.0)), 1.3, 6.0);
    for (const std::size_t g : order) {
        if (members[g].empty()) continue;
        const std::string colour = classes ? kClasses[std::min<std::size_t>(g, kClassColours - 1)]
                                           : ramp_colour((static_cast<double>(g) + 0.5) / kRampSteps);
        s.raw(fmt::format("<g fill=\"{}\" fill-opacity=\"0.85\"{}>\n", colour,
                          r >= 2 ? " stroke=\"#fff\" stroke-width=\"0.5\"" : ""));
        for (const std::size_t i : members[g]) s.raw(node_circle(p, at, i, r) + "\n");
        s.raw("</g>\n");
    }
}

// The room below the layout: classes in rows, or the colour bar.
void legend(Sheet& s, const LayoutPanel& p) {
    const double y = kLayout.bottom + 20;
    if (p.class_names.empty()) {
        if (p.value_name.empty()) return;
        constexpr double kBar = 200, kTall = 9;
        const double left = kLayout.right - kBar;
        for (int i = 0; i < kRampSteps; ++i)
            s.rect({left + kBar * i / kRampSteps, y - kTall, left + kBar * (i + 1) / kRampSteps + 0.8, y},
                   fmt::format(" fill=\"{}\"", ramp_colour((i + 0.5) / kRampSteps)).c_str());
        s.text(left - 10, y, p.value_name, 12, kSoft, "end");
        return;
    }
    double x = kLayout.left + 4, line = y;
    for (std::size_t g = 0; g < p.class_names.size(); ++g) {
        if (p.class_names[g].empty()) continue;
        const std::string name = shortened(p.class_names[g], 20);
        const double width = 26 + 7.0 * static_cast<double>(std::min<std::size_t>(name.size(), 22));
        if (x + width > kLayout.right && x > kLayout.left + 4) x = kLayout.left + 4, line += 18;
        const char* colour = kClasses[std::min<std::size_t>(g, kClassColours - 1)];
        s.circle(x + 5, line - 4, 4.5, fmt::format(" fill=\"{}\"", colour).c_str());
        s.text(x + 14, line, name, 12, kInk);
        x += width;
    }
}

void layout_panel(Sheet& s, const LayoutPanel& p) {
    s.text(kLayout.left, kLayout.top - 16, p.title, 15, kInk, "start", " font-weight=\"600\"");
    s.rect(kLayout, fmt::format(" fill=\"#fbfcfd\" stroke=\"{}\" stroke-width=\"1\" rx=\"4\"", kLine).c_str());
    if (!p.absent.empty() || p.x.empty())
        return s.text((kLayout.left + kLayout.right) / 2, (kLayout.top + kLayout.bottom) / 2,
                      p.absent.empty() ? "no nodes" : p.absent, 14, kSoft, "middle");
    const Positions at = place(p, kLayout);
    draw_edges(s, p, at);
    draw_nodes(s, p, at);
    legend(s, p);
}

}  // namespace

std::string xml_text(std::string_view text) {
    std::string out;
    out.reserve(text.size());
    for (std::size_t at = 0; at < text.size();) {
        const auto first = static_cast<unsigned char>(text[at]);
        const auto bytes = static_cast<std::size_t>(std::max(utf8_sequence(text, at), 0));
        const bool good = bytes > 0 && (first >= ' ' || first == '\t' || first == '\n') && first != 127 &&
                          text.substr(at, bytes) != "\xEF\xBF\xBE" && text.substr(at, bytes) != "\xEF\xBF\xBF";
        if (!good) {
            out += "\xEF\xBF\xBD";
            at += std::max<std::size_t>(bytes, 1);
            continue;
        }
        switch (first) {
            case '&':
                out += "&amp;";
                break;
            case '<':
                out += "&lt;";
                break;
            case '>':
                out += "&gt;";
                break;
            case '"':
                out += "&quot;";
                break;
            case '\'':
                out += "&#39;";
                break;
            default:
                out += text.substr(at, bytes);
        }
        at += bytes;
    }
    return out;
}

std::vector<double> axis_ticks(double low, double high, int count) {
    std::vector<double> ticks;
    if (!(high > low) || !std::isfinite(high - low) || count < 1) return ticks;
    const double raw = (high - low) / count, power = std::pow(10, std::floor(std::log10(raw)));
    const double lead = raw / power;
    const double step = power * (lead <= 1 ? 1 : lead <= 2 ? 2 : lead <= 5 ? 5 : 10);
    for (double i = std::ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; ++i) ticks.push_back(i * step);
    return ticks;
}

std::string svg_of(const SpectrumPlot& p) {
    Sheet s;
    s.raw(
        fmt::format("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1}\" width=\"{0}\" height=\"{1}\" "
                    "font-family=\"Helvetica Neue, Arial, Liberation Sans, DejaVu Sans, sans-serif\">\n",
                    kWidth, kHeight));
    s.raw("<title>" + xml_text(p.title) + "</title>\n");
    s.rect({0, 0, kWidth, kHeight}, " fill=\"#ffffff\"");
    s.text(24, 38, shortened(p.title, 90), 22, kInk, "start", " font-weight=\"700\"");
    s.text(24, 62, shortened(p.subtitle, 170), 13.5, kSoft);
    curve_panel(s, p.curve);
    layout_panel(s, p.layout);
    s.text(24, kHeight - 18, shortened(p.caption, 190), 12.5, kSoft);
    s.raw("</svg>\n");
    return s.take();
}

}  // namespace fiedler
