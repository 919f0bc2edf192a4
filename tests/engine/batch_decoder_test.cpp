// Many sequences in slots against one at a time: the same tokens, whoever the neighbours are, wherever and whenever a
// sequence begins; packed prompts; the recorded step on the GPU.
#include "engine/batch_decoder.h"

#include <gtest/gtest.h>

#include "engine/decode.h"
#include "engine/error.h"
#include "engine/runner.h"
#include "engine/slot_decoder.h"
#include "tests/engine/random_laplacian.h"
#include "tests/support/buffer.h"
#include "tests/support/compare.h"

namespace fiedler {
namespace {

using Ints = std::vector<std::int32_t>;
using test::Values;

struct Shape {
    const char* name;
    const char* pattern;
    ScalarKind kind = ScalarKind::coordinate;
    Rotary rotary = Rotary::dot;
    bool conv = true, gate = true;
    std::int64_t spectral_dims = 0, context = 48;
};
void PrintTo(const Shape& s, std::ostream* out) { *out << s.name; }

ModelSpec spec_of(const Shape& s) {
    Config c;
    c.pattern = s.pattern;
    c.layers = 3;
    c.channels = 64;
    c.heads = 2;
    c.scalars = 4;
    c.scalar_kind = s.kind;
    c.rope = s.rotary;
    c.conv = s.conv;
    c.gate = s.gate;
    c.vocab = 259;  // no multiple of 8: padded logits
    c.context = s.context;
    c.spectral_dims = s.spectral_dims;
    return model_spec(c);
}
const std::vector<Shape> kShapes = {
    {.name = "coordinates", .pattern = "sbd"},
    {.name = "windows", .pattern = "b:7sd:5"},
    {.name = "energies", .pattern = "sbb", .kind = ScalarKind::energy},
    {.name = "energies_rotated", .pattern = "bsd", .kind = ScalarKind::energy, .rotary = Rotary::all},
    {.name = "no_convolution", .pattern = "sbd", .conv = false},
    {.name = "no_gate", .pattern = "sbs", .gate = false},
    {.name = "spectral", .pattern = "sbd", .spectral_dims = 5}};

ModelConstants constants_of(const ModelSpec& spec) {
    ModelConstants c;
    if (spec.spectral_dims > 0) {
        c.spectral = random_spectral_table(spec, 3);
        for (float& x : c.spectral) x = float(bf16(x));
    }
    if (spec.has_energies()) c.laplacian = test::random_laplacian(spec.head_dim(), 4);
    return c;
}

// Weights moved off their start, exact in bf16, with logits far enough apart for rounding not to choose tokens.
template <class Dev, class T>
std::unique_ptr<Runner<Dev, T>> make_runner(const ModelSpec& spec, std::size_t budget = 0) {
    RunPlan plan;
    plan.tokens = spec.context;
    plan.training = false;
    auto runner = std::make_unique<Runner<Dev, T>>(std::make_unique<Dev>(), spec, plan, budget, constants_of(spec));
    std::vector<float> w(static_cast<std::size_t>(runner->table().elements));
    initialise(runner->table(), spec, 5, w.data());
    const Values noise = test::random_values(w.size(), 11, 0.05);
    for (const ParamTensor& t : runner->table().tensor)
        for (std::int64_t i = t.offset; i < t.offset + t.size(); ++i) {
            auto& x = w[static_cast<std::size_t>(i)];
            x = float(bf16(x + static_cast<float>(noise[static_cast<std::size_t>(i)])));
        }
    runner->write(Block::master, w.data());
    return runner;
}

// Prompts of every length that matters: the separator alone, fewer tokens than the convolution is wide, the context.
std::vector<Ints> prompts_of(const ModelSpec& spec) {
    std::vector<Ints> all;
    std::uint64_t seed = 1;
    for (const std::int64_t n : {1, 2, 3, 4, 5, 17, 31, 9, 1, spec.context, 26})
        all.push_back(test::random_ints(static_cast<std::size_t>(n), seed++, 0, spec.vocab));
    return all;
}

struct Texts {
    std::vector<Ints> tokens;                             // of each prompt
    std::vector<std::vector<std::vector<float>>> logits;  // of each prompt, after each step; if asked for
    std::int64_t replayed = 0;
};
struct How {
    std::int64_t slots = 3, most = 10;
    std::int32_t stop = -1;
    SamplingSettings sampling{.temperature = 0};
    BatchDecoderOptions::Packing packing = BatchDecoderOptions::Packing::automatic;
    bool cuda_graph = true, logits = false, backwards = false;
    int in_flight = 1;
};

// The continuous batch on tokens: each free slot takes the next prompt, one step is on its way while another's tokens are
// looked at (in_flight = 2), and prompts are taken from the last on (backwards).
template <class Dev, class T>
Texts run_batch(Runner<Dev, T>& runner, const std::vector<Ints>& prompts, const How& how) {
    BatchDecoderOptions o;
    o.slots = how.slots, o.stop = how.stop, o.sampling = how.sampling;
    o.packing = how.packing, o.cuda_graph = how.cuda_graph;
    for (const Ints& p : prompts) o.capacity = std::max(o.capacity, std::int64_t(p.size()) + how.most);
    SlotDecoder<Dev, T> decoder(runner.device(), runner.model(), runner.layout().params, o, 0);
    EXPECT_EQ(decoder.slots(), how.slots);
    Texts run;
    run.tokens.resize(prompts.size()), run.logits.resize(prompts.size());
    std::vector<std::ptrdiff_t> holder(static_cast<std::size_t>(how.slots), -1);
    std::size_t next = 0, ended = 0;
    int on_the_way = 0;
    const auto take = [&] {
        const Ints given = decoder.finish_step();
        --on_the_way;
        for (std::size_t s = 0; s < given.size(); ++s) {
            if (given[s] == BatchDecoder::kNothing || holder[s] < 0) continue;
            const auto p = static_cast<std::size_t>(holder[s]);
            run.tokens[p].push_back(given[s]);
            if (how.logits) run.logits[p].push_back(decoder.logits(std::int64_t(s)));
            if (given[s] == how.stop || std::int64_t(run.tokens[p].size()) == how.most) holder[s] = -1, ++ended;
        }
    };
    while (ended < prompts.size()) {
        std::vector<SlotStart> starts;
        for (std::size_t s = 0; s < holder.size() && next < prompts.size(); ++s) {
            if (holder[s] >= 0) continue;
            const std::size_t p = how.backwards ? prompts.size() - 1 - next : next;
            ++next;
            holder[s] = std::ptrdiff_t(p);
            starts.push_back({std::int64_t(s), prompts[p], 40 + p, how.most});
        }
        if (!starts.empty()) decoder.start(starts);
        decoder.submit_step();
        if (++on_the_way == how.in_flight) take();
    }
    while (on_the_way > 0) take();
    run.replayed = decoder.replayed_steps();
    return run;
}

// One at a time, by the decoder of one sequence and the host's choice.
template <class Dev, class T>
Texts run_each(Runner<Dev, T>& runner, const std::vector<Ints>& prompts, const How& how) {
    Texts run;
    for (std::size_t p = 0; p < prompts.size(); ++p) {
        const auto decoder = runner.decoder(std::int64_t(prompts[p].size()) + how.most);
        decoder->prefill(prompts[p]);
        SamplingSettings sampling = how.sampling;
        sampling.seed = 40 + p;
        run.tokens.emplace_back(), run.logits.emplace_back();
        for (std::int64_t i = 0; i < how.most; ++i) {
            run.logits[p].push_back(decoder->logits());
            run.tokens[p].push_back(sample(decoder->logits(), sampling, static_cast<std::uint64_t>(decoder->length())));
            if (run.tokens[p].back() == how.stop) break;
            decoder->append(run.tokens[p].back());
        }
    }
    return run;
}

Values flat(const std::vector<std::vector<std::vector<float>>>& all) {
    Values v;
    for (const auto& prompt : all)
        for (const auto& step : prompt) v.insert(v.end(), step.begin(), step.end());
    return v;
}

class BatchDecoding : public testing::TestWithParam<Shape> {};

TEST_P(BatchDecoding, GivesTheTokensOfOneAtATime) {
    const ModelSpec spec = spec_of(GetParam());
    const auto runner = make_runner<Cpu, double>(spec);
    const std::vector<Ints> prompts = prompts_of(spec);
    How how;
    how.logits = true;
    const Texts want = run_each(*runner, prompts, how);
    for (const std::int64_t slots : {1, 3, 16}) {
        how.slots = slots;
        const Texts got = run_batch(*runner, prompts, how);
        EXPECT_EQ(got.tokens, want.tokens) << slots << " slots";
        EXPECT_TRUE(test::close_to(flat(got.logits), flat(want.logits), 1e-5));  // kept as f32
    }
    how.sampling = {.temperature = 1.3};
    EXPECT_EQ(run_batch(*runner, prompts, how).tokens, run_each(*runner, prompts, how).tokens);
    EXPECT_NE(run_batch(*runner, prompts, how).tokens, want.tokens);
}

// Bit for bit: every logit of every step.
TEST_P(BatchDecoding, DoesNotDependOnTheNeighbours) {
    const ModelSpec spec = spec_of(GetParam());
    const auto runner = make_runner<Cpu, float>(spec);
    const std::vector<Ints> prompts = prompts_of(spec);
    How how;
    how.logits = true, how.slots = 1;
    how.sampling = {.temperature = 0.9, .top_k = 30, .top_p = 0.9};
    const Texts alone = run_batch(*runner, prompts, how);
    for (const std::int64_t slots : {2, 5, 16})
        for (const bool backwards : {false, true}) {
            how.slots = slots, how.backwards = backwards;
            const Texts got = run_batch(*runner, prompts, how);
            EXPECT_EQ(got.tokens, alone.tokens) << slots << " slots";
            EXPECT_TRUE(got.logits == alone.logits) << slots << " slots";
        }
}

INSTANTIATE_TEST_SUITE_P(Shapes, BatchDecoding, testing::ValuesIn(kShapes),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(BatchDecoder, StopTokensEndASequence) {
    const ModelSpec spec = spec_of(kShapes[0]);
    const auto runner = make_runner<Cpu, float>(spec);
    const std::vector<Ints> prompts = prompts_of(spec);
    How how;
    const Texts whole = run_batch(*runner, prompts, how);
    how.stop = whole.tokens[5][4];
    how.in_flight = 2;
    const Texts got = run_batch(*runner, prompts, how);
    bool cut = false;
    for (std::size_t p = 0; p < prompts.size(); ++p) {
        const auto at = std::find(whole.tokens[p].begin(), whole.tokens[p].end(), how.stop);
        const auto n =
            std::min<std::ptrdiff_t>(at - whole.tokens[p].begin() + 1, std::ptrdiff_t(whole.tokens[p].size()));
        EXPECT_EQ(got.tokens[p], Ints(whole.tokens[p].begin(), whole.tokens[p].begin() + n));
        cut |= n < std::ptrdiff_t(whole.tokens[p].size());
    }
    EXPECT_TRUE(cut);
}

// Several prompts in one forward pass: the same but for rounding, which with doubles is next to nothing.
template <class Compare>
void expect_packed(const Shape& shape, const Compare& compare) {
    const ModelSpec spec = spec_of(shape);
    const auto runner = make_runner<Cpu, double>(spec);
    std::vector<Ints> prompts = prompts_of(spec);
    for (const std::int64_t n : {127, 256, 257, 258, 513})
        prompts.push_back(test::random_ints(static_cast<std::size_t>(n), std::uint64_t(n), 0, spec.vocab));
    How how;
    how.logits = true, how.slots = 6, how.most = 3;
    const Texts apart = run_batch(*runner, prompts, how);
    how.packing = BatchDecoderOptions::Packing::on;
    compare(run_batch(*runner, prompts, how), apart);
}
TEST(BatchDecoder, PackedPromptsAreTheSame) {
    for (Shape shape : kShapes) {
        SCOPED_TRACE(shape.name);
        shape.context = 1000;  // no multiple of the rows that prompts are aligned to
        expect_packed(shape, [](const Texts& packed, const Texts& apart) {
            EXPECT_EQ(packed.tokens, apart.tokens);
            EXPECT_TRUE(test::close_to(flat(packed.logits), flat(apart.logits), 1e-5));
        });
    }
}

TEST(BatchDecoder, TakesTheSlotsThatFit) {
    const ModelSpec spec = spec_of(kShapes[0]);
    const auto runner = make_runner<Cpu, float>(spec);
    const auto with = [&](std::int64_t slots, std::int64_t sequences, std::size_t budget) {
        BatchDecoderOptions o;
        o.slots = slots, o.sequences = sequences, o.capacity = 100;
        return std::make_unique<SlotDecoder<Cpu, float>>(runner->device(), runner->model(), runner->layout().params, o,
                                                         budget);
    };
    EXPECT_EQ(with(0, 0, 0)->slots(), 16);
    EXPECT_EQ(with(0, 3, 0)->slots(), 3);
    EXPECT_EQ(with(40, 3, 0)->slots(), 40);
    const std::size_t five = with(5, 0, 0)->bytes(), four = with(4, 0, 0)->bytes();
    EXPECT_GT(five, four);
    EXPECT_EQ(with(0, 0, five)->slots(), 5);
    EXPECT_EQ(with(0, 0, five - 1)->slots(), 4);
    try {
        with(6, 0, five);
        FAIL() << "six slots in the memory of five";
    } catch (const InputError& e) {
        EXPECT_NE(std::string(e.what()).find("--batch 5 would fit"), std::string::npos) << e.what();
    }
    try {
        with(0, 0, 1000);
        FAIL() << "a slot in 1000 bytes";
    } catch (const InputError& e) {
        EXPECT_NE(std::string(e.what()).find("--memory-budget"), std::string::npos) << e.what();
    }
}

// The engine's budget is for its model and the slots together.
TEST(BatchDecoder, SharesTheMemoryBudget) {
    const ModelSpec spec = spec_of(kShapes[0]);
    const std::size_t model = make_runner<Cpu, float>(spec)->plan().bytes;
    BatchDecoderOptions o;
    o.capacity = 100, o.slots = 2;
    const std::size_t two = make_runner<Cpu, float>(spec)->batch_decoder(o)->bytes();
    o.slots = 0;
    const auto runner = make_runner<Cpu, float>(spec, model + two);
    EXPECT_EQ(runner->batch_decoder(o)->slots(), 2);
}

TEST(BatchDecoder, RefusesWhatDoesNotFitASlot) {
    const ModelSpec spec = spec_of(kShapes[0]);
    const auto runner = make_runner<Cpu, float>(spec);
    BatchDecoderOptions o;
    o.slots = 2, o.capacity = 20;
    const auto decoder = runner->batch_decoder(o);
    const Ints ten(10, 1);
    EXPECT_THROW(decoder->start({{0, ten, 1, 11}}), std::logic_error);
    EXPECT_THROW(decoder->start({{2, ten, 1, 1}}), std::logic_error);
    EXPECT_THROW(decoder->start({{0, {}, 1, 1}}), std::logic_error);
    EXPECT_THROW(decoder->start({{0, Ints(49, 1), 1, 1}}), std::logic_error);
    EXPECT_THROW(decoder->finish_step(), std::logic_error);
    decoder->start({{1, ten, 1, 10}});
    decoder->submit_step();
    decoder->submit_step();
    EXPECT_THROW(decoder->submit_step(), std::logic_error);
    EXPECT_EQ(decoder->finish_step()[0], BatchDecoder::kNothing);
    EXPECT_NE(decoder->finish_step()[1], BatchDecoder::kNothing);
}

#if FIEDLER_CUDA

class BatchDecodingGpu : public testing::TestWithParam<Shape> {};

TEST_P(BatchDecodingGpu, ARecordedStepIsTheStepItself) {
    FIEDLER_GPU_OR_SKIP();
    const ModelSpec spec = spec_of(GetParam());
    const auto runner = make_runner<Cuda, bf16>(spec);
    const std::vector<Ints> prompts = prompts_of(spec);
    for (const SamplingSettings& sampling :
         {SamplingSettings{.temperature = 0}, SamplingSettings{.temperature = 1, .top_k = 40, .top_p = 0.95}}) {
        How how;
        how.logits = true, how.slots = 4, how.sampling = sampling;
        const Texts with = run_batch(*runner, prompts, how);
        how.cuda_graph = false;
        const Texts without = run_batch(*runner, prompts, how);
        EXPECT_EQ(with.tokens, without.tokens);
        EXPECT_TRUE(with.logits == without.logits);
        EXPECT_GT(with.replayed, 20);
        EXPECT_EQ(without.replayed, 0);
        how.cuda_graph = true, how.in_flight = 2, how.logits = false;
        EXPECT_EQ(run_batch(*runner, prompts, how).tokens, with.tokens);
    }
}

// Bit for bit, for one number of slots and one capacity: other neighbours, other slots, other companions in the pass.
TEST_P(BatchDecodingGpu, DoesNotDependOnTheNeighbours) {
    FIEDLER_GPU_OR_SKIP();
    Shape shape = GetParam();
    shape.context = 1024;
    const ModelSpec spec = spec_of(shape);
    const auto runner = make_runner<Cuda, bf16>(spec);
    std::vector<Ints> prompts = prompts_of(spec);
    How how;
    how.logits = true, how.slots = 4;
    const Texts forwards = run_batch(*runner, prompts, how);
    how.backwards = true;
    const Texts backwards = run_batch(*runner, prompts, how);
    EXPECT_EQ(forwards.tokens, backwards.tokens);
    EXPECT_TRUE(forwards.logits == backwards.logits);
    for (const std::size_t p : {std::size_t(0), std::size_t(6), std::size_t(9)}) {
        how.backwards = false;
        std::vector<Ints> two = {prompts[p], prompts[9]};  // the second sets the capacity
        const Texts alone = run_batch(*runner, two, how);
        EXPECT_TRUE(alone.logits[0] == forwards.logits[p]) << p;
    }
}

// Logits of the first step after each prompt against doubles: at most twice the error of the forward pass on the GPU.
TEST_P(BatchDecodingGpu, LogitsMatchTheCpu) {
    FIEDLER_GPU_OR_SKIP();
    const ModelSpec spec = spec_of(GetParam());
    const auto device = make_runner<Cuda, bf16>(spec);
    const auto reference = make_runner<Cpu, double>(spec);
    const std::vector<Ints> prompts = prompts_of(spec);
    How how;
    how.logits = true, how.most = 1;
    const Values got = flat(run_batch(*device, prompts, how).logits);
    EXPECT_TRUE(test::close(got, flat(run_each(*reference, prompts, how).logits),
                            flat(run_each(*device, prompts, how).logits)));
}

INSTANTIATE_TEST_SUITE_P(Shapes, BatchDecodingGpu, testing::ValuesIn(kShapes),
                         [](const auto& info) { return std::string(info.param.name); });

#endif

}  // namespace
}  // namespace fiedler
