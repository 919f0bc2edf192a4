// tests/engine/comm_test.cpp: one process, with and without a communicator, trains the same weights.
#include "engine/comm.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "engine/config.h"
#include "engine/error.h"
#include "engine/runner.h"
#include "tests/support/buffer.h"

namespace fiedler {
namespace {

class Environment {  // a variable for the length of a test
  public:
    Environment(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
    ~Environment() { unsetenv(name_); }

  private:
    const char* name_;
};

TEST(Comm, NoEnvironmentIsOneProcess) {
    const World w = world_from_environment();
    EXPECT_EQ(w.size, 1);
    EXPECT_EQ(w.rank, 0);
    EXPECT_EQ(make_comm(w)->size(), 1);
}
TEST(Comm, BadEnvironmentIsRefused) {
    {
        const Environment size("FIEDLER_WORLD_SIZE", "two");
        EXPECT_THROW((void)world_from_environment(), InputError);
    }
    const Environment size("FIEDLER_WORLD_SIZE", "2");
    EXPECT_THROW((void)world_from_environment(), InputError) << "without FIEDLER_COMM_FILE";
    const Environment file("FIEDLER_COMM_FILE", "somewhere"), rank("FIEDLER_RANK", "2");
    EXPECT_THROW((void)world_from_environment(), InputError) << "rank 2 of 2";
}
TEST(Comm, TwoProcessesNeedDevices) { EXPECT_THROW((void)make_comm(World{0, 2, "file"}), InputError); }

#if FIEDLER_CUDA
std::vector<float> train(bool with_nccl) {
    Config c;
    c.channels = 64;
    c.heads = 2;
    c.layers = 2;
    c.pattern = "sb";
    c.vocab = 64;
    c.context = 32;
    const ModelSpec spec = model_spec(c);
    RunPlan plan;
    plan.micro_batch = 4;
    plan.micro_batches = 2;
    plan.tokens = 4 * 32;
    Runner<Cuda, bf16> runner(std::make_unique<Cuda>(), spec, plan, 0);
    if (with_nccl) runner.use_comm(make_comm(runner.device(), World{}, true));
    std::vector<float> w(static_cast<std::size_t>(runner.table().elements));
    initialise(runner.table(), spec, 1, w.data());
    runner.write(Block::master, w.data());
    Batch b;
    b.rows = 4;
    b.length = 32;
    b.inputs = test::random_ints(128, 1, 0, 64);
    b.targets = test::random_ints(128, 2, 0, 64);
    StepSettings s{.lr = 1e-2};
    for (s.step = 1; s.step <= 5; ++s.step) (void)runner.train_step({b, b}, s);
    runner.read(Block::master, w.data());
    return w;
}

TEST(Comm, GpuOneProcessWithNcclEqualsNone) {
    FIEDLER_GPU_OR_SKIP();
    std::vector<float> with;
    try {
        with = train(true);
    } catch (const InputError& e) {
        GTEST_SKIP() << "NCCL NOT TESTED: " << e.what();
    }
    const std::vector<float> without = train(false);
    EXPECT_TRUE(test::identical(with.data(), without.data(), with.size() * sizeof(float)));
}
#endif

}  // namespace
}  // namespace fiedler
