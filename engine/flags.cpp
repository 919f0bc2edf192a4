// engine/flags.cpp: knobs from the command line and from a TOML file, both read by CLI11.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <fstream>
#include <nlohmann/json.hpp>

#include "engine/config.h"
#include "engine/error.h"

namespace fiedler {

namespace {

struct Flag {
    const Knob* knob;
    CLI::Option* option;
    const char* value = "";  // that the flag stands for, if it takes none
};

Flag add_flag(CLI::App& app, const Knob& k, Command command) {
    const std::string name = (k.name[1] ? "--" : fmt::format("-{},--", k.name)) + k.name;
    if (std::holds_alternative<bool Config::*>(k.field)) return {&k, app.add_flag(name + ",!--no-" + k.name)};
    const bool positional = k.rules.positional & bit_of(command);
    const bool list = std::holds_alternative<std::vector<std::string> Config::*>(k.field);
    CLI::Option* option = app.add_option(positional ? std::string(k.name) + "," + name : name, CLI::callback_t{});
    option->expected(*k.rules.alone ? 0 : 1, list ? CLI::detail::expected_max_vector_size : 1);
    if (list) option->allow_extra_args(true);
    option->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
    return {&k, option};
}

// Values of a flag that was given; a flag that may stand alone and does gets the value the table names.
std::vector<std::string> values_of(const Flag& f) {
    if (*f.value) return {f.value};
    std::vector<std::string> values = f.option->results();
    if (*f.knob->rules.alone)
        for (std::string& v : values)
            if (v.empty()) v = f.knob->rules.alone;
    if (values.empty() && *f.knob->rules.alone) values = {f.knob->rules.alone};
    return values;
}

std::string unexpected_argument(Command command, const std::string& argument) {
    const std::string where = std::string("fiedler ") + name_of(command);
    if (!argument.starts_with("--"))
        return fmt::format("{}: unexpected argument '{}'; `fiedler {} --help` lists what it takes", where, argument,
                           name_of(command));
    std::string name = argument.substr(2, argument.find('=') - 2);
    if (name.starts_with("no-") && find_knob(name.substr(3))) name = name.substr(3);
    const Knob* k = find_knob(name);
    if (!k) return unknown_knob(name, where);
    if (!(k->commands & bit_of(command)))
        return fmt::format("{}: --{} is a knob of other commands; `fiedler {} --help` lists this one's", where, name,
                           name_of(command));
    return fmt::format("{}: --{} takes no separate value; write --{}=VALUE, --{} or --no-{}", where, name, name, name,
                       name);
}

// Line of the file on which `name` is set, for messages; 0 when it is not found.
int line_of(const std::string& path, const std::string& name) {
    std::ifstream in(path);
    std::string line;
    for (int n = 1; std::getline(in, line); ++n) {
        const std::size_t first = line.find_first_not_of(" \t\"'");
        if (first == std::string::npos || line.compare(first, name.size(), name) != 0) continue;
        const std::size_t next = line.find_first_not_of(" \t\"'\r", first + name.size());
        if (next == std::string::npos || line[next] == '=') return n;
    }
    return 0;
}

std::string place(const std::string& path, const std::string& name) {
    const int line = line_of(path, name);
    return line ? fmt::format("{}:{}", path, line) : path;
}

void apply_file(Invocation& run, const std::string& path) {
    for (auto& [name, values] : read_toml(path)) {
        const Knob* k = find_knob(name);
        if (!k) throw InputError(unknown_knob(name, place(path, name)));
        if (!(k->commands & bit_of(run.command)))
            throw InputError(fmt::format("{}: {} is no knob of `fiedler {}`: take it out", place(path, name), name,
                                         name_of(run.command)));
        if (*k->rules.alone && values.size() == 1 && values[0] == "true") values[0] = k->rules.alone;
        if (*k->rules.alone && values.size() == 1 && values[0] == "false") values[0].clear();
        set_value(run.config, *k, values, place(path, name));
        run.source[name] = Source::file;
    }
}

}  // namespace

std::vector<std::pair<std::string, std::vector<std::string>>> read_toml(const std::string& path) {
    std::ifstream in(path);
    if (!in) throw InputError(fmt::format("{}: cannot be read; --config takes a TOML file", path));
    std::vector<CLI::ConfigItem> items;
    try {
        items = CLI::ConfigTOML().from_config(in);
    } catch (const CLI::Error& e) {
        throw InputError(fmt::format("{}: is not a TOML file of knobs: {}", path, e.what()));
    }
    std::vector<std::pair<std::string, std::vector<std::string>>> knobs;
    for (const CLI::ConfigItem& item : items) {
        if (item.name == "++" || item.name == "--") continue;  // begin and end of a section
        const Knob* k = find_knob(item.name);
        if (k && !item.parents.empty() && (item.parents.size() > 1 || item.parents[0] != name_of(k->group)))
            throw InputError(fmt::format("{}: {} stands in section [{}]; its section is [{}], or none",
                                         place(path, item.name), item.name, fmt::join(item.parents, "."),
                                         name_of(k->group)));
        for (const std::string& v : item.inputs)
            if (!v.empty() && (v.front() == '"' || v.front() == '\''))
                throw InputError(fmt::format("{}: {} has a quote that does not end (a text cannot hold a #)",
                                             place(path, item.name), item.name));
        knobs.emplace_back(item.name, item.inputs);
    }
    return knobs;
}

Invocation parse_arguments(Command command, const std::vector<std::string>& arguments) {
    Invocation run;
    run.command = command;
    CLI::App app;
    app.set_help_flag();
    app.allow_extras();
    bool help = false;
    std::string file;
    app.add_flag("-h,--help", help);
    app.add_option("--config", file);
    std::vector<Flag> flags;
    for (const Knob& k : knobs()) {
        if (!(k.commands & bit_of(command))) continue;
        flags.push_back(add_flag(app, k, command));
        for (const char* choice : k.rules.choices)
            if (k.rules.choice_flags) flags.push_back({&k, app.add_flag(std::string("--") + choice), choice});
    }
    try {
        app.parse(std::vector<std::string>(arguments.rbegin(), arguments.rend()));  // CLI11 wants them in reverse
    } catch (const CLI::ArgumentMismatch& e) {
        if (help) return run.help = true, run;
        const std::string what = e.what();  // "--steps: 1 required INT missing"
        throw InputError(fmt::format("fiedler {}: {} needs a value; `fiedler {} --help` says which", name_of(command),
                                     what.substr(0, what.find(':')), name_of(command)));
    } catch (const CLI::Error& e) {
        if (help) return run.help = true, run;
        throw InputError(fmt::format("fiedler {}: {}", name_of(command), e.what()));
    }
    if (help) return run.help = true, run;
    if (const auto extra = app.remaining(); !extra.empty())
        throw InputError(unexpected_argument(command, extra.front()));

    const auto apply_given = [&](Invocation& to) {
        if (!file.empty()) apply_file(to, file);
        for (const Flag& f : flags) {
            if (!f.option->count()) continue;
            if (*f.value && to.source[f.knob->name] == Source::flag && value_text(to.config, *f.knob) != f.value)
                throw InputError(fmt::format("fiedler {}: --{} and {} = {} contradict each other: give one",
                                             name_of(command), f.value, f.knob->name, value_text(to.config, *f.knob)));
            set_value(to.config, *f.knob, values_of(f), std::string("--") + f.knob->name);
            to.source[f.knob->name] = Source::flag;
        }
    };
    Invocation first = run;  // the preset lies under file and flags, but either may name it
    apply_given(first);
    apply_preset(run.config, first.config.preset);
    for (const Knob& k : knobs())
        if (value_text(run.config, k) != value_text(Config{}, k)) run.source[k.name] = Source::preset;
    apply_given(run);
    return run;
}

std::string to_toml(const Config& c, Command command) {
    std::string out = fmt::format("# fiedler {} --config THIS_FILE\n", name_of(command));
    KnobGroup group = KnobGroup::model;
    bool first = true;
    const Json all = to_json(c);
    for (const Knob& k : knobs()) {
        if (!(k.commands & bit_of(command))) continue;
        if (first || k.group != group) out += fmt::format("\n[{}]\n", name_of(k.group));
        first = false;
        group = k.group;
        out += fmt::format("{} = {}\n", k.name, all.at(k.name).dump());
    }
    return out;
}

}  // namespace fiedler
