// Ten training losses of one fixed model against tests/golden/losses.txt, which says how they were made.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <sstream>

#include "engine/engine.h"
#include "engine/rng.h"

namespace fiedler {
namespace {

constexpr int kSteps = 10;

Config golden_config() {
    Config c;
    c.pattern = "sbd";
    c.layers = 3;
    c.channels = 64;
    c.heads = 2;
    c.scalars = 4;
    c.vocab = 128;
    c.context = 48;
    c.batch_tokens = 4 * 48;
    c.micro_batch = 2;
    c.threads = 1;
    return c;
}

// A token is three times the one before it plus 0 to 3: something to learn, without a tokenizer or a file.
Batch golden_batch(const Config& c, std::uint64_t number) {
    Batch b;
    b.rows = b.real_rows = c.micro_batch;
    b.length = c.context;
    for (std::int64_t row = 0; row < b.rows; ++row) {
        const std::uint64_t stream = number * 100 + static_cast<std::uint64_t>(row);
        auto token = static_cast<std::int32_t>(rng::below(128, 7, stream, 0));
        for (std::int64_t i = 0; i < b.length; ++i) {
            b.inputs.push_back(token);
            token =
                (3 * token + static_cast<std::int32_t>(rng::below(4, 7, stream, static_cast<std::uint64_t>(i + 1)))) %
                128;
            b.targets.push_back(token);
        }
    }
    return b;
}

std::vector<double> train() {
    const Config c = golden_config();
    const ModelSpec spec = model_spec(c);
    const auto engine = make_engine(spec, engine_options(c, DeviceKind::cpu, true));
    std::vector<float> master(static_cast<std::size_t>(engine->table().elements));
    initialise(engine->table(), spec, 11, master.data());
    engine->write(Block::master, master.data());
    std::vector<double> losses;
    for (int step = 0; step < kSteps; ++step) {
        StepSettings s;
        s.step = step + 1;
        s.lr = 3e-3;
        const auto n = static_cast<std::uint64_t>(step);
        const std::vector<Batch> micro_batches = {golden_batch(c, 2 * n), golden_batch(c, 2 * n + 1)};
        losses.push_back(engine->train_step(micro_batches, s).loss);
    }
    return losses;
}

std::vector<double> stored() {
    std::ifstream in(FIEDLER_SOURCE_DIR "/tests/golden/losses.txt");
    std::vector<double> losses;
    for (std::string line; std::getline(in, line);)
        if (!line.empty() && line[0] != '#') losses.push_back(std::stod(line));
    return losses;
}

TEST(Golden, TenLossesAreThoseOnFile) {
    const std::vector<double> now = train(), then = stored();
    std::string list;
    for (const double loss : now) list += fmt::format("{:.6f}\n", loss);
    SCOPED_TRACE("the losses are now:\n" + list);
    ASSERT_EQ(then.size(), std::size_t{kSteps});
    for (std::size_t i = 0; i < then.size(); ++i) {
        ASSERT_TRUE(std::isfinite(now[i]));
        EXPECT_LE(std::abs(now[i] - then[i]), 1e-4 * then[i]) << "step " << i + 1;
    }
    EXPECT_LT(now.back(), now.front() - 0.2);  // it learned
}

}  // namespace
}  // namespace fiedler
