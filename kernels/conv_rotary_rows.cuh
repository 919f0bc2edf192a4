// kernels/conv_rotary_rows.cuh: what conv_rotary's kernels work on: a thread's columns, rows of matrices and their way to it,
// and the angles that it turns by.
#pragma once
#include "kernels/conv_taps.cuh"
#include "kernels/mma.cuh"
#include "kernels/rotary_turn.cuh"

namespace fiedler::turned_rows {

using namespace taps;
using namespace turning;
constexpr int kAngles = kPackSize / 2;  // of a thread

struct Args {
    nv_bf16* out;           // y or dx
    const nv_bf16 *in, *x;  // x or dy; x again (backward)
    const float* w;
    float* partial[2];             // of each job: [blocks of tokens][its channels][4] (backward)
    int ld_out, ld_in, ld_x;       // in bytes: an address is then one product and a sum
    int tokens, channels, turned;  // tokens below 2^30, so that a block may count beyond them; turned: channels
    int parts;                     // of a run of turned channels, 1 or 2; as many jobs has a block (backward)
    bool normalise, rotate;
    float eps;
    Packed seq;
    Frequencies frequencies;
};

// What a block works on, backward: job number 0 is runs of turned channels, number 1 runs of others. With two jobs,
// which need twice as many turned channels as others, runs of the first have two parts: all blocks have the same work.
__device__ inline Place place_of(const Args& a, int job) {
    if (a.parts == 1) return Place(a.channels);
    int block;  // read anew each time, as in Place
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    const int turned = a.turned / kBlockChannels, others = turned / 2;
    return job == 0 ? Place(block / turned, block % turned * kBlockChannels)
                    : Place(block / others, a.turned + block % others * kBlockChannels);
}
__device__ inline int parts_of(const Args& a, bool turned) { return turned ? a.parts : 1; }

// cos and sin of angles, whose turns are taken off in two parts, to 3e-7; what is left to 1e-6, up to half a turn: there
// CUDA's bounds of __cosf and __sinf end. After 2^16 turns it may be more by 0.03, after 2^18 by 0.12.
__device__ inline void cos_sin(float angle, float& c, float& s) {
    const float turns = rintf(angle * 0.15915494f), rest = fmaf(turns, 1.7484556e-7f, fmaf(turns, -6.2831855f, angle));
    c = __cosf(rest), s = __sinf(rest);
}

// A thread's columns, and whether they exist and are turned.
template <int D>
struct Columns {
    Channels own;
    int angle;       // the first of its angles
    unsigned first;  // of its columns of the lower half, in bytes from the matrix's first
    bool inside, turns;
    __device__ Columns(const Args& a, int first_channel) {
        const int head = threadIdx.x / (D / 8) * D;
        angle = threadIdx.x % (D / 8) * kAngles;
        own = {head + angle, head + angle + D / 2};
        inside = D == kBlockChannels || first_channel + head < a.channels;
        turns = first_channel + head < a.turned;
        first = unsigned(first_channel + (inside ? own.lower : angle)) * unsigned(sizeof(nv_bf16));
    }
};

// Rows on their way from memory, each thread's piece to a place of its own: no thread reads another's, so there are no
// barriers, and no registers are needed to wait in.
template <int kDepth>
using Ring = uint4[kDepth][kThreads];

// A thread's columns of the rows of a matrix; ld in bytes. An address is made anew each time: kept, it would take registers.
template <int D>
struct Rows {
    const nv_bf16* matrix;
    const int& ld;
    const unsigned& first;
    __device__ const char* at(int row) const {
        const char* address;
        asm volatile(
            "{ .reg .b64 r, f;\n"
            "mad.wide.s32 r, %1, %2, %4;\n"
            "cvt.u64.u32 f, %3;\n"
            "add.s64 %0, r, f; }\n"
            : "=l"(address)
            : "r"(row), "r"(ld), "r"(first), "l"(matrix));
        return address;
    }
    __device__ uint4 load(int row) const {
        const char* p = at(row);
        uint4 v;
        asm volatile(
            "ld.global.v2.u32 {%0, %1}, [%4];\n"
            "ld.global.v2.u32 {%2, %3}, [%4 + %5];\n"
            : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
            : "l"(p), "n"(kUpper));
        return v;
    }
    __device__ void store(int row, const Row& y) const {
        const char* p = at(row);
        const uint4 v = packed(y);
        asm volatile(
            "st.global.v2.u32 [%4], {%0, %1};\n"
            "st.global.v2.u32 [%4 + %5], {%2, %3};\n" ::"r"(v.x),
            "r"(v.y), "r"(v.z), "r"(v.w), "l"(p), "n"(kUpper)
            : "memory");
    }
    // Without a branch, as those below: what comes before and after it may then be mixed.
    __device__ void store_if(bool wanted, int row, const Row& y) const {
        const char* p = at(row);
        const uint4 v = packed(y);
        asm volatile(
            "{ .reg .pred p;\n"
            "setp.ne.b32 p, %6, 0;\n"
            "@p st.global.v2.u32 [%4], {%0, %1};\n"
            "@p st.global.v2.u32 [%4 + %5], {%2, %3}; }\n" ::"r"(v.x),
            "r"(v.y), "r"(v.z), "r"(v.w), "l"(p), "n"(kUpper), "r"(int(wanted))
            : "memory");
    }
    __device__ void send_if(bool wanted, unsigned to, int row) const {
        asm volatile(
            "{ .reg .pred p;\n"
            "setp.ne.b32 p, %3, 0;\n"
            "@p cp.async.ca.shared.global [%0], [%1], 8;\n"
            "@p cp.async.ca.shared.global [%0 + 8], [%1 + %2], 8; }\n" ::"r"(to),
            "l"(at(row)), "n"(kUpper), "r"(int(wanted))
            : "memory");
    }
    // Zeros where the row is not there or not wanted.
    __device__ void send(uint4& to, int row, bool wanted) const {
        asm volatile(
            "cp.async.ca.shared.global [%0], [%1], 8, %3;\n"
            "cp.async.ca.shared.global [%0 + 8], [%1 + %2], 8, %3;\n" ::"r"(shared_address(&to)),
            "l"(at(row)), "n"(kUpper), "r"(wanted ? 8 : 0)
            : "memory");
    }

  private:
    static constexpr int kUpper = D / 2 * sizeof(nv_bf16);
};
// Waits until no more than kPending of the thread's last groups of rows are on their way.
template <int kPending>
__device__ void wait_for_rows() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// cos and sin of the angles of kSteps tokens from the first of a sequence on, then of the first token of each part of each
// run, in fours. Without rotation all angles are 0, as those of row 0 always are. The last of a block's shared memory:
// there are as many rows as runs have parts.
template <int D, int kSteps>
struct Table {
    static constexpr int kFours = D / 8;
    struct Row {
        float4 cosine[kFours], sine[kFours];
    };
    FIEDLER_HD static constexpr std::size_t bytes(int parts) { return (kSteps + kRuns * parts) * sizeof(Row); }
    Row row[1];

    // All threads of the block take part, without a barrier. length: tokens of a part.
    __device__ void fill(const Args& a, int token_block, int length) {
        static_assert(kThreads % (D / 2) == 0);
        const int thread = threadIdx.y * kLanes + threadIdx.x, d = thread % (D / 2), all = kRuns * a.parts;
        const float frequency = a.rotate ? a.frequencies.value[d] : 0.f;
        for (int k = thread / (D / 2); k < kSteps + all; k += kThreads / (D / 2)) {
            int position = k;
            if (k >= kSteps) {
                const int start = min((token_block * all + k - kSteps) * length, a.tokens - 1);
                position = start - a.seq.first(start);
            }
            cos_sin(float(position) * frequency, (&row[k].cosine[d / 4].x)[d % 4], (&row[k].sine[d / 4].x)[d % 4]);
        }
    }
};

// The angles of a thread at the token at hand: those at the sequence's first token, or its part's first, and what they have
// grown by since. In a thread that turns nothing they stay 0. All of them stay in shared memory: registers are dearer.
template <int D, int kSteps>
struct Turn {
    using Angles = Table<D, kSteps>;
    static constexpr unsigned kRowBytes = sizeof(typename Angles::Row);
    const Angles& table;
    unsigned origin, place;  // where the two lie in the table, in bytes of shared memory
    unsigned row;            // from a token's to the next one's

    __device__ Turn(const Angles& t, const Columns<D>& columns)
        : table(t), origin(column(t)), place(column(t)), row(columns.turns ? kRowBytes : 0) {}
    // At `token` of part number `part` of the block, which begins at `start`, of a sequence that does at `first`.
    __device__ void begin(int token, int part, int start, int first) {
        origin = column(table) + (first <= start ? kSteps + part : 0) * row;
        place = column(table) + unsigned(token - max(start, first)) * row;
    }
    __device__ void move(int tokens) { place += unsigned(tokens) * row; }
    // By the addition theorem; no more than kSteps - 1 tokens after the first. Two angles at a time: registers again.
    __device__ void at(float (&c)[kAngles], float (&s)[kAngles]) const {
        two<0>(c, s);
        two<2>(c, s);
    }

  protected:
    static constexpr int kSine = sizeof(Angles::Row::cosine);
    static __device__ void load_four(float (&v)[kAngles], unsigned from) {
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                     : "r"(from));
    }
    static __device__ void add(float& c, float& s, float cosine, float sine, float by_cosine, float by_sine) {
        c = fmaf(cosine, by_cosine, -sine * by_sine);
        s = fmaf(sine, by_cosine, cosine * by_sine);
    }
    // Where the thread's column of the table begins: found anew each time, as addresses of rows are.
    __device__ static unsigned column(const Angles& table) {
        unsigned lane;
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(lane));
        return shared_address(&table.row[0].cosine[lane % Angles::kFours]);
    }
    template <int kFirst>
    __device__ void two(float (&c)[kAngles], float (&s)[kAngles]) const {
        float cosine[2], sine[2], by_cosine[2], by_sine[2];
        load<4 * kFirst>(cosine, origin);
        load<4 * kFirst + kSine>(sine, origin);
        load<4 * kFirst>(by_cosine, place);
        load<4 * kFirst + kSine>(by_sine, place);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            add(c[kFirst + i], s[kFirst + i], cosine[i], sine[i], by_cosine[i], by_sine[i]);
        }
    }
    template <int kOffset>
    __device__ static void load(float (&v)[2], unsigned from) {
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2 + %3];" : "=f"(v[0]), "=f"(v[1]) : "r"(from), "n"(kOffset));
    }
};

// The same where there are registers for the angles at the first token.
template <int D, int kSteps>
struct KeptTurn : Turn<D, kSteps> {
    using Base = Turn<D, kSteps>;
    float cosine[kAngles], sine[kAngles];
    using Base::Base;
    __device__ void begin(int token, int part, int start, int first) {
        Base::begin(token, part, start, first);
        Base::load_four(cosine, this->origin);
        Base::load_four(sine, this->origin + Base::kSine);
    }
    __device__ void at(float (&c)[kAngles], float (&s)[kAngles]) const {
        float by_cosine[kAngles], by_sine[kAngles];
        Base::load_four(by_cosine, this->place);
        Base::load_four(by_sine, this->place + Base::kSine);
#pragma unroll
        for (int i = 0; i < kAngles; ++i) Base::add(c[i], s[i], cosine[i], sine[i], by_cosine[i], by_sine[i]);
    }
};

}  // namespace fiedler::turned_rows
