// The arena: alignment, reuse, peak, budget, and that misuse is refused.
#include "engine/arena.h"

#include <gtest/gtest.h>

#include <cstring>
#include <stdexcept>

#include "engine/error.h"

namespace fiedler {
namespace {

// Host memory that counts what is asked of it.
struct CountingMemory {
    int allocations = 0, releases = 0;
    std::size_t bytes = 0;
    Cpu cpu;
    Memory memory() {
        return {[this](std::size_t n) { return ++allocations, bytes = n, device_alloc(cpu, n); },
                [this](void* p) { ++releases, device_free(cpu, p); }};
    }
};

struct Layout {
    Vec<float> weights;
    Mat<bf16> saved;
    Vec<double> first, second;
    Vec<std::int32_t> after;
    explicit Layout(Arena& arena) {
        weights = arena.vec<float>("weights", 100, Lifetime::persistent);
        saved = arena.mat<bf16>("layers.0.x", 3, 7, Lifetime::saved);
        {
            const auto scope = arena.scope();
            first = arena.vec<double>("first", 1000, Lifetime::scratch);
        }
        {
            const auto scope = arena.scope();
            second = arena.vec<double>("second", 10, Lifetime::scratch);
        }
        after = arena.vec<std::int32_t>("after", 1, Lifetime::persistent);
    }
};

TEST(Arena, PlanIsWhatIsCommittedAndOneAllocationIsMade) {
    CountingMemory m;
    {
        Arena arena;
        Layout planned(arena);
        // 400 -> 512, 42 -> 256, then 8000 -> 8192 in the scope, which outweighs everything after it.
        EXPECT_EQ(arena.peak(), 512u + 256u + 8192u);
        EXPECT_EQ(m.allocations, 0);
        arena.commit(m.memory());
        EXPECT_EQ(m.allocations, 1);
        EXPECT_EQ(m.bytes, arena.peak());
        EXPECT_FALSE(arena.complete());
        Layout real(arena);
        EXPECT_TRUE(arena.complete());
        EXPECT_EQ(m.allocations, 1);
        // Same distances as planned; the last address lies inside the allocation.
        EXPECT_EQ(reinterpret_cast<char*>(real.after.data) - reinterpret_cast<char*>(real.weights.data),
                  reinterpret_cast<char*>(planned.after.data) - reinterpret_cast<char*>(planned.weights.data));
        EXPECT_EQ(real.weights.data, arena.base());
        std::memset(arena.base(), 1, arena.peak());
        real.first.data[999] = 3;
        EXPECT_EQ(m.releases, 0);
    }
    EXPECT_EQ(m.releases, 1);
}

TEST(Arena, BlocksAreAlignedAndNeverOverlapWhileAlive) {
    CountingMemory m;
    Arena arena;
    { Layout planned(arena); }
    arena.commit(m.memory());
    Layout l(arena);
    for (const void* p :
         {static_cast<void*>(l.weights.data), static_cast<void*>(l.saved.data), static_cast<void*>(l.first.data),
          static_cast<void*>(l.second.data), static_cast<void*>(l.after.data)})
        EXPECT_EQ(reinterpret_cast<std::uintptr_t>(p) % Arena::kAlign, 0u);
    EXPECT_GE(reinterpret_cast<char*>(l.saved.data), reinterpret_cast<char*>(l.weights.data + 100));
    EXPECT_EQ(static_cast<void*>(l.first.data), static_cast<void*>(l.second.data));  // closed scopes are used again
    EXPECT_EQ(static_cast<void*>(l.first.data), static_cast<void*>(l.after.data));
}

TEST(Arena, NullBaseNeverLooksAbsentAndEmptyBlocksAre) {
    Arena arena;
    EXPECT_TRUE(arena.vec<float>("first", 1, Lifetime::scratch));
    EXPECT_FALSE(arena.vec<float>("none", 0, Lifetime::scratch));
    EXPECT_FALSE(arena.mat<float>("none", 5, 0, Lifetime::scratch));
    EXPECT_EQ(arena.peak(), 256u);
    EXPECT_EQ(arena.blocks().size(), 1u);
}

TEST(Arena, KnowsWhatWasAliveAtThePeak) {
    Arena arena;
    Layout l(arena);
    std::vector<std::string> names;
    for (const Arena::Block* b : arena.alive_at_peak()) names.push_back(b->name);
    EXPECT_EQ(names, (std::vector<std::string>{"weights", "layers.0.x", "first"}));
    EXPECT_EQ(arena.bytes_at_peak(Lifetime::persistent), 512u);
    EXPECT_EQ(arena.bytes_at_peak(Lifetime::saved), 256u);
    EXPECT_EQ(arena.bytes_at_peak(Lifetime::scratch), 8192u);
    EXPECT_EQ(arena.bytes_at_peak(Lifetime::recomputed), 0u);
}

TEST(Arena, BudgetIsHardAndSaysByHowMuch) {
    CountingMemory m;
    Arena arena;
    arena.vec<std::byte>("large", 3 << 20, Lifetime::saved);
    arena.vec<std::byte>("small", 1 << 20, Lifetime::scratch);
    EXPECT_EQ(arena.shortage(4 << 20), "");
    try {
        arena.commit(m.memory(), 3 << 20);
        FAIL() << "a plan of 4 MiB fits 3 MiB";
    } catch (const InputError& e) {
        const std::string text = e.what();
        EXPECT_NE(text.find("needs 4.0 MiB, 1.0 MiB more than the budget of 3.0 MiB; largest: large 3.0 MiB"),
                  std::string::npos)
            << text;
        EXPECT_EQ(text.find('\n'), std::string::npos);
    }
    EXPECT_EQ(m.allocations, 0);
    arena.commit(m.memory(), 4 << 20);  // the exact size fits
    EXPECT_EQ(m.allocations, 1);
}

TEST(Arena, AFailingAllocationLeavesThePlan) {
    Arena arena;
    arena.vec<float>("x", 1, Lifetime::saved);
    const Memory none{[](std::size_t) -> void* { throw DeviceError("no memory"); }, [](void*) {}};
    EXPECT_THROW(arena.commit(none), DeviceError);
    CountingMemory m;
    arena.commit(m.memory());
    EXPECT_TRUE(arena.committed());
}

TEST(Arena, ASecondRunThatDiffersFromThePlanIsRefused) {
    CountingMemory m;
    Arena arena;
    arena.vec<float>("x", 8, Lifetime::saved);
    arena.commit(m.memory());
    EXPECT_THROW(arena.vec<float>("y", 8, Lifetime::saved), std::logic_error);
    EXPECT_THROW(arena.vec<float>("x", 9, Lifetime::saved), std::logic_error);
    EXPECT_THROW(arena.vec<bf16>("x", 8, Lifetime::saved), std::logic_error);
    EXPECT_TRUE(arena.vec<float>("x", 8, Lifetime::saved));
    EXPECT_THROW(arena.vec<float>("z", 8, Lifetime::saved), std::logic_error);  // taken after the commit, never planned
    EXPECT_THROW(arena.commit(m.memory()), std::logic_error);
}

TEST(Arena, ScopesOutOfOrderAreRefused) {
    Arena arena;
    {
        auto outer = arena.scope();
        auto inner = arena.scope();
        EXPECT_THROW(outer.close(), std::logic_error);
        EXPECT_THROW(arena.vec<float>("x", 1, Lifetime::saved), std::logic_error);  // unusable from then on
    }
    Arena other;
    auto* outer = new Arena::Scope(other.scope());
    auto* inner = new Arena::Scope(other.scope());
    delete outer;  // a destructor cannot throw: the next call does
    EXPECT_THROW(other.vec<float>("x", 1, Lifetime::saved), std::logic_error);
    delete inner;

    Arena third;
    auto open = third.scope();
    CountingMemory m;
    EXPECT_THROW(third.commit(m.memory()), std::logic_error);
    open.close();
    EXPECT_THROW(open.close(), std::logic_error);
    third.commit(m.memory());
}

TEST(Arena, ImpossibleSizesAndBasesAreRefused) {
    Arena arena;
    EXPECT_THROW(arena.vec<float>("x", -1, Lifetime::saved), std::logic_error);
    EXPECT_THROW(arena.mat<float>("x", std::int64_t{1} << 40, std::int64_t{1} << 40, Lifetime::saved),
                 std::logic_error);
    arena.vec<float>("x", 1, Lifetime::saved);
    alignas(256) static char memory[512];
    EXPECT_THROW(arena.commit(memory + 8), std::logic_error);
    arena.commit(memory);
    EXPECT_EQ(static_cast<void*>(arena.vec<float>("x", 1, Lifetime::saved).data), static_cast<void*>(memory));
}

TEST(Arena, TableHasOneLineForTheBlocksOfAllLayers) {
    Arena arena;
    for (int l = 0; l < 12; ++l) arena.mat<bf16>("layers." + std::to_string(l) + ".x", 64, 64, Lifetime::saved);
    arena.vec<float>("master", 8192, Lifetime::persistent);
    const std::string table = arena.table();
    EXPECT_NE(table.find("layers.*.x     12  64 x 64  bf16   saved         96.0 KiB   75.0%"), std::string::npos)
        << table;
    EXPECT_NE(table.find("peak 128.0 KiB (131072 bytes), persistent 32.0 KiB (25.0%), saved 96.0 KiB (75.0%)"),
              std::string::npos)
        << table;
}

}  // namespace
}  // namespace fiedler
