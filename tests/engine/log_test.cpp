// The JSONL log, the progress line and the signals.
#include "engine/log.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <limits>

#include "engine/error.h"
#include "engine/files.h"
#include "engine/signals.h"

namespace fiedler {
namespace {

class Log : public testing::Test {
  protected:
    std::string folder_ =
        (std::filesystem::temp_directory_path() / ("fiedler_log_" + std::to_string(getpid()))).string();
    std::string path_ = join_path(folder_, "log.jsonl");
    void SetUp() override { make_folders(folder_); }
    void TearDown() override { std::filesystem::remove_all(folder_); }
    std::vector<Json> records() const {
        std::ifstream in(path_);
        std::vector<Json> all;
        for (std::string line; std::getline(in, line);) all.push_back(Json::parse(line));
        return all;
    }
};

TEST_F(Log, OneRecordALineFlushedAtOnce) {
    RunLog log(path_, false);
    log.write("start", {{"device", "cpu"}, {"parameters", 12}});
    log.write("step", {{"step", 1}, {"loss", 4.25}});
    const auto all = records();  // the log is still open
    ASSERT_EQ(all.size(), 2u);
    EXPECT_EQ(all[0]["event"], "start");
    EXPECT_GT(all[0]["time"].get<double>(), 1.6e9);
    EXPECT_EQ(all[1]["loss"], 4.25);
    EXPECT_EQ(all[1].begin().key(), "event");
}

TEST_F(Log, NumbersThatAreNotFiniteAreNullAndAnyTextIsWritten) {
    RunLog log(path_, false);
    log.write("step", {{"loss", std::numeric_limits<double>::quiet_NaN()},
                       {"norm", std::numeric_limits<double>::infinity()},
                       {"text", "two\nlines \xff\xfe"}});
    const auto all = records();
    ASSERT_EQ(all.size(), 1u);
    EXPECT_TRUE(all[0]["loss"].is_null());
    EXPECT_TRUE(all[0]["norm"].is_null());
    EXPECT_EQ(all[0]["text"].get<std::string>().substr(0, 10), "two\nlines ");
}

TEST_F(Log, AppendGoesOnAndDropsATornRecord) {
    RunLog(path_, false).write("step", {{"step", 1}});
    std::ofstream(path_, std::ios::app) << R"({"event":"step","st)";
    RunLog(path_, true).write("step", {{"step", 2}});
    const auto all = records();
    ASSERT_EQ(all.size(), 2u);
    EXPECT_EQ(all[0]["step"], 1);
    EXPECT_EQ(all[1]["step"], 2);
    RunLog(path_, false).write("start", Json::object());
    EXPECT_EQ(records().size(), 1u);
}

TEST_F(Log, UnwritableIsAnInputError) {
    EXPECT_THROW(RunLog(join_path(folder_, "no/such/folder/log.jsonl"), false), InputError);
    if (!file_exists("/dev/full") && !std::filesystem::exists("/dev/full")) return;
    RunLog full("/dev/full", false);
    EXPECT_THROW(full.write("step", Json::object()), InputError);
}

TEST(StepProgress, HasEveryNumberOnOneLine) {
    const std::string text = progress_text({120, 1000, 4.12345, 2e-3, 0.5119, 1.23e6, "tok", 0.432, 65});
    EXPECT_TRUE(
        text.starts_with("step  120/1000  loss 4.1235  lr 2.00e-03  norm 0.512  1.23M tok/s  43.2% of peak  eta "));
    EXPECT_NE(text.find("eta "), std::string::npos);
    EXPECT_EQ(text.find('\n'), std::string::npos);
    EXPECT_EQ(count_text(std::numeric_limits<double>::infinity()), "?");
    EXPECT_EQ(duration_text(std::numeric_limits<double>::quiet_NaN()), "?");
    EXPECT_EQ(duration_text(-1), "?");
    const std::string unknown =
        progress_text({1, 10, std::numeric_limits<double>::quiet_NaN(), 0, 0, 0, "tok", -1, -1});
    EXPECT_EQ(unknown.find("peak"), std::string::npos);
    EXPECT_EQ(unknown.find("eta"), std::string::npos);
    EXPECT_NE(unknown.find("nan"), std::string::npos);
}

// What a Terminal writes.
template <class Body>
std::string written(bool is_terminal, int columns, Body&& body) {
    std::FILE* file = std::tmpfile();
    {
        Terminal terminal(file, is_terminal, columns);
        body(terminal);
    }
    std::string text(static_cast<std::size_t>(std::ftell(file)), '\0');
    std::rewind(file);
    EXPECT_EQ(std::fread(text.data(), 1, text.size(), file), text.size());
    std::fclose(file);
    return text;
}

TEST(Terminal, WritesOverTheProgressLineOnATerminalOnly) {
    const auto body = [](Terminal& t) {
        t.progress("one");
        t.progress("two");
        t.line("stays");
        t.progress("three");
    };
    EXPECT_EQ(written(true, 80, body), "one\r\033[Ktwo\r\033[Kstays\nthree\n");
    EXPECT_EQ(written(false, 80, body), "one\ntwo\nstays\nthree\n");
    EXPECT_EQ(written(true, 21, [](Terminal& t) { t.progress(std::string(50, 'x')); }), std::string(20, 'x') + "\n");
}

TEST(Signals, SetAFlagWhileGuardedAndAreRestored) {
    struct sigaction before {
    }, after{};
    sigaction(SIGTERM, nullptr, &before);
    {
        SignalGuard guard;
        EXPECT_FALSE(stop_requested());
        raise(SIGTERM);
        EXPECT_TRUE(stop_requested());
        EXPECT_EQ(stop_signal(), SIGTERM);
        raise(SIGINT);  // the first SIGINT: no exit yet
        EXPECT_EQ(stop_signal(), SIGINT);
        EXPECT_THROW(SignalGuard{}, std::logic_error);
    }
    sigaction(SIGTERM, nullptr, &after);
    EXPECT_EQ(before.sa_handler, after.sa_handler);
    SignalGuard again;
    EXPECT_FALSE(stop_requested());
}

TEST(SignalsDeathTest, ASecondInterruptEndsTheProcess) {
    EXPECT_EXIT(
        {
            SignalGuard guard;
            raise(SIGINT);
            raise(SIGINT);
        },
        testing::ExitedWithCode(130), "");
}

}  // namespace
}  // namespace fiedler
