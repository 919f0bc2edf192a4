#include "engine/spectrum_command.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "engine/engine.h"
#include "engine/error.h"
#include "engine/files.h"
#include "engine/log.h"
#include "engine/matrix_files.h"
#include "engine/run_folder.h"
#include "engine/signals.h"
#include "engine/spectrum_file.h"
#include "engine/spectrum_input.h"
#include "engine/spectrum_plot.h"
#include "engine/weights.h"

namespace fiedler {

namespace {

using Clock = std::chrono::steady_clock;

// Without --out: runs/spectrum-GRAPH, or runs/spectrum-GRAPH-2, -3, ... when that is taken.
std::string output_folder(const Config& c, const std::string& name) {
    if (!c.out.empty()) {
        if (!is_free(c.out)) input_error("{}: exists already; remove it or choose another --out", c.out);
        return c.out;
    }
    return free_folder("runs/spectrum-" + name);
}

// ---- the solve ------------------------------------------------------------------------------------------------------------

RawVector<float> start_vectors(const Config& c, const SpectrumInput& in, std::int64_t& columns) {
    std::int64_t rows = 0;
    RawVector<float> values;
    if (is_weights_file(c.start)) {
        Spectrum s = read_spectrum(c.start, c.allow_partial);
        rows = s.nodes;
        columns = s.count();
        values = std::move(s.vectors);
    } else {
        Matrix m = read_matrix(c.start);
        rows = m.rows;
        columns = m.columns;
        values.assign(m.values.begin(), m.values.end());
    }
    if (rows == in.graph.nodes) return values;
    if (in.kept.empty() || rows != in.all_nodes)
        input_error("{}: has {} rows, and the graph has {} nodes: give vectors of this graph as --start", c.start, rows,
                    in.graph.nodes);
    RawVector<float> kept;
    for (const std::int32_t i : in.kept)
        kept.insert(kept.end(), values.begin() + i * columns, values.begin() + (i + 1) * columns);
    return kept;
}

std::string progress_line(const SpectrumProgress& p) {
    std::string text = fmt::format("{}: {} of {} pairs converged", p.stage, p.converged, p.wanted);
    if (p.iteration > 0) text += fmt::format(", iteration {}", p.iteration);
    if (p.worst_residual > 0) text += fmt::format(", worst residual {:.1e}", p.worst_residual);
    text += ", " + duration_text(p.seconds);
    if (p.seconds_left >= 0) text += fmt::format(", {} left", duration_text(p.seconds_left));
    return text;
}

SpectrumOptions solver_options(const Config& c, const SpectrumInput& in) {
    SpectrumOptions o;
    o.k = c.k;
    o.beyond_null = c.beyond_null;
    o.kind = c.laplacian;
    o.method = c.method;
    o.tolerance = c.tolerance;
    o.max_iterations = c.max_iterations;
    o.seed = static_cast<std::uint64_t>(c.seed);
    o.threads = static_cast<int>(c.threads);
    o.memory_budget = static_cast<std::size_t>(c.memory_budget);
    if (!c.start.empty()) o.start = start_vectors(c, in, o.start_columns);
    o.stop = [] { return stop_requested(); };
    return o;
}

Spectrum solve(const Config& c, const SpectrumInput& in, const Components& components, bool cuda, std::FILE* words) {
    constexpr double kTerminalSeconds = 0.1, kLineSeconds = 10;
    SpectrumOptions o = solver_options(c, in);
    o.components = &components;
    Terminal terminal(words);
    const auto every = std::chrono::duration<double>(terminal.is_terminal() ? kTerminalSeconds : kLineSeconds);
    auto last = Clock::now();
    o.progress = [&](const SpectrumProgress& p) {
        if (Clock::now() - last < every) return;
        last = Clock::now();
        terminal.progress(progress_line(p));
    };
    Spectrum s = solve_spectrum(in.graph, o, cuda);
    if (terminal.is_terminal()) terminal.line("");
    return s;
}

// ---- what comes out ---------------------------------------------------------------------------------------------------------

Json graph_json(const GraphStatistics& s) {
    return {{"nodes", s.nodes},
            {"edges", s.edges},
            {"isolated", s.isolated},
            {"components", s.components},
            {"largest_component", s.largest_component},
            {"degree_min", s.degree_min},
            {"degree_median", s.degree_median},
            {"degree_max", s.degree_max},
            {"degree_mean", s.degree_mean},
            {"bandwidth", s.bandwidth},
            {"weight_min", s.weight_min},
            {"weight_max", s.weight_max},
            {"weight_sum", s.weight_sum}};
}

double worst_residual(const Spectrum& s) {
    double worst = 0;
    for (const double r : s.residuals) worst = !(r <= worst) ? r : worst;  // NaN stays
    return worst;
}

// Of what is returned, the part beyond the zeros; its first column.
std::int64_t first_beyond(const Config& c, const Spectrum& s) {
    return c.beyond_null ? 0 : std::min(s.zeros, s.count());
}

Json summary_json(const Config& c, const SpectrumInput& in, const GraphStatistics& stats, const Spectrum& s,
                  double read_seconds, const std::string& folder) {
    Json j = {{"graph", graph_json(stats)}, {"about", in.about}, {"read_seconds", read_seconds}};
    j.update(summary_of(s));
    j["device_seconds"] = s.device_seconds;
    j["prepare_seconds"] = s.prepare_seconds;
    j["solve_seconds"] = s.solve_seconds;
    j["stages"] = Json::array();
    for (const SpectrumStage& stage : s.stages)
        j["stages"].push_back({{"name", stage.name}, {"seconds", stage.seconds}});
    const std::int64_t first = first_beyond(c, s);
    const auto value = [&](std::int64_t i) { return Json(s.eigenvalues[static_cast<std::size_t>(i)]); };
    j["beyond_null"] = c.beyond_null;
    j["first_nonzero"] = first < s.count() ? value(first) : Json();
    j["last"] = s.count() > 0 ? value(s.count() - 1) : Json();
    j["worst_residual"] = worst_residual(s);
    j["out"] = folder;
    return j;
}

std::string json_line(const Json& j) { return j.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n"; }

void write_outputs(const std::string& folder, const SpectrumInput& in, const Spectrum& s, const Json& summary) {
    write_npy<double>(join_path(folder, "eigenvalues.npy"), s.eigenvalues, {s.count()});
    write_npy<double>(join_path(folder, "residuals.npy"), s.residuals, {s.count()});
    {
        FileWriter vectors(join_path(folder, "eigenvectors.npy"));
        write_npy<float>(vectors, s.vectors, {s.nodes, s.count()});
        vectors.close();
    }
    write_spectrum(join_path(folder, "spectrum.fdl"), s, in.about);
    write_file_atomic(join_path(folder, "summary.json"), json_line(summary));
    if (in.graph.names.empty()) return;
    std::string names;
    for (const std::string& name : in.graph.names) {
        for (const char ch : name) names += ch == '\n' || ch == '\r' ? ' ' : ch;
        names += '\n';
    }
    write_file_atomic(join_path(folder, "nodes.txt"), names);
}

std::string eigenvalues_text(const Config& c, const Spectrum& s) {
    const std::int64_t first = first_beyond(c, s);
    std::string text = fmt::format("{} pairs", s.count());
    if (c.beyond_null)
        text += fmt::format(" beyond {} zero{}", s.zeros, s.zeros == 1 ? "" : "s");
    else
        text += fmt::format(": {} zero{} (one for each component)", first, first == 1 ? "" : "s");
    if (first < s.count())
        text += fmt::format(", then {:.6g} to {:.6g}", s.eigenvalues[static_cast<std::size_t>(first)],
                            s.eigenvalues.back());
    return text;
}

void print_summary(const Config& c, const Spectrum& s, double read_seconds, std::FILE* words) {
    fmt::print(words, "laplacian    {}\n", name_of(s.kind));
    const std::string method = name_of(s.method);
    fmt::print(words, "method       {}{}\n", s.why.starts_with(method) ? "" : method + ": ", s.why);
    fmt::print(words, "eigenvalues  {}\n", eigenvalues_text(c, s));
    fmt::print(words, "residual     {:.2e} at worst{}\n", worst_residual(s),
               s.tolerance > 0 ? fmt::format(" (tolerance {:.2e})", s.tolerance) : "");
    fmt::print(words, "work         {} iterations, {} columns multiplied by the Laplacian, peak {} on {}\n",
               s.iterations, s.products, bytes_text(static_cast<std::int64_t>(s.peak_bytes)), s.device);
    fmt::print(words, "time         reading {:.2f} s, preparing {:.2f} s, solving {:.2f} s, of {:.2f} s in all{}\n",
               read_seconds, s.prepare_seconds, s.solve_seconds, read_seconds + s.seconds,
               s.device_seconds > 0 ? fmt::format(", and the device's context {:.2f} s", s.device_seconds) : "");
}

// The result is saved by now; what remains is to say that it is not whole.
void refuse_partial(const Config& c, const Spectrum& s, const std::string& folder) {
    if (s.status == SpectrumStatus::complete || c.allow_partial) return;
    run_error(
        "fiedler spectrum: a partial result: {}; it is saved in {}, marked as partial; go on from it with --start {} "
        "--allow-partial",
        s.why, folder, join_path(folder, "spectrum.fdl"));
}

}  // namespace

int run_spectrum(const Invocation& call) {
    const SignalGuard guard;
    const Config& c = call.config;
    std::FILE* words = c.json ? stderr : stdout;
    const bool cuda = choose_device(c.device) == DeviceKind::cuda;
    for (const std::string& path : {c.plot, c.save_graph})
        if (!path.empty()) probe_writable(path);
    if (!c.out.empty()) (void)output_folder(c, "");

    const auto begin = Clock::now();
    const SpectrumInput in = read_spectrum_input(call, cuda, words);
    const double read_seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    const Components components = find_components(in.graph);
    const double components_seconds = std::chrono::duration<double>(Clock::now() - begin).count() - read_seconds;
    const GraphStatistics stats = statistics_of(in.graph, components);
    std::string text = stats.text();
    while (text.ends_with('\n')) text.pop_back();
    fmt::print(words, "{}\n", text);
    std::fflush(words);
    if (stop_requested()) run_error("interrupted before the solve; nothing was written");

    const std::string folder = output_folder(c, in.name);
    StagedFolder staged(folder);  // an unwritable output is found here, before the work
    Spectrum s = solve(c, in, components, cuda, words);
    // Found before the solve, but a part of it: whoever asks the solver alone pays for it there.
    s.seconds += components_seconds, s.prepare_seconds += components_seconds;
    for (SpectrumStage& stage : s.stages)
        if (stage.name == "components") stage.seconds += components_seconds;
    const Json summary = summary_json(c, in, stats, s, read_seconds, folder);
    write_outputs(staged.path(), in, s, summary);
    staged.commit(false);
    print_summary(c, s, read_seconds, words);
    fmt::print(words, "spectrum     {}\n", folder);
    if (!c.save_graph.empty()) {
        write_graph(c.save_graph, in.graph, in.about);
        fmt::print(words, "graph        {}\n", c.save_graph);
    }
    if (!c.plot.empty()) {
        write_file_atomic(c.plot, svg_of(plot_of(in.graph, s, {.title = in.name, .labels = in.labels})));
        fmt::print(words, "plot         {}\n", c.plot);
    }
    if (c.json) fmt::print("{}", json_line(summary));
    std::fflush(words);
    refuse_partial(c, s, folder);
    return 0;
}

}  // namespace fiedler
