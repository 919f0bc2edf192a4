// engine/help.cpp: what --help prints, from the table of knobs.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <sstream>

#include "engine/config.h"

namespace fiedler {

namespace {

std::string number_text(double x) {
    char text[40];
    std::snprintf(text, sizeof text, "%.6g", x);
    return text;
}

// "--lr NUMBER": how the flag is written.
std::string flag_text(const Knob& k, Command command) {
    const std::string flag = (k.name[1] ? std::string("--") : std::string("-")) + k.name;
    if (std::holds_alternative<bool Config::*>(k.field)) return std::string("--[no-]") + k.name;
    if (k.rules.positional & bit_of(command)) return std::string(k.name) + "...";
    if (k.rules.unit == Unit::bytes) return flag + " BYTES";
    if (k.rules.unit == Unit::steps) return flag + " STEPS";
    if (k.rules.unit == Unit::tokens) return flag + " TOKENS";
    if (std::holds_alternative<std::int64_t Config::*>(k.field)) return flag + " N";
    if (std::holds_alternative<double Config::*>(k.field)) return flag + " X";
    if (std::holds_alternative<ChoiceField>(k.field))
        return fmt::format("{} {}", flag, fmt::join(k.rules.choices, "|"));
    return *k.rules.alone ? flag + "[=TEXT]" : flag + " TEXT";
}

bool is_zero(const Config& c, const Knob& k) {
    const std::string value = value_text(c, k);
    return value.empty() || value == "0";
}

// "(default 0.003)", "(default 0: all)".
std::string default_text(const Config& defaults, const Knob& k) {
    const std::string value = k.rules.unit == Unit::bytes && !is_zero(defaults, k)
                                  ? bytes_text(defaults.*std::get<std::int64_t Config::*>(k.field))
                                  : value_text(defaults, k);
    std::string text;
    if (*k.rules.zero && is_zero(defaults, k))
        text = std::string("default: ") + k.rules.zero;
    else if (!value.empty())
        text = "default " + value +
               (*k.rules.zero && k.rules.low == 0 && k.rules.high > 0 ? std::string(", 0: ") + k.rules.zero : "");
    if (k.rules.high > 0 && k.rules.high <= 65536 && k.rules.low != k.rules.high)
        text += (text.empty() ? "" : "; ") + number_text(k.rules.low) + " to " + number_text(k.rules.high);
    return text.empty() ? text : " (" + text + ")";
}

void wrapped(std::ostream& out, const std::string& text, std::size_t indent, std::size_t width) {
    std::istringstream words(text);
    std::string word;
    std::size_t column = 0;
    while (words >> word) {
        if (column && column + 1 + word.size() > width) {
            out << "\n" << std::string(indent, ' ');
            column = 0;
        }
        if (column) out << ' ', ++column;
        out << word;
        column += word.size();
    }
    out << "\n";
}

struct CommandText {
    Command command;
    const char *name, *arguments, *summary;
};
constexpr CommandText kCommands[] = {
    {Command::prepare, "prepare", "DATA...", "turn a corpus into a tokenizer and token shards"},
    {Command::train, "train", "--data DATA...", "train a model; raw text is prepared first"},
    {Command::eval, "eval", "MODEL --data DATA...", "validation loss and bits per byte of a corpus"},
    {Command::generate, "generate", "MODEL [--prompt TEXT]", "continue a text, or many at once"},
    {Command::plan, "plan", "[--preset NAME]", "the memory table of a training run, without a GPU"},
    {Command::inspect, "inspect", "FILE...", "what any Fiedler file holds"},
    {Command::spectrum, "spectrum", "GRAPH [-k N]", "the smallest eigenpairs of a graph's Laplacian, and a plot"},
    {Command::bench, "bench", "[FAMILY...] [step|samples]", "time of the kernels and of a training step"},
    {Command::export_model, "export", "MODEL --out FILE", "a model as .fdl, safetensors or gguf"},
    {Command::import_model, "import", "MODEL --out FILE", "a model from safetensors or gguf, as .fdl"},
    {Command::quantize, "quantize", "MODEL --out FILE", "weights of 8 or 4 bits, for the CPU runtime"},
    {Command::predict, "predict", "MODEL --out FILE", "what a model of samples says of new ones, as CSV"},
};
// Benchmarks' own flags (bench_command.cpp), which no other command has and no file of a run keeps.
constexpr const char* kBenchText =
    "\nWithout a word: every kernel family and the step. `kernels`: every family. `step`: a training step of the "
    "model\n"
    "that the knobs below describe, on synthetic tokens. `samples`: of a model of molecules, series or nodes on data "
    "of\n"
    "its own, with the knobs of `fiedler train`. `infer MODEL`: generation by the CPU runtime (its own --help).\n\n"
    "  --json FILE                       write all figures\n"
    "  --compare FILE                    a verdict for each row that an earlier --json has, too\n"
    "  --fail-on-slower                  exit code 1 if a row is slower than the noise allows\n"
    "  --samples N                       timed runs of a kernel (default 20)\n"
    "  --steps N                         timed steps (default 20)\n"
    "  --small                           small shapes, as on the CPU\n"
    "  --trace                           the step's longest kernels by name, where CUPTI can be loaded\n"
    "  --list                            the families\n";

const CommandText& text_of(Command c) { return kCommands[static_cast<std::size_t>(c)]; }

void presets_text(std::ostream& out) {
    out << "\nPresets (--preset):\n";
    for (const Preset& p : presets()) {
        const std::string name(p.name);
        out << "  " << name << std::string(name.size() < 20 ? 20 - name.size() : 1, ' ');
        wrapped(out, p.summary, 22, 98);
    }
}

}  // namespace

const char* name_of(Command c) { return text_of(c).name; }

const char* name_of(KnobGroup g) {
    constexpr const char* names[] = {"model", "data", "train", "run", "use", "graph", "spectrum"};
    return names[static_cast<int>(g)];
}

std::optional<Command> command_named(std::string_view name) {
    for (const CommandText& c : kCommands)
        if (name == c.name) return c.command;
    return std::nullopt;
}

std::vector<std::string> command_names() {
    std::vector<std::string> names;
    for (const CommandText& c : kCommands) names.emplace_back(c.name);
    return names;
}

std::string help_text() {
    std::ostringstream out;
    out << "fiedler: trains compact transformers whose attention compares scalars instead of dot products.\n\nusage: "
           "fiedler COMMAND [ARGUMENTS]\n\nCommands:\n";
    for (const CommandText& c : kCommands) {
        char line[200];
        std::snprintf(line, sizeof line, "  %-9s %-23s %s\n", c.name, c.arguments, c.summary);
        out << line;
    }
    presets_text(out);
    out << "\n`fiedler COMMAND --help` lists a command's knobs. Every knob is a flag and a line of a TOML file "
           "(--config).\nExit codes: 0 done, 1 failed while running, 2 bad usage or bad input.\n";
    return out.str();
}

std::string help_text(Command command) {
    const Config defaults;
    std::ostringstream out;
    out << "usage: fiedler " << text_of(command).name << " " << text_of(command).arguments << " [knobs]\n  "
        << text_of(command).summary
        << "\n\n  --config FILE                     knobs from a TOML file; flags win over it\n"
        << "  --help                            this text\n";
    if (command == Command::bench) out << kBenchText;
    for (const KnobGroup group : {KnobGroup::graph, KnobGroup::spectrum, KnobGroup::model, KnobGroup::data,
                                  KnobGroup::train, KnobGroup::run, KnobGroup::use}) {
        bool first = true;
        for (const Knob& k : knobs()) {
            if (k.group != group || !(k.commands & bit_of(command))) continue;
            if (first) out << "\n[" << name_of(group) << "]\n";
            first = false;
            std::string flag = "  " + flag_text(k, command);
            if (flag.size() > 34)
                flag += "\n" + std::string(36, ' ');
            else
                flag.resize(36, ' ');
            out << flag;
            std::string text = k.help + default_text(defaults, k);
            if (k.rules.choice_flags) text += fmt::format("; also as --{}", fmt::join(k.rules.choices, ", --"));
            wrapped(out, text, 36, 84);
        }
    }
    if (command == Command::train || command == Command::plan || command == Command::bench) presets_text(out);
    return out.str();
}

}  // namespace fiedler
