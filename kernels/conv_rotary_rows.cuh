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
    float* partial;                // [blocks of tokens][channels][4] (backward)
    int ld_out, ld_in, ld_x;       // in bytes: an address is then one product and a sum
    int tokens, channels, turned;  // tokens below 2^30, so that a block may count beyond them; turned: channels
    bool normalise, rotate;
    float eps;
    Packed seq;
    Frequencies frequencies;
};

// A thread's columns, and whether they exist and are turned.
template <int D>
struct Columns {
    Channels own;
    int angle, first;  // the first of its angles, and of its columns of the lower half
    bool inside, turns;
    __device__ Columns(const Args& a, int first_channel) {
        const int head = threadIdx.x / (D / 8) * D;
        angle = threadIdx.x % (D / 8) * kAngles;
        own = {head + angle, head + angle + D / 2};
        inside = first_channel + head < a.channels;
        turns = first_channel + head < a.turned;
        first = first_channel + (inside ? own.lower : angle);
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
    const int &ld, &first;
    __device__ const char* at(int row) const {
        const char* address;
        asm volatile(
            "{ .reg .b64 r;\n"
            "mad.wide.s32 r, %1, %2, %4;\n"
            "mad.wide.s32 %0, %3, 2, r; }\n"
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

// cos and sin of the angles of kSteps tokens from the first of a sequence on, then of the first token of each run, in
// fours. Without rotation all angles are 0, as those of row 0 always are.
template <int D, int kSteps>
struct Table {
    static constexpr int kRows = kSteps + kRuns, kFours = D / 8;
    float4 cosine[kRows][kFours], sine[kRows][kFours];

    // All threads of the block take part, without a barrier. run: tokens of each.
    __device__ void fill(const Args& a, int token_block, int run) {
        static_assert(kThreads % (D / 2) == 0);
        const int thread = threadIdx.y * kLanes + threadIdx.x, d = thread % (D / 2);
        const float frequency = a.rotate ? a.frequencies.value[d] : 0.f;
        for (int row = thread / (D / 2); row < kRows; row += kThreads / (D / 2)) {
            int position = row;
            if (row >= kSteps) {
                const int start = min((token_block * kRuns + row - kSteps) * run, a.tokens - 1);
                position = start - a.seq.first(start);
            }
            sincosf(float(position) * frequency, &sine[row][d / 4].x + d % 4, &cosine[row][d / 4].x + d % 4);
        }
    }
};

// The angles of a thread at the token at hand: those at the sequence's first token, or the run's first, and what they have
// grown by since. In a thread that turns nothing they stay 0. All of them stay in shared memory: registers are dearer.
template <int D, int kSteps>
struct Turn {
    using Angles = Table<D, kSteps>;
    static constexpr unsigned kRowBytes = Angles::kFours * sizeof(float4);
    const Angles& table;
    unsigned origin, place;  // where the two lie in the table, in bytes of shared memory
    unsigned row;            // from a token's to the next one's

    __device__ Turn(const Angles& t, const Columns<D>& columns)
        : table(t), origin(column(t)), place(column(t)), row(columns.turns ? kRowBytes : 0) {}
    // At `token` of a run from `start` on, whose sequence begins at `first`.
    __device__ void begin(int token, int start, int first) {
        origin = column(table) + (first <= start ? kSteps + threadIdx.y : 0) * row;
        place = column(table) + unsigned(token - max(start, first)) * row;
    }
    __device__ void move(int tokens) { place += unsigned(tokens) * row; }
    // By the addition theorem; no more than kSteps - 1 tokens after the first. Two angles at a time: registers again.
    __device__ void at(float (&c)[kAngles], float (&s)[kAngles]) const {
        two<0>(c, s);
        two<2>(c, s);
    }

  private:
    static constexpr int kSine = sizeof(Angles::cosine);
    // Where the thread's column of the table begins: found anew each time, as addresses of rows are.
    __device__ static unsigned column(const Angles& table) {
        unsigned lane;
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(lane));
        return shared_address(&table.cosine[0][lane % Angles::kFours]);
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
            c[kFirst + i] = fmaf(cosine[i], by_cosine[i], -sine[i] * by_sine[i]);
            s[kFirst + i] = fmaf(sine[i], by_cosine[i], cosine[i] * by_sine[i]);
        }
    }
    template <int kOffset>
    __device__ static void load(float (&v)[2], unsigned from) {
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2 + %3];" : "=f"(v[0]), "=f"(v[1]) : "r"(from), "n"(kOffset));
    }
};

}  // namespace fiedler::turned_rows
